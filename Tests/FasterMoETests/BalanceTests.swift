import Foundation
import Testing

@testable import FasterMoE

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
