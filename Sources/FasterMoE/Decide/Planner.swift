/// Chooses what a batch is to do: which experts are shadowed, in groups of how many rows move, in which order.
///
/// Every candidate is played on the Cluster, by a Timeline of its StepCosts; the one that takes least is the plan. Doing
/// nothing clever (no shadow, nothing overlapped) is always among them, so by its own model a plan is never slower than that.
/// The same values give the same plan on every worker: nothing is measured here.
package struct Planner {
  private let demand: Demand
  private let cluster: Cluster
  /// Without shadows.
  private let none: Volumes
  private var budget: PlayBudget
  /// Sizes of groups that are worth a look, in the order in which they are looked at.
  private var sizes: [Int] = []
  /// For `none`, and for what is looked at and forgotten.
  private let memory = Scratch()

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
    demand = Demand(traffic, shape, on: cluster)
    self.cluster = cluster
    none = Volumes(demand, in: memory)
    budget = PlayBudget(workers: cluster.workers, experts: traffic.experts)
  }

  package mutating func plan(_ request: PlanRequest) throws(Failure) -> (plan: Plan, report: PlanReport) {
    try request.check()
    let mark = memory.mark
    defer { memory.release(to: mark) }
    let plain = coarse(none)
    sizes = groupSizes(request)
    // Of a request for pairwise exchange, the coarse plan is no answer.
    let known = request.schedule == .pairwise ? nil : plain
    var chosen: Choice
    switch request.shadowing {
    case .never: chosen = best(ofAll: [candidate([])], request, known)
    case .given: chosen = best(ofAll: [candidate(request.shadows)], request, nil)
    case .paper: chosen = best(ofAll: [candidate(paper)], request, nil)
    case .everyExpert:
      let (plan, seconds, volumes) = everyExpert(request)
      return (plan, report(plan, seconds, volumes, plain))
    case .best:
      chosen = best(ofAll: candidates(below: plain.seconds), request, known)
      improve(&chosen, request)
    }
    let volumes = volumes(chosen.shadows)
    refine(&chosen, volumes)
    let plan = chosen.plan
    return (plan, report(plan, chosen.seconds, volumes, plain))
  }

  private func report(_ plan: Plan, _ seconds: Seconds, _ volumes: Volumes, _ plain: Choice) -> PlanReport {
    var report = PlanReport()
    let roofline = volumes.roofline
    report.shadows = plan.shadows.count
    report.groupSize = plan.groups.size
    report.steps = plan.steps
    report.plain = plain.seconds
    report.planned = seconds
    report.ideal = min(roofline.ideal, seconds)  // no less but for rounding
    report.semiIdeal = roofline.semiIdeal
    report.computeOverCommunicate = roofline.computeOverCommunicate
    report.stepRatio = roofline.stepRatio
    report.flopRatePerWorker = roofline.flopRatePerWorker(in: seconds)
    report.roofline = roofline
    return report
  }

  /// A plan as far as it is chosen, and what it takes.
  private struct Choice {
    var groups: Groups
    var shadows: [Int]
    /// nil for the coarse plan.
    var trips: (forward: Trip, backward: Trip)?
    var seconds: Seconds

    /// The best order of a direction among those that were played; any one, and a bound, where that ruled all out.
    typealias Trip = (order: Order, seconds: Seconds)

    var plan: Plan {
      guard let trips else { return .coarse(workers: groups.workers, shadows: shadows) }
      return .pairwise(groups, shadows: shadows, forward: trips.forward.order, backward: trips.backward.order)
    }
  }

  // MARK: Shadows

  private var paper: [Int] { Shadowing.paper(demand).experts }

  private func volumes(_ shadows: [Int]) -> Volumes {
    shadows.isEmpty ? none : Volumes(demand, shadows: shadows, in: memory)
  }

  /// A set of shadows, and what no schedule of it is faster than.
  private struct Candidate {
    let shadows: [Int]
    let least: Seconds
  }
  private func candidate(_ shadows: [Int]) -> Candidate {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    return Candidate(shadows: shadows, least: volumes(shadows).least)
  }

  /// No shadow, the paper's set, and the prefixes of the order by excess load whose bounds are least; by the least time
  /// that any schedule of each could take.
  private func candidates(below plain: Seconds) -> [Candidate] {
    let room = max(1, min(Planner.mostSets, Planner.mostPairs / (cluster.workers * cluster.workers)))
    let mark = memory.mark
    defer { memory.release(to: mark) }
    var found: [Candidate] = []
    func insert(_ set: Candidate) { found.insert(set, at: found.firstIndex { set.least < $0.least } ?? found.count) }
    var affordable = plain
    let volumes = Volumes(demand, in: memory)
    for expert in ByExcess(demand) {
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

  /// Most prefixes whose schedules are played, and most pairs of workers over all of them.
  private static let mostSets = 8
  private static let mostPairs = 1 << 20
  /// So many are played, whatever it takes.
  private static let fewestSets = 3
  /// A plan that takes this many times what no other can beat is good enough.
  private static let enough = 1.005

  // MARK: Schedules

  private func coarse(_ volumes: Volumes) -> Choice {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    let groups = Groups(workers: cluster.workers, size: cluster.workers)
    let lists = Steps.coarse(groups, shadows: volumes.shadows.count, fetchesAgain: false, in: memory)
    return Choice(
      groups: groups, shadows: volumes.shadows, trips: nil,
      seconds: seconds(lists, StepCosts(groups, volumes, in: memory), overlaps: false))
  }

  private func everyExpert(_ request: PlanRequest) -> (Plan, Seconds, Volumes) {
    let volumes = Volumes(everyExpertOf: demand)
    let groups = Groups(workers: cluster.workers, size: cluster.workers)
    // Where several copies are played as one, so are the steps of the plan.
    let copies = volumes.countOfCopies
    let lists =
      request.schedule == .coarse
      ? Steps.coarse(groups, shadows: copies, fetchesAgain: true, in: memory)
      : Steps.everyExpert(copies, in: memory)
    let seconds = seconds(lists, StepCosts(groups, volumes, in: memory), overlaps: request.schedule != .coarse)
    return (Plan.everyExpert(request, workers: cluster.workers, experts: demand.traffic.experts), seconds, volumes)
  }

  private func seconds(_ lists: (forward: Steps.List, backward: Steps.List), _ costs: StepCosts, overlaps: Bool)
    -> Seconds
  {
    let (forward, backward) = (PlayedSteps(lists.forward, in: memory), PlayedSteps(lists.backward, in: memory))
    return costs.forward(forward, overlaps: overlaps, slowdown: cluster.slowdown, in: memory)
      + costs.backward(backward, overlaps: overlaps, slowdown: cluster.slowdown, in: memory)
  }

  private mutating func best(ofAll sets: [Candidate], _ request: PlanRequest, _ known: Choice?) -> Choice {
    budget.begin(sets[0].least)
    return best(sets, request, known)
  }

  /// The best schedule of the best of `sets`, which stand in the order of their least time; `known` is one already.
  private mutating func best(_ sets: [Candidate], _ request: PlanRequest, _ known: Choice?) -> Choice {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    var chosen = known
    /// Nothing that overlaps such a set can take less.
    func isEnough(_ set: Candidate) -> Bool { chosen.map { $0.seconds < set.least * Planner.enough } ?? false }
    func choose(_ other: Choice) { if chosen.map({ other.seconds < $0.seconds }) ?? true { chosen = other } }

    // The first sets in groups of several sizes, each other one in the best of these; then in more, the best sets first.
    var best = sizes.first
    var tried: [(set: Candidate, volumes: Volumes, sizes: [Int], seconds: Seconds)] = []
    for (index, set) in sets.enumerated() where !isEnough(set) && (budget.left > 0 || index < Planner.fewestSets) {
      let volumes = volumes(set.shadows)
      let first = best.map { pairwise($0, volumes, below: chosen?.seconds) } ?? coarse(volumes)
      choose(first)
      var (done, least) = (best.map { [$0] } ?? [], first.seconds)
      if index < Planner.fewestSets {
        for size in sizes where size != best && isAffordable(size, volumes, 4) && !isEnough(set) {
          let other = pairwise(size, volumes, below: chosen?.seconds)
          choose(other)
          done.append(size)
          least = min(least, other.seconds)
        }
        if let chosen, chosen.trips != nil { best = chosen.groups.size }
      }
      tried.insert((set, volumes, done, least), at: tried.firstIndex { least < $0.seconds } ?? tried.count)
    }
    for (set, volumes, done, _) in tried {
      for size in sizes where !done.contains(size) && isAffordable(size, volumes, 1) && !isEnough(set) {
        choose(pairwise(size, volumes, below: chosen?.seconds))
      }
    }
    // Where messages slow down much beside computing.
    if request.schedule == .best, let first = tried.first?.volumes, first.leastSerial < chosen!.seconds {
      choose(coarse(first))
    }
    return chosen!
  }

  /// Prefixes of one order are not all sets: takes what is a little different for as long as that helps, where a plan is
  /// small enough to play many.
  private mutating func improve(_ chosen: inout Choice, _ request: PlanRequest) {
    let experts = demand.traffic.experts
    let mark = memory.mark
    defer { memory.release(to: mark) }
    var (expert, unchanged, volumes) = (0, 0, volumes(chosen.shadows))
    while unchanged < experts {
      let (before, shadows) = (chosen.seconds, chosen.shadows)
      for change in ShadowChange.all(of: expert, in: shadows) {
        budget.payBound()
        guard budget.left > playsOfRefining(chosen) else { return }
        let least: Seconds
        switch change {
        case .adding: least = volumes.least(with: expert, without: nil)
        case .replacing(let place): least = volumes.least(with: expert, without: shadows[place])
        case .leaving: least = volumes.least(with: nil, without: expert)
        case .moving: least = volumes.least(with: nil, without: nil)
        }
        guard least < chosen.seconds else { continue }
        chosen = best([Candidate(shadows: change.applied(expert, to: shadows), least: least)], request, chosen)
      }
      if chosen.seconds < before {
        memory.release(to: mark)
        volumes = self.volumes(chosen.shadows)
      }
      unchanged = chosen.seconds < before ? 0 : unchanged + 1
      expert = (expert + 1) % experts
    }
  }

  private mutating func pairwise(_ size: Int, _ volumes: Volumes, below limit: Seconds?) -> Choice {
    let groups = Groups(workers: cluster.workers, size: size)
    budget.payCosts(groups)
    return pairwise(groups, volumes, Planner.orders(volumes.shadows.isEmpty), nil, below: limit)
  }

  /// Whether groups of `size` take no more than one part in `parts` of the plays that are left.
  private func isAffordable(_ size: Int, _ volumes: Volumes, _ parts: Int) -> Bool {
    let groups = Groups(workers: cluster.workers, size: size)
    let trips = 2 * Planner.orders(volumes.shadows.isEmpty).count
    return budget.allows(groups, trips: trips, shadows: volumes.shadows.count, inParts: parts)
  }

  /// The best of `orders` and of what is `known`, of each direction for itself: they follow one another. What cannot be below
  /// `limit` is not played to its end, and said to take what it takes at least.
  private mutating func pairwise(
    _ groups: Groups, _ volumes: Volumes, _ orders: [Order], _ known: (forward: Choice.Trip, backward: Choice.Trip)?,
    below limit: Seconds?
  ) -> Choice {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    let (costs, shadows, slowdown) = (StepCosts(groups, volumes, in: memory), volumes.shadows.count, cluster.slowdown)
    let exchange = costs.leastExchange
    let (leastForward, leastBackward) = (max(volumes.leastForward, exchange), max(volumes.leastBackward, exchange))
    var choice = Choice(
      groups: groups, shadows: volumes.shadows, trips: ((Order(), leastForward), (Order(), leastBackward)),
      seconds: leastForward + leastBackward)
    if let limit, choice.seconds >= limit { return choice }
    let forward = least(orders, known?.forward, leastForward, groups, shadows) {
      let steps = PlayedSteps(Steps.forward(groups, shadows: shadows, $0, in: $1), in: $1)
      return costs.forward(steps, overlaps: true, slowdown: slowdown, in: $1)
    }
    choice.seconds = forward.seconds + leastBackward
    if let limit, choice.seconds >= limit { return choice }
    let backward = least(orders, known?.backward, leastBackward, groups, shadows) {
      let steps = PlayedSteps(Steps.backward(groups, shadows: shadows, $0, in: $1), in: $1)
      return costs.backward(steps, overlaps: true, slowdown: slowdown, in: $1)
    }
    choice.trips = (forward, backward)
    choice.seconds = forward.seconds + backward.seconds
    return choice
  }

  /// Until one takes no more than `bound`, as none takes less.
  private mutating func least(
    _ orders: [Order], _ known: Choice.Trip?, _ bound: Seconds, _ groups: Groups, _ shadows: Int,
    _ seconds: (Order, Scratch) -> Seconds
  ) -> Choice.Trip {
    var least = known ?? (orders[0], Seconds(.infinity))
    for order in orders where least.seconds.value > bound.value * Planner.same {
      let mark = memory.mark
      let other = seconds(order, memory)
      memory.release(to: mark)
      budget.payTrip(groups, shadows: shadows)
      if other < least.seconds { least = (order, other) }
    }
    return least
  }
  /// Two times whose quotient is less are the same but for rounding.
  private static let same = 1 + 1e-9

  /// The orders that matter most.
  private static func orders(_ isWithoutShadows: Bool) -> [Order] { isWithoutShadows ? plainOrders : shadowOrders }
  private static let plainOrders = [Order()]
  private static let shadowOrders = Order.Shadows.allCases.map { Order(shadows: $0) }
  /// All others.
  private static func otherOrders(_ isWithoutShadows: Bool) -> [Order] {
    isWithoutShadows ? otherPlainOrders : otherShadowOrders
  }
  private static let otherPlainOrders = Order.all(withoutShadows: true).filter { !plainOrders.contains($0) }
  private static let otherShadowOrders = Order.all(withoutShadows: false).filter { !shadowOrders.contains($0) }

  /// All other orders of what is chosen.
  private mutating func refine(_ chosen: inout Choice, _ volumes: Volumes) {
    guard chosen.groups.count > 1 else { return }
    let orders = Planner.otherOrders(chosen.shadows.isEmpty)
    let other = pairwise(chosen.groups, volumes, orders, chosen.trips, below: chosen.seconds)
    if other.seconds < chosen.seconds { chosen = other }
  }
  private func playsOfRefining(_ chosen: Choice) -> Int {
    guard chosen.groups.count > 1 else { return 0 }
    let trips = 2 * Planner.otherOrders(chosen.shadows.isEmpty).count
    return trips * budget.trip(chosen.groups, shadows: chosen.shadows.count)
  }

  /// All divisors of W, those that make two to four groups, and those of the places that workers share; not so small that
  /// rounds are too many to play. The largest first: it has the fewest steps. Then, of few workers, all others.
  private func groupSizes(_ request: PlanRequest) -> [Int] {
    let workers = cluster.workers
    guard request.schedule != .coarse else { return [] }
    guard request.groupSize == 0 else { return [min(request.groupSize, workers)] }
    var isWorth = (0...workers).map { $0 > 0 && workers % $0 == 0 }
    for groups in 2...4 where groups < workers { isWorth[(workers + groups - 1) / groups] = true }
    for node in cluster.nodes where !node.seats.isEmpty { isWorth[node.seats.count] = true }
    let mostRounds = workers > Planner.manyWorkers ? Planner.manyWorkers / 2 : Planner.manyWorkers
    var sizes: [Int] = []
    for size in stride(from: workers, to: 0, by: -1) where isWorth[size] {
      let rounds = (workers + size - 1) / size
      guard rounds == 1 || (rounds <= mostRounds && rounds * demand.traffic.experts <= Planner.mostOfRounds) else {
        break
      }
      sizes.append(size)
    }
    if workers <= Planner.fewWorkers { for size in 1...workers where !isWorth[size] { sizes.append(size) } }
    // Of many workers a new size is much to look at: first those that are most often best.
    func distance(_ size: Int) -> Double {
      let ratio = Double(workers) / (Double(size) * Planner.usualGroups)
      return max(ratio, 1 / ratio)
    }
    if workers > Planner.someWorkers { sizes.sort { (distance($0), $1) < (distance($1), $0) } }
    return sizes
  }

  private static let manyWorkers = 64
  private static let someWorkers = 512
  private static let usualGroups = 8.0
  /// Up to so many, every size is looked at.
  private static let fewWorkers = 8
}
