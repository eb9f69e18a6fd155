import Foundation
import Testing

@testable import FasterMoE

@Suite struct NearGateTests {
  /// Four workers in two places of two, experts in order: [W, E] levels that are crossed.
  private static func crossings(experts: Int) -> [[Int32]] {
    (0..<4).map { worker in
      (0..<experts).map { expert in
        let owner = expert * 4 / experts
        return (owner != worker ? 1 : 0) + (owner / 2 != worker / 2 ? 1 : 0)
      }
    }
  }

  @Test(arguments: [NearGate.Levels.top, .every], [0.05, 0.14, 0.5, 1])
  func noMoreThanTheBudgetLeaves(levels: NearGate.Levels, share: Double) throws {
    var numbers = Numbers(60)
    let experts = 8
    let gate = NearGate(share: share, levels)
    for k in [1, 2, 3] {
      for tokens in [[10, 3, 0, 25], [1, 1, 1, 1], [0, 40, 0, 0]] {
        let n = tokens.reduce(0, +)
        for (kind, logits) in ([skewed(&numbers, n, experts)] + degenerate(n, experts)).enumerated() {
          let spread = Spread(tokens: tokens, crossings: Self.crossings(experts: experts), levels: 2)
          let got = try elect(gate, logits, choices: k, spread)
          let free = try elect(TopKGate(), logits, choices: k, spread)
          var first = 0
          for (worker, count) in tokens.enumerated() {
            for (level, limit) in [2, 1].enumerated() where levels == .every || level == 0 {
              let leaving = got.picks[first..<first + count].joined().count {
                $0 >= 0 && spread.crossings[worker][$0] >= limit
              }
              #expect(leaving <= gate.budget(level, of: count * k), "kind \(kind)")
            }
            first += count
          }
          if share == 1 { #expect(got.picks == free.picks && got.moved == 0) }
          if share == 1, kind == 0 { #expect(got.weights == free.weights) }
          // Three choices do not fit the two experts that a worker has.
          if k < 3 { #expect(got.picks.joined().allSatisfy { $0 >= 0 }) }
        }
      }
    }
  }

  /// By hand: two places, the first token's choices lead out, and one of all may.
  @Test func theHighestScoresLeaveAndTheOthersStay() throws {
    let logits: [[Float]] = [[0, 1, 5, 4], [2, 1, 3, 0], [9, 8, 0, 1]]
    let spread = Spread(tokens: [3, 0], crossings: [[0, 0, 1, 1], [1, 1, 0, 0]], levels: 1)
    let got = try elect(NearGate(share: 0.2, .top), logits, choices: 2, spread)
    #expect(got.picks == [[2, 1], [0, 1], [0, 1]] || got.picks == [[2, 1], [1, 0], [0, 1]])
    #expect(got.picks[1] == [1, 0], "in the place of the choice that may not leave")
    #expect(got.moved == 2)
    #expect(abs(got.weights[0][0] - 1 / (1 + exp(-4))) < 1e-6, "weights are by the scores of what is chosen now")
    let none = try elect(
      NearGate(share: 0.01, .top), [[0, 1, 5, 4]], choices: 2,
      Spread(
        tokens: [1, 0], crossings: [[1, 0, 1, 1], [1, 1, 0, 0]], levels: 1))
    #expect(none.picks == [[1, -1]] && none.weights == [[1, 0]], "what has no expert left is dropped")
  }

  @Test func everyLevelTakesItsShareOfWhatStays() {
    let gate = NearGate(share: 0.5, .every)
    #expect((0..<3).map { gate.budget($0, of: 1000) } == [500, 750, 875])
    #expect(NearGate(share: 0.14, .top).budget(0, of: 50) == 7 && NearGate(share: 0.14, .top).budget(0, of: 7) == 0)
    #expect(NearGate(share: 1, .every).budget(2, of: 9) == 9)
  }

  /// An expert that all will have a copy of is inside for everyone: it takes nothing of the budget, and who must stay inside
  /// may have it.
  @Test func whatWillBeShadowedCountsAsLocal() throws {
    let logits: [[Float]] = [[0, 1, 5, 4], [2, 1, 3, 0], [9, 8, 0, 1]]
    let spread = Spread(tokens: [3, 0], crossings: [[0, 0, 0, 1], [1, 1, 0, 0]], levels: 1)
    let got = try elect(NearGate(share: 0.17, .top), logits, choices: 2, spread)
    #expect(got.picks == [[2, 3], [2, 0], [0, 1]] && got.moved == 0, "one choice leaves, two are for the copy")
    let none = try elect(NearGate(share: 0.01, .top), logits, choices: 2, spread)
    #expect(none.picks == [[2, 1], [2, 0], [0, 1]] && none.moved == 1)
  }

  /// A plan is for what its gate counted as local; what leaves that open takes it, nothing may leave it out.
  @Test func requestsKeepWhatTheGateCountedAsLocal() throws {
    func request(_ shadowing: PlanRequest.Shadowing, _ shadows: [Int] = []) -> PlanRequest {
      var request = PlanRequest()
      (request.shadowing, request.shadows) = (shadowing, shadows)
      return request
    }
    for open in [PlanRequest.Shadowing.best, .paper] {
      let kept = try request(open).keeping([1, 4])
      #expect(kept.shadowing == .given && kept.shadows == [1, 4])
      #expect(try request(open).keeping([]).shadowing == .never)
    }
    #expect(try request(.given, [0, 1, 4]).keeping([1, 4]).shadows == [0, 1, 4])
    #expect(try request(.everyExpert).keeping([1, 4]).shadowing == .everyExpert)
    #expect(try request(.never).keeping([]).shadowing == .never)
    #expect(throws: Failure.self) { try request(.given, [0, 1]).keeping([1, 4]) }
    #expect(throws: Failure.self) { try request(.never).keeping([1]) }
  }

  /// Over slow links, with an expert that all tokens like: the set that a batch was found to want is what the next batch's
  /// gate counts as local, and what its plan shadows, report or not.
  @Test func thePlanShadowsWhatTheGateCountedAsLocal() throws {
    let (workers, experts, n, d, hot) = (4, 8, 200, 32, 7)
    let box = Mailbox()
    onThreads(workers) { rank in
      var options = Group.Options()
      (options.threads, options.pins, options.timeout) = (1, false, Seconds(60))
      let machine = strdup("pack:2 numa:2 core:1 pu:1")!
      defer { free(machine) }
      options.topology = UnsafePointer(machine)
      let group = try Group.over(Mailbox.Seat(rank, workers, box), options, failure: nil)
      let flops = SIMD8<Double>(repeating: 1e10)
      let rates = ComputeRates(products: flops, weightGrads: flops, rowHandling: ByteRate(1e9))
      group.take(
        Calibration(
          rates: Array(repeating: rates, count: workers),
          withinHosts: Calibration.Link(latency: Seconds(1e-6), rate: ByteRate(1e7)), betweenHosts: nil,
          messageSlowdown: 1))
      let shape = try Shape(model: d, hidden: 8, experts: experts, choices: 2, activation: .gelu)
      let layer = try Layer.together(group) { Layer.Options(shape, gate: NearGate(share: 0.1, .top), seed: 3) }
      let plain = try Layer.together(group) { Layer.Options(shape, seed: 3) }
      for expert in 0..<experts { layer.valueTensors.gate[expert * d] = expert == hot ? 4 : 0 }
      var numbers = Numbers(UInt64(62 + rank))
      var tokens = numbers.array(n * d)
      for token in 0..<n { tokens[token * d] = 1 }
      func step(_ layer: Layer, planned: Bool) throws -> (shadows: [Int], report: Int?, leaving: [Int]) {
        try tokens.withUnsafeBufferPointer { tokens in
          var output = [Float](repeating: 0, count: n * d)
          let pass = try layer.gate(tokens: tokens.baseAddress, count: n)
          let report = planned ? try pass.plan(wantsReport: true) { PlanRequest() } : nil
          try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
          defer { pass.end() }
          let picks = UnsafeBufferPointer(start: pass.routing.choices, count: 2 * n)
          return (
            pass.shadows, report?.shadows,
            picks.compactMap { $0 >= 0 && layer.crossings[Int($0)] == 2 ? Int($0) : nil }
          )
        }
      }
      let budget = 2 * n / 10
      let first = try step(layer, planned: true)
      #expect(first.shadows == [] && first.report == 0 && first.leaving.count <= budget)
      let wanted = layer.awaited
      #expect(wanted.contains(hot) || rank / 2 == 1 && !wanted.isEmpty, "\(wanted)")
      let second = try step(layer, planned: true)
      #expect(second.shadows == wanted && second.report == wanted.count)
      #expect(second.leaving.count { !wanted.contains($0) } <= budget)
      if rank < 2 && wanted.contains(hot) { #expect(second.leaving.count { $0 == hot } > budget, "as if it were here") }
      let third = layer.awaited
      #expect(try step(layer, planned: false).shadows == third, "also where nobody calls plan")
      try layer.awaitShadows([1, 2])
      #expect(try step(layer, planned: true).shadows == [1, 2] && layer.awaited == [1, 2], "the host knows better")
      try layer.awaitShadows(nil)
      #expect(try step(layer, planned: true).shadows == [] && !layer.awaited.isEmpty)
      // Other gates have shadows chosen for the batch itself.
      #expect(try step(plain, planned: true).report != nil && plain.awaited.isEmpty)
      #expect(throws: Failure.self) { try plain.awaitShadows([1]) }
    }
  }

  /// A share that was given counts more than a measured one, and that more than the usual one.
  @Test func theShareIsGivenMeasuredOrUsual() throws {
    var numbers = Numbers(61)
    let logits = skewed(&numbers, 60, 8)
    func picks(_ given: Double?, _ measured: Double?) throws -> [[Int]] {
      let spread = Spread(tokens: [30, 30, 0, 0], crossings: Self.crossings(experts: 8), levels: 2, measured: measured)
      return try elect(NearGate(share: given, .top), logits, choices: 2, spread).picks
    }
    #expect(try picks(nil, nil) == picks(0.14, nil) && picks(nil, nil) != picks(0.3, nil))
    #expect(try picks(nil, 0.3) == picks(0.3, nil) && picks(0.3, 0.05) == picks(0.3, nil))
    #expect(NearGate(share: nil, .top).heedsLinks && !NearGate(share: 0.1, .top).heedsLinks && !TopKGate().heedsLinks)
  }
}
