import Testing

@testable import FasterMoE

/// What a plan takes in virtual time.
@Suite struct SimulatorTests {
  // MARK: Virtual time

  /// Seconds of a plan, forward and backward.
  static func seconds(_ plan: Plan, _ batch: Batch, _ shape: Shape, _ cluster: Cluster) -> Double {
    let volumes = Volumes(batch.traffic, shape, on: cluster, shadows: plan.shadows)
    volumes.fetchesAgain = plan.backward.contains { $0.action == .fetch(shadow: 0) }
    let memory = Scratch()
    defer { withExtendedLifetime((memory, volumes)) {} }
    let costs = StepCosts(plan.groups, volumes, in: memory)
    var total = 0.0
    for (steps, least) in [(plan.forward, costs.forward), (plan.backward, costs.backward)] {
      let timeline = Timeline(steps, costs, overlaps: plan.overlaps, slowdown: cluster.slowdown)
      let played = PlayedSteps(steps, in: memory)
      let seconds = least(played, plan.overlaps, cluster.slowdown, memory)
      #expect(seconds >= timeline.end)
      if plan.overlaps { #expect(seconds.value >= costs.leastExchange.value * (1 - rounding)) }
      total += seconds.value
      let unhindered = Timeline.end(of: played, costs, overlaps: plan.overlaps, slowdown: 1, in: memory)
      let expected = play(steps, costs, plan.overlaps, stretch: plan.overlaps ? costs.stretch : 1)
      #expect(abs(unhindered.value - expected) <= rounding * expected, "\(unhindered.value), not \(expected)")
      #expect(timeline.end.value >= expected * (1 - rounding))
    }
    return total
  }

  /// When all is over: message by message, from one range of seats to another, whose lanes are a dictionary.
  private static func play(_ steps: [Step], _ costs: StepCosts, _ overlaps: Bool, stretch: Double) -> Double {
    enum Lane: Hashable { case sends(Int), receives(Int), computes(Int) }
    var lanes: [Lane: Double] = [:]
    // By step and seat: what others of the step's worker wait for.
    var spans: [[Int: (start: Double, end: Double)]] = []
    let (groups, all) = (costs.groups, 0..<costs.groups.workers)
    for step in steps {
      var span: [Int: (start: Double, end: Double)] = [:]
      func cause(_ seat: Int) -> (start: Double, end: Double) {
        step.after < 0 ? (0, 0) : spans[step.after][seat] ?? (0, 0)
      }
      if step.action.communicates, !overlaps, step.after >= 0 {
        for seat in all {
          for lane in [Lane.sends(seat), .receives(seat)] { lanes[lane] = max(lanes[lane] ?? 0, cause(seat).end) }
        }
      }
      var moves: [(from: [Int], to: [Int], start: Double, end: Double)] = []
      /// `ready`: when who sends may, and when what is sent last is there; `tail`: what then still takes.
      func move(_ from: [Int], _ to: [Int], _ seconds: Double, _ ready: (Int) -> Double, last: Double = 0) {
        let free = from.map { max(lanes[.sends($0)] ?? 0, ready($0)) } + to.map { lanes[.receives($0)] ?? 0 }
        let start = free.max() ?? 0
        moves.append((from, to, start, max(start + seconds, last)))
      }
      switch step.action {
      case .send(let round):
        for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
          move(
            Array(groups.seats(of: group)), Array(groups.seats(of: groups.target(of: group, round: round))),
            costs.sends[round * groups.count + group] * stretch
          ) { cause($0).end }
        }
      case .giveBack(let round):
        for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
          let from = Array(groups.seats(of: groups.target(of: group, round: round)))
          let shares = from.map { costs.blockShares[round * all.count + $0] }
          let seconds = costs.returns[round * groups.count + group] * stretch
          move(
            from, Array(groups.seats(of: group)), seconds,
            {
              let made = cause($0)
              return overlaps && step.after >= 0
                ? made.start + (made.end - made.start) * costs.blockShares[round * all.count + $0] : made.end
            }, last: from.map { cause($0).end }.max()! + seconds * shares.max()!)
        }
      case .fetch(let shadow), .reduce(let shadow):
        let owner = costs.owners[shadow]
        var (first, seconds) = (owner, 0.0)
        if case .fetch = step.action {
          seconds = costs.fetches[shadow] * stretch
        } else {
          (first, seconds) = ((owner + 1) % all.count, costs.reduces[shadow] * stretch)
        }
        let last = (first + all.count - 1) % all.count
        move(all.filter { $0 != last }, all.filter { $0 != first }, seconds) { cause($0).end }
      case .compute, .computeShadow, .gradWeights, .gradShadowWeights:
        for seat in all {
          var (work, share) = (0.0, 1.0)
          switch step.action {
          case .compute(let round):
            (work, share) = (costs.computes[round * all.count + seat], costs.blockShares[round * all.count + seat])
          case .computeShadow(let shadow): work = costs.shadows[shadow * all.count + seat]
          case .gradShadowWeights(let shadow): work = costs.shadowWeights[shadow * all.count + seat]
          default: work = costs.gradWeights[seat]
          }
          let (given, free) = (cause(seat), lanes[.computes(seat)] ?? 0)
          if case .compute = step.action, overlaps, step.after >= 0 {
            let start = max(free, given.start + (given.end - given.start) * share)
            span[seat] = (start, max(start + work, given.end + work * share))
          } else {
            span[seat] = (max(free, given.end), max(free, given.end) + work)
          }
          lanes[.computes(seat)] = span[seat]!.end
        }
      }
      for move in moves {
        for seat in move.from { lanes[.sends(seat)] = move.end }
        for seat in move.to { lanes[.receives(seat)] = move.end }
        var isSend = true
        if case .giveBack = step.action { isSend = false }
        if case .reduce = step.action { isSend = false }
        for seat in isSend && overlaps ? move.to : move.to + move.from {
          let before = span[seat] ?? (move.start, move.end)
          span[seat] = (min(before.start, move.start), max(before.end, move.end))
        }
      }
      if step.action.communicates, !overlaps {
        // Whoever has no part in a step is past it all the same once it is past those before.
        for seat in all {
          let free = max(lanes[.sends(seat)] ?? 0, lanes[.receives(seat)] ?? 0)
          span[seat] = (span[seat]?.start ?? free, free)
        }
      }
      spans.append(span)
    }
    return lanes.values.max() ?? 0
  }

  /// Rounding of sums of some hundred terms.
  static let rounding = 1e-12

  @Test func coarseIsComputingPlusCommunicating() throws {
    try RandomPlans.withRandom(35, latency: 0) { numbers, cluster, batch, shape in
      let shadows = (0..<batch.traffic.experts).filter { _ in numbers.below(5) == 0 }
      let volumes = Volumes(batch.traffic, shape, on: cluster)
      for expert in shadows { volumes.shadow(expert) }
      let expected = volumes.roofline.semiIdeal.value
      let atOnce = Volumes(batch.traffic, shape, on: cluster, shadows: shadows).roofline.semiIdeal.value
      #expect(abs(atOnce - expected) <= Self.rounding * expected, "one by one or all at once")
      // Copies of two owners may move at once, in opposite directions or over different links.
      let got = Self.seconds(.coarse(workers: cluster.workers, shadows: shadows), batch, shape, cluster)
      #expect(got <= expected * (1 + Self.rounding), "\(got), not \(expected)")
      #expect(got >= volumes.leastSerial.value * (1 - Self.rounding), "less than \(volumes.leastSerial)")
      let owners = Set(shadows.map { batch.traffic.owner(of: $0) })
      if owners.count < 2 { #expect(got >= expected * (1 - Self.rounding), "\(got), not \(expected)") }
    }
  }

  /// Two workers, one expert each, both shadowed: copies of both move at once, then all compute, then the gradients move.
  @Test func coarseComputesOnceAllCopiesAreThere() throws {
    var document = Cluster.Document()
    document.places = [.init(name: "net")]
    for rank in 0..<2 {
      document.workers.append(
        .init(
          name: "w\(rank)", in: "net", up: .init(bandwidth: 1e6, latency: 0),
          flops: [.init(rows: 1, rate: FlopRate(1e9))]))
    }
    let shape = try Shape(model: 100, hidden: 50, experts: 2, choices: 1, activation: .gelu)
    let batch = Batch([[10, 30], [30, 10]])
    let copy = shape.expertBytes.value / 1e6
    let compute = shape.flops(rows: 40).value / 3 / 1e9
    let got = Self.seconds(.coarse(workers: 2, shadows: [0, 1]), batch, shape, try Cluster(document))
    #expect(abs(got - (2 * copy + 3 * compute)) <= Self.rounding * got, "\(got)")
  }

  @Test func fasterLinksAreNeverSlower() throws {
    try RandomPlans.withRandom(36) { numbers, cluster, batch, shape in
      let plan = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      var document = cluster.document
      let place = 1 + numbers.below(document.places.count - 1)
      document.places[place].up?.bandwidth = nil
      document.workers[0].down?.latency = 0
      let faster = try Cluster(document)
      let (before, after) = (
        Self.seconds(plan, batch, shape, cluster), Self.seconds(plan, batch, shape, faster)
      )
      #expect(after <= before * (1 + Self.rounding))
    }
  }

  @Test func twiceTheBytesAtTwiceTheRateTakeTheSameTime() throws {
    try RandomPlans.withRandom(37) { numbers, cluster, batch, shape in
      let plan = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      func twice(_ link: inout Cluster.Document.Link?) { link?.bandwidth? *= 2 }
      var document = cluster.document
      for place in document.places.indices {
        twice(&document.places[place].up)
        twice(&document.places[place].down)
      }
      for worker in document.workers.indices {
        twice(&document.workers[worker].up)
        twice(&document.workers[worker].down)
        // A model twice as wide has twice the bytes a row and an expert, and twice the flops.
        func faster(_ samples: [RateCurve.Sample]) -> [RateCurve.Sample] {
          samples.map { .init(rows: $0.rows, rate: FlopRate($0.rate.value * 2)) }
        }
        document.workers[worker].flops = faster(document.workers[worker].flops)
        document.workers[worker].weightFlops = document.workers[worker].weightFlops.map(faster)
        document.workers[worker].rowHandling? *= 2
      }
      for peer in (document.peers ?? []).indices {
        document.peers![peer].there.bandwidth? *= 2
        twice(&document.peers![peer].back)
      }
      let wide = try Shape(model: 128, hidden: 128, experts: shape.experts, choices: 1, activation: .gelu)
      let (before, after) = (
        Self.seconds(plan, batch, shape, cluster), Self.seconds(plan, batch, wide, try Cluster(document))
      )
      #expect(abs(after - before) <= Self.rounding * before)
    }
  }

  /// Whatever slows half, no plan takes more than half longer, and none less; the plan, before and after.
  private static func slowed(
    _ stream: UInt64, _ change: @escaping (inout Cluster.Document) -> Void,
    _ body: (Plan, _ before: Double, _ after: Double) throws -> Void
  ) throws {
    try RandomPlans.withRandom(stream) { numbers, cluster, batch, shape in
      var document = cluster.document
      change(&document)
      let slower = try Cluster(document)
      let any = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      for plan in [any, .coarse(workers: cluster.workers, shadows: [])] {
        let (before, after) = (seconds(plan, batch, shape, cluster), seconds(plan, batch, shape, slower))
        #expect(after >= before * (1 - rounding) && after <= 1.5 * before * (1 + rounding))
        try body(plan, before, after)
      }
    }
  }

  /// In a plan that overlaps messages take longer, as far as their workers compute; else they do not.
  @Test func messagesSlowDownWhileWorkersCompute() throws {
    var some = false
    try Self.slowed(39) {
      $0.messageSlowdown = 1.5
    } _: { plan, before, after in
      if !plan.overlaps { #expect(after == before) }
      some = some || after > before
    }
    #expect(some)
  }

  @Test func slowdownCountsWhileMessagesMove() throws {
    var some = false
    try Self.slowed(38) {
      $0.slowdown = 1.5
    } _: { plan, before, after in
      if plan == .coarse(workers: plan.groups.workers, shadows: []) {
        #expect(after <= before * (1 + Self.rounding), "nothing overlaps, nothing is slower")
      }
      some = some || after > before
    }
    #expect(some)
  }

  // MARK: One worker's part

  /// Every worker's steps follow what they wait for, its lanes do not overlap, and its rows are those of the batch.
  @Test func forecastsAreOfOneWorker() throws {
    try RandomPlans.withRandom(43, times: 60) { numbers, cluster, batch, shape in
      let plan = RandomPlans.randomPlan(&numbers, workers: cluster.workers, experts: batch.traffic.experts)
      let (traffic, workers) = (batch.traffic, cluster.workers)
      func stays(_ expert: Int) -> Bool { plan.shadows.contains(expert) }
      func between(_ source: Int, _ target: Int) -> Int {
        traffic.owned(by: target).filter { !stays($0) }.reduce(0) {
          $0 + Int(traffic.counts[source * traffic.experts + $1])
        }
      }
      var forward = Seconds(0)
      for rank in 0..<workers {
        let forecast = Forecast(plan, traffic, shape, on: cluster, of: rank)
        let own = (0..<traffic.experts).filter(stays).reduce(0) {
          $0 + Int(traffic.counts[rank * traffic.experts + $1])
        }
        let (out, into) = (
          (0..<workers).reduce(0) { $0 + ($1 == rank ? 0 : between(rank, $1)) },
          (0..<workers).reduce(0) { $0 + ($1 == rank ? 0 : between($1, rank)) }
        )
        for (trip, steps) in [(forecast.forward, plan.forward), (forecast.backward, plan.backward)] {
          #expect(trip.steps.map(\.action) == steps.map(\.action))
          let spans = [
            trip.steps.map(\.computes), trip.steps.map(\.sends), trip.steps.map(\.receives),
          ].map { lane in lane.filter { !$0.isEmpty } }
          for lane in spans {
            #expect(lane.allSatisfy { $0.upperBound <= trip.seconds })
            for (one, next) in zip(lane, lane.dropFirst()) { #expect(one.upperBound <= next.lowerBound) }
          }
          for (index, step) in steps.enumerated() where step.after >= 0 {
            let (cause, effect) = (trip.steps[step.after], trip.steps[index])
            guard !effect.computes.isEmpty, !cause.receives.isEmpty else { continue }
            // What comes block by block is computed so; nothing else begins before what it needs is whole.
            var isByBlocks = false
            if case .compute = step.action { isByBlocks = plan.overlaps }
            #expect(cause.receives.upperBound <= (isByBlocks ? effect.computes.upperBound : effect.computes.lowerBound))
            #expect(cause.receives.lowerBound <= effect.computes.lowerBound)
          }
          func sum(_ rows: (Forecast.Stretch) -> Int, _ isMeant: (Action) -> Bool) -> Int {
            trip.steps.filter { isMeant($0.action) }.reduce(0) { $0 + rows($1) }
          }
          func isSend(_ action: Action) -> Bool { if case .send = action { true } else { false } }
          func isReturn(_ action: Action) -> Bool { if case .giveBack = action { true } else { false } }
          func isCompute(_ action: Action) -> Bool {
            switch action {
            case .compute, .computeShadow: true
            default: false
            }
          }
          #expect(sum(\.leaving, isSend) == out && sum(\.arriving, isSend) == into)
          #expect(sum(\.leaving, isReturn) == into && sum(\.arriving, isReturn) == out)
          #expect(sum(\.computed, isCompute) == into + between(rank, rank) + own)
          #expect(
            trip.steps.filter { isSend($0.action) || isReturn($0.action) }.reduce(0) { $0 + $1.bytes.value }
              == Double(2 * (out + into)) * shape.rowBytes.value)
        }
        #expect(rank == 0 || forecast.forward.seconds == forward, "a trip takes all workers as long")
        forward = forecast.forward.seconds
      }
    }
  }

  /// Workers that share memory: what the report of a plan in place says.
  @Test func forecastsInPlaceTakeWhatTheirReportSays() throws {
    try RandomPlans.withRandom(44, times: 20) { numbers, _, batch, shape in
      let rates = (0..<batch.traffic.workers).map { _ in
        WorkerRates(
          ComputeRates(
            products: SIMD8(repeating: 1e9 * Double(1 + numbers.below(9))),
            weightGrads: SIMD8(repeating: 1e9 * Double(1 + numbers.below(9))), rowHandling: ByteRate(1e9)))
      }
      let report = PlanReport.inPlace(batch.traffic, shape: shape, rates: rates)
      let cluster = try #require(Cluster.inPlace(rates))
      let forecast = Forecast(
        .coarse(workers: cluster.workers, shadows: []), batch.traffic, shape, on: cluster, of: cluster.workers - 1)
      let got = (forecast.forward.seconds + forecast.backward.seconds).value
      #expect(abs(got - report.planned.value) <= Self.rounding * got, "\(got), not \(report.planned.value)")
    }
  }
}
