import Foundation
import Testing

@testable import FasterMoE

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
