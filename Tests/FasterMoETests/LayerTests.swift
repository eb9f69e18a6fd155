import Foundation
import Testing

@testable import FasterMoE

/// One batch through a layer, everything that comes out of it.
private struct Outcome: Equatable {
  var choices: [Int32], output, gradTokens: [Float], gradients: [Float]
}

@Suite struct LayerTests {
  private static let (n, d, h, experts) = (61, 20, 37, 5)

  private static func group(threads: Int) throws -> Group {
    var options = Group.Options()
    options.threads = threads
    return try Group.local(1, options)[0]
  }

  private static func run(
    threads: Int, choices k: Int = 2, activation: Activation = .gelu, gate: any Gate = TopKGate(),
    order: [Int] = Array(0..<n), n: Int = n, inPlace: Bool = false
  ) throws -> Outcome {
    let shape = try Shape(model: d, hidden: h, experts: experts, choices: k, activation: activation)
    let layer = try Layer.together(group(threads: threads)) {
      Layer.Options(shape, gate: gate, losses: RouterLosses(balance: 0.1, z: 0.01), seed: 7)
    }
    return try run(layer, order: order, n: n, inPlace: inPlace)
  }

  private static func run(
    _ layer: Layer, order: [Int] = Array(0..<n), n: Int = n, inPlace: Bool = false
  ) throws -> Outcome {
    var numbers = Numbers(20)
    let rows = (0..<Self.n).map { _ in (numbers.array(d), numbers.array(d)) }
    let tokens = order.prefix(n).flatMap { rows[$0].0 }
    let gradOutput = order.prefix(n).flatMap { rows[$0].1 }
    var output = [Float](repeating: .nan, count: n * d)
    var gradTokens = output
    var choices: [Int32] = []
    try tokens.withUnsafeBufferPointer { tokens in
      let pass = try layer.gate(tokens: tokens.baseAddress, count: n)
      choices = Array(UnsafeBufferPointer(start: pass.routing.choices, count: n * layer.shape.choices))
      try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
      if inPlace { gradTokens = gradOutput }
      try gradOutput.withUnsafeBufferPointer { dy in
        try gradTokens.withUnsafeMutableBufferPointer { dx in
          try pass.backward(
            inPlace ? UnsafePointer(dx.baseAddress) : dy.baseAddress, gradTokens: dx.baseAddress, gradWeights: nil)
        }
      }
      pass.end()
    }
    let gradients = Array(UnsafeBufferPointer(start: layer.gradients.base, count: layer.gradients.floats))
    return Outcome(choices: choices, output: output, gradTokens: gradTokens, gradients: gradients)
  }

  @Test(arguments: [1, 2, 4], [Activation.gelu, .geluTanh, .relu, .silu, .swiglu])
  func anyNumberOfThreadsGivesTheSameBits(k: Int, activation: Activation) throws {
    let alone = try Self.run(threads: 1, choices: k, activation: activation)
    for threads in [1, 2, 3, 8] {
      #expect(try Self.run(threads: threads, choices: k, activation: activation) == alone, "\(threads) threads")
    }
  }

  /// Fewer experts than threads: their rows are cut by columns, in stages, or by rows where they are many.
  @Test(arguments: [1, 4, 5, 12, 13, 60, 129, 240, 241, 600], [Activation.gelu, .swiglu])
  func fewExpertsGiveTheSameBitsForAnyThreads(n: Int, activation: Activation) throws {
    let (d, h) = (40, 100)
    var numbers = Numbers(22)
    let (tokens, gradOutput, weights) = (numbers.array(n * d), numbers.array(n * d), numbers.array(n))
    for (experts, busy) in [(1, 1), (4, 2)] {
      let choices = (0..<n).map { Int32($0 % 7 < 5 ? 0 : busy - 1) }
      func outcome(threads: Int) throws -> [[Float]] {
        let shape = try Shape(model: d, hidden: h, experts: experts, choices: 1, activation: activation)
        let layer = try Layer.together(Self.group(threads: threads)) { Layer.Options(shape, seed: 9) }
        var (output, gradTokens) = ([Float](repeating: 0, count: n * d), [Float](repeating: 0, count: n * d))
        var gradWeights = [Float](repeating: 0, count: n)
        try tokens.withUnsafeBufferPointer { tokens in
          let pass = try layer.route(tokens: tokens.baseAddress, count: n, choices: choices, weights: weights)
          try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
          try gradTokens.withUnsafeMutableBufferPointer { dx in
            try gradWeights.withUnsafeMutableBufferPointer {
              try pass.backward(gradOutput, gradTokens: dx.baseAddress, gradWeights: $0.baseAddress)
            }
          }
          pass.end()
        }
        let gradients = Array(UnsafeBufferPointer(start: layer.gradients.base, count: layer.gradients.floats))
        return [output, gradTokens, gradWeights, gradients]
      }
      let alone = try outcome(threads: 1)
      for threads in [2, 3, 4, 8] { #expect(try outcome(threads: threads) == alone, "\(experts), \(threads) threads") }
    }
  }

  /// Many pre-activations may be written past the caches, few are not: halves of a batch give the bits of the whole.
  @Test(arguments: [Activation.gelu, .swiglu]) func halvesOfALargeBatchGiveItsBits(activation: Activation) throws {
    let (n, d, h) = (600, 8, 1024)
    var numbers = Numbers(23)
    let (tokens, gradOutput, weights) = (numbers.array(n * d), numbers.array(n * d), numbers.array(n))
    let shape = try Shape(model: d, hidden: h, experts: 1, choices: 1, activation: activation)
    let layer = try Layer.together(Self.group(threads: 2)) { Layer.Options(shape, seed: 9) }
    func outcome(_ part: Range<Int>) throws -> (output: [Float], gradTokens: [Float]) {
      let floats = part.lowerBound * d..<part.upperBound * d
      var (output, gradTokens) = (
        [Float](repeating: 0, count: floats.count), [Float](repeating: 0, count: floats.count)
      )
      try Array(tokens[floats]).withUnsafeBufferPointer { tokens in
        let pass = try layer.route(
          tokens: tokens.baseAddress, count: part.count, choices: [Int32](repeating: 0, count: part.count),
          weights: Array(weights[part]))
        try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
        try gradTokens.withUnsafeMutableBufferPointer { dx in
          try pass.backward(Array(gradOutput[floats]), gradTokens: dx.baseAddress, gradWeights: nil)
        }
        pass.end()
      }
      return (output, gradTokens)
    }
    let (whole, first, second) = (try outcome(0..<n), try outcome(0..<n / 2), try outcome(n / 2..<n))
    #expect(whole.output.map(\.bitPattern) == (first.output + second.output).map(\.bitPattern))
    #expect(whole.gradTokens.map(\.bitPattern) == (first.gradTokens + second.gradTokens).map(\.bitPattern))
  }

  /// grad_tokens may stand where grad_output does.
  @Test(arguments: [1, 2]) func gradientsMayTakeThePlaceOfOthers(k: Int) throws {
    for threads in [1, 3] {
      let apart = try Self.run(threads: threads, choices: k)
      #expect(try Self.run(threads: threads, choices: k, inPlace: true) == apart)
    }
  }

  @Test func everyGateGivesTheSameBitsForAnyThreads() throws {
    let tight = Capacity(factor: 0.7, inEvaluation: 1)
    let gates: [(any Gate, Int)] = [
      (NoisyGate(), 2), (SwitchGate(tight), 1),
      (SwitchGate(Capacity(factor: 0.7, inEvaluation: 1, dropping: .lightest)), 2),
      (GShardGate(tight), 2), (BaseGate(), 1), (NearGate(share: 0.1, .every), 2),
    ]
    for (gate, k) in gates {
      let alone = try Self.run(threads: 1, choices: k, gate: gate)
      for threads in [2, 3] { #expect(try Self.run(threads: threads, choices: k, gate: gate) == alone, "\(gate)") }
    }
  }

  /// One expert with more rows than a block holds: its blocks add to the same gradients, one after the other.
  @Test func blocksOfOneExpertAddUpInOrder() throws {
    let (n, d, h) = (1800, 16, 144)  // 3 tasks a block: threads change places from block to block
    var numbers = Numbers(21)
    let (tokens, gradOutput, weights) = (numbers.array(n * d), numbers.array(n * d), numbers.array(n))
    let choices = [Int32](repeating: 1, count: n)
    func gradients(threads: Int) throws -> [Float] {
      let shape = try Shape(model: d, hidden: h, experts: 2, choices: 1, activation: .relu)
      let layer = try Layer.together(Self.group(threads: threads)) { Layer.Options(shape, seed: 9) }
      var (output, gradTokens) = ([Float](repeating: 0, count: n * d), [Float](repeating: 0, count: n * d))
      try tokens.withUnsafeBufferPointer { tokens in
        let pass = try layer.route(tokens: tokens.baseAddress, count: n, choices: choices, weights: weights)
        try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
        try gradTokens.withUnsafeMutableBufferPointer {
          try pass.backward(gradOutput, gradTokens: $0.baseAddress, gradWeights: nil)
        }
        pass.end()
      }
      return Array(UnsafeBufferPointer(start: layer.gradients.base, count: layer.gradients.floats))
    }
    let alone = try gradients(threads: 1)
    for threads in [2, 4] { #expect(try gradients(threads: threads) == alone, "\(threads) threads") }
  }

  @Test func permutingTokensPermutesOutputs() throws {
    let order = (0..<Self.n).map { ($0 * 17 + 5) % Self.n }
    let straight = try Self.run(threads: 2)
    let permuted = try Self.run(threads: 2, order: order)
    for (place, token) in order.enumerated() {
      #expect(
        permuted.output[place * Self.d..<(place + 1) * Self.d] == straight.output[token * Self.d..<(token + 1) * Self.d]
      )
    }
  }

  @Test func gradientsAddUpOverPasses() throws {
    let shape = try Shape(model: Self.d, hidden: Self.h, experts: Self.experts, choices: 2, activation: .silu)
    let layer = try Layer.together(Self.group(threads: 2)) { Layer.Options(shape, seed: 7) }
    let once = try Self.run(layer)
    let twice = try Self.run(layer)
    for (a, b) in zip(once.gradients, twice.gradients) { #expect(b == 2 * a) }
    layer.zeroGradients()
    #expect(try Self.run(layer) == once)
  }

  @Test func groupsOfTwoHostThreadsDoNotMeet() throws {
    let alone = try Self.run(threads: 2)
    let agreed = UnsafeMutablePointer<Int>.allocate(capacity: 4)
    agreed.initialize(repeating: 0, count: 4)
    defer { agreed.deallocate() }
    nonisolated(unsafe) let places = agreed
    DispatchQueue.concurrentPerform(iterations: 4) { host in
      for _ in 0..<5 where (try? Self.run(threads: 2)) == alone { places[host] += 1 }
    }
    for host in 0..<4 { #expect(agreed[host] == 5) }
  }

  /// Experts spread over ranks that are threads: outputs and gradients have the bits of one worker with all tokens.
  @Test(arguments: [2, 4], [1, 2])
  func ranksOfOneProcessGiveTheBitsOfOne(ranks: Int, threads: Int) throws {
    let (n, d, h, experts) = (64, 20, 37, 8)
    var numbers = Numbers(22)
    let (tokens, gradOutput, weights) = (numbers.array(n * d), numbers.array(n * d), numbers.array(n * 2))
    // Half of all choices are expert 5's, and every ninth is dropped.
    let choices = (0..<n * 2).map { Int32($0 % 9 == 4 ? -1 : $0 % 2 == 0 ? 5 : $0 * 7 % experts) }
    let shape = try Shape(model: d, hidden: h, experts: experts, choices: 2, activation: .silu)
    /// y, dx, ds of all tokens and the experts' gradients, computed by `size` ranks.
    func run(_ size: Int) throws -> [[Float]] {
      var options = Group.Options()
      options.threads = threads
      nonisolated(unsafe) let groups = try Group.local(size, options)
      let lengths = [n * d, n * d, n * 2, experts * h * d]
      nonisolated(unsafe) let results = lengths.map { UnsafeMutablePointer<Float>.allocate(capacity: $0) }
      defer { for result in results { result.deallocate() } }
      onThreads(size) { rank in
        let part = n / size
        let layer = try Layer.together(groups[rank]) { Layer.Options(shape, seed: 9) }
        try tokens.withUnsafeBufferPointer { tokens in
          let pass = try layer.route(
            tokens: tokens.baseAddress! + rank * part * d, count: part,
            choices: Array(choices[rank * part * 2..<(rank + 1) * part * 2]),
            weights: Array(weights[rank * part * 2..<(rank + 1) * part * 2]))
          try pass.forward(results[0] + rank * part * d)
          try pass.backward(
            Array(gradOutput[rank * part * d..<(rank + 1) * part * d]), gradTokens: results[1] + rank * part * d,
            gradWeights: results[2] + rank * part * 2)
          pass.end()
        }
        let first = layer.owned.lowerBound * h * d
        (results[3] + first).update(from: layer.gradients.inward, count: layer.owned.count * h * d)
      }
      return zip(results, lengths).map { Array(UnsafeBufferPointer(start: $0, count: $1)) }
    }
    let alone = try run(1)
    let together = try run(ranks)
    for result in 0..<3 { #expect(together[result] == alone[result]) }
    #expect(together[3].map { $0 * Float(ranks) } == alone[3], "of the mean over workers of their losses")
  }

  @Test func noTokensAndOneToken() throws {
    let none = try Self.run(threads: 2, n: 0)
    #expect(none.output.isEmpty && none.gradients.allSatisfy { $0 == 0 })
    let one = try Self.run(threads: 2, n: 1)
    #expect(one.output.allSatisfy(\.isFinite) && one.gradients.contains { $0 != 0 })
  }
}

@Suite struct TopologyTests {
  @Test func aDescriptionGivesItsCores() throws {
    let machine = try Topology(description: "pack:2 [numa] l3:2 core:3 pu:2")
    #expect(!machine.isThisMachine && machine.cores.count == 12)
    #expect(machine.cores[0] == Topology.Core(package: 0, numaNode: 0, sharedCache: 0, processor: 0))
    #expect(machine.cores[3] == Topology.Core(package: 0, numaNode: 0, sharedCache: 1, processor: 6))
    #expect(machine.cores[11] == Topology.Core(package: 1, numaNode: 1, sharedCache: 3, processor: 22))
  }

  @Test func thisMachineHasCoresToPinTo() throws {
    let machine = try Topology()
    #expect(machine.isThisMachine && machine.cores.count >= 1)
    #expect(machine.cores.count <= ProcessInfo.processInfo.activeProcessorCount)
  }

  @Test func nonsenseIsRefusedInWords() {
    #expect(throws: Failure.self) { try Topology(description: "no such machine") }
    #expect(throws: Failure.self) { try Topology(description: "/etc/hostname") }
  }
}
