/// The gate of the Switch Transformer (§2.1-2.2): weights are probabilities, and an expert takes so many rows of the whole
/// batch and no more, in the order of all workers' tokens, whatever the number of workers.
package struct SwitchGate: Gate {
  private let capacity: Capacity

  package init(_ capacity: Capacity) { self.capacity = capacity }

  package var weighing: Weighing { .probability }
  package var draws: Bool { capacity.draws }
  /// Each worker tells how many of its first, second... choices are for each expert: from these follows what all keep.
  package func numbersTold(choices: Int) -> Int { choices }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int {
    max(2 * experts, Capacity.scratch(tokens: tokens, choices: choices))
  }

  package func settle(_ batch: GateBatch) -> Int {
    batch.countChoices(into: batch.told(by: batch.rank))
    return 0
  }

  package func hear(_ batch: GateBatch, counts: UnsafeMutablePointer<UInt32>, shares: UnsafeMutablePointer<Float>)
    -> Int
  {
    let (k, experts) = (batch.choices, batch.experts)
    let all = batch.tokensOfAll
    let room = capacity.rows(of: all, choices: k, experts: experts, isTraining: batch.isTraining)
    batch.share(of: all * k, into: shares) { worker, expert in
      (0..<k).reduce(0) { $0 + batch.told(by: worker)[$1 * experts + expert] }
    }
    counts.update(repeating: 0, count: batch.workers * experts)
    switch capacity.dropping(isTraining: batch.isTraining) {
    case .last: dropLast(batch, room, counts)
    case let dropping: drop(dropping, batch, room, counts)
    }
    return 0
  }

  private func dropLast(_ batch: GateBatch, _ room: Int, _ counts: UnsafeMutablePointer<UInt32>) {
    let (k, experts) = (batch.choices, batch.experts)
    // What has come for each expert so far, and what has come before this worker's next choice.
    let (come, before) = (batch.scratch, batch.scratch + experts)
    come.update(repeating: 0, count: experts)
    for choice in 0..<k {
      for worker in 0..<batch.workers {
        let told = batch.told(by: worker) + choice * experts
        if worker == batch.rank { before.update(from: come, count: experts) }
        for expert in 0..<experts {
          let free = max(0, room - Int(come[expert]))
          counts[worker * experts + expert] += min(told[expert], UInt32(free))
          come[expert] += UInt64(told[expert])
        }
      }
      for token in 0..<batch.tokens {
        let slot = token * k + choice
        let expert = Int(batch.picks[slot])
        if before[expert] >= UInt64(room) { batch.drop(slot) }
        before[expert] += 1
      }
    }
  }

  /// Every worker has its part of the room, by its tokens, since a choice is only compared with those of its own batch.
  private func drop(
    _ dropping: Capacity.Dropping, _ batch: GateBatch, _ room: Int, _ counts: UnsafeMutablePointer<UInt32>
  ) {
    let (k, experts) = (batch.choices, batch.experts)
    for worker in 0..<batch.workers {
      let told = batch.told(by: worker)
      // Every token has a first choice.
      let tokens = (0..<experts).reduce(0) { $0 + Int(told[$1]) }
      let part = batch.tokensOfAll > 0 ? room * tokens / batch.tokensOfAll : 0
      for expert in 0..<experts {
        let come = (0..<k).reduce(0) { $0 + Int(told[$1 * experts + expert]) }
        counts[worker * experts + expert] = UInt32(min(come, part))
      }
      if worker == batch.rank { dropping.drop(batch, room: part, numbers: k) }
    }
  }
}
