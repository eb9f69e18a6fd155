/// The gate of GShard (Algorithm 1), a worker's batch being one of its groups: an expert takes so many rows of each
/// worker and no more, first choices before others, and the other choices are taken by chance, the less they weigh the
/// more rarely.
package struct GShardGate: Gate {
  private let capacity: Capacity

  package init(_ capacity: Capacity) { self.capacity = capacity }

  package var weighing: Weighing { .softmaxOfChosen }
  package var draws: Bool { true }
  package var dropsWeighedChoices: Bool { true }
  /// What is left, and the first choices before any was dropped, which the balance loss is about.
  package func numbersTold(choices: Int) -> Int { 2 }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int {
    max(experts, Capacity.scratch(tokens: tokens, choices: choices))
  }

  package func settle(_ batch: GateBatch) -> Int {
    let (n, k, experts) = (batch.tokens, batch.choices, batch.experts)
    let told = batch.told(by: batch.rank)
    let first = told + experts
    first.update(repeating: 0, count: experts)
    for token in 0..<n { first[Int(batch.picks[token * k])] += 1 }
    let room = capacity.rows(of: n, choices: k, experts: experts, isTraining: batch.isTraining)
    switch capacity.dropping(isTraining: batch.isTraining) {
    case .last:
      // A choice takes its place also where it is dropped.
      let come = batch.scratch
      come.update(repeating: 0, count: experts)
      for choice in 0..<k {
        for token in 0..<n {
          let slot = token * k + choice
          let expert = Int(batch.picks[slot])
          if come[expert] >= UInt64(room) || !isTaken(batch, token, choice) { batch.drop(slot) }
          come[expert] += 1
        }
      }
    case let dropping:
      batch.count(into: told)
      dropping.drop(batch, room: room, numbers: 1)
      for choice in 1..<max(1, k) {
        for token in 0..<n where batch.picks[token * k + choice] >= 0 && !isTaken(batch, token, choice) {
          batch.drop(token * k + choice)
        }
      }
    }
    batch.count(into: told)
    return 0
  }

  /// A choice behind the first is taken with probability k·s, at most 1; always in evaluation.
  private func isTaken(_ batch: GateBatch, _ token: Int, _ choice: Int) -> Bool {
    guard choice > 0, batch.isTraining else { return true }
    let luck = batch.random.share((batch.firstToken + token) * batch.choices + choice)
    return Float(batch.choices) * batch.weights[token * batch.choices + choice] > luck
  }

  package func hear(_ batch: GateBatch, counts: UnsafeMutablePointer<UInt32>, shares: UnsafeMutablePointer<Float>)
    -> Int
  {
    batch.takeCounts(counts)
    batch.share(of: batch.tokensOfAll, into: shares) { batch.told(by: $0)[batch.experts + $1] }
    return 0
  }
}
