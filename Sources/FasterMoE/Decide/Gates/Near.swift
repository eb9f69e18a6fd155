/// The topology-aware gate (FasterMoE §4.3): few choices leave a place of the machine room, those with the highest scores;
/// the others choose again among the experts inside.
///
/// It counts all k choices of all of a worker's tokens. A token that has too few experts inside drops a choice. An expert
/// that every worker will have a copy of is inside for all.
package struct NearGate: Gate {
  package enum Levels: Sendable { case top, every }
  /// Of a worker's choices, at most this share leaves the widest place that divides the workers; with `.every` level, of
  /// those that stay at most this share leaves the next smaller one, and so on.
  ///
  /// nil: what the links say that were measured, or `usualShare`.
  private let share: Double?
  private let levels: Levels

  package init(share: Double?, _ levels: Levels) {
    self.share = share
    self.levels = levels
  }

  /// The paper's, for four workers in a host: 50/(4·88) by the rates of its links.
  package static let usualShare = 0.14

  package var heedsLinks: Bool { share == nil }
  package var limitsPlaces: Bool { true }
  package var weighing: Weighing { .softmaxOfChosen }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int { tokens * choices }

  /// Choices of `all` that may cross the level, 0 being the top.
  package func budget(_ level: Int, of all: Int, measured: Double? = nil) -> Int {
    let share = share ?? measured ?? NearGate.usualShare
    var crossing = share
    for _ in 0..<level { crossing += share * (1 - crossing) }
    return Int((crossing * Double(all)).rounded(.down))
  }

  package func settle(_ batch: GateBatch) -> Int {
    var moved = 0
    let levels = self.levels == .top ? min(1, batch.levels) : batch.levels
    // From the top: what is brought back inside a place may still leave a smaller one inside that.
    for level in 0..<levels {
      let budget = budget(level, of: batch.tokens * batch.choices, measured: batch.measuredShare)
      moved += keep(budget, batch, crossing: Int32(batch.levels - level))
    }
    batch.count(into: batch.told(by: batch.rank))
    return moved
  }

  /// Lets the `budget` highest of the choices that cross so many levels go on, and has the others choose again.
  private func keep(_ budget: Int, _ batch: GateBatch, crossing levels: Int32) -> Int {
    let (k, keys) = (batch.choices, batch.scratch)
    var count = 0
    for slot in 0..<batch.tokens * k where batch.picks[slot] >= 0 {
      let expert = Int(batch.picks[slot])
      guard batch.crossings[expert] >= levels else { continue }
      keys[count] = Highest.key(batch.preference(slot / k, expert), slot)
      count += 1
    }
    guard count > budget else { return 0 }
    Highest.select(budget, of: keys, count)
    // -1 is a choice that was dropped before.
    for place in budget..<count { batch.picks[Highest.index(keys[place])] = NearGate.toMove }
    for token in 0..<batch.tokens {
      let picks = batch.picks + token * k
      guard (0..<k).contains(where: { picks[$0] == NearGate.toMove }) else { continue }
      for choice in 0..<k where picks[choice] == NearGate.toMove {
        picks[choice] = best(token, batch, crossing: levels)
      }
      batch.weigh(token, by: weighing)
    }
    return count - budget
  }

  private static let toMove: Int32 = -2

  /// A token's highest score among the experts that it has not chosen and for which fewer levels are crossed, or -1.
  private func best(_ token: Int, _ batch: GateBatch, crossing levels: Int32) -> Int32 {
    let picks = batch.picks + token * batch.choices
    var (best, high) = (Int32(-1), UInt64(0))
    for expert in 0..<batch.experts where batch.crossings[expert] < levels {
      guard !(0..<batch.choices).contains(where: { picks[$0] == Int32(expert) }) else { continue }
      let key = Highest.key(batch.preference(token, expert), expert)
      if best < 0 || key > high { (best, high) = (Int32(expert), key) }
    }
    return best
  }
}
