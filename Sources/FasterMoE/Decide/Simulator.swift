/// Plays plans in virtual time: on what the Executor will do, but on a Cluster instead of a machine.
///
/// The model of one step. A worker sends and receives at once, each in the order of steps. *Communication* begins when those
/// who send and those who receive have reached the step, and takes the time of the slowest link on the way between the two
/// groups, each link shared by all that moves in this step, plus the latency of the way. *Computing* takes each expert's
/// flops at the rate for its rows, and the handling of rows. Where a plan overlaps, rows come, are computed and go back
/// block by block. No trip is faster than its busiest link, however the steps fall.
package struct Simulator {
  private let cluster: Cluster
  private let shape: Shape
  private let traffic: Traffic
  /// By group size: [rounds, E] seconds for a round's rows at the owner, forward or back, and for the weights' gradients.
  private var roundSeconds: [Int: RoundSeconds] = [:]
  private struct RoundSeconds {
    var rows, weights, blocks: [Double]
  }

  package init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster) {
    (self.cluster, self.shape, self.traffic) = (cluster, shape, traffic)
  }

  /// Whether the costs of such groups take O(rounds·E) less, as some of the same were asked for before.
  package func knows(_ groups: Groups) -> Bool { roundSeconds[groups.size] != nil }

  /// What each step of any plan with these groups and shadows costs; `moving` are the rows that move then.
  /// O(W² + W·E + W·rounds).
  package mutating func costs(_ groups: Groups, _ volumes: Volumes, _ moving: RowsBetween) -> StepCosts {
    let (workers, experts) = (cluster.workers, traffic.experts)
    var shadowed = [Bool](repeating: false, count: experts)
    for expert in volumes.shadows { shadowed[expert] = true }
    var costs = StepCosts(groups, leastForward: volumes.linkForward, leastBackward: volumes.linkBackward)
    costs.stretch = stretch(volumes.roofline)

    let loads = LinkLoads(moving, on: cluster, groups)
    for round in 0..<groups.count {
      for group in 0..<groups.count {
        let target = groups.target(of: group, round: round)
        guard loads.sent[round * groups.count + group] > 0 else { continue }
        costs.isSent[round * groups.count + group] = true
        costs.sends[round * groups.count + group] = exchange(
          loads.up, loads.down, peers: { loads.peers[$0] }, round, groups.seats(of: group), groups.seats(of: target))
        costs.returns[round * groups.count + group] = exchange(
          loads.down, loads.up, peers: { loads.peers[$0 ^ 1] }, round, groups.seats(of: target), groups.seats(of: group)
        )
      }
    }

    let seconds = secondsOfRounds(groups)
    for expert in 0..<experts where !shadowed[expert] {
      let seat = cluster.seats[traffic.owner(of: expert)]
      for round in 0..<groups.count {
        costs.computes[round * workers + seat] += seconds.rows[round * experts + expert]
        costs.gradWeights[seat] += seconds.weights[round * experts + expert]
        costs.blocks[round * workers + seat] += seconds.blocks[round * experts + expert]
      }
    }
    for place in costs.blocks.indices { costs.blocks[place] = max(1, costs.blocks[place]) }
    for first in stride(from: 0, to: volumes.shadows.count, by: volumes.copiesAtOnce) {
      let owners = volumes.shadows[first...].prefix(volumes.copiesAtOnce).map { cluster.seats[traffic.owner(of: $0)] }
      costs.owners.append(owners[0])
      costs.fetches.append(owners.reduce(0) { $0 + volumes.fetching(from: $1).value })
      costs.reduces.append(owners.reduce(0) { $0 + volumes.reducing(to: $1).value })
    }
    (costs.shadows, costs.shadowWeights) = (volumes.shadowSeconds, volumes.shadowWeightSeconds)
    return costs
  }

  /// How many times longer messages take where workers compute meanwhile: x = 1 + (slowdown - 1) · share, where computing
  /// fills the share compute / (x · messages) of the time in which they move, or all of it.
  private func stretch(_ roofline: Roofline) -> Double {
    guard roofline.busiestLink.value > 0 else { return 1 }
    let product = (cluster.messageSlowdown - 1) * (roofline.compute / roofline.busiestLink)
    return min(cluster.messageSlowdown, (1 + (1 + 4 * product).squareRoot()) / 2)
  }

  /// Of the rows that a round brings to each expert.
  private mutating func secondsOfRounds(_ groups: Groups) -> RoundSeconds {
    if let known = roundSeconds[groups.size] { return known }
    let (workers, experts) = (cluster.workers, traffic.experts)
    let each = experts / workers
    // Neighbouring ranks whose experts are in one group.
    let groupOf = cluster.seats.map { groups.group(of: $0) }
    let starts = (0..<workers).filter { $0 == 0 || groupOf[$0] != groupOf[$0 - 1] }
    let runs = zip(starts, starts.dropFirst() + [workers]).map {
      (first: $0 * each, count: ($1 - $0) * each, owner: $0)
    }
    var rows = [Int](repeating: 0, count: groups.count * experts)
    rows.withUnsafeMutableBufferPointer { rows in
      for source in 0..<workers {
        for run in runs {
          let round = groups.round(from: groupOf[source], to: groupOf[run.owner])
          let sums = rows.baseAddress! + round * experts + run.first
          let counts = traffic.counts + source * experts + run.first
          for expert in 0..<run.count { sums[expert] &+= Int(counts[expert]) }
        }
      }
    }
    let none = [Double](repeating: 0, count: rows.count)
    var seconds = RoundSeconds(rows: none, weights: none, blocks: none)
    for (place, count) in rows.enumerated() where count > 0 {
      let rates = cluster.rates[cluster.seats[traffic.owner(of: place % experts)]]
      seconds.rows[place] = shape.seconds(rows: count, at: rates).value
      seconds.weights[place] = shape.weightSeconds(rows: count, at: rates).value
      seconds.blocks[place] = Double((count + Block.mostRows - 1) / Block.mostRows)
    }
    roundSeconds[groups.size] = seconds
    return seconds
  }

  /// How long it takes until all rows have come from one range of seats to another: the slowest link and its latency.
  private func exchange(
    _ up: [Double], _ down: [Double], peers: (Int) -> Double, _ round: Int, _ sources: Range<Int>, _ targets: Range<Int>
  ) -> Double {
    var top = sources.lowerBound
    let all = min(sources.lowerBound, targets.lowerBound)..<max(sources.upperBound, targets.upperBound)
    while !cluster.nodes[top].seats.contains(all.lowerBound) || cluster.nodes[top].seats.upperBound < all.upperBound {
      top = cluster.nodes[top].parent
    }
    let first = round * cluster.nodes.count
    var (slowest, latencyUp, latencyDown) = (0.0, 0.0, 0.0)
    for seat in sources {
      var (node, latency) = (seat, 0.0)
      while node != top {
        if up[first + node] > 0 {
          slowest = max(slowest, up[first + node] * cluster.nodes[node].up.slowness)
          latency += cluster.nodes[node].up.latency
        }
        node = cluster.nodes[node].parent
      }
      latencyUp = max(latencyUp, latency)
    }
    for seat in targets {
      var (node, latency) = (seat, 0.0)
      while node != top {
        if down[first + node] > 0 {
          slowest = max(slowest, down[first + node] * cluster.nodes[node].down.slowness)
          latency += cluster.nodes[node].down.latency
        }
        node = cluster.nodes[node].parent
      }
      latencyDown = max(latencyDown, latency)
    }
    var latency = latencyUp + latencyDown
    for seat in sources {
      for link in cluster.peersFrom[seat] where cluster.nodes[cluster.peers[link].to].seats.overlaps(targets) {
        let rows = peers(round * cluster.peers.count + link)
        guard rows > 0 else { continue }
        slowest = max(slowest, rows * cluster.peers[link].cost.slowness)
        latency = max(latency, cluster.peers[link].cost.latency)
      }
    }
    return slowest * shape.rowBytes.value + latency
  }
}

/// Seconds of every step of a plan, whatever its order.
package struct StepCosts {
  package let groups: Groups
  /// [rounds, groups] whether the group sends anything, how long that takes, and how long until it has its results.
  fileprivate(set) var isSent: [Bool]
  fileprivate(set) var sends: [Double]
  fileprivate(set) var returns: [Double]
  /// [rounds, W] by seat, and in how many blocks, 1 at least.
  fileprivate(set) var computes: [Double]
  fileprivate(set) var blocks: [Double]
  /// [W]
  fileprivate(set) var gradWeights: [Double]
  /// [shadows, W] each worker's own rows, and their gradients of weights.
  fileprivate(set) var shadows: [Double] = []
  fileprivate(set) var shadowWeights: [Double] = []
  /// [shadows] by seat
  fileprivate(set) var owners: [Int] = []
  fileprivate(set) var fetches: [Double] = []
  fileprivate(set) var reduces: [Double] = []
  /// How many times longer messages take where a plan overlaps.
  fileprivate(set) var stretch = 1.0
  fileprivate let leastForward: Seconds
  fileprivate let leastBackward: Seconds

  fileprivate init(_ groups: Groups, leastForward: Seconds, leastBackward: Seconds) {
    self.groups = groups
    isSent = Array(repeating: false, count: groups.count * groups.count)
    sends = Array(repeating: 0, count: isSent.count)
    returns = sends
    computes = Array(repeating: 0, count: groups.count * groups.workers)
    blocks = computes
    gradWeights = Array(repeating: 0, count: groups.workers)
    (self.leastForward, self.leastBackward) = (leastForward, leastBackward)
  }

  package func forward(_ steps: PlayedSteps, overlaps: Bool, slowdown: Double) -> Seconds {
    max(leastForward, Timeline.end(of: steps, self, overlaps: overlaps, slowdown: slowdown))
  }
  package func backward(_ steps: PlayedSteps, overlaps: Bool, slowdown: Double) -> Seconds {
    max(leastBackward, Timeline.end(of: steps, self, overlaps: overlaps, slowdown: slowdown))
  }
}
