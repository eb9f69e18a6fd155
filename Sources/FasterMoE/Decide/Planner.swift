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
    case .never: chosen = best(ofAll: [none], request, known)
    case .given: chosen = best(ofAll: [shadowing(request.shadows)], request, nil)
    case .paper: chosen = best(ofAll: [shadowing(paper)], request, nil)
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

  /// No shadow, the paper's set, and the prefixes of the order by excess load whose bounds are least; by the least time
  /// that any schedule of each could take.
  private func candidates(below plain: Seconds) -> [Volumes] {
    let room = max(1, min(Planner.mostSets, Planner.mostPairs / (cluster.workers * cluster.workers)))
    var found: [(least: Seconds, shadows: ArraySlice<Int>)] = []
    func insert(_ least: Seconds, _ shadows: ArraySlice<Int>) {
      found.insert((least, shadows), at: found.firstIndex { least < $0.least } ?? found.count)
    }
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
      insert(least, volumes.shadows[...])
    }
    let paper = self.paper
    if !paper.isEmpty, !found.contains(where: { $0.shadows.elementsEqual(paper) }) {
      insert(shadowing(paper).least, paper[...])
    }
    insert(none.least, [])
    return found.map { $0.shadows.isEmpty ? none : shadowing(Array($0.shadows)) }
  }

  /// Most prefixes whose schedules are played, and most pairs of workers over all of them: planning must stay small
  /// beside what it plans.
  private static let mostSets = 8
  private static let mostPairs = 1 << 20
  /// So many are played, whatever it takes.
  private static let fewestSets = 3
  /// Which share of a step planning may take, at so many seconds for each play of a worker's part in a step.
  private static let share = 0.005
  private static let secondsEach = Seconds(2e-8)
  /// A third of a millisecond: many workers with few rows have short steps that still want good plans.
  private static let fewestPlays = 1 << 14
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

  private mutating func best(ofAll sets: [Volumes], _ request: PlanRequest, _ known: Choice?) -> Choice {
    plays = max(Planner.fewestPlays, Int(sets[0].least * Planner.share / Planner.secondsEach))
    return best(sets, request, known)
  }

  /// The best schedule of the best of `sets`, which stand in the order of their least time; `known` is one already.
  private mutating func best(_ sets: [Volumes], _ request: PlanRequest, _ known: Choice?) -> Choice {
    var chosen = known
    /// Nothing that overlaps `volumes` can take less than this.
    func isEnough(_ volumes: Volumes) -> Bool { chosen.map { $0.seconds < volumes.least * Planner.enough } ?? false }
    func choose(_ other: Choice) { if chosen.map({ other.seconds < $0.seconds }) ?? true { chosen = other } }

    // Every set in the fewest rounds, then what was best in more.
    let sizes = groupSizes(request)
    var tried: [(seconds: Seconds, volumes: Volumes, moving: RowsBetween)] = []
    for (index, volumes) in sets.enumerated() where !isEnough(volumes) && (plays > 0 || index < Planner.fewestSets) {
      let moving = volumes.moving
      let first = sizes.first.map { pairwise($0, volumes, moving) } ?? coarse(volumes, moving)
      choose(first)
      tried.insert((first.seconds, volumes, moving), at: tried.firstIndex { first.seconds < $0.seconds } ?? tried.count)
    }
    for (_, volumes, moving) in tried {
      for size in sizes.dropFirst() where plays > 0 && !isEnough(volumes) { choose(pairwise(size, volumes, moving)) }
    }
    // Where messages slow down much beside computing.
    if request.schedule == .best, let (_, volumes, moving) = tried.first { choose(coarse(volumes, moving)) }
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
        plays -= workers * (workers + experts)
        guard plays > 0 else { return }
        let volumes = shadowing(shadows)
        if volumes.least < chosen.seconds { chosen = best([volumes], request, chosen) }
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
    return pairwise(simulator.costs(groups, volumes, moving), volumes, Planner.orders(volumes))
  }

  private mutating func pairwise(_ costs: StepCosts, _ volumes: Volumes, _ orders: [Order]) -> Choice {
    let shadows = volumes.shadows.count
    plays -= orders.count * (3 * costs.groups.count + 3 * shadows) * 2 * cluster.workers
    let forward = Planner.least(orders) {
      costs.forward(
        Steps.forward(costs.groups, shadows: shadows, $0).list, overlaps: true, slowdown: cluster.slowdown)
    }
    let backward = Planner.least(orders) {
      costs.backward(
        Steps.backward(costs.groups, shadows: shadows, $0).list, overlaps: true, slowdown: cluster.slowdown)
    }
    return Choice(
      plan: .pairwise(costs.groups, shadows: volumes.shadows, forward: forward.order, backward: backward.order),
      seconds: forward.seconds + backward.seconds, volumes: volumes, costs: costs)
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

  /// All divisors of W (of few workers every size), those that make two to four groups, and those of the places that workers share; not so small
  /// that rounds are too many to play. The largest first: it has the fewest steps.
  private func groupSizes(_ request: PlanRequest) -> [Int] {
    let workers = cluster.workers
    guard request.schedule != .coarse else { return [] }
    guard request.groupSize == 0 else { return [min(request.groupSize, workers)] }
    var sizes = Set((1...workers).filter { workers % $0 == 0 || workers <= Planner.fewWorkers })
    for groups in 2...4 where groups < workers { sizes.insert((workers + groups - 1) / groups) }
    for node in cluster.nodes where !node.seats.isEmpty { sizes.insert(node.seats.count) }
    let mostRounds = workers > Planner.manyWorkers ? Planner.manyWorkers / 2 : Planner.manyWorkers
    return sizes.filter {
      let rounds = (workers + $0 - 1) / $0
      return rounds == 1 || (rounds <= mostRounds && rounds * traffic.experts <= Planner.mostOfRounds)
    }.sorted(by: >)
  }

  private static let manyWorkers = 64
  /// Up to so many, every size is looked at.
  private static let fewWorkers = 8

  private func seconds(_ plan: Plan, _ costs: StepCosts) -> Seconds {
    costs.forward(plan.forward, overlaps: plan.overlaps, slowdown: cluster.slowdown)
      + costs.backward(plan.backward, overlaps: plan.overlaps, slowdown: cluster.slowdown)
  }
}
