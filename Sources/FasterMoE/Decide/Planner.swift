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

  /// Most counts, W·E, and most entries of a table of rounds.
  private static let mostCounts = 1 << 24

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
  }

  package mutating func plan(_ request: PlanRequest) throws(Failure) -> (plan: Plan, report: PlanReport) {
    try request.check()
    let none = Volumes(traffic, shape, on: cluster)
    let plain = coarse(none, none.moving)
    // Of a request for pairwise exchange, the coarse plan is no answer.
    let known = request.schedule == .pairwise ? nil : plain
    var chosen: Choice
    switch request.shadowing {
    case .never: chosen = best([none], request, known)
    case .given: chosen = best([shadowing(request.shadows)], request, nil)
    case .paper: chosen = best([shadowing(paper)], request, nil)
    case .everyExpert: chosen = everyExpert(request)
    case .best: chosen = best(candidates(after: none, below: plain.seconds), request, known)
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
    return (chosen.plan, report)
  }

  private struct Choice {
    var plan: Plan
    var seconds: Seconds
    let volumes: Volumes
    let costs: StepCosts
  }

  // MARK: Shadows

  private var paper: [Int] { Shadowing.paper(traffic, shape, on: cluster).experts }

  private func shadowing(_ experts: [Int]) -> Volumes { Volumes(traffic, shape, on: cluster, shadows: experts) }

  /// No shadow, the paper's set, and the prefixes of the order by excess load whose bounds are least; by the least time
  /// that any schedule of each could take.
  private func candidates(after none: Volumes, below plain: Seconds) -> [Volumes] {
    let room = max(1, min(Planner.mostSets, Planner.mostPairs / (cluster.workers * cluster.workers)))
    var found: [(least: Seconds, volumes: Volumes)] = []
    func insert(_ volumes: Volumes) {
      let least = volumes.least
      found.insert((least, volumes), at: found.firstIndex { least < $0.least } ?? found.count)
    }
    var (volumes, affordable) = (none, plain)
    for expert in Shadowing.byExcess(traffic, on: cluster) {
      volumes.shadow(expert)
      // Copies only add up: once they alone take longer than some other set takes in all, so does what follows.
      guard volumes.leastCopying < affordable else { break }
      affordable = min(affordable, volumes.serial)
      if found.count == room {
        guard volumes.least < found[room - 1].least else { continue }
        found.removeLast()
      }
      insert(volumes)
    }
    let paper = self.paper
    if !paper.isEmpty, !found.contains(where: { $0.volumes.shadows == paper }) { insert(shadowing(paper)) }
    insert(none)
    return found.map(\.volumes)
  }

  /// Most prefixes whose schedules are played, and most pairs of workers over all of them: planning must stay small
  /// beside what it plans.
  private static let mostSets = 8
  private static let mostPairs = 1 << 20
  /// Most steps, each of all workers, that are played before what was found so far is good enough: twice rounds and shadows
  /// in every order.
  private static let mostPlayed = 1 << 19
  /// A plan that takes this many times what no other can beat is good enough.
  private static let enough = 1.005

  // MARK: Schedules

  private mutating func coarse(_ volumes: Volumes, _ moving: RowsBetween) -> Choice {
    let plan = Plan.coarse(workers: cluster.workers, shadows: volumes.shadows)
    let costs = simulator.costs(plan.groups, volumes, moving)
    return Choice(plan: plan, seconds: seconds(plan, costs), volumes: volumes, costs: costs)
  }

  private mutating func everyExpert(_ request: PlanRequest) -> Choice {
    var volumes = shadowing(Array(0..<traffic.experts))
    volumes.fetchesAgain = true
    let plan = Plan.everyExpert(request, workers: cluster.workers, experts: traffic.experts)
    let costs = simulator.costs(plan.groups, volumes, volumes.moving)
    return Choice(plan: plan, seconds: seconds(plan, costs), volumes: volumes, costs: costs)
  }

  /// The best schedule of the best of `sets`, which stand in the order of their least time; `known` is one already.
  private mutating func best(_ sets: [Volumes], _ request: PlanRequest, _ known: Choice?) -> Choice {
    var chosen = known
    let sizes = groupSizes(request)
    var played = 0
    for volumes in sets {
      // Nothing that follows can take less than this.
      func isEnough() -> Bool { chosen.map { $0.seconds < volumes.least * Planner.enough } ?? false }
      if isEnough() { break }
      let moving = volumes.moving
      if request.schedule != .pairwise, !volumes.shadows.isEmpty || known == nil {
        let other = coarse(volumes, moving)
        if chosen.map({ other.seconds < $0.seconds }) ?? true { chosen = other }
      }
      for size in sizes where !isEnough() && (chosen == nil || played < Planner.mostPlayed) {
        let groups = Groups(workers: cluster.workers, size: size)
        played += (groups.count + volumes.shadows.count) * cluster.workers
        let other = pairwise(simulator.costs(groups, volumes, moving), volumes, Planner.orders(volumes))
        if chosen.map({ other.seconds < $0.seconds }) ?? true { chosen = other }
      }
    }
    return chosen!
  }

  /// The best of `orders`, of each direction for itself: they follow one another.
  private func pairwise(_ costs: StepCosts, _ volumes: Volumes, _ orders: [Order]) -> Choice {
    let shadows = volumes.shadows.count
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
  private func refine(_ chosen: inout Choice) {
    var orders: [Order] = []
    for shadows in chosen.plan.shadows.isEmpty ? [.late] : Order.Shadows.allCases {
      for rows in Order.Rows.allCases {
        for returns in Order.Returns.allCases { orders.append(Order(shadows: shadows, rows: rows, returns: returns)) }
      }
    }
    let other = pairwise(chosen.costs, chosen.volumes, orders)
    if other.seconds < chosen.seconds { chosen = other }
  }

  /// All divisors of W, those that make two to four groups, and those of the places that workers share; not so small
  /// that rounds are too many to play. The largest first: it has the fewest steps.
  private func groupSizes(_ request: PlanRequest) -> [Int] {
    let workers = cluster.workers
    guard request.schedule != .coarse else { return [] }
    guard request.groupSize == 0 else { return [min(request.groupSize, workers)] }
    var sizes = Set((1...workers).filter { workers % $0 == 0 })
    for groups in 2...4 where groups < workers { sizes.insert((workers + groups - 1) / groups) }
    for node in cluster.nodes where !node.seats.isEmpty { sizes.insert(node.seats.count) }
    let mostRounds = workers > Planner.manyWorkers ? Planner.manyWorkers / 2 : Planner.manyWorkers
    return sizes.filter {
      let rounds = (workers + $0 - 1) / $0
      return rounds == 1 || (rounds <= mostRounds && rounds * traffic.experts <= Planner.mostCounts)
    }.sorted(by: >)
  }

  private static let manyWorkers = 64

  private func seconds(_ plan: Plan, _ costs: StepCosts) -> Seconds {
    costs.forward(plan.forward, overlaps: plan.overlaps, slowdown: cluster.slowdown)
      + costs.backward(plan.backward, overlaps: plan.overlaps, slowdown: cluster.slowdown)
  }
}
