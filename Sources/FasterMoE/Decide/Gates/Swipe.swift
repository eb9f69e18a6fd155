/// The gate of SWIPE: in training every worker's experts together take as many choices of the whole batch, and none is
/// dropped: what a worker has no room for moves to workers that have some.
///
/// First choices come before second ones, the tokens of lower ranks before others. What does not fit goes, in the same
/// order, to the lowest ranks with room, and there to the expert with the token's highest score that it has not chosen
/// yet; if it has chosen all, to the highest.
package struct SwipeGate: Gate {
  package init() {}

  package var weighing: Weighing { .softmaxOfChosen }
  /// How many first, second... choices are for each expert: from these follows how many each worker moves where. Which
  /// expert takes them there its scores say, which nobody else knows.
  package func numbersTold(choices: Int) -> Int { choices }
  package var tellsAgain: Bool { true }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int { 4 * experts }

  package func settle(_ batch: GateBatch) -> Int {
    batch.countChoices(into: batch.told(by: batch.rank))
    return 0
  }

  package func hear(_ batch: GateBatch, counts: UnsafeMutablePointer<UInt32>, shares: UnsafeMutablePointer<Float>)
    -> Int
  {
    let (k, experts, workers) = (batch.choices, batch.experts, batch.workers)
    batch.share(of: batch.tokensOfAll * k, into: shares) { worker, expert in
      (0..<k).reduce(0) { $0 + batch.told(by: worker)[$1 * experts + expert] }
    }
    guard batch.isTraining, workers > 1 else { return 0 }
    // Of each worker: room that is left; choices of a kind that do not fit. Of the own ones: how many each worker takes,
    // and how many move there.
    let (left, over) = (batch.scratch, batch.scratch + experts)
    let (taken, moves) = (batch.scratch + 2 * experts, batch.scratch + 3 * experts)
    let all = batch.tokensOfAll * k
    for worker in 0..<workers { left[worker] = UInt64(all / workers + (worker < all % workers ? 1 : 0)) }
    var moved = 0
    for choice in 0..<k {
      for source in 0..<workers {
        over[source] = 0
        for worker in 0..<workers {
          let come = batch.owned(by: worker).reduce(0 as UInt64) {
            $0 + UInt64(batch.told(by: source)[choice * experts + $1])
          }
          let fit = min(come, left[worker])
          left[worker] -= fit
          over[source] += come - fit
          if source == batch.rank { (taken[worker], moves[worker]) = (fit, 0) }
        }
      }
      var target = 0
      for source in 0..<workers {
        while over[source] > 0 {
          while left[target] == 0 { target += 1 }
          let some = min(over[source], left[target])
          over[source] -= some
          left[target] -= some
          if source == batch.rank { moves[target] += some }
        }
      }
      moved += move(choice, of: batch, taken: taken, moves: moves)
    }
    return moved
  }

  /// Has the own tokens' choices of one kind go where they fit.
  private func move(
    _ choice: Int, of batch: GateBatch, taken: UnsafeMutablePointer<UInt64>, moves: UnsafeMutablePointer<UInt64>
  ) -> Int {
    let each = batch.experts / batch.workers
    var (target, moved) = (0, 0)
    for token in 0..<batch.tokens {
      let slot = token * batch.choices + choice
      let worker = Int(batch.picks[slot]) / each
      if taken[worker] > 0 {
        taken[worker] -= 1
        continue
      }
      while moves[target] == 0 { target += 1 }
      moves[target] -= 1
      batch.picks[slot] = best(token, batch, of: batch.owned(by: target))
      batch.weigh(token, by: weighing)
      moved += 1
    }
    return moved
  }

  /// The highest score among `experts` that the token has not chosen, or among all of them if it has.
  private func best(_ token: Int, _ batch: GateBatch, of experts: Range<Int>) -> Int32 {
    let picks = batch.picks + token * batch.choices
    var (best, high) = (Int32(0), UInt64(0))
    for expert in experts {
      let isTaken = (0..<batch.choices).contains { picks[$0] == Int32(expert) }
      // All that are free rank before all that are not.
      let key = Highest.key(batch.score(token, expert), expert) >> 1 | (isTaken ? 0 : 1 << 63)
      if key > high { (best, high) = (Int32(expert), key) }
    }
    return best
  }
}
