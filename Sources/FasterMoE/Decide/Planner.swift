/// Chooses what a batch is to do: which experts are shadowed, in groups of how many rows move, in which order.
///
/// Every candidate is played by the Simulator on the Cluster; the one that takes least is the plan. Doing nothing clever
/// (no shadow, nothing overlapped) is always among them, so by its own model a plan is never slower than that. The same
/// values give the same plan on every worker: nothing is measured here.
package struct Planner {
  private let traffic: Traffic
  private let shape: Shape
  private let cluster: Cluster
  private var simulator: Simulator
  /// How many more times a worker's part in a step may be played.
  private var plays = 0
  /// Lists of steps that were played, by all that they depend on.
  private var lists: [Int: PlayedSteps] = [:]
  /// Without shadows.
  private let none: Volumes

  /// Most counts, W·E: a gigabyte.
  package static let mostCounts = 1 << 28
  /// Most entries of a table of rounds.
  private static let mostOfRounds = 1 << 24

  package static func check(workers: Int, experts: Int) throws(Failure) {
    guard experts % workers == 0 else {
      throw Failure(.argument, "\(experts) experts cannot be shared equally by \(workers) workers")
    }
    guard experts <= mostCounts / workers else {
      throw Failure(.argument, "\(workers) x \(experts) counts are more than the \(mostCounts) that can be planned")
    }
  }

  package init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster) {
    (self.traffic, self.shape, self.cluster) = (traffic, shape, cluster)
    simulator = Simulator(traffic, shape, on: cluster)
    none = Volumes(traffic, shape, on: cluster)
  }

  package mutating func plan(_ request: PlanRequest) throws(Failure) -> (plan: Plan, report: PlanReport) {
    try request.check()
    let plain = coarse(none, none.moving)
    // Of a request for pairwise exchange, the coarse plan is no answer.
    let known = request.schedule == .pairwise ? nil : plain
    var chosen: Choice
    switch request.shadowing {
    case .never: chosen = best(ofAll: [candidate([])], request, known)
    case .given: chosen = best(ofAll: [candidate(request.shadows)], request, nil)
    case .paper: chosen = best(ofAll: [candidate(paper)], request, nil)
    case .everyExpert: chosen = everyExpert(request)
    case .best:
      chosen = best(ofAll: candidates(below: plain.seconds), request, known)
      improve(&chosen, request)
    }
    if chosen.plan.groups.count > 1 { refine(&chosen) }

    var report = PlanReport()
    let roofline = chosen.volumes.roofline
    report.shadows = chosen.plan.shadows.count
    report.groupSize = chosen.plan.groups.size
    report.steps = chosen.plan.steps
    report.plain = plain.seconds
    report.planned = chosen.seconds
    report.ideal = min(roofline.ideal, chosen.seconds)  // no less but for rounding
    report.semiIdeal = roofline.semiIdeal
    report.computeOverCommunicate = roofline.computeOverCommunicate
    report.stepRatio = roofline.stepRatio
    report.flopRatePerWorker = roofline.flopRatePerWorker(in: chosen.seconds)
    report.roofline = roofline
    return (chosen.plan, report)
  }

  private struct Choice {
    var plan: Plan
    var seconds: Seconds
    let volumes: Volumes
    let costs: StepCosts
  }

  // MARK: Shadows

  private var paper: [Int] { Shadowing.paper(traffic, shape, on: cluster, rows: none.rows).experts }

  private func shadowing(_ experts: [Int]) -> Volumes { Volumes(none, shadows: experts) }

  /// A set of shadows, and what no schedule of it is faster than.
  private struct Candidate {
    let shadows: [Int]
    let least: Seconds
  }
  private func candidate(_ shadows: [Int]) -> Candidate {
    Candidate(shadows: shadows, least: (shadows.isEmpty ? none : shadowing(shadows)).least)
  }

  /// No shadow, the paper's set, and the prefixes of the order by excess load whose bounds are least; by the least time
  /// that any schedule of each could take.
  private func candidates(below plain: Seconds) -> [Candidate] {
    let room = max(1, min(Planner.mostSets, Planner.mostPairs / (cluster.workers * cluster.workers)))
    var found: [Candidate] = []
    func insert(_ set: Candidate) { found.insert(set, at: found.firstIndex { set.least < $0.least } ?? found.count) }
    var (volumes, affordable) = (none, plain)
    for expert in ByExcess(traffic, rows: none.rows, on: cluster) {
      volumes.shadow(expert)
      // Copies only add up: once they alone take longer than some other set takes in all, so does what follows.
      guard volumes.leastCopying < affordable else { break }
      affordable = min(affordable, volumes.serial)
      let least = volumes.least
      if found.count == room {
        guard least < found[room - 1].least else { continue }
        found.removeLast()
      }
      insert(Candidate(shadows: volumes.shadows, least: least))
    }
    let paper = self.paper
    // The other two right after the first: bounds say little of how well sets overlap, and prefixes are much alike.
    var others = [candidate([])]
    if !paper.isEmpty, !found.contains(where: { $0.shadows == paper }) { others.append(candidate(paper)) }
    let first = (found + others).min { $0.least < $1.least }!
    return [first] + (others + found).filter { $0.shadows != first.shadows }
  }

  /// Most prefixes whose schedules are played, and most pairs of workers over all of them: planning must stay small
  /// beside what it plans.
  private static let mostSets = 8
  private static let mostPairs = 1 << 20
  /// So many are played, whatever it takes.
  private static let fewestSets = 3
  /// Which share of a step planning may take, at so many seconds for each play of a worker's part in a step.
  private static let share = 0.01
  private static let secondsEach = Seconds(1e-8)
  /// Some 40 microseconds: with fewer, steps of milliseconds get plans that lose more than planning takes (`build/plan`).
  private static let fewestPlays = 1 << 11
  /// Some seconds, however long a step is.
  private static let mostPlays = 1 << 28
  /// What looking at a set, at its costs in some groups, and at a list of steps takes besides, in plays.
  private static let playsEach = 40
  /// A plan that takes this many times what no other can beat is good enough.
  private static let enough = 1.005

  // MARK: Schedules

  private mutating func coarse(_ volumes: Volumes, _ moving: RowsBetween) -> Choice {
    let plan = Plan.coarse(workers: cluster.workers, shadows: volumes.shadows)
    let costs = simulator.costs(plan.groups, volumes, moving)
    return Choice(plan: plan, seconds: seconds(plan, costs), volumes: volumes, costs: costs)
  }

  private mutating func everyExpert(_ request: PlanRequest) -> Choice {
    let volumes = Volumes(everyExpertOf: none)
    let plan = Plan.everyExpert(request, workers: cluster.workers, experts: traffic.experts)
    let costs = simulator.costs(plan.groups, volumes, volumes.moving)
    // Where several copies are played as one, so are the steps of the plan.
    let steps = (traffic.experts + volumes.copiesAtOnce - 1) / volumes.copiesAtOnce
    let played = Plan.everyExpert(request, workers: cluster.workers, experts: steps)
    return Choice(plan: plan, seconds: seconds(played, costs), volumes: volumes, costs: costs)
  }

  private mutating func best(ofAll sets: [Candidate], _ request: PlanRequest, _ known: Choice?) -> Choice {
    let worth = sets[0].least * Planner.share / Planner.secondsEach
    plays = worth > Double(Planner.fewestPlays) ? Int(min(worth, Double(Planner.mostPlays))) : Planner.fewestPlays
    return best(sets, request, known)
  }

  /// The best schedule of the best of `sets`, which stand in the order of their least time; `known` is one already.
  private mutating func best(_ sets: [Candidate], _ request: PlanRequest, _ known: Choice?) -> Choice {
    var chosen = known
    /// Nothing that overlaps such a set can take less.
    func isEnough(_ set: Candidate) -> Bool { chosen.map { $0.seconds < set.least * Planner.enough } ?? false }
    func choose(_ other: Choice) { if chosen.map({ other.seconds < $0.seconds }) ?? true { chosen = other } }

    // The first sets in groups of several sizes, each other one in the best of these; then in more, the best sets first.
    let all = groupSizes(request)
    var best = all.first
    var tried: [(set: Candidate, volumes: Volumes, moving: RowsBetween, sizes: [Int], seconds: Seconds)] = []
    for (index, set) in sets.enumerated() where !isEnough(set) && (plays > 0 || index < Planner.fewestSets) {
      let volumes = set.shadows.isEmpty ? none : shadowing(set.shadows)
      let moving = volumes.moving
      let first = best.map { pairwise($0, volumes, moving) } ?? coarse(volumes, moving)
      choose(first)
      var sizes = best.map { [$0] } ?? []
      if index < Planner.fewestSets {
        for size in all where size != best && isAffordable(size, volumes, 4) && !isEnough(set) {
          choose(pairwise(size, volumes, moving))
          sizes.append(size)
        }
        if let chosen, chosen.plan.overlaps { best = chosen.plan.groups.size }
      }
      tried.insert(
        (set, volumes, moving, sizes, first.seconds),
        at: tried.firstIndex { first.seconds < $0.seconds } ?? tried.count)
    }
    for (set, volumes, moving, sizes, _) in tried {
      for size in all where !sizes.contains(size) && isAffordable(size, volumes, 1) && !isEnough(set) {
        choose(pairwise(size, volumes, moving))
      }
    }
    // Where messages slow down much beside computing.
    if request.schedule == .best, let first = tried.first { choose(coarse(first.volumes, first.moving)) }
    return chosen!
  }

  /// Prefixes of one order are not all sets: takes what is a little different for as long as that helps, where a plan is
  /// small enough to play many.
  private mutating func improve(_ chosen: inout Choice, _ request: PlanRequest) {
    let (workers, experts) = (cluster.workers, traffic.experts)
    var (expert, unchanged) = (0, 0)
    while unchanged < experts {
      let before = chosen.seconds
      for shadows in Planner.neighbours(of: chosen.volumes.shadows, expert) {
        plays -= workers * (workers + experts) + Planner.playsEach
        guard plays > 0 else { return }
        let other = candidate(shadows)
        if other.least < chosen.seconds { chosen = best([other], request, chosen) }
      }
      unchanged = chosen.seconds < before ? 0 : unchanged + 1
      expert = (expert + 1) % experts
    }
  }

  /// The lists of shadows in which one expert is in or out, in place of another, or fetched first or last.
  private static func neighbours(of shadows: [Int], _ expert: Int) -> [[Int]] {
    guard shadows.contains(expert) else {
      return [shadows + [expert]]
        + shadows.indices.map {
          var other = shadows
          other[$0] = expert
          return other
        }
    }
    let others = shadows.filter { $0 != expert }
    return [others] + [[expert] + others, others + [expert]].filter { $0 != shadows }
  }

  /// The best of `orders`, of each direction for itself: they follow one another.
  private mutating func pairwise(_ size: Int, _ volumes: Volumes, _ moving: RowsBetween) -> Choice {
    let groups = Groups(workers: cluster.workers, size: size)
    plays -= playsOfCosts(groups)
    return pairwise(simulator.costs(groups, volumes, moving), volumes, Planner.orders(volumes))
  }

  /// Whether groups of `size` take no more than one part in `parts` of the plays that are left.
  private func isAffordable(_ size: Int, _ volumes: Volumes, _ parts: Int) -> Bool {
    let groups = Groups(workers: cluster.workers, size: size)
    return parts * (playsOfCosts(groups) + plays(of: Planner.orders(volumes), groups, volumes)) < plays
  }
  private func playsOfCosts(_ groups: Groups) -> Int {
    Planner.playsEach + (simulator.knows(groups) ? 0 : groups.count * traffic.experts)
  }
  private func plays(of orders: [Order], _ groups: Groups, _ volumes: Volumes) -> Int {
    orders.count * (Planner.playsEach + 2 * cluster.workers * 3 * (groups.count + volumes.shadows.count))
  }

  private mutating func pairwise(_ costs: StepCosts, _ volumes: Volumes, _ orders: [Order]) -> Choice {
    let shadows = volumes.shadows.count
    plays -= plays(of: orders, costs.groups, volumes)
    let slowdown = cluster.slowdown
    let forward = Planner.least(orders) {
      costs.forward(list(.forward, costs.groups, shadows, $0), overlaps: true, slowdown: slowdown)
    }
    let backward = Planner.least(orders) {
      costs.backward(list(.backward, costs.groups, shadows, $0), overlaps: true, slowdown: slowdown)
    }
    return Choice(
      plan: .pairwise(costs.groups, shadows: volumes.shadows, forward: forward.order, backward: backward.order),
      seconds: forward.seconds + backward.seconds, volumes: volumes, costs: costs)
  }

  private enum Trip: Int { case forward, backward }

  /// The steps of a pairwise exchange: the same for all sets of so many shadows.
  private mutating func list(_ trip: Trip, _ groups: Groups, _ shadows: Int, _ order: Order) -> PlayedSteps {
    let key = ((groups.size * (traffic.experts + 1) + shadows) * Order.count + order.number) * 2 + trip.rawValue
    if let list = lists[key] { return list }
    let list =
      switch trip {
      case .forward: PlayedSteps(Steps.forward(groups, shadows: shadows, order).list)
      case .backward: PlayedSteps(Steps.backward(groups, shadows: shadows, order).list)
      }
    lists[key] = list
    return list
  }

  private static func least(_ orders: [Order], _ seconds: (Order) -> Seconds) -> (order: Order, seconds: Seconds) {
    var least = (order: orders[0], seconds: seconds(orders[0]))
    for order in orders.dropFirst() {
      let other = seconds(order)
      if other < least.seconds { least = (order, other) }
    }
    return least
  }

  /// The orders that matter most.
  private static func orders(_ volumes: Volumes) -> [Order] {
    volumes.shadows.isEmpty ? [Order()] : Order.Shadows.allCases.map { Order(shadows: $0) }
  }

  /// All orders of what is chosen.
  private mutating func refine(_ chosen: inout Choice) {
    var orders: [Order] = []
    for shadows in chosen.plan.shadows.isEmpty ? [.late] : Order.Shadows.allCases {
      for rows in Order.Rows.allCases {
        for returns in Order.Returns.allCases { orders.append(Order(shadows: shadows, rows: rows, returns: returns)) }
      }
    }
    let other = pairwise(chosen.costs, chosen.volumes, orders)
    if other.seconds < chosen.seconds { chosen = other }
  }

  /// All divisors of W, those that make two to four groups, and those of the places that workers share; not so small that
  /// rounds are too many to play. The largest first: it has the fewest steps. Then, of few workers, all others.
  private func groupSizes(_ request: PlanRequest) -> [Int] {
    let workers = cluster.workers
    guard request.schedule != .coarse else { return [] }
    guard request.groupSize == 0 else { return [min(request.groupSize, workers)] }
    var sizes = Set((1...workers).filter { workers % $0 == 0 })
    for groups in 2...4 where groups < workers { sizes.insert((workers + groups - 1) / groups) }
    for node in cluster.nodes where !node.seats.isEmpty { sizes.insert(node.seats.count) }
    let mostRounds = workers > Planner.manyWorkers ? Planner.manyWorkers / 2 : Planner.manyWorkers
    let playable = sizes.filter {
      let rounds = (workers + $0 - 1) / $0
      return rounds == 1 || (rounds <= mostRounds && rounds * traffic.experts <= Planner.mostOfRounds)
    }.sorted(by: >)
    return workers <= Planner.fewWorkers ? playable + (1...workers).filter { !sizes.contains($0) } : playable
  }

  private static let manyWorkers = 64
  /// Up to so many, every size is looked at.
  private static let fewWorkers = 8

  private func seconds(_ plan: Plan, _ costs: StepCosts) -> Seconds {
    costs.forward(PlayedSteps(plan.forward), overlaps: plan.overlaps, slowdown: cluster.slowdown)
      + costs.backward(PlayedSteps(plan.backward), overlaps: plan.overlaps, slowdown: cluster.slowdown)
  }
}
