import Foundation
import Testing

@testable import FasterMoE

@Suite struct DecisionTests {
  // MARK: Choosing

  private static func choose(_ logits: [Float], _ k: Int) -> [Int32] {
    var padded = logits + Array(repeating: -Float.infinity, count: Panels.padded(logits.count) - logits.count)
    var choices = [Int32](repeating: -9, count: k)
    TopK.choose(&padded, experts: logits.count, choices: k, into: &choices)
    return choices
  }

  @Test func theHighestLogitsAreChosenInFallingOrder() {
    #expect(Self.choose([0.1, 0.9, -3, 0.5], 3) == [1, 3, 0])
    var numbers = Numbers(10)
    for experts in [1, 2, 15, 16, 17, 64, 100] {
      for _ in 0..<20 {
        let logits = numbers.array(experts)
        let k = min(experts, 4)
        let sorted = logits.indices.sorted { (logits[$0], $1) > (logits[$1], $0) }
        #expect(Self.choose(logits, k) == sorted.prefix(k).map { Int32($0) })
      }
    }
  }

  @Test func tiesGoToTheLowerExpert() {
    #expect(Self.choose([1, 1, 1, 1, 1], 3) == [0, 1, 2])
    #expect(Self.choose([0, 2, 1, 2, 1], 4) == [1, 3, 2, 4])
    #expect(Self.choose([-0.0, 0.0], 2) == [0, 1])
  }

  @Test func nanAndInfinityStillChooseDistinctExperts() {
    #expect(Self.choose([.nan, 1, .nan, 2], 3) == [3, 1, 0])
    #expect(Self.choose([.nan, .nan, .nan], 2) == [0, 1])
    #expect(Self.choose([-.infinity, 5, -.infinity], 3) == [1, 0, 2])
    #expect(Self.choose([.infinity, 5, .infinity], 3) == [0, 2, 1])
  }

  @Test func softmaxEqualsDouble() {
    var numbers = Numbers(11)
    for experts in [1, 5, 16, 40] {
      let logits = numbers.array(experts).map { $0 * 20 }
      let padded = logits + Array(repeating: -Float.infinity, count: Panels.padded(experts) - experts)
      var p = [Float](repeating: 9, count: padded.count)
      let logSum = TopK.softmax(padded, experts: experts, into: &p)
      let total = logits.reduce(0.0) { $0 + exp(Double($1)) }
      #expect(abs(Double(logSum) - log(total)) < 1e-5)
      for e in 0..<experts { #expect(abs(Double(p[e]) - exp(Double(logits[e])) / total) < 1e-6) }
      for e in experts..<padded.count { #expect(p[e] == 0) }
    }
  }

  // MARK: Losses

  /// Losses of n tokens, in Double, as the layer defines them; counts are constants.
  private static func losses(_ logits: [[Double]], _ shares: [Double], _ balance: Double, _ z: Double) -> Double {
    let experts = shares.count
    var mean = [Double](repeating: 0, count: experts)
    var squares = 0.0
    for row in logits {
      let total = row.reduce(0) { $0 + exp($1) }
      for e in 0..<experts { mean[e] += exp(row[e]) / total / Double(logits.count) }
      squares += log(total) * log(total) / Double(logits.count)
    }
    return balance * Double(experts) * zip(shares, mean).reduce(0) { $0 + $1.0 * $1.1 } + z * squares
  }

  @Test func lossGradientsEqualCentralDifferences() {
    var numbers = Numbers(12)
    let (experts, tokens) = (7, 5)
    let logits = (0..<tokens).map { _ in numbers.array(experts).map { Double($0) * 2 } }
    let shares: [Double] = [0.3, 0.1, 0, 0.2, 0.2, 0.1, 0.1]
    let losses = RouterLosses(balance: 0.7, z: 0.3)
    for token in 0..<tokens {
      let padded = logits[token].map { Float($0) } + Array(repeating: -.infinity, count: 9)
      var p = [Float](repeating: 0, count: 16)
      let logSum = TopK.softmax(padded, experts: experts, into: &p)
      var gradient = [Float](repeating: 0, count: 16)
      losses.backward(
        probabilities: p, logSum: logSum, shares: shares.map { Float($0) } + Array(repeating: 0, count: 9),
        experts: experts,
        tokens: tokens, addingTo: &gradient)
      for e in 0..<experts {
        var (up, down) = (logits, logits)
        up[token][e] += 1e-5
        down[token][e] -= 1e-5
        let difference = (Self.losses(up, shares, 0.7, 0.3) - Self.losses(down, shares, 0.7, 0.3)) / 2e-5
        #expect(abs(Double(gradient[e]) - difference) < 1e-6)
      }
    }
  }

  @Test func balanceLossIsItsCoefficientWhenUniform() {
    let loss = RouterLosses(balance: 0.01).balanceLoss(
      shares: [0.25, 0.25, 0.25, 0.25], sums: [3, 3, 3, 3], experts: 4, tokens: 12)
    #expect(abs(loss - 0.01) < 1e-12)
  }

  // MARK: Sorting and cutting

  private static func withRouting(_ choices: [Int32], experts: Int, _ body: (Routing) -> Void) throws {
    var size = Arena()
    _ = Routing(arena: &size, slots: choices.count, experts: experts)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let routing = Routing(arena: &arena, slots: choices.count, experts: experts)
    for (slot, choice) in choices.enumerated() { routing.choices[slot] = choice }
    var room = Arena()
    _ = Moves(arena: &room, Traffic(arena: &room, workers: 1, experts: experts))
    let space = try Region(bytes: room.bytes, for: "a test")
    var over = Arena(over: space.base)
    let moves = Moves(arena: &over, Traffic(arena: &over, workers: 1, experts: experts))
    routing.count(slots: choices.count, experts: experts)
    routing.sort(slots: choices.count, experts: experts, moves)
    body(routing)
  }

  @Test func sortingIsABijectionInOrder() throws {
    var numbers = Numbers(13)
    for (slots, experts) in [(0, 3), (1, 1), (50, 4), (1000, 37)] {
      let choices = (0..<slots).map { _ in Int32(numbers.below(experts + 1) - 1) }
      try Self.withRouting(choices, experts: experts) { routing in
        let live = choices.indices.filter { choices[$0] >= 0 }
        #expect(routing.firstRow[0] == 0 && routing.firstRow[experts] == live.count)
        let expected = live.sorted { (choices[$0], $0) < (choices[$1], $1) }
        #expect((0..<live.count).map { Int(routing.slots[$0]) } == expected)
        for slot in 0..<slots {
          if choices[slot] < 0 {
            #expect(routing.rows[slot] == -1)
          } else {
            #expect(routing.slots[Int(routing.rows[slot])] == slot)
          }
        }
        for e in 0..<experts {
          #expect(Int(routing.counts[e]) == choices.count { $0 == e })
          #expect(routing.firstRow[e + 1] - routing.firstRow[e] == Int(routing.counts[e]))
        }
      }
    }
  }

  @Test(arguments: [false, true])
  func blocksCoverEveryRowOnceLargestOrFirstRowsFirst(inOrder: Bool) throws {
    for counts in [
      [0, 0], [1], [576], [577], [1760, 3, 0, 12, 1200], Array(repeating: 5, count: 40), [5000, 700, 1153],
    ] {
      let choices = counts.enumerated().flatMap { Array(repeating: Int32($0.offset), count: $0.element) }
      try Self.withRouting(choices, experts: counts.count) { routing in
        let most = Block.mostBlocks(slots: choices.count, experts: counts.count)
        let blocks = UnsafeMutablePointer<Block>.allocate(capacity: most)
        defer { blocks.deallocate() }
        var latest = [Int32](repeating: -1, count: counts.count)
        let made = Block.cut(
          firstRow: routing.firstRow, experts: counts.count, inOrder: inOrder, into: blocks, behind: 0, latest: &latest)
        #expect(made <= most)
        var covered = [Int](repeating: 0, count: choices.count)
        var last: [Int32: Int] = [:]
        for index in 0..<made {
          let block = blocks[index]
          #expect(block.rows > 0 && Int(block.rows) <= Block.mostRows)
          if index > 0, inOrder { #expect(block.row == blocks[index - 1].row + blocks[index - 1].rows) }
          if index > 0, !inOrder {
            #expect(Panels.count(Int(block.rows)) <= Panels.count(Int(blocks[index - 1].rows)))
          }
          #expect((Int(block.row) - routing.firstRow[Int(block.expert)]) % Panels.height == 0, "a block begins a panel")
          #expect(Int(block.previous) == last[block.expert] ?? -1)
          if block.previous >= 0 { #expect(blocks[Int(block.previous)].row < block.row) }
          last[block.expert] = index
          for row in block.row..<block.row + block.rows {
            covered[Int(row)] += 1
            #expect(choices[Int(routing.slots[Int(row)])] == block.expert)
          }
        }
        #expect(covered.allSatisfy { $0 == 1 })
        #expect(latest == (0..<Int32(counts.count)).map { Int32(last[$0] ?? -1) })
      }
    }
  }

  // MARK: Predicting

  @Test func aLoneWorkersPlanIsItsComputing() throws {
    let shape = try Shape(model: 64, hidden: 128, experts: 3, choices: 2, activation: .gelu)
    let rates = WorkerRates(
      ComputeRates(
        products: 1e9 * SIMD8(1, 2, 3, 4, 5, 6, 7, 8), weightGrads: 1e8 * SIMD8(1, 2, 3, 4, 5, 6, 7, 8),
        rowHandling: ByteRate(1e9)))
    let report = try Self.withTraffic([[576, 0, 1]]) { PlanReport.inPlace($0, shape: shape, rates: [rates]) }
    #expect(report.shadows == 0 && report.groupSize == 1 && report.computeOverCommunicate == .infinity)
    let flops = 12.0 * 64 * 128
    let part = flops / 3
    let handled = Double(2 * 577 * 64 * 4) / 1e9
    let expected = 576 * part * (2 / 8e9 + 1 / 8e8) + part * (2 / 1e9 + 1 / 1e8) + handled
    #expect(abs(report.planned.value - expected) < 1e-12)
    #expect(report.plain == report.planned && report.ideal == report.planned)
    #expect(abs(report.flopRatePerWorker.value - 577 * flops / report.planned.value) < 1)
  }

  private static func flat(_ rate: Double) -> WorkerRates {
    let curve = RateCurve([RateCurve.Sample(rows: 1, rate: FlopRate(rate))])
    return WorkerRates(products: curve, weightGrads: curve, rowHandling: ByteRate(.infinity))
  }

  @Test func amongWorkersTheBusiestCounts() throws {
    let shape = try Shape(model: 64, hidden: 128, experts: 2, choices: 1, activation: .gelu)
    let (fast, slow) = (Self.flat(4e9), Self.flat(1e9))
    let flops = 12.0 * 64 * 128
    let cases: [([[UInt32]], Double)] = [
      ([[10, 0], [20, 5]], 30 * flops / 4e9), ([[10, 10], [20, 5]], 15 * flops / 1e9),
    ]
    for (counts, seconds) in cases {
      let report = try Self.withTraffic(counts) { PlanReport.inPlace($0, shape: shape, rates: [fast, slow]) }
      #expect(abs(report.planned.value - seconds) < 1e-12)
    }
  }

  // MARK: Between workers

  private static func withTraffic<R>(_ counts: [[UInt32]], _ body: (Traffic) -> R) throws -> R {
    var size = Arena()
    _ = Traffic(arena: &size, workers: counts.count, experts: counts[0].count)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let traffic = Traffic(arena: &arena, workers: counts.count, experts: counts[0].count)
    for (at, count) in counts.joined().enumerated() { traffic.counts[at] = count }
    return body(traffic)
  }

  /// What one sends in a round, another one receives in it; each meets each in one round, and its own group in round 0.
  @Test(arguments: [1, 2, 3, 5, 8])
  func everyPairMeetsInOneRound(workers: Int) {
    for groupSize in 1...workers + 1 {
      let backwards = Array((0..<workers).reversed())
      let rounds = Rounds(Groups(workers: workers, size: groupSize), ranks: backwards, seats: backwards)
      #expect(rounds.count == (workers + groupSize - 1) / groupSize)
      for worker in 0..<workers {
        #expect(rounds.sources(of: worker, in: 0).contains(worker))
        #expect((0..<rounds.count).flatMap { rounds.sources(of: worker, in: $0) }.sorted() == Array(0..<workers))
        for round in 0..<rounds.count {
          for target in rounds.targets(of: worker, in: round) {
            #expect(rounds.sources(of: target, in: round).contains(worker))
          }
        }
      }
    }
  }

  /// For each worker: as many rows come from each other one as that one sends; they stand by round, then by expert, then
  /// by worker, then in that worker's order, each once. Rows for shadowed experts stay, and stand last.
  @Test(arguments: [false, true])
  func arrivalsAreWhatTheOthersSend(arePacked: Bool) throws {
    var numbers = Numbers(12)
    for (workers, each, groupSize) in [(1, 3, 1), (2, 1, 2), (3, 2, 1), (4, 4, 4), (5, 2, 2), (4, 3, 3)] {
      let experts = workers * each
      let counts = (0..<workers).map { _ in (0..<experts).map { _ in UInt32(max(0, numbers.below(12) - 4)) } }
      let ranks = Array(0..<workers)
      let rounds = Rounds(Groups(workers: workers, size: groupSize), ranks: ranks, seats: ranks)
      for share in [0, 3, 10] {
        let shadows = (0..<experts).filter { _ in numbers.below(10) < share }
        try Self.withTraffic(counts) { traffic in
          let room = try! Region(bytes: experts, for: "a test")
          var over = Arena(over: room.base)
          let moves = Moves(arena: &over, traffic)
          moves.shadow(shadows)
          // The place of each row among the sorted ones of its worker.
          func place(_ source: Int, _ expert: Int) -> Int {
            let order = (0..<experts).filter { !shadows.contains($0) } + shadows
            return order.prefix { $0 != expert }.reduce(0) { $0 + Int(counts[source][$1]) }
          }
          for worker in 0..<workers {
            let rows = moves.rows(at: worker)
            let segments = rounds.count * each + shadows.count
            var size = Arena()
            _ = Arrivals(arena: &size, rows: rows, segments: segments)
            let region = try! Region(bytes: size.bytes, for: "a test")
            var arena = Arena(over: region.base)
            let arrivals = Arrivals(arena: &arena, rows: rows, segments: segments)
            arrivals.sort(moves, shadows, at: worker, rounds, arePacked: arePacked)
            var expected: [[Int]] = []
            var packed = [Int](repeating: 0, count: workers)
            for round in 0..<rounds.count {
              for expert in worker * each..<(worker + 1) * each {
                #expect(arrivals.firstRow[round * each + expert - worker * each] == expected.count)
                for source in rounds.sources(of: worker, in: round) {
                  if shadows.contains(expert) { continue }
                  for row in 0..<Int(counts[source][expert]) {
                    let isPacked = arePacked && source != worker
                    expected.append([source, isPacked ? packed[source] : place(source, expert) + row])
                    packed[source] += 1
                  }
                }
              }
            }
            for (index, expert) in shadows.enumerated() {
              #expect(arrivals.firstRow[rounds.count * each + index] == expected.count)
              for row in 0..<Int(counts[worker][expert]) { expected.append([worker, place(worker, expert) + row]) }
            }
            #expect(arrivals.firstRow[segments] == rows)
            for source in 0..<workers { #expect(packed[source] == moves.rows(from: source, to: worker)) }
            let got = (0..<rows).map { [Int(arrivals.origins[$0].worker), Int(arrivals.origins[$0].row)] }
            #expect(got == expected)
          }
        }
      }
    }
  }

}
