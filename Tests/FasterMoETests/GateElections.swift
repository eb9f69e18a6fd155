import Foundation
import Testing

@testable import FasterMoE

/// What a gate makes of the scores of all workers.
struct Election {
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
struct Spread {
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
func elect(
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

final class Memory {
  let region: Region
  init(_ region: consuming Region) { self.region = region }
}

/// Random scores of tokens that mostly like the first experts.
func skewed(_ numbers: inout Numbers, _ tokens: Int, _ experts: Int) -> [[Float]] {
  (0..<tokens).map { _ in numbers.array(experts).enumerated().map { $1 * 2 - Float($0) / Float(experts) } }
}

/// Scores on which rules stumble: all equal, one column constant and highest, none finite, one finite.
func degenerate(_ tokens: Int, _ experts: Int) -> [[[Float]]] {
  let row = { (value: (Int) -> Float) in (0..<experts).map(value) }
  return [
    Array(repeating: row { _ in 0 }, count: tokens),
    (0..<tokens).map { token in row { $0 == experts - 1 ? 5 : Float(($0 * 7 + token) % 5) } },
    Array(repeating: row { _ in .nan }, count: tokens),
    (0..<tokens).map { token in row { $0 == token % experts ? 1 : -.infinity } },
    (0..<tokens).map { token in row { $0 == 0 ? .infinity : $0 == 1 ? .nan : Float(token) } },
  ]
}
