/// Plays plans in virtual time: on what the Executor will do, but on a Cluster instead of a machine.
///
/// The model of one step. *Communication* begins when the worker and all that it exchanges with have reached the step,
/// and takes the time of the slowest link on the way between the two groups, each link shared by all that moves in this
/// step, plus the latency of the way. *Computing* takes each expert's flops at the rate for its rows. No trip is faster
/// than its busiest link, however the steps fall.
package struct Simulator {
  private let cluster: Cluster
  private let shape: Shape
  private let traffic: Traffic
  /// By group size: [rounds, E] seconds for a round's rows at the owner, forward or back, and for the weights' gradients.
  private var roundSeconds: [Int: (rows: [Double], weights: [Double])] = [:]

  package init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster) {
    (self.cluster, self.shape, self.traffic) = (cluster, shape, traffic)
  }

  /// What each step of any plan with these groups and shadows costs; `moving` are the rows that move then.
  /// O(W² + W·E + W·rounds).
  package mutating func costs(_ groups: Groups, _ volumes: Volumes, _ moving: RowsBetween) -> StepCosts {
    let (workers, experts) = (cluster.workers, traffic.experts)
    var shadowed = [Bool](repeating: false, count: experts)
    for expert in volumes.shadows { shadowed[expert] = true }
    var costs = StepCosts(groups, leastForward: volumes.linkForward, leastBackward: volumes.linkBackward)

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
      }
    }
    for expert in volumes.shadows {
      let owner = cluster.seats[traffic.owner(of: expert)]
      costs.fetches.append(volumes.fetching(from: owner).value)
      costs.reduces.append(volumes.reducing(to: owner).value)
    }
    (costs.shadows, costs.shadowWeights) = (volumes.shadowSeconds, volumes.shadowWeightSeconds)
    return costs
  }

  /// Of the rows that a round brings to each expert.
  private mutating func secondsOfRounds(_ groups: Groups) -> (rows: [Double], weights: [Double]) {
    if let known = roundSeconds[groups.size] { return known }
    let (workers, experts) = (cluster.workers, traffic.experts)
    let each = experts / workers
    // Neighbouring ranks whose experts are in one group.
    let groupOf = cluster.seats.map { groups.group(of: $0) }
    let starts = (0..<workers).filter { $0 == 0 || groupOf[$0] != groupOf[$0 - 1] }
    let runs = zip(starts, starts.dropFirst() + [workers]).map {
      (first: $0 * each, count: ($1 - $0) * each, owner: $0)
    }
    var rows = [UInt32](repeating: 0, count: groups.count * experts)
    rows.withUnsafeMutableBufferPointer { rows in
      for source in 0..<workers {
        for run in runs {
          let round = groups.round(from: groupOf[source], to: groupOf[run.owner])
          let sums = rows.baseAddress! + round * experts + run.first
          let counts = traffic.counts + source * experts + run.first
          for expert in 0..<run.count { sums[expert] &+= counts[expert] }
        }
      }
    }
    let none = [Double](repeating: 0, count: rows.count)
    var seconds = (rows: none, weights: none)
    for (place, count) in rows.enumerated() where count > 0 {
      let rates = cluster.rates[cluster.seats[traffic.owner(of: place % experts)]]
      seconds.rows[place] = shape.seconds(rows: Int(count), at: rates).value
      seconds.weights[place] = shape.weightSeconds(rows: Int(count), at: rates).value
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
  /// [rounds, W] by seat
  fileprivate(set) var computes: [Double]
  /// [W]
  fileprivate(set) var gradWeights: [Double]
  /// [shadows, W] each worker's own rows, and their gradients of weights.
  fileprivate(set) var shadows: [Double] = []
  fileprivate(set) var shadowWeights: [Double] = []
  /// [shadows]
  fileprivate(set) var fetches: [Double] = []
  fileprivate(set) var reduces: [Double] = []
  fileprivate let leastForward: Seconds
  fileprivate let leastBackward: Seconds

  fileprivate init(_ groups: Groups, leastForward: Seconds, leastBackward: Seconds) {
    self.groups = groups
    isSent = Array(repeating: false, count: groups.count * groups.count)
    sends = Array(repeating: 0, count: isSent.count)
    returns = sends
    computes = Array(repeating: 0, count: groups.count * groups.workers)
    gradWeights = Array(repeating: 0, count: groups.workers)
    (self.leastForward, self.leastBackward) = (leastForward, leastBackward)
  }

  package func forward(_ steps: [Step], slowdown: Double) -> Seconds {
    max(leastForward, Timeline(steps, self, slowdown: slowdown, keeping: .needed).end)
  }
  package func backward(_ steps: [Step], slowdown: Double) -> Seconds {
    max(leastBackward, Timeline(steps, self, slowdown: slowdown, keeping: .needed).end)
  }
}

/// When every worker begins and ends every step of one trip.
package struct Timeline {
  package enum Keeping { case everything, needed }
  package let workers: Int
  /// [steps, W] by seat, in seconds from the beginning of the trip; only while they are needed if that is all to keep.
  package private(set) var starts: [Double]
  package private(set) var ends: [Double]
  /// When the last worker has done its last step.
  package private(set) var end = Seconds(0)

  /// O(steps·W).
  package init(_ steps: [Step], _ costs: StepCosts, slowdown: Double, keeping: Keeping) {
    workers = costs.groups.workers
    // What slows computing down is looked up later.
    let rows = slowdown > 1 || keeping == .everything ? Array(steps.indices) : Timeline.rowsNeeded(steps)
    starts = Array(repeating: 0, count: ((rows.max() ?? -1) + 1) * workers)
    ends = starts
    var last = 0.0
    starts.withUnsafeMutableBufferPointer { starts in
      ends.withUnsafeMutableBufferPointer { ends in
        var player = Player(steps, costs, slowdown: slowdown, rows, starts, ends)
        for index in steps.indices { player.play(index) }
        last = max(player.talking.reduce(0, max), player.computing.reduce(0, max))
      }
    }
    end = Seconds(last)
  }

  /// The row of each step's times, or -1 if no later step waits for it; a row serves again once nobody waits any more.
  private static func rowsNeeded(_ steps: [Step]) -> [Int] {
    var lastUse = Array(repeating: -1, count: steps.count)
    for (index, step) in steps.enumerated() where step.after >= 0 { lastUse[step.after] = index }
    var (rows, free, count) = (lastUse, [Int](), 0)
    for (index, step) in steps.enumerated() {
      // Taken before the other is given back: a step reads and writes its times worker by worker.
      if lastUse[index] >= 0 {
        if free.isEmpty {
          free.append(count)
          count += 1
        }
        rows[index] = free.removeLast()
      }
      if step.after >= 0, lastUse[step.after] == index { free.append(rows[step.after]) }
    }
    return rows
  }

  private struct Player {
    let steps: [Step]
    let costs: StepCosts
    let slowdown: Double
    let rows: [Int]
    let starts, ends: UnsafeMutableBufferPointer<Double>
    /// [W] when each lane has done its steps so far.
    var talking, computing: [Double]
    /// [groups] when all workers of each have reached the step.
    var groupReady: [Double]
    /// The communication steps so far; [W] the first of them that may not have ended when the next compute begins.
    var talks: [Int] = []
    var firstTalk: [Int]

    init(
      _ steps: [Step], _ costs: StepCosts, slowdown: Double, _ rows: [Int],
      _ starts: UnsafeMutableBufferPointer<Double>, _ ends: UnsafeMutableBufferPointer<Double>
    ) {
      (self.steps, self.costs, self.slowdown, self.rows) = (steps, costs, slowdown, rows)
      (self.starts, self.ends) = (starts, ends)
      talking = Array(repeating: 0, count: costs.groups.workers)
      computing = talking
      groupReady = Array(repeating: 0, count: costs.groups.count)
      firstTalk = Array(repeating: 0, count: costs.groups.workers)
    }

    mutating func play(_ index: Int) {
      let workers = costs.groups.workers
      switch steps[index].action {
      case .send(let round): exchange(index, round, costs.sends)
      case .giveBack(let round): exchange(index, round, costs.returns)
      case .fetch(let shadow): collect(index, costs.fetches[shadow])
      case .reduce(let shadow): collect(index, costs.reduces[shadow])
      case .compute(let round): compute(index, costs.computes, first: round * workers)
      case .computeShadow(let shadow): compute(index, costs.shadows, first: shadow * workers)
      case .gradShadowWeights(let shadow): compute(index, costs.shadowWeights, first: shadow * workers)
      case .gradWeights: compute(index, costs.gradWeights, first: 0)
      }
    }

    /// When a worker has reached a step.
    @inline(__always)
    private func ready(_ lane: [Double], _ index: Int, _ seat: Int) -> Double {
      let after = steps[index].after
      return after < 0 ? lane[seat] : max(lane[seat], ends[rows[after] * lane.count + seat])
    }

    /// Every group with the one it sends to and the one it receives from, where anything moves.
    private mutating func exchange(_ index: Int, _ round: Int, _ seconds: [Double]) {
      let groups = costs.groups
      for group in 0..<groups.count {
        var latest = 0.0
        for seat in groups.seats(of: group) {
          talking[seat] = ready(talking, index, seat)
          latest = max(latest, talking[seat])
        }
        groupReady[group] = latest
      }
      for group in 0..<groups.count {
        let (target, source) = (groups.target(of: group, round: round), groups.source(of: group, round: round))
        let (out, into) = (round * groups.count + group, round * groups.count + source)
        var (others, takes) = (0.0, 0.0)
        if costs.isSent[out] { (others, takes) = (groupReady[target], seconds[out]) }
        if costs.isSent[into] { (others, takes) = (max(others, groupReady[source]), max(takes, seconds[into])) }
        for seat in groups.seats(of: group) {
          let start = max(talking[seat], others)
          finish(index, seat, start, start + takes)
          talking[seat] = start + takes
        }
      }
      talks.append(index)
    }

    /// All workers together.
    private mutating func collect(_ index: Int, _ seconds: Double) {
      var start = 0.0
      for seat in talking.indices { start = max(start, ready(talking, index, seat)) }
      for seat in talking.indices {
        finish(index, seat, start, start + seconds)
        talking[seat] = start + seconds
      }
      talks.append(index)
    }

    private mutating func compute(_ index: Int, _ seconds: [Double], first: Int) {
      for seat in computing.indices {
        let start = ready(computing, index, seat)
        let end = slowdown > 1 ? slowed(seconds[first + seat], from: start, seat) : start + seconds[first + seat]
        finish(index, seat, start, end)
        computing[seat] = end
      }
    }

    /// When `work` ends that goes slower while the worker's messages move.
    ///
    /// The list has communication as early as it can be, so what moves during this step stands before it.
    private mutating func slowed(_ work: Double, from start: Double, _ seat: Int) -> Double {
      let workers = computing.count
      while firstTalk[seat] < talks.count, ends[talks[firstTalk[seat]] * workers + seat] <= start {
        firstTalk[seat] += 1
      }
      var (time, left) = (start, work)
      for talk in talks[firstTalk[seat]...] {
        let (begins, stops) = (starts[talk * workers + seat], ends[talk * workers + seat])
        guard stops > time else { continue }
        if begins > time {
          if left <= begins - time { return time + left }
          left -= begins - time
          time = begins
        }
        if left * slowdown <= stops - time { return time + left * slowdown }
        left -= (stops - time) / slowdown
        time = stops
      }
      return time + left
    }

    @inline(__always)
    private func finish(_ index: Int, _ seat: Int, _ start: Double, _ end: Double) {
      guard rows[index] >= 0 else { return }
      starts[rows[index] * computing.count + seat] = start
      ends[rows[index] * computing.count + seat] = end
    }
  }
}
