/// When one worker is expected to begin and end every step of a plan, and what moves or is computed in it.
package struct Forecast {
  package struct Stretch {
    package let action: Action
    /// From the beginning of the trip: when it computes, or when messages leave it and reach it; empty where none do.
    package let computes, sends, receives: Range<Seconds>
    /// Rows that leave this worker for others, that come to it from others, and that it computes.
    package fileprivate(set) var leaving = 0
    package fileprivate(set) var arriving = 0
    package fileprivate(set) var computed = 0
    /// Sent and received.
    package fileprivate(set) var bytes = Bytes(0)
  }

  package struct Trip {
    /// In the order of the plan.
    package let steps: [Stretch]
    /// When the last worker is done, or the busiest link.
    package let seconds: Seconds
  }

  package let forward: Trip
  package let backward: Trip

  /// O(steps·W + W² + W·E): every worker's steps are played to know one's.
  package init(_ plan: Plan, _ traffic: Traffic, _ shape: Shape, on cluster: Cluster, of rank: Int) {
    let volumes = Volumes(traffic, shape, on: cluster, shadows: plan.shadows)
    volumes.fetchesAgain = plan.fetchesAgain
    let memory = Scratch()
    defer { withExtendedLifetime((memory, volumes)) {} }
    let costs = StepCosts(plan.groups, volumes, in: memory)
    let seat = cluster.seats[rank]
    let volume = StepVolumes(plan, volumes, rank: rank, seat: seat)

    func span(_ seconds: Range<Double>) -> Range<Seconds> { Seconds(seconds.lowerBound)..<Seconds(seconds.upperBound) }
    func trip(_ steps: [Step], _ least: (PlayedSteps, Bool, Double, Scratch) -> Seconds) -> Trip {
      let timeline = Timeline(steps, costs, overlaps: plan.overlaps, slowdown: cluster.slowdown)
      return Trip(
        steps: steps.enumerated().map { index, step in
          let place = index * timeline.workers + seat
          return volume.fill(
            Stretch(
              action: step.action,
              computes: step.action.communicates ? span(0..<0) : span(timeline.starts[place]..<timeline.ends[place]),
              sends: span(timeline.sent[place]), receives: span(timeline.received[place])))
        }, seconds: least(PlayedSteps(steps, in: memory), plan.overlaps, cluster.slowdown, memory))
    }
    forward = trip(plan.forward, costs.forward)
    backward = trip(plan.backward, costs.backward)
  }
}

/// What one worker moves and computes in each step of a plan.
private struct StepVolumes {
  let plan: Plan
  let volumes: Volumes
  let rank, seat: Int
  private let traffic: Traffic
  private let shape: Shape

  init(_ plan: Plan, _ volumes: Volumes, rank: Int, seat: Int) {
    (self.plan, self.volumes, self.rank, self.seat) = (plan, volumes, rank, seat)
    (traffic, shape) = (volumes.demand.traffic, volumes.demand.shape)
  }

  func fill(_ step: Forecast.Stretch) -> Forecast.Stretch {
    var step = step
    switch step.action {
    case .send(let round): (step.leaving, step.arriving) = (toTarget(round), fromSource(round))
    case .giveBack(let round): (step.leaving, step.arriving) = (fromSource(round), toTarget(round))
    case .compute(let round): step.computed = fromSource(round) + (round == 0 ? rows(seat, seat) : 0)
    case .computeShadow(let shadow), .gradShadowWeights(let shadow):
      step.computed = Int(traffic.counts[rank * traffic.experts + plan.shadows[shadow]])
    case .gradWeights: step.computed = (0..<traffic.workers).reduce(0) { $0 + rows($1, seat) }
    case .fetch, .reduce: step.bytes = shape.expertBytes
    }
    if step.leaving + step.arriving > 0 { step.bytes = shape.rowBytes * Double(step.leaving + step.arriving) }
    return step
  }

  private func rows(_ source: Int, _ target: Int) -> Int { volumes.rows(from: source, to: target) }

  /// Rows of this worker that other workers compute in a round.
  private func toTarget(_ round: Int) -> Int {
    let groups = plan.groups
    return groups.seats(of: groups.target(of: groups.group(of: seat), round: round)).reduce(0) {
      $0 + ($1 == seat ? 0 : rows(seat, $1))
    }
  }

  /// Rows of other workers that this one computes in a round.
  private func fromSource(_ round: Int) -> Int {
    let groups = plan.groups
    return groups.seats(of: groups.source(of: groups.group(of: seat), round: round)).reduce(0) {
      $0 + ($1 == seat ? 0 : rows($1, seat))
    }
  }
}

extension Cluster {
  /// Workers between whom nothing has to move, each as fast as it was measured; nil if they are too many for a cluster.
  package static func inPlace(_ rates: [WorkerRates]) -> Cluster? {
    var document = Document()
    document.places = [Document.Place(name: "process")]
    document.workers = rates.enumerated().map { rank, rates in
      Document.Worker(
        name: "rank\(rank)", in: "process", flops: rates.products.samples, weightFlops: rates.weightGrads.samples,
        rowHandling: rates.rowHandling.value)
    }
    return try? Cluster(document)
  }
}
