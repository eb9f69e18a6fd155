/// How much a plan may still play: planning must stay small beside what it plans.
///
/// A play is that of a worker's part in a step. Plays are counted, not timed, so that all workers stop at the same place and
/// the same values give the same plan.
struct PlayBudget {
  private let workers: Int
  private let experts: Int
  private(set) var left = 0
  /// Sizes of groups whose costs this plan has paid for: so it does not matter what was planned before.
  private var paidSizes: [Int] = []

  /// Which share of a step planning may take, at so many seconds for each play. With what is not counted that is what an
  /// Emerald Rapids takes; a Zen 1 at 2.5 GHz, on which plays were last timed when they took a third longer, takes more. With
  /// fewer plays some plans are up to 6 % slower.
  private static let share = 0.01
  private static let secondsEach = Seconds(1.15e-8)
  /// Some 20 microseconds: with fewer, steps of milliseconds get plans that lose more than planning takes (`build/plan`).
  private static let fewest = 1 << 11
  /// Some seconds, however long a step is.
  private static let most = 1 << 28
  /// What looking at a set, at its costs in some groups, and at a list of steps takes besides.
  private static let look = 40

  init(workers: Int, experts: Int) { (self.workers, self.experts) = (workers, experts) }

  /// Begins anew with what planning a step of so many seconds is worth. All workers as one group are always looked at.
  mutating func begin(_ step: Seconds) {
    paidSizes = [workers]
    let worth = step * PlayBudget.share / PlayBudget.secondsEach
    left = worth > Double(PlayBudget.fewest) ? Int(min(worth, Double(PlayBudget.most))) : PlayBudget.fewest
  }

  /// Pays for the costs of steps in `groups`.
  mutating func payCosts(_ groups: Groups) {
    left -= costs(groups)
    if !paidSizes.contains(groups.size) { paidSizes.append(groups.size) }
  }

  /// Pays for one direction of a step in one order.
  mutating func payTrip(_ groups: Groups, shadows: Int) { left -= trip(groups, shadows: shadows) }

  /// Pays for the bound of a set of shadows.
  mutating func payBound() { left -= 4 * workers + PlayBudget.look }

  /// Whether costs and so many trips in `groups` take no more than one part in `parts` of what is left.
  func allows(_ groups: Groups, trips: Int, shadows: Int, inParts parts: Int) -> Bool {
    parts * (costs(groups) + trips * trip(groups, shadows: shadows)) < left
  }

  func trip(_ groups: Groups, shadows: Int) -> Int { PlayBudget.look / 2 + workers * 3 * (groups.count + shadows) }

  private func costs(_ groups: Groups) -> Int {
    let ways = PlayBudget.look + groups.count * workers / 2
    return paidSizes.contains(groups.size) ? ways : ways + groups.count * experts + workers * (workers + experts) / 16
  }
}
