/// How many rows of a batch an expert takes, and which ones if more come.
package struct Capacity: Sendable {
  /// Which choices go: those that come last, all first choices being before all second ones; or those with the lowest
  /// weights.
  package enum Dropping: Int, Sendable { case last, lightest }

  /// Rows over those of a balanced batch.
  package let factor: Double
  package let factorInEvaluation: Double
  package let dropping: Dropping

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

  /// Words that `dropLightest` takes.
  package static func scratch(tokens: Int, choices: Int) -> Int { tokens * choices }

  /// Drops of each expert's choices in the batch all but the `room` with the highest weights.
  package static func dropLightest(_ batch: GateBatch, room: Int, counts: (Int) -> Int) {
    let (n, k, keys) = (batch.tokens, batch.choices, batch.scratch)
    for expert in 0..<batch.experts where counts(expert) > room {
      var count = 0
      for choice in 0..<k {
        for token in 0..<n where batch.picks[token * k + choice] == Int32(expert) {
          keys[count] = Highest.key(batch.weights[token * k + choice], choice * n + token)
          count += 1
        }
      }
      Highest.select(room, of: keys, count)
      for place in room..<max(room, count) {
        let index = Highest.index(keys[place])
        batch.drop(index % n * k + index / n)
      }
    }
  }
}
