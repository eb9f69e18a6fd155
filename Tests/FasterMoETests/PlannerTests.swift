import Foundation
import Testing

@testable import FasterMoE

private func cluster(_ name: String) throws -> Cluster {
  let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  return try Cluster(Documents.read(Cluster.Document.self, from: root.appending(path: name).path))
}
private let johnny = try! cluster("Benchmarks/paper/johnny.json")
private let trevor = try! cluster("Benchmarks/paper/trevor.json")

/// An expert of the paper's: α = 2, two matrices, fp32.
private func paperShape(_ model: Int, on cluster: Cluster) throws -> Shape {
  try Shape(model: model, hidden: 2 * model, experts: cluster.workers, choices: 2, activation: .gelu)
}

/// To the last digit that is printed.
private func isPrinted(_ value: Double, _ printed: Double, digits: Int) -> Bool {
  let scale = pow(10, Double(digits))
  return (value * scale).rounded() == (printed * scale).rounded()
}

@Suite struct PlannerTests {
  /// W_net/(M·W_local): 50/(8·88) on johnny; on trevor the slower of the two kinds of workers counts.
  @Test func remoteSharesBalanceAPlaceWithItsWorkers() throws {
    #expect(abs(johnny.remoteShare! - 50.0 / (8 * 88)) < 1e-12)
    #expect(abs(trevor.remoteShare! - 62.0 / (4 * 62)) < 1e-12)
    // Out of a processor of johnny over its own link, 180/(4·88); the other one's has no limit.
    let shares = [0, 4].map { seat in johnny.remoteShare(of: seat, leaving: johnny.nodes[seat].parent)! }
    #expect(shares.max()! == 1 && abs(shares.min()! - 180.0 / (4 * 88)) < 1e-12)
  }

  // MARK: The paper's clusters

  /// (cluster, model, batch, comm ms, comp ms, R_CC, 3 comp + 4 comm ms, P-bar TFLOP/s or nil)
  @Test func rooflineEqualsThePublishedSimulator() throws {
    let flat = Batch.flat(workers: 16, rows: 2048)
    let hot = Batch.hot(workers: 16, rows: 2048, share: 0.2)
    let wide = Batch.flat(workers: 64, rows: 4096)
    let cases: [(Cluster, Int, Batch, Double, Double, Double, Double, Double?)] = [
      (johnny, 1024, flat, 5.3687, 1.4939, 0.2783, 25.957, 1.9856),
      (johnny, 2048, flat, 10.7374, 5.9756, 0.5565, 60.876, 3.3865),
      (johnny, 4096, flat, 21.4748, 23.9024, 1.1130, 157.607, 5.2322),
      (johnny, 1024, hot, 6.1656, 4.8202, 0.7818, 39.123, 1.3174),
      (johnny, 2048, hot, 12.3313, 19.2807, 1.5636, 107.167, nil),
      (trevor, 1024, wide, 8.1180, 2.9878, 0.3680, 41.435, 2.4877),
    ]
    for (cluster, model, batch, comm, comp, ratio, step, rate) in cases {
      let roofline = Volumes(batch.traffic, try paperShape(model, on: cluster), on: cluster).roofline
      #expect(isPrinted(roofline.communicate.value / 4 * 1e3, comm, digits: 4), "\(roofline.communicate.value / 4e-3)")
      #expect(isPrinted(roofline.compute.value / 3 * 1e3, comp, digits: 4), "\(roofline.compute.value / 3e-3)")
      #expect(isPrinted(roofline.computeOverCommunicate, ratio, digits: 4), "\(roofline.computeOverCommunicate)")
      #expect(abs(roofline.stepRatio - 0.75 * roofline.computeOverCommunicate) < 1e-12)
      #expect(isPrinted(roofline.semiIdeal.value * 1e3, step, digits: 3), "\(roofline.semiIdeal.value * 1e3)")
      if let rate {
        let got = roofline.flopRatePerWorker(in: roofline.semiIdeal).value * 1e-12
        #expect(isPrinted(got, rate, digits: 4), "\(got)")
      }
    }
    // The lines of the roofline, and the bound of overlapping both all-to-alls with their computing.
    let roofline = Volumes(flat.traffic, try paperShape(1024, on: johnny), on: johnny).roofline
    let (ratio, peak) = (roofline.computeOverCommunicate, 11.5)
    #expect(isPrinted(peak * min(1, ratio), 3.2, digits: 4))
    #expect(isPrinted(peak * ratio / (ratio + 1), 2.5034, digits: 4))
    let (comp, comm) = (roofline.compute.value / 3, roofline.communicate.value / 4)
    #expect(isPrinted((comm + comp) / max(comm, comp), 1.2783, digits: 4))
    #expect(isPrinted((4 * comm + 3 * comp) / (max(2 * comm, comp) + max(2 * comm, 2 * comp)), 1.2087, digits: 4))
  }

  /// Broadcast of one expert; ring all-reduce of one and of all (data parallel), 2(n-1)/n of their bytes on every hop.
  @Test func ringsEqualThePublishedSimulator() throws {
    let cases: [(Cluster, Int, Double, Double, Double)] = [
      (johnny, 1024, 2.6844, 5.0332, 80.531), (johnny, 2048, 10.7374, 20.1327, 322.123),
      (johnny, 4096, 42.9497, 80.5306, 1288.490), (trevor, 1024, 2.4403, 4.8044, 307.481),
      (trevor, 2048, 9.7613, 19.2175, 1229.922),
    ]
    for (cluster, model, broadcast, reduce, all) in cases {
      let bytes = try paperShape(model, on: cluster).expertBytes
      let workers = Double(cluster.workers)
      func around(_ times: Double) -> Double { cluster.around(bytes * times, without: 0).value * 1e3 }
      #expect(isPrinted(around(1), broadcast, digits: 4), "\(around(1))")
      #expect(isPrinted(around(2 * (workers - 1) / workers), reduce, digits: 4))
      #expect(isPrinted(around(2 * (workers - 1)), all, digits: 3), "\(around(2 * (workers - 1)))")
    }
  }

  /// (batch, model, Algorithm 1's set, what it promises without and with it, simulated ms without and with it)
  @Test func algorithmOneEqualsTheReplay() throws {
    let flat = Batch.flat(workers: 16, rows: 2048)
    let hot = Batch.hot(workers: 16, rows: 2048, share: 0.2)
    let cases: [(Batch, Int, [Int], Double, Double, Double, Double)] = [
      (flat, 1024, [], 9.8504, 9.8504, 25.957, 25.957), (flat, 2048, [], 28.6642, 28.6642, 60.876, 60.876),
      (flat, 4096, [], 93.1821, 93.1821, 157.607, 157.607), (hot, 1024, [0], 31.7830, 10.0889, 39.123, 28.376),
      (hot, 2048, [0], 92.4870, 40.3558, 107.167, 76.930),
    ]
    for (batch, model, shadows, without, with, plain, shadowed) in cases {
      let shape = try paperShape(model, on: johnny)
      let set = Shadowing.paper(Demand(batch.traffic, shape, on: johnny))
      #expect(set.experts == shadows)
      #expect(isPrinted(set.without.value * 1e3, without, digits: 4))
      #expect(isPrinted(set.with.value * 1e3, with, digits: 4))
      var request = PlanRequest()
      (request.shadowing, request.schedule) = (.paper, .coarse)
      var planner = Planner(batch.traffic, shape, on: johnny)
      let report = try planner.plan(request).report
      #expect(isPrinted(report.plain.value * 1e3, plain, digits: 3), "\(report.plain.value * 1e3)")
      #expect(isPrinted(report.planned.value * 1e3, shadowed, digits: 3), "\(report.planned.value * 1e3)")
      // Of all prefixes none is better in this model.
      request.shadowing = .best
      #expect(try planner.plan(request).report.shadows == shadows.count)
    }
  }

  /// Gathers and sums all parameters three times, each over its link 2 n-1/n times: 120.8 ms on johnny by the formula,
  /// which counts a share of the ring that broadcasts one by one do not save.
  @Test func zeroTakesWhatItsCollectivesTake() throws {
    let batch = Batch.flat(workers: 16, rows: 2048)
    var planner = Planner(batch.traffic, try paperShape(1024, on: johnny), on: johnny)
    var request = PlanRequest()
    request.shadowing = .everyExpert
    let seconds = try planner.plan(request).report.planned.value * 1e3
    #expect(seconds > 120.8 && seconds < 120.8 * 16 / 15 + 4, "\(seconds)")
  }

  /// So many copies that two are played as one: that takes as long but for one bucket on its way.
  @Test func bucketsOfCopiesTakeWhatSingleCopiesTake() throws {
    let cluster = try Cluster(johnny.document.repeated(to: 2104))
    let size = cluster.workers
    let batch = Batch((0..<size).map { worker in (0..<size).map { ($0 * 7 + worker) % 40 == 0 ? 300 + $0 % 9 : 0 } })
    let shape = try paperShape(1024, on: cluster)
    let demand = Demand(batch.traffic, shape, on: cluster)
    let buckets = Volumes(everyExpertOf: demand)
    let single = Volumes(demand, shadows: Array(0..<size))
    single.fetchesAgain = true
    #expect(buckets.copiesAtOnce == 2 && single.copiesAtOnce == 1 && buckets.fetchesAgain)
    let seconds = [buckets, single].map { volumes in
      let memory = Scratch()
      defer { withExtendedLifetime(memory) {} }
      let costs = StepCosts(Groups(workers: size, size: size), volumes, in: memory)
      let plan = Plan.everyExpert(workers: size, experts: (size + volumes.copiesAtOnce - 1) / volumes.copiesAtOnce)
      let (forward, backward) = (PlayedSteps(plan.forward, in: memory), PlayedSteps(plan.backward, in: memory))
      return
        (costs.forward(forward, overlaps: true, slowdown: 1, in: memory)
        + costs.backward(backward, overlaps: true, slowdown: 1, in: memory)).value
    }
    #expect(abs(seconds[0] / seconds[1] - 1) < 3.0 / Double(size) * 2, "\(seconds)")
  }

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
