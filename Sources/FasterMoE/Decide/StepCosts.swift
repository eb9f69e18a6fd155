/// Seconds of every step of a plan, whatever its order; a Timeline plays them.
///
/// *Communication* takes the time of the slowest link on the way between two groups, each link shared by all that moves in this
/// step, plus the latency of the way. *Computing* takes each expert's flops at the rate for its rows, and the handling of rows.
///
/// Its tables belong to the memory that they were made in, some to the Demand, which are not to be written: passing it on
/// costs nothing, and it is played by the thousand.
package struct StepCosts {
  package let groups: Groups
  /// [rounds, groups] whether the group sends anything, how long that takes, and how long until it has its results.
  let isSent: UnsafeMutableBufferPointer<Bool>
  let sends, returns: UnsafeMutableBufferPointer<Double>
  /// [rounds, W] by seat, and which share of it is one of the blocks that the rows come in.
  let computes, blockShares: UnsafeMutableBufferPointer<Double>
  /// [W]
  let gradWeights: UnsafeMutableBufferPointer<Double>
  /// [copies, W] each worker's own rows, and their gradients of weights.
  let shadows, shadowWeights: UnsafeMutableBufferPointer<Double>
  /// [copies] by seat
  let owners: UnsafeMutableBufferPointer<Int>
  let fetches, reduces: UnsafeMutableBufferPointer<Double>
  /// How many times longer messages take where a plan overlaps.
  let stretch: Double
  private let leastForward, leastBackward: Seconds

  /// What each step of any plan with these groups and shadows costs. O(W² + W·E) for new groups, and O(W·shadows +
  /// rounds·(E + W + links)).
  package init(_ groups: Groups, _ volumes: Volumes, in memory: Scratch) {
    let demand = volumes.demand
    let workers = demand.traffic.workers
    self.groups = groups
    stretch = StepCosts.stretch(volumes)
    (leastForward, leastBackward) = (volumes.linkForward, volumes.linkBackward)
    let known = demand.rounds(groups)
    let isPlain = volumes.shadows.isEmpty
    let loads = isPlain ? demand.loads(groups) : LinkLoads(demand, without: volumes.shadows, groups, in: memory)

    isSent = memory.take(groups.count * groups.count, of: false)
    (sends, returns) = (memory.take(isSent.count, of: 0), memory.take(isSent.count, of: 0))
    for round in 0..<groups.count {
      for group in 0..<groups.count {
        let place = round * groups.count + group
        guard loads.sent[place] > 0 else { continue }
        let (from, to) = (groups.seats(of: group), groups.seats(of: groups.target(of: group, round: round)))
        let way = Way(demand, round, from, to)
        isSent[place] = true
        sends[place] = way.seconds(loads.up, loads.down, loads.peers, turned: 0, from, to)
        returns[place] = way.seconds(loads.down, loads.up, loads.peers, turned: 1, to, from)
      }
    }

    (computes, gradWeights) =
      isPlain ? (known.rows, known.weights) : (memory.copy(known.rows), memory.copy(known.weights))
    blockShares = memory.copy(known.blocks)
    if !isPlain {
      let isShadow = memory.take(demand.traffic.experts, of: false)
      for expert in volumes.shadows { isShadow[expert] = true }
      for owner in 0..<workers where volumes.shadowsOf[demand.seats[owner]] > 0 {
        gradWeights[demand.seats[owner]] = 0
        demand.add(known, groups, of: owner, to: computes, gradWeights, blockShares) { !isShadow[$0] }
      }
    }
    for place in 0..<blockShares.count { blockShares[place] = 1 / max(1, blockShares[place]) }

    let copies = volumes.countOfCopies
    (shadows, shadowWeights) = (memory.take(copies * workers), memory.take(copies * workers))
    (owners, fetches, reduces) = (memory.take(copies), memory.take(copies, of: 0), memory.take(copies, of: 0))
    for copy in 0..<copies {
      let computing = volumes.computing(copy)
      (shadows.baseAddress! + copy * workers).update(from: computing.rows, count: workers)
      (shadowWeights.baseAddress! + copy * workers).update(from: computing.weights, count: workers)
      let first = copy * volumes.copiesAtOnce
      owners[copy] = demand.owner(of: volumes.shadows[first])
      for index in first..<min(first + volumes.copiesAtOnce, volumes.shadows.count) {
        let owner = demand.owner(of: volumes.shadows[index])
        fetches[copy] += volumes.fetching(from: owner).value
        reduces[copy] += volumes.reducing(to: owner).value
      }
    }
  }

  /// How many times longer messages take where workers compute meanwhile: x = 1 + (slowdown - 1) · share, where computing
  /// fills the share compute / (x · messages) of the time in which they move, or all of it.
  private static func stretch(_ volumes: Volumes) -> Double {
    let slowdown = volumes.demand.cluster.messageSlowdown
    guard slowdown > 1 else { return 1 }
    let roofline = volumes.roofline
    guard roofline.busiestLink.value > 0 else { return 1 }
    let product = (slowdown - 1) * (roofline.compute / roofline.busiestLink)
    return min(slowdown, (1 + (1 + 4 * product).squareRoot()) / 2)
  }

  /// What no exchange that overlaps takes less than: every group sends its rows, round by round, and all results, one after
  /// the other. Where rounds are many, their latencies are most of it. O(rounds·groups).
  package var leastExchange: Seconds {
    var most = 0.0
    for group in 0..<groups.count {
      var sum = 0.0
      for round in 0..<groups.count {
        let source = groups.source(of: group, round: round)
        sum += sends[round * groups.count + group] + returns[round * groups.count + source]
      }
      most = max(most, sum)
    }
    return Seconds(most * stretch)
  }

  /// `memory` is for what is needed meanwhile.
  package func forward(_ steps: PlayedSteps, overlaps: Bool, slowdown: Double, in memory: Scratch) -> Seconds {
    max(leastForward, Timeline.end(of: steps, self, overlaps: overlaps, slowdown: slowdown, in: memory))
  }
  package func backward(_ steps: PlayedSteps, overlaps: Bool, slowdown: Double, in memory: Scratch) -> Seconds {
    max(leastBackward, Timeline.end(of: steps, self, overlaps: overlaps, slowdown: slowdown, in: memory))
  }
}

/// The way of rows between two ranges of seats in one round.
private struct Way {
  private let demand: Demand
  private let round: Int
  /// The lowest node around both.
  private let top: Int

  init(_ demand: Demand, _ round: Int, _ from: Range<Int>, _ to: Range<Int>) {
    let (first, end) = (min(from.lowerBound, to.lowerBound), max(from.upperBound, to.upperBound))
    var top = from.lowerBound
    while first < demand.nodes[top].seats.lowerBound || demand.nodes[top].seats.upperBound < end {
      top = demand.nodes[top].parent
    }
    (self.demand, self.round, self.top) = (demand, round, top)
  }

  /// How long it takes until all rows have come: the slowest link and its latency. `up` and `down` are what links carry in
  /// the direction of the rows, peer links what the one numbered their own number xor `turned` carries there.
  func seconds(
    _ up: UnsafeMutableBufferPointer<Double>, _ down: UnsafeMutableBufferPointer<Double>,
    _ peers: UnsafeMutableBufferPointer<Double>, turned: Int, _ sources: Range<Int>, _ targets: Range<Int>
  ) -> Double {
    let nodes = demand.nodes
    let (out, home) = (climb(sources, up) { nodes[$0].up }, climb(targets, down) { nodes[$0].down })
    var (slowest, latency) = (max(out.slowest, home.slowest), out.latency + home.latency)
    if !peers.isEmpty {
      let links = demand.cluster.peers
      for seat in sources {
        for link in demand.cluster.peersFrom[seat] where nodes[links[link].to].seats.overlaps(targets) {
          let rows = peers[round * links.count + (link ^ turned)]
          guard rows > 0 else { continue }
          slowest = max(slowest, rows * links[link].cost.slowness)
          latency = max(latency, links[link].cost.latency)
        }
      }
    }
    return slowest * demand.shape.rowBytes.value + latency
  }

  /// Of the links between some seats and the top that carry anything: what the slowest takes for a row's byte each, and the
  /// latency of the longest way.
  @inline(__always)
  private func climb(
    _ seats: Range<Int>, _ loads: UnsafeMutableBufferPointer<Double>, _ link: (Int) -> Cluster.Cost
  ) -> (slowest: Double, latency: Double) {
    let (nodes, first) = (demand.nodes, round * demand.nodes.count)
    var (slowest, longest) = (0.0, 0.0)
    for seat in seats {
      var (node, latency) = (seat, 0.0)
      while node != top {
        if loads[first + node] > 0 {
          slowest = max(slowest, loads[first + node] * link(node).slowness)
          latency += link(node).latency
        }
        node = nodes[node].parent
      }
      longest = max(longest, latency)
    }
    return (slowest, longest)
  }
}
