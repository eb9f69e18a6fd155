/// How many rows of a batch an expert takes, and which ones if more come.
package struct Capacity: Sendable {
  /// Which choices go: those that come last, all first choices being before all second ones; those with the lowest
  /// weights; any, by chance; or, first choices before second ones, those of tokens whose first choice weighs least.
  package enum Dropping: Int, Sendable { case last, lightest, random, unimportant }

  /// Rows over those of a balanced batch.
  package let factor: Double
  package let factorInEvaluation: Double
  private let dropping: Dropping

  package init(factor: Double, inEvaluation: Double, dropping: Dropping = .last) {
    self.factor = factor
    factorInEvaluation = inEvaluation
    self.dropping = dropping
  }

  /// ⌈factor · k·n/E⌉
  package func rows(of tokens: Int, choices: Int, experts: Int, isTraining: Bool) -> Int {
    let rows = (isTraining ? factor : factorInEvaluation) * Double(tokens * choices) / Double(experts)
    return rows < Double(Int32.max) ? Int(rows.rounded(.up)) : Int(Int32.max)
  }

  package var draws: Bool { dropping == .random }

  /// In evaluation nothing is left to chance.
  package func dropping(isTraining: Bool) -> Dropping { dropping == .random && !isTraining ? .last : dropping }

  /// Words that `Dropping.drop` takes.
  package static func scratch(tokens: Int, choices: Int) -> Int { tokens * (choices + 1) }
}

extension Capacity.Dropping {
  /// Drops of each expert's choices in the batch all but `room`; not for `last`, which is about all workers' batches. How
  /// many there are for each expert is the sum of the first `numbers` that the worker tells.
  package func drop(_ batch: GateBatch, room: Int, numbers: Int) {
    let (n, k, told) = (batch.tokens, batch.choices, batch.told(by: batch.rank))
    let (importance, keys) = (batch.scratch, batch.scratch + n)
    // What is dropped loses its weight, also where another expert asks for it.
    for token in 0..<n { importance[token] = UInt64(batch.weights[token * k].bitPattern) }
    for expert in 0..<batch.experts {
      var come = 0
      for number in 0..<numbers { come += Int(told[number * batch.experts + expert]) }
      guard come > room else { continue }
      var (left, first) = (room, 0)
      while first < k {
        let end = self == .unimportant ? first + 1 : k
        var count = 0
        for choice in first..<end {
          for token in 0..<n where batch.picks[token * k + choice] == Int32(expert) {
            keys[count] = Highest.key(rank(batch, token, choice), choice * n + token)
            count += 1
          }
        }
        Highest.select(left, of: keys, count)
        for place in left..<max(left, count) {
          let index = Highest.index(keys[place])
          batch.drop(index % n * k + index / n)
        }
        left = max(0, left - count)
        first = end
      }
    }
  }

  /// The higher, the sooner a choice is kept; what tokens' first choices weigh is in the scratch memory.
  private func rank(_ batch: GateBatch, _ token: Int, _ choice: Int) -> Float {
    let slot = token * batch.choices + choice
    return switch self {
    case .last: 0
    case .lightest: batch.weights[slot]
    case .random: batch.random.share(Capacity.firstDraw + batch.firstToken * batch.choices + slot)
    case .unimportant: Float(bitPattern: UInt32(batch.scratch[token]))
    }
  }
}

extension Capacity {
  /// Of those in a pass; GShard draws before it.
  fileprivate static let firstDraw = 1 << 40
}
