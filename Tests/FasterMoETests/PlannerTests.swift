import Foundation
import Testing

@testable import FasterMoE

@Suite struct PlannerTests {
  // MARK: Any cluster and batch

  @Test func seatsFollowTheTree() throws {
    try RandomPlans.withRandom(31) { _, cluster, _, _ in
      #expect(cluster.ranks.sorted() == Array(0..<cluster.workers))
      for rank in 0..<cluster.workers { #expect(cluster.ranks[cluster.seats[rank]] == rank) }
      for node in cluster.nodes {
        #expect(cluster.nodes[node.parent].seats.contains(node.seats.lowerBound) || node.seats.isEmpty)
      }
      for a in 0..<cluster.workers {
        for b in 0..<cluster.workers {
          let top = cluster.meeting(a, b)
          #expect(cluster.nodes[top].seats.contains(a) && cluster.nodes[top].seats.contains(b))
          #expect(a != b || top == a, "the lowest")
        }
      }
    }
  }

  /// Every round's loads equal the sum over all flows of the links that each one walks.
  @Test func loadsEqualEveryFlowForItself() throws {
    try RandomPlans.withRandom(32) { numbers, cluster, batch, shape in
      let groups = Groups(workers: cluster.workers, size: 1 + numbers.below(cluster.workers))
      let shadows = (0..<batch.traffic.experts).filter { _ in numbers.below(3) == 0 }
      let memory = Scratch()
      let loads = LinkLoads(Demand(batch.traffic, shape, on: cluster), without: shadows, groups, in: memory)
      var (up, down, peers) = (loads.up.map { _ in 0.0 }, loads.down.map { _ in 0.0 }, loads.peers.map { _ in 0.0 })
      var sent = loads.sent.map { _ in 0.0 }
      for source in 0..<cluster.workers {
        for target in 0..<cluster.workers where target != source {
          let owner = cluster.ranks[target]
          let rows = batch.traffic.owned(by: owner).filter { !shadows.contains($0) }.reduce(0.0) {
            $0 + Double(batch.traffic.counts[cluster.ranks[source] * batch.traffic.experts + $1])
          }
          let (from, to) = (groups.group(of: source), groups.group(of: target))
          let round = groups.round(from: from, to: to)
          #expect(groups.target(of: from, round: round) == to && groups.source(of: to, round: round) == from)
          sent[round * groups.count + from] += rows
          cluster.walk(
            from: source, to: target, up: { up[round * cluster.nodes.count + $0] += rows },
            down: { down[round * cluster.nodes.count + $0] += rows },
            peer: { peers[round * cluster.peers.count + $0] += rows })
        }
      }
      withExtendedLifetime(memory) {
        #expect(Array(loads.up) == up && Array(loads.down) == down)
        #expect(Array(loads.peers) == peers && Array(loads.sent) == sent)
      }
    }
  }

  /// What a set of shadows is bound by, found from another set by what is changed, is what it is bound by for itself.
  @Test func boundsOfNeighboursAreThoseOfTheirSets() throws {
    try RandomPlans.withRandom(34) { numbers, cluster, batch, shape in
      let demand = Demand(batch.traffic, shape, on: cluster)
      let shadows = (0..<batch.traffic.experts).filter { _ in numbers.below(3) == 0 }
      let volumes = Volumes(demand, shadows: shadows)
      let before = volumes.least
      for expert in 0..<batch.traffic.experts {
        let isShadow = shadows.contains(expert)
        let left = isShadow ? expert : shadows.isEmpty ? nil : shadows[numbers.below(shadows.count)]
        let taken = isShadow ? nil : expert
        let others = shadows.filter { $0 != left } + (taken.map { [$0] } ?? [])
        let (expected, got) = (
          Volumes(demand, shadows: others).least.value, volumes.least(with: taken, without: left).value
        )
        #expect(abs(got - expected) <= SimulatorTests.rounding * volumes.serial.value, "\(got), not \(expected)")
      }
      #expect(volumes.least == before && volumes.shadows == shadows)
    }
  }

  /// Everything that a batch needs is done once, after what it needs.
  @Test func plansAreWhole() throws {
    try RandomPlans.withRandom(33, times: 200) { numbers, cluster, batch, _ in
      let plan = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      let refetches = plan.backward.contains { $0.action == .fetch(shadow: 0) }
      for (steps, isBackward) in [(plan.forward, false), (plan.backward, true)] {
        var place: [Int: Int] = [:]
        func index(_ action: Action) -> Int? { steps.firstIndex { $0.action == action } }
        for (at, step) in steps.enumerated() {
          #expect(step.after < at && index(step.action) == at, "once, and after what stands before it")
          if step.after >= 0 { #expect(steps[step.after].action.communicates != step.action.communicates) }
          place[at] = at
        }
        /// `first` is over on a worker before it begins `then`, by lanes and dependencies alone.
        func precedes(_ first: Action, _ then: Action) -> Bool {
          guard let from = index(first), let to = index(then) else { return false }
          var reached = [to], seen = Set<Int>()
          while let at = reached.popLast() {
            if at == from { return true }
            guard seen.insert(at).inserted else { continue }
            if steps[at].after >= 0 { reached.append(steps[at].after) }
            let lane = steps[at].action.communicates
            if let before = steps[..<at].lastIndex(where: { $0.action.communicates == lane }) { reached.append(before) }
          }
          return false
        }
        let moves = plan.shadows.count < batch.traffic.experts || steps.contains { $0.action == .compute(round: 0) }
        for round in 0..<(moves ? plan.groups.count : 0) {
          #expect(index(.compute(round: round)) != nil)
          guard round > 0 || plan.groups.size > 1 else { continue }
          #expect(precedes(.send(round: round), .compute(round: round)))
          #expect(precedes(.compute(round: round), .giveBack(round: round)))
          if isBackward { #expect(precedes(.compute(round: round), .gradWeights)) }
        }
        for shadow in plan.shadows.indices {
          if !isBackward || refetches { #expect(precedes(.fetch(shadow: shadow), .computeShadow(shadow))) }
          if isBackward {
            #expect(precedes(.computeShadow(shadow), .gradShadowWeights(shadow)))
            #expect(precedes(.gradShadowWeights(shadow), .reduce(shadow: shadow)))
          }
        }
      }
    }
  }

  /// Workers that play a plan at any pace, each waiting for its partners at every step, all come to its end.
  @Test func nobodyWaitsForWhatCannotCome() throws {
    try RandomPlans.withRandom(34, times: 100) { numbers, cluster, batch, _ in
      let plan = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      for steps in [plan.forward, plan.backward] {
        let lanes = [true, false].map { lane in steps.indices.filter { steps[$0].action.communicates == lane } }
        var next = Array(repeating: [0, 0], count: cluster.workers)
        var done = Array(repeating: Set<Int>(), count: cluster.workers)
        func reached(_ seat: Int, _ lane: Int, _ step: Int) -> Bool {
          next[seat][lane] < lanes[lane].count && lanes[lane][next[seat][lane]] == step
            && (steps[step].after < 0 || done[seat].contains(steps[step].after))
        }
        func partners(_ seat: Int, _ action: Action) -> [Int] {
          let group = plan.groups.group(of: seat)
          switch action {
          case .send(let round), .giveBack(let round):
            return [plan.groups.target(of: group, round: round), plan.groups.source(of: group, round: round)].flatMap {
              Array(plan.groups.seats(of: $0))
            }
          case .fetch, .reduce: return Array(0..<cluster.workers)
          default: return []
          }
        }
        /// One step of a lane, if this worker and its partners have reached it; who is past it has done its part.
        func play(_ seat: Int, _ lane: Int) -> Bool {
          guard next[seat][lane] < lanes[lane].count else { return false }
          let step = lanes[lane][next[seat][lane]]
          let met = partners(seat, steps[step].action).allSatisfy { done[$0].contains(step) || reached($0, lane, step) }
          guard reached(seat, lane, step), met else { return false }
          done[seat].insert(step)
          next[seat][lane] += 1
          return true
        }
        // In any order for a while; then everyone in turn, until nobody can go on.
        for _ in 0..<steps.count * cluster.workers { _ = play(numbers.below(cluster.workers), numbers.below(2)) }
        while (0..<2 * cluster.workers).contains(where: { play($0 / 2, $0 % 2) }) {}
        #expect(done.allSatisfy { $0.count == steps.count })
      }
    }
  }

  // MARK: Planning

  @Test func aPlanDoesNotDependOnEarlierOnes() throws {
    try RandomPlans.withRandom(48, times: 60, slower: 100) { _, cluster, batch, shape in
      var planner = Planner(batch.traffic, shape, on: cluster)
      let fresh = try planner.plan(PlanRequest())
      for shadowing in [PlanRequest.Shadowing.never, .paper, .everyExpert] {
        var request = PlanRequest()
        request.shadowing = shadowing
        _ = try planner.plan(request)
      }
      let again = try planner.plan(PlanRequest())
      #expect(fresh.plan == again.plan && fresh.report.planned == again.report.planned)
    }
  }

  @Test func plansAreNeverSlowerThanPlain() throws {
    try RandomPlans.withRandom(39, times: 150, slower: 100) { _, cluster, batch, shape in
      var (planner, another) = (
        Planner(batch.traffic, shape, on: cluster), Planner(batch.traffic, shape, on: cluster)
      )
      let (plan, report) = try planner.plan(PlanRequest())
      #expect(
        report.planned <= report.plain && report.ideal.value <= report.planned.value * (1 + SimulatorTests.rounding))
      var request = PlanRequest()
      request.shadowing = .paper
      // Where a plan is good enough, the rest is not tried.
      #expect(try report.planned.value <= planner.plan(request).report.planned.value * 1.005)
      #expect(report.shadows == plan.shadows.count && report.steps == plan.forward.count + plan.backward.count)
      #expect(try another.plan(PlanRequest()).plan == plan, "the same values, the same plan")
      #expect(
        abs(SimulatorTests.seconds(plan, batch, shape, cluster) - report.planned.value)
          <= SimulatorTests.rounding * max(1, report.planned.value))
    }
  }

  /// Steps of milliseconds, for which few plans are played.
  @Test func plansOfShortStepsAreGoodEnough() throws {
    var (ours, papers) = (0.0, 0.0)
    try RandomPlans.withRandom(39, times: 150) { _, cluster, batch, shape in
      var planner = Planner(batch.traffic, shape, on: cluster)
      let report = try planner.plan(PlanRequest()).report
      var request = PlanRequest()
      request.shadowing = .paper
      let paper = try planner.plan(request).report.planned.value
      #expect(report.planned <= report.plain && report.planned.value <= 1.15 * paper)
      ours += report.planned.value
      papers += paper
    }
    #expect(ours <= 0.95 * papers)
  }

  /// Planning takes a share of the step, which for some clusters takes longer than anybody lives.
  @Test func endlessStepsArePlannedInTime() throws {
    try RandomPlans.withRandom(42, times: 10, slower: 1e60) { _, cluster, batch, shape in
      var planner = Planner(batch.traffic, shape, on: cluster)
      let report = try planner.plan(PlanRequest()).report
      #expect(report.planned <= report.plain && report.planned.value > 1e50)
    }
  }

  /// Against every set of shadows, group size and order.
  @Test func plansAreNearlyTheBestThereAre() throws {
    try RandomPlans.withRandom(40, times: 30, slower: 100) { _, cluster, batch, shape in
      let (workers, experts) = (cluster.workers, batch.traffic.experts)
      guard experts <= 6 else { return }
      var least = Double.infinity
      for set in 0..<1 << experts {
        let shadows = (0..<experts).filter { set >> $0 & 1 == 1 }
        for size in 1...workers {
          for shadowOrder in Order.Shadows.allCases {
            for rows in Order.Rows.allCases {
              let order = Order(shadows: shadowOrder, rows: rows)
              let plan = Plan.pairwise(
                Groups(workers: workers, size: size), shadows: shadows, forward: order, backward: order)
              least = min(least, SimulatorTests.seconds(plan, batch, shape, cluster))
            }
          }
        }
      }
      var planner = Planner(batch.traffic, shape, on: cluster)
      let planned = try planner.plan(PlanRequest()).report.planned.value
      #expect(planned <= 1.01 * least, "\(planned) s, but \(least) s can be done")
    }
  }

  @Test func shadowsWhereTheyPayAndNowhereElse() throws {
    let flat = Batch.flat(workers: 16, rows: 2048)
    let shape = try paperShape(1024, on: johnny)
    var planner = Planner(flat.traffic, shape, on: johnny)
    #expect(try planner.plan(PlanRequest()).plan.shadows.isEmpty, "balanced, and copies are costly")
    let one = Batch(Array(repeating: [2048] + Array(repeating: 0, count: 15), count: 16))
    var document = johnny.document
    for place in document.places.indices { document.places[place].up = nil }
    for worker in document.workers.indices { document.workers[worker].up = nil }
    let free = try Cluster(document)
    planner = Planner(one.traffic, shape, on: free)
    let (plan, report) = try planner.plan(PlanRequest())
    #expect(plan.shadows == [0] && abs(report.planned.value * 16 - report.plain.value) < 1e-9)
    #expect(report.computeOverCommunicate == .infinity)
    // Four experts at a fifth each: one alone does not pay, all four do, which Algorithm 1 does not find.
    let four = Batch(Array(repeating: Array(repeating: 410, count: 4) + Array(repeating: 34, count: 12), count: 16))
    planner = Planner(four.traffic, shape, on: johnny)
    var paper = PlanRequest()
    paper.shadowing = .paper
    let (ours, theirs) = (try planner.plan(PlanRequest()), try planner.plan(paper))
    #expect(ours.plan.shadows.sorted() == [0, 1, 2, 3] && ours.report.planned <= theirs.report.planned)
  }

  @Test func requestsAreHonoured() throws {
    try RandomPlans.withRandom(41, times: 20) { numbers, cluster, batch, shape in
      let experts = batch.traffic.experts
      var planner = Planner(batch.traffic, shape, on: cluster)
      for schedule in [PlanRequest.Schedule.best, .coarse, .pairwise] {
        var request = PlanRequest()
        request.schedule = schedule
        request.shadowing = .given
        request.shadows = (0..<experts).filter { _ in numbers.below(2) == 0 }
        let given = try planner.plan(request).plan
        #expect(given.shadows == request.shadows)
        request.shadowing = .paper
        let demand = Demand(batch.traffic, shape, on: cluster)
        #expect(try planner.plan(request).plan.shadows == Shadowing.paper(demand).experts)
        request.shadowing = .never
        request.groupSize = 1 + numbers.below(cluster.workers + 2)
        let plan = try planner.plan(request).plan
        #expect(plan.shadows.isEmpty)
        if schedule == .pairwise { #expect(plan.groups.size == min(request.groupSize, cluster.workers)) }
        if schedule == .coarse { #expect(plan == .coarse(workers: cluster.workers, shadows: [])) }
        request.shadowing = .everyExpert
        #expect(try planner.plan(request).plan.shadows == Array(0..<experts))
        request.groupSize = -1
        #expect(throws: Failure.self) { try planner.plan(request) }
      }
    }
  }

  @Test func documentsComeBackAsTheyWent() throws {
    let path = FileManager.default.temporaryDirectory.appending(path: "fastermoe-\(getpid()).json").path
    defer { try? FileManager.default.removeItem(atPath: path) }
    try RandomPlans.withRandom(42, times: 20) { _, cluster, _, _ in
      try Documents.write(cluster.document, to: path)
      #expect(try Documents.read(Cluster.Document.self, from: path) == cluster.document)
    }
  }

  @Test func curvesLieBetweenTheirSamples() {
    let measured = ComputeRates(
      products: SIMD8(1, 2, 4, 6, 8, 9, 10, 12), weightGrads: SIMD8(repeating: 1), rowHandling: ByteRate(1))
    let curve = WorkerRates(measured).products
    #expect(curve.rate(rows: 1).value == 1 && curve.rate(rows: 4).value == 2 && curve.rate(rows: 5000).value == 12)
    #expect(abs(curve.rate(rows: 2).value - 1.5) < 1e-12, "half way by the logarithm")
    #expect(RateCurve([.init(rows: 7, rate: FlopRate(3))]).rate(rows: 1).value == 3)
    #expect(curve.peak.value == 12)
  }

  /// However far a rate falls from one sample to the next.
  @Test(arguments: [(1, 1e15, 2, 1e-3), (3, 1e15, 7, 1e-3), (2, 6e11, 900, 1e-4), (5, 1e-3, 4000, 1e15)])
  func steepCurvesStayBetweenTheirSamples(from: Int, high: Double, to: Int, low: Double) {
    let curve = RateCurve([.init(rows: from, rate: FlopRate(high)), .init(rows: to, rate: FlopRate(low))])
    for rows in from...to {
      let rate = curve.rate(rows: rows).value
      #expect(rate >= min(high, low) && rate <= max(high, low), "\(rows) rows: \(rate)")
    }
    #expect(curve.rate(rows: from).value == high && curve.rate(rows: to).value == low)
  }
}
