import Foundation
import Testing

@testable import FasterMoE

/// What a gate makes of the scores of all workers.
private struct Election {
  /// [n] of all workers, one after the other.
  var picks: [[Int]] = []
  var weights: [[Float]] = []
  /// [W, E] as the first worker knows them.
  var counts: [[Int]] = []
  var shares: [Float] = []
  var loads: [Double] = []
  var moved = 0
  /// [E] over all workers.
  var totals: [Int] { counts[0].indices.map { expert in counts.reduce(0) { $0 + $1[expert] } } }
}

/// How a batch is spread over workers.
private struct Spread {
  /// Tokens of each worker.
  var tokens: [Int]
  var isTraining = true
  /// [W, E] and how many levels there are.
  var crossings: [[Int32]] = []
  var levels = 0
  /// [E] of gates that choose by one.
  var bias: [Float] = []
  /// What links say may leave a place.
  var measured: Double?
  var pass: UInt64 = 1
}

/// Runs a gate's rule on `logits` [n, E] as the layer does: choose, weigh, settle, tell, hear.
private func elect(
  _ gate: any Gate, _ logits: [[Float]], choices k: Int, _ spread: Spread, mayRepeat: Bool = false
) throws -> Election {
  let experts = logits.first?.count ?? 4
  let (workers, padded) = (spread.tokens.count, Panels.padded(experts))
  let numbers = gate.numbersTold(choices: k)
  var result = Election()
  var batches: [GateBatch] = []
  var memory: [Memory] = []
  for worker in 0..<workers {
    let (n, first) = (spread.tokens[worker], spread.tokens[..<worker].reduce(0, +))
    func lay(_ arena: inout Arena) -> GateBatch {
      let crossings: UnsafeMutablePointer<Int32> = arena.take(experts)
      let bias: UnsafeMutablePointer<Float> = arena.take(padded)
      return GateBatch(
        tokens: n, choices: k, experts: experts, rank: worker, workers: workers, firstToken: first,
        tokensOfAll: logits.count, isTraining: spread.isTraining, random: RandomStream(seed: 3, stream: spread.pass),
        scores: Panels(arena.take(n * padded), width: experts), picks: arena.take(n * k), weights: arena.take(n * k),
        bias: spread.bias.isEmpty ? nil : UnsafePointer(bias), crossings: crossings, levels: spread.levels,
        measuredShare: spread.measured,
        told: arena.take(workers * numbers * experts), numbers: numbers,
        loads: arena.take(experts), scratch: arena.take(gate.scratch(tokens: n, choices: k, experts: experts)),
        logits: arena.take(padded),
        probabilities: arena.take(padded))
    }
    var size = Arena()
    _ = lay(&size)
    memory.append(Memory(try Region(bytes: size.bytes, for: "a test")))
    var arena = Arena(over: memory[worker].region.base)
    let batch = lay(&arena)
    if !spread.crossings.isEmpty {
      UnsafeMutablePointer(mutating: batch.crossings).update(from: spread.crossings[worker], count: experts)
    }
    if let bias = batch.bias { UnsafeMutablePointer(mutating: bias).update(from: spread.bias, count: experts) }
    for token in 0..<n {
      for expert in 0..<experts {
        batch.scores.block(expert / 16, row: token, of: n)[expert % 16] = logits[first + token][expert]
      }
      batch.readScores(token)
      if batch.bias != nil {
        for expert in 0..<experts { batch.logits[expert] = batch.preference(token, expert) }
      }
      TopK.choose(batch.logits, experts: experts, choices: k, into: batch.picks + token * k)
      batch.weigh(token, by: gate.weighing)
    }
    result.moved += gate.settle(batch)
    batches.append(batch)
  }
  for batch in batches {
    for other in batches where other.rank != batch.rank {
      batch.told(by: other.rank).update(from: other.told(by: other.rank), count: numbers * experts)
    }
  }
  var heard: [(counts: [UInt32], shares: [Float])] = []
  for batch in batches {
    var counts = [UInt32](repeating: 9, count: workers * experts)
    var shares = [Float](repeating: 9, count: experts)
    result.moved += gate.hear(batch, counts: &counts, shares: &shares)
    heard.append((counts, shares))
  }
  for batch in batches where gate.tellsAgain {
    var counts = [UInt32](repeating: 9, count: experts)
    batch.count(into: &counts)
    let own = batch.rank * experts..<(batch.rank + 1) * experts
    for worker in 0..<workers { heard[worker].counts.replaceSubrange(own, with: counts) }
  }
  for batch in batches {
    let (counts, shares) = heard[batch.rank]
    result.loads = (0..<experts).map { batch.loads[$0] }
    let rows = (0..<workers).map { worker in (0..<experts).map { Int(counts[worker * experts + $0]) } }
    if batch.rank == 0 { (result.counts, result.shares) = (rows, shares) }
    #expect(rows == result.counts && shares == result.shares, "all workers know the same")
    let mine = (0..<batch.tokens).map { token in (0..<k).map { Int(batch.picks[token * k + $0]) } }
    #expect(rows[batch.rank] == (0..<experts).map { expert in mine.joined().count { $0 == expert } })
    result.picks += mine
    result.weights += (0..<batch.tokens).map { token in (0..<k).map { batch.weights[token * k + $0] } }
  }
  for (picks, weights) in zip(result.picks, result.weights) {
    for (pick, weight) in zip(picks, weights) where pick < 0 { #expect(weight == 0) }
    let live = picks.filter { $0 >= 0 }
    #expect(mayRepeat || Set(live).count == live.count, "a token has an expert once")
  }
  withExtendedLifetime(memory) {}
  return result
}

private final class Memory {
  let region: Region
  init(_ region: consuming Region) { self.region = region }
}

/// Random scores of tokens that mostly like the first experts.
private func skewed(_ numbers: inout Numbers, _ tokens: Int, _ experts: Int) -> [[Float]] {
  (0..<tokens).map { _ in numbers.array(experts).enumerated().map { $1 * 2 - Float($0) / Float(experts) } }
}

/// Scores on which rules stumble: all equal, one column constant and highest, none finite, one finite.
private func degenerate(_ tokens: Int, _ experts: Int) -> [[[Float]]] {
  let row = { (value: (Int) -> Float) in (0..<experts).map(value) }
  return [
    Array(repeating: row { _ in 0 }, count: tokens),
    (0..<tokens).map { token in row { $0 == experts - 1 ? 5 : Float(($0 * 7 + token) % 5) } },
    Array(repeating: row { _ in .nan }, count: tokens),
    (0..<tokens).map { token in row { $0 == token % experts ? 1 : -.infinity } },
    (0..<tokens).map { token in row { $0 == 0 ? .infinity : $0 == 1 ? .nan : Float(token) } },
  ]
}

@Suite struct GateTests {
  // MARK: The highest

  @Test func theHighestKeysAreThoseOfASort() {
    var numbers = Numbers(40)
    for count in [1, 2, 3, 16, 100, 1000] {
      for kind in 0..<3 {
        let scores = numbers.array(count).map { kind == 0 ? $0 : kind == 1 ? ($0 * 3).rounded() : 0 }
        let all = scores.enumerated().map { Highest.key($1, $0) }
        let expected = scores.indices.sorted { (scores[$0], $1) > (scores[$1], $0) }
        for wanted in Set([0, 1, count / 3, count - 1, count]) {
          var keys = all
          Highest.select(wanted, of: &keys, count)
          #expect(Set(keys.prefix(wanted).map(Highest.index)) == Set(expected.prefix(wanted)))
          #expect(Set(keys) == Set(all))
        }
      }
    }
  }

  @Test func keysAreInTheOrderOfScores() {
    let rising: [Float] = [-.infinity, -3, -1e-30, 0, 1e-30, 3, .infinity]
    for (a, b) in zip(rising, rising.dropFirst()) { #expect(Highest.key(a, 0) < Highest.key(b, 9)) }
    #expect(Highest.key(-0.0, 1) > Highest.key(0.0, 2) && Highest.key(.nan, 1) > Highest.key(-.infinity, 2))
    #expect(Highest.index(Highest.key(1, 123_456)) == 123_456)
  }

  // MARK: Weights

  /// Every weighing's gradient against central differences in Double, some choices being none.
  @Test(
    arguments: [Weighing.softmaxOfChosen, .probability, .logistic], [[3], [3, 0], [3, -1, 5], [-1, -1], [2, 4, 1]])
  func gradientsOfWeightsEqualCentralDifferences(weighing: Weighing, picks: [Int32]) {
    var numbers = Numbers(41)
    let (experts, k) = (7, picks.count)
    let logits = numbers.array(experts).map { Double($0) * 2 }
    let ds = numbers.array(k)
    func weights(_ logits: [Double]) -> [Double] {
      let all = logits.reduce(0) { $0 + exp($1) }
      let chosen = picks.filter { $0 >= 0 }.reduce(0) { $0 + exp(logits[Int($1)]) }
      return picks.map { pick in
        guard pick >= 0 else { return 0 }
        return switch weighing {
        case .softmaxOfChosen: exp(logits[Int(pick)]) / (k == 1 ? all : chosen)
        case .probability: exp(logits[Int(pick)]) / all
        case .logistic: 1 / (1 + exp(-logits[Int(pick)]))
        }
      }
    }
    let row = logits.map { Float($0) } + Array(repeating: -Float.infinity, count: 9)
    var (p, gradient) = ([Float](repeating: 0, count: 16), [Float](repeating: 0, count: 16))
    var s = [Float](repeating: 9, count: k)
    _ = TopK.softmax(row, experts: experts, into: &p)
    weighing.weigh(picks, choices: k, logits: row, probabilities: p, into: &s)
    for (got, wanted) in zip(s, weights(logits)) { #expect(abs(Double(got) - wanted) < 1e-6) }
    weighing.backward(
      picks, choices: k, weights: s, gradWeights: ds, probabilities: p, experts: experts, addingTo: &gradient)
    func loss(_ logits: [Double]) -> Double { zip(weights(logits), ds).reduce(0) { $0 + $1.0 * Double($1.1) } }
    for expert in 0..<experts {
      var (up, down) = (logits, logits)
      up[expert] += 1e-5
      down[expert] -= 1e-5
      #expect(abs(Double(gradient[expert]) - (loss(up) - loss(down)) / 2e-5) < 1e-6)
    }
  }

  // MARK: Capacity

  @Test func capacityIsRoundedUp() {
    let capacity = Capacity(factor: 1.25, inEvaluation: 2.5)
    #expect(capacity.rows(of: 100, choices: 1, experts: 8, isTraining: true) == 16)
    #expect(capacity.rows(of: 100, choices: 2, experts: 8, isTraining: false) == 63)
    #expect(capacity.rows(of: 1, choices: 1, experts: 64, isTraining: true) == 1)
    #expect(capacity.rows(of: 0, choices: 2, experts: 64, isTraining: true) == 0)
  }

  @Test(arguments: [Capacity.Dropping.last, .lightest, .random, .unimportant])
  func noExpertTakesMoreThanItsRoom(dropping: Capacity.Dropping) throws {
    var numbers = Numbers(42)
    for (n, experts, k) in [(50, 4, 1), (50, 4, 2), (64, 16, 3), (1, 4, 2), (3, 8, 1), (0, 4, 1)] {
      for logits in [skewed(&numbers, n, experts)] + degenerate(n, experts) {
        for factor in [0.3, 1, 1.25, 100] {
          for tokens in [[n], [n / 2, n - n / 2], [0, n / 3, n - n / 3, 0]] {
            let capacity = Capacity(factor: factor, inEvaluation: 2 * factor, dropping: dropping)
            func room(_ n: Int) -> Int { capacity.rows(of: n, choices: k, experts: experts, isTraining: true) }
            let whole = try elect(SwitchGate(capacity), logits, choices: k, Spread(tokens: tokens))
            #expect(whole.totals.allSatisfy { $0 <= room(n) })
            if n > 0 { #expect(abs(whole.shares.reduce(0, +) - 1) < 1e-5) }
            let each = try elect(GShardGate(capacity), logits, choices: k, Spread(tokens: tokens))
            for (counts, n) in zip(each.counts, tokens) { #expect(counts.allSatisfy { $0 <= room(n) }) }
            if factor == 100 { #expect(whole.picks.joined().allSatisfy { $0 >= 0 }) }
          }
        }
      }
    }
  }

  /// First come, first served, over all workers: who is dropped does not depend on how many they are.
  @Test func switchDropsWhatComesLast() throws {
    var numbers = Numbers(43)
    for k in 1...3 {
      let (n, experts) = (60, 8)
      let logits = skewed(&numbers, n, experts)
      let gate = SwitchGate(Capacity(factor: 0.7, inEvaluation: 1))
      let free = try elect(TopKGate(), logits, choices: k, Spread(tokens: [n]))
      let room = Int((0.7 * Double(k * n) / Double(experts)).rounded(.up))
      var (expected, come) = (free.picks, [Int](repeating: 0, count: experts))
      for choice in 0..<k {
        for token in 0..<n {
          let expert = free.picks[token][choice]
          if come[expert] >= room { expected[token][choice] = -1 }
          come[expert] += 1
        }
      }
      #expect(expected.joined().contains(-1))
      let alone = try elect(gate, logits, choices: k, Spread(tokens: [n]))
      #expect(alone.picks == expected)
      for tokens in [[20, 40], [60, 0], [0, 7, 13, 40]] {
        let spread = try elect(gate, logits, choices: k, Spread(tokens: tokens))
        #expect(spread.picks == expected && spread.totals == alone.totals && spread.shares == alone.shares)
      }
    }
  }

  @Test func lightestKeepsTheHighestWeights() throws {
    var numbers = Numbers(44)
    let (n, experts) = (40, 4)
    let logits = skewed(&numbers, n, experts)
    let capacity = Capacity(factor: 0.5, inEvaluation: 1, dropping: .lightest)
    let free = try elect(SwitchGate(Capacity(factor: 100, inEvaluation: 1)), logits, choices: 1, Spread(tokens: [n]))
    let kept = try elect(SwitchGate(capacity), logits, choices: 1, Spread(tokens: [n]))
    for expert in 0..<experts {
      let all = (0..<n).filter { free.picks[$0] == [expert] }.sorted { free.weights[$0][0] > free.weights[$1][0] }
      #expect(Set((0..<n).filter { kept.picks[$0] == [expert] }) == Set(all.prefix(5)))
    }
  }

  /// What each way to drop keeps of one worker's first and second choices, said as an order of them all.
  @Test(arguments: [Capacity.Dropping.lightest, .random, .unimportant])
  func roomGoesToTheFirstInAnOrder(dropping: Capacity.Dropping) throws {
    var numbers = Numbers(46)
    let (n, experts, k) = (40, 4, 2)
    let logits = skewed(&numbers, n, experts)
    let free = try elect(
      SwitchGate(Capacity(factor: 100, inEvaluation: 100)), logits, choices: k, Spread(tokens: [n], pass: 9))
    let draws = RandomStream(seed: 3, stream: 9)
    func comesBefore(_ a: (token: Int, choice: Int), _ b: (token: Int, choice: Int)) -> Bool {
      func order(_ of: (token: Int, choice: Int)) -> (Int, Float) {
        switch dropping {
        case .random: (0, -draws.share(1 << 40 + of.token * k + of.choice))
        case .unimportant: (of.choice, -free.weights[of.token][0])
        default: (0, -free.weights[of.token][of.choice])
        }
      }
      return order(a) != order(b) ? order(a) < order(b) : (a.choice, a.token) < (b.choice, b.token)
    }
    for isTraining in [true, false] {
      let capacity = Capacity(factor: 0.5, inEvaluation: 0.5, dropping: dropping)
      let spread = Spread(tokens: [n], isTraining: isTraining, pass: 9)
      let kept = try elect(SwitchGate(capacity), logits, choices: k, spread)
      var expected = free.picks
      for expert in 0..<experts {
        var all = (0..<k).flatMap { choice in (0..<n).map { (token: $0, choice: choice) } }
          .filter { free.picks[$0.token][$0.choice] == expert }
        // Without chance, those that come first are kept.
        if dropping != .random || isTraining { all.sort(by: comesBefore) }
        for (token, choice) in all.dropFirst(10) { expected[token][choice] = -1 }
      }
      #expect(kept.picks == expected && expected.joined().contains(-1))
    }
  }

  /// GShard, Algorithm 1, with what is drawn read from the same stream.
  @Test func gshardTakesSecondChoicesByChance() throws {
    var numbers = Numbers(45)
    let (n, experts) = (200, 8)
    let logits = skewed(&numbers, n, experts)
    for tokens in [[n], [70, 0, 130]] {
      let free = try elect(TopKGate(), logits, choices: 2, Spread(tokens: tokens))
      let got = try elect(
        GShardGate(Capacity(factor: 1, inEvaluation: 2)), logits, choices: 2, Spread(tokens: tokens, pass: 5))
      var expected = free.picks
      var first = 0
      for count in tokens {
        var come = [Int](repeating: 0, count: experts)
        let room = (2 * count + experts - 1) / experts
        for choice in 0..<2 {
          for token in first..<first + count {
            let expert = free.picks[token][choice]
            let luck = RandomStream(seed: 3, stream: 5).share(token * 2 + choice)
            let isLucky = choice == 0 || 2 * free.weights[token][1] > luck
            if come[expert] >= room || !isLucky { expected[token][choice] = -1 }
            come[expert] += 1
          }
        }
        first += count
      }
      #expect(got.picks == expected)
      let firsts = (0..<experts).map { expert in Float(free.picks.count { $0[0] == expert }) / Float(n) }
      for (share, wanted) in zip(got.shares, firsts) { #expect(abs(share - wanted) < 1e-6) }
    }
    let evaluated = try elect(
      GShardGate(Capacity(factor: 1, inEvaluation: 100)), logits, choices: 2, Spread(tokens: [n], isTraining: false))
    #expect(evaluated.picks.joined().allSatisfy { $0 >= 0 }, "nothing is left to chance")
  }

  @Test func chanceIsFairAndNeverTheSame() {
    let (one, other) = (RandomStream(seed: 1, stream: 1), RandomStream(seed: 1, stream: 2))
    let draws = (0..<20_000).map { one.share($0) }
    #expect(draws.allSatisfy { $0 >= 0 && $0 < 1 } && abs(draws.reduce(0, +) / 20_000 - 0.5) < 0.01)
    #expect((0..<20_000).count { one.share($0) == other.share($0) } < 20)
  }
}

@Suite struct BalanceTests {
  // MARK: Bias

  /// Towards the mean, nowhere at it, and as far for all.
  @Test func aBiasMovesTowardsBalance() {
    var bias: [Float] = [0, 0.5, -1, 2]
    Bias.move(&bias, loads: [10, 20, 30, 20], experts: 4, step: 0.25)
    #expect(bias == [0.25, 0.5, -1.25, 2])
    Bias.move(&bias, loads: [0, 0, 0, 0], experts: 4, step: 0.25)
    #expect(bias == [0.25, 0.5, -1.25, 2], "nobody was chosen")
    var uneven: [Float] = [0, 0, 0]
    Bias.move(&uneven, loads: [33, 33, 34], experts: 3, step: 1)
    #expect(uneven == [1, 1, -1], "no load is the mean of 100 over 3")
  }

  /// A bias alone evens out scores that are all for the first experts, and weights are as without it.
  @Test(arguments: [1, 2]) func aBiasBalancesWithoutALoss(choices k: Int) throws {
    var numbers = Numbers(47)
    let (n, experts) = (512, 8)
    let logits = (0..<n).map { _ in numbers.array(experts).enumerated().map { $1 - Float($0) / 2 } }
    func fullest(_ totals: [Int]) -> Double { Double(totals.max()! * experts) / Double(n * k) }
    var spread = Spread(tokens: [200, 0, 312], bias: Array(repeating: 0, count: experts))
    let free = try elect(TopKGate(), logits, choices: k, spread)
    #expect(fullest(free.totals) > 2)
    #expect(try elect(TopKGate(), logits, choices: k, Spread(tokens: [n])).picks == free.picks, "0 changes nothing")
    var last = free
    for _ in 0..<400 {
      Bias.move(&spread.bias, loads: last.loads, experts: experts, step: 0.002)
      last = try elect(TopKGate(), logits, choices: k, spread)
    }
    #expect(fullest(last.totals) < 1.15, "\(last.totals)")
    for token in 0..<n {
      let scores = last.picks[token].map { exp(logits[token][$0]) }
      let all = k == 1 ? logits[token].reduce(0) { $0 + exp($1) } : scores.reduce(0, +)
      #expect(zip(last.weights[token], scores).allSatisfy { abs($0 - $1 / all) < 1e-5 })
    }
  }

  // MARK: SWIPE

  /// As many choices for each worker, none dropped, whatever the scores; what fits stays.
  @Test func everyWorkerTakesAsMany() throws {
    var numbers = Numbers(48)
    let experts = 8
    for k in 1...3 {
      for tokens in [[10, 3, 0, 25], [1, 1, 1, 1], [0, 40, 0, 0], [7, 0], [31]] {
        let (n, workers) = (tokens.reduce(0, +), tokens.count)
        let each = experts / workers
        for (kind, logits) in ([skewed(&numbers, n, experts)] + degenerate(n, experts)).enumerated() {
          // A worker may have fewer experts than a token has choices: it then has one of them twice.
          let got = try elect(SwipeGate(), logits, choices: k, Spread(tokens: tokens), mayRepeat: each < k)
          let free = try elect(TopKGate(), logits, choices: k, Spread(tokens: tokens))
          for worker in 0..<workers {
            let rows = got.totals[worker * each..<(worker + 1) * each].reduce(0, +)
            #expect(rows == n * k / workers + (worker < n * k % workers ? 1 : 0), "kind \(kind)")
          }
          #expect(got.shares == free.shares, "the loss is about what tokens wanted")
          let differ = zip(got.picks.joined(), free.picks.joined()).count { $0 != $1 }
          #expect(got.moved >= differ)
          if workers == 1 { #expect(got.picks == free.picks && got.moved == 0) }
          if workers == 1 && kind == 0 { #expect(got.weights == free.weights) }
          let evaluated = try elect(SwipeGate(), logits, choices: k, Spread(tokens: tokens, isTraining: false))
          #expect(evaluated.picks == free.picks && evaluated.moved == 0)
        }
      }
    }
  }

  /// By hand: two workers with two experts each; all four tokens want expert 0.
  @Test func whatDoesNotFitGoesToTheBestOfWhoeverHasRoom() throws {
    let logits: [[Float]] = [[9, 1, 2, 3], [9, 1, 3, 2], [9, 1, 2, 3], [9, 1, 3, 2]]
    for tokens in [[4, 0], [1, 3], [0, 4]] {
      let got = try elect(SwipeGate(), logits, choices: 1, Spread(tokens: tokens))
      #expect(got.picks == [[0], [0], [3], [2]] && got.moved == 2, "the first two fit, whosever they are")
      let all = logits[2].reduce(0) { $0 + exp($1) }
      #expect(abs(got.weights[2][0] - exp(3) / all) < 1e-6, "weights are by the scores of what is chosen now")
    }
  }

  // MARK: Jitter

  /// Within its bounds, about 1, by the token's place and column alone.
  @Test func jitterDependsOnThePlaceAlone() throws {
    let (rows, width, bound) = (30, 37, Float(0.1))
    let jitter = Jitter(RandomStream(seed: 2, stream: 3), bound: bound, width: width)
    var sum = 0.0
    for first in [0, 12, 18] {
      let memory = Memory(try Region(bytes: 4 * rows * 48, for: "a test"))
      let base = memory.region.base.assumingMemoryBound(to: Float.self)
      // Of all columns, and of those from 16 on.
      for column in [0, 16] {
        let panels = Panels(base, width: width - column)
        let ones = [Float](repeating: 1, count: width)
        ones.withUnsafeBufferPointer { ones in panels.fill(rows: rows - first) { _ in ones.baseAddress! } }
        jitter.apply(to: panels, rows: rows - first, token: 100 + first, column: column)
        for row in 0..<rows - first {
          for at in 0..<width - column {
            let got = panels.block(at / 16, row: row, of: rows - first)[at % 16]
            let wanted = jitter.factors(100 + first + row, (column + at) / 16 * 16)[(column + at) % 16]
            #expect(got == wanted && abs(got - 1) <= bound)
            if first == 0 && column == 0 { sum += Double(got) }
          }
        }
      }
    }
    #expect(abs(sum / Double(rows * width) - 1) < 0.01)
  }
}

@Suite struct AuctionTests {
  /// Holders of jobs, and in how many rounds they were found.
  private static func assign(_ values: [[Float]]) throws -> (holders: [Int], rounds: Int) {
    let (jobs, bidders) = (values.count, values[0].count)
    var size = Arena()
    _ = Auction(arena: &size, jobs: jobs, experts: bidders)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let auction = Auction(arena: &arena, jobs: jobs, experts: bidders)
    for job in 0..<jobs {
      for bidder in 0..<bidders { auction.set(values[job][bidder], of: job, to: bidder) }
    }
    let rounds = auction.run()
    return ((0..<jobs).map { Int(auction.holders[$0]) }, rounds)
  }

  /// The generator of the published vectors.
  private static func golden(_ seed: UInt64, _ jobs: Int, _ bidders: Int) -> [[Float]] {
    var state = seed
    return (0..<jobs).map { _ in
      (0..<bidders).map { _ in
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return Float(Double(state >> 33) / 2_147_483_648)
      }
    }
  }

  private static func sum(_ values: [[Float]], _ holders: [Int]) -> Double {
    zip(values, holders).reduce(0) { $0 + Double($1.0[$1.1]) }
  }

  /// The highest sum that there is, each bidder taking `each`: the Hungarian method on a square of places.
  private static func optimum(_ values: [[Float]], each: Int) -> Double {
    let n = values[0].count * each
    func cost(_ row: Int, _ column: Int) -> Double { row < values.count ? -Double(values[row][column / each]) : 0 }
    var (u, v) = ([Double](repeating: 0, count: n + 1), [Double](repeating: 0, count: n + 1))
    var (match, way) = ([Int](repeating: 0, count: n + 1), [Int](repeating: 0, count: n + 1))
    for row in 1...n {
      match[0] = row
      var column = 0
      var least = [Double](repeating: .infinity, count: n + 1)
      var used = [Bool](repeating: false, count: n + 1)
      repeat {
        used[column] = true
        var (delta, next) = (Double.infinity, 0)
        for j in 1...n where !used[j] {
          let reduced = cost(match[column] - 1, j - 1) - u[match[column]] - v[j]
          if reduced < least[j] { (least[j], way[j]) = (reduced, column) }
          if least[j] < delta { (delta, next) = (least[j], j) }
        }
        for j in 0...n {
          if used[j] {
            u[match[j]] += delta
            v[j] -= delta
          } else {
            least[j] -= delta
          }
        }
        column = next
      } while match[column] != 0
      repeat {
        match[column] = match[way[column]]
        column = way[column]
      } while column != 0
    }
    return v[0]
  }

  @Test func publishedAssignmentsComeOut() throws {
    let cases: [(UInt64, Int, Int, [[Int]]?, Double, Double)] = [
      (1, 8, 2, [[6, 2, 4, 3], [1, 7, 5, 0]], 5.150743, 5.150743),
      (2, 12, 4, [[8, 7, 9], [2, 0, 5], [10, 3, 11], [1, 6, 4]], 9.185708, 9.207640),
      (3, 32, 4, nil, 23.811947, 23.811947),
    ]
    for (seed, jobs, bidders, lists, sum, best) in cases {
      let values = Self.golden(seed, jobs, bidders)
      let got = try Self.assign(values)
      if let lists {
        for (bidder, list) in lists.enumerated() {
          #expect(Set((0..<jobs).filter { got.holders[$0] == bidder }) == Set(list))
        }
      }
      #expect(abs(Self.sum(values, got.holders) - sum) < 1e-5)
      #expect(abs(Self.optimum(values, each: jobs / bidders) - best) < 1e-5)
    }
  }

  /// Everyone gets as many, up to what does not divide, and the sum is within a step a job of the highest.
  @Test func everyoneGetsAsManyAndTheSumIsNearTheHighest() throws {
    var numbers = Numbers(50)
    for (jobs, bidders) in [(1, 1), (7, 1), (1, 5), (4, 5), (5, 5), (12, 4), (13, 4), (40, 8), (41, 8), (90, 3)] {
      for kind in 0..<4 {
        let values = (0..<jobs).map { _ in
          numbers.array(bidders).enumerated().map { place, value in
            switch kind {
            case 0: value
            case 1: value - Float(place)  // all like the first ones best
            case 2: (value * 4).rounded()  // many ties
            default: 1e8 + value * 100  // hardly told apart in single precision
            }
          }
        }
        let got = try Self.assign(values)
        let each = (jobs + bidders - 1) / bidders
        for bidder in 0..<bidders {
          let count = got.holders.count { $0 == bidder }
          #expect(jobs % bidders == 0 ? count == each : count <= each)
        }
        let all = values.joined()
        let step = max(Double(all.max()! - all.min()!) / 50, 1e-4)
        let rest = Double(each * bidders) * step + (kind == 3 ? 1e3 : 0)
        #expect(Self.sum(values, got.holders) >= Self.optimum(values, each: each) - rest - 1e-3)
        #expect(got.rounds < Auction.mostRounds)
      }
    }
  }

  @Test func scoresWithoutAnOrderStillShareOut() throws {
    for (n, experts) in [(64, 8), (1024, 16), (5, 8), (67, 8)] {
      for (kind, logits) in degenerate(n, experts).enumerated() {
        let got = try Self.assign(logits)
        let counts = (0..<experts).map { expert in got.holders.count { $0 == expert } }
        #expect(counts.reduce(0, +) == n && counts.allSatisfy { $0 <= (n + experts - 1) / experts }, "\(kind)")
        if n % experts == 0 { #expect(Set(counts) == [n / experts]) }
      }
    }
  }

  @Test func baseSharesOutInTrainingAlone() throws {
    var numbers = Numbers(51)
    let logits = skewed(&numbers, 50, 4)
    let free = try elect(TopKGate(), logits, choices: 1, Spread(tokens: [50]))
    let trained = try elect(BaseGate(), logits, choices: 1, Spread(tokens: [20, 0, 30]))
    #expect(trained.counts.map { $0.max()! } == [5, 0, 8] && trained.totals.reduce(0, +) == 50)
    let first = try Self.assign(Array(logits[..<20]))
    #expect(trained.picks[..<20].map { $0[0] } == first.holders)
    #expect(trained.moved == zip(trained.picks, free.picks).count { $0 != $1 })
    for (token, pick) in trained.picks.enumerated() {
      #expect(abs(trained.weights[token][0] - 1 / (1 + exp(-logits[token][pick[0]]))) < 1e-6)
    }
    let evaluated = try elect(BaseGate(), logits, choices: 1, Spread(tokens: [50], isTraining: false))
    #expect(evaluated.picks == free.picks)
  }
}

@Suite struct NoiseTests {
  @Test func variationIsZeroWhereAllAreEqualAndItsSlopeIsADifference() {
    #expect(Variation(4) { _ in 3 }.value == 0)
    #expect(Variation(4) { _ in 3 }.slope(3) == 0)
    #expect(Variation(1) { _ in 3 }.value == 0 && Variation(4) { _ in 0 }.value == 0)
    let x = [1.0, 3, 2, 7]
    #expect(abs(Variation(4) { x[$0] }.value - 83.0 / 12 / 3.25 / 3.25) < 1e-9)
    for place in 0..<4 {
      var (up, down) = (x, x)
      up[place] += 1e-5
      down[place] -= 1e-5
      let difference =
        (Variation(4) { up[$0] }.value - Variation(4) { down[$0] }.value) / 2e-5
      #expect(abs(Variation(4) { x[$0] }.slope(x[place]) - difference) < 1e-8)
    }
  }

  @Test func drawsAreNormal() {
    let random = RandomStream(seed: 5, stream: 6)
    let draws = (0..<2_500).flatMap { block in (0..<16).map { Double(random.normals(16 * block)[$0]) } }
    for place in 0..<1000 {
      let pair = place / 2 * 2
      let (radius, angle) = (Double(1 - random.share(pair)), 2 * Double.pi * Double(random.share(pair + 1)))
      let wanted = (-2 * log(radius)).squareRoot() * (place % 2 == 0 ? cos(angle) : sin(angle))
      #expect(abs(draws[place] - wanted) < 3e-6)
    }
    let mean = draws.reduce(0, +) / 40_000
    let square = draws.reduce(0) { $0 + $1 * $1 } / 40_000
    #expect(abs(mean) < 0.02 && abs(square - 1) < 0.03)
    #expect(abs(Double(draws.count { $0 < 1 }) / 40_000 - 0.8413) < 0.01)
  }

  @Test func softplusEqualsDouble() {
    for x: Float in [-200, -80, -5, -1e-3, 0, 1e-3, 1, 20, 80, 1e30] {
      let wanted = max(0, Double(x)) + log1p(exp(-abs(Double(x))))
      #expect(abs(Double(softplus(Vector(repeating: x))[3]) - wanted) <= 1e-6 * wanted + 1e-37)
    }
  }

  @Test func logarithmAndCosineEqualDouble() {
    for x in stride(from: Float(1e-3), to: 4, by: 1e-3) {
      let got = Double(naturalLogarithm(Vector(repeating: x))[0])
      #expect(abs(got - log(Double(x))) <= 3e-7 * max(abs(log(Double(x))), 0.1))
    }
    #expect(abs(naturalLogarithm(Vector(repeating: 0x1p-24))[1] + 16.635532) < 2e-6)
    #expect(naturalLogarithm(Vector(repeating: 1))[0] == 0)
    for x in stride(from: Float(-1), through: 1, by: 1e-3) {
      #expect(abs(Double(cosineOfTurns(Vector(repeating: x))[0]) - cos(2 * .pi * Double(x))) < 3e-7)
    }
  }

  /// The bar of a chosen expert is the best score that was not chosen, that of another the worst that was.
  @Test func barsAreWhatMustBeExceeded() throws {
    var size = Arena()
    _ = Noise(arena: &size, experts: 5)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let noise = Noise(arena: &arena, experts: 5)
    let scores: [Float] = [3, 9, 1, 7, 5]
    let (ofChosen, ofOthers) = noise.findBars(
      scores, [1, 3], choices: 2, rest: [3, -.infinity, 1, -.infinity, 5])
    #expect(ofChosen == 4 && ofOthers == 3)
    #expect((0..<5).map { noise.bar[$0] } == [7, 5, 7, 5, 7])
  }
}

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
