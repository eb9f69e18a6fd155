/// The DDL-Roofline of one batch (FasterMoE §3): what computing and communicating would take on their own.
package struct Roofline {
  /// Of the busiest worker, forward and again backward: three computes (eq. 1).
  package let compute: Seconds
  /// Four collectives, each over its busiest directed link (eq. 2), and the copies of shadows. Latency of rows is left out,
  /// as in the paper.
  package let communicate: Seconds
  /// Of the busiest directed link over the whole step, where rows come and go at the same time.
  package let busiestLink: Seconds
  /// That link; nil where nothing is sent.
  package let link: Cluster.Link?
  /// The seat that computes longest.
  package let busiestSeat: Int
  /// Of all workers.
  package let work: Flops
  package let workers: Int

  /// R_CC (eq. 3) as one compute over one collective; infinite where nothing is sent.
  package var computeOverCommunicate: Double { communicate.value > 0 ? stepRatio * 4 / 3 : .infinity }
  /// R_CC as the computing of a step over its communicating, on which the semi-ideal line holds exactly.
  package var stepRatio: Double { communicate.value > 0 ? compute / communicate : .infinity }

  /// All perfectly overlapped: where P-bar = P·min(1, R_CC) for a balanced load (eq. 5). No schedule is faster.
  package var ideal: Seconds { max(compute, busiestLink) }
  /// One after the other: where P-bar = P·R_CC / (R_CC + 1) for a balanced load (eq. 6).
  package var semiIdeal: Seconds { compute + communicate }
  /// P-bar (eq. 4) of a step that takes `seconds`.
  package func flopRatePerWorker(in seconds: Seconds) -> FlopRate {
    work.value > 0 ? Flops(work.value / Double(workers)) / seconds : FlopRate(0)
  }
}

/// What a batch gives every worker to compute and every link to carry, with some experts shadowed.
///
/// A shadowed expert is computed by each worker for its own rows, which then move no more; instead its parameters go
/// around the ring of workers before, and its gradients after (§4.1).
package struct Volumes {
  private let cluster: Cluster
  private let shape: Shape
  private let traffic: Traffic
  /// [E] rows of all workers.
  package let rows: [Int]
  /// [W] by seat: seconds for rows, forward or back, and for gradients of weights.
  private var busy: [Double]
  private var busyWithWeights: [Double]
  /// As if nothing were shadowed.
  private let between: RowsBetween
  /// [1, nodes] and [1, peers] rows on their way to experts; they come back in the other direction.
  private var loads: LinkLoads
  /// [W] by seat: shadowed experts of each owner.
  private var shadowsOf: [Int]
  private(set) package var shadows: [Int] = []
  /// Shadows that are played as one step.
  package let copiesAtOnce: Int
  /// [shadows / copiesAtOnce, W] by seat: the same of each worker's own rows.
  private(set) package var shadowSeconds: [Double] = []
  private(set) package var shadowWeightSeconds: [Double] = []
  /// What all copies take one after the other, as every schedule moves them.
  package var copying: Seconds { fetching * (fetchesAgain ? 2 : 1) + reducing }
  /// What no schedule of them takes less than: one after the other or, of two workers, on the hop that carries most.
  package var leastCopying: Seconds {
    guard cluster.workers == 2 else { return copying }
    var most = 0.0
    for (hop, cost) in cluster.ring.costs.enumerated() {
      most = max(most, Double(fetches(over: hop) * (fetchesAgain ? 2 : 1) + reduces(over: hop)) * cost.slowness)
    }
    return Seconds(most * shape.expertBytes.value)
  }
  private var fetching = Seconds(0)
  private var reducing = Seconds(0)
  /// Whether backward fetches the shadows again (ZeRO stage 3).
  package var fetchesAgain = false

  /// With `shadows`, in the order in which they are fetched. O(W·(W + E)).
  package init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster, shadows: [Int] = []) {
    self.init(
      traffic, shape, cluster, rows: traffic.rowsOfExperts, RowsBetween(traffic, on: cluster), shadows, atOnce: 1)
  }

  /// Other shadows of the same batch. O(E + W·shadows).
  package init(_ other: Volumes, shadows: [Int]) {
    self.init(other.traffic, other.shape, other.cluster, rows: other.rows, other.between, shadows, atOnce: 1)
  }

  /// Every expert of the same batch shadowed, and fetched again for backward (ZeRO stage 3).
  ///
  /// Where that makes more steps of more workers than are worth looking at, some copies are played as one, each still far
  /// shorter than the whole; implementations fetch in buckets, too. O(W·E).
  package init(everyExpertOf other: Volumes) {
    let experts = other.traffic.experts
    let atOnce = max(1, (experts * other.traffic.workers + Volumes.mostSteps - 1) / Volumes.mostSteps)
    self.init(
      other.traffic, other.shape, other.cluster, rows: other.rows, other.between, Array(0..<experts), atOnce: atOnce)
    fetchesAgain = true
  }
  private static let mostSteps = 1 << 22

  private init(
    _ traffic: Traffic, _ shape: Shape, _ cluster: Cluster, rows: [Int], _ between: RowsBetween, _ shadows: [Int],
    atOnce: Int
  ) {
    (self.cluster, self.shape, self.traffic) = (cluster, shape, traffic)
    (self.rows, self.between) = (rows, between)
    busy = Array(repeating: 0, count: cluster.workers)
    busyWithWeights = busy
    shadowsOf = Array(repeating: 0, count: cluster.workers)
    var isShadow = Array(repeating: false, count: traffic.experts)
    for expert in shadows { isShadow[expert] = true }
    copiesAtOnce = atOnce
    let steps = (shadows.count + copiesAtOnce - 1) / copiesAtOnce
    shadowSeconds = Array(repeating: 0, count: steps * cluster.workers)
    shadowWeightSeconds = shadowSeconds
    for seat in 0..<cluster.workers {
      let (rates, rank) = (cluster.rates[seat], cluster.ranks[seat])
      for expert in traffic.owned(by: rank) where !isShadow[expert] {
        busy[seat] += shape.seconds(rows: rows[expert], at: rates).value
        busyWithWeights[seat] += shape.weightSeconds(rows: rows[expert], at: rates).value
      }
      let counts = traffic.counts + rank * traffic.experts
      for (index, expert) in shadows.enumerated() where counts[expert] > 0 {
        let place = index / copiesAtOnce * cluster.workers + seat
        shadowSeconds[place] += shape.seconds(rows: Int(counts[expert]), at: rates).value
        shadowWeightSeconds[place] += shape.weightSeconds(rows: Int(counts[expert]), at: rates).value
      }
      for step in 0..<steps {
        busy[seat] += shadowSeconds[step * cluster.workers + seat]
        busyWithWeights[seat] += shadowWeightSeconds[step * cluster.workers + seat]
      }
    }
    let all = Groups(workers: cluster.workers, size: cluster.workers)
    loads = LinkLoads(between.without(shadows, of: traffic, on: cluster), on: cluster, all)
    for expert in shadows { addCopy(of: expert) }
  }

  /// One shadow more. O(W).
  package mutating func shadow(_ expert: Int) {
    let owner = cluster.seats[traffic.owner(of: expert)]
    busy[owner] -= shape.seconds(rows: rows[expert], at: cluster.rates[owner]).value
    busyWithWeights[owner] -= shape.weightSeconds(rows: rows[expert], at: cluster.rates[owner]).value
    for (seat, rates) in cluster.rates.enumerated() {
      let rows = Int(traffic.counts[cluster.ranks[seat] * traffic.experts + expert])
      let seconds = shape.seconds(rows: rows, at: rates).value
      let weightSeconds = shape.weightSeconds(rows: rows, at: rates).value
      shadowSeconds.append(seconds)
      shadowWeightSeconds.append(weightSeconds)
      busy[seat] += seconds
      busyWithWeights[seat] += weightSeconds
      if seat != owner, rows > 0 { loads.remove(Double(rows), from: seat, to: owner, on: cluster) }
    }
    addCopy(of: expert)
  }

  private mutating func addCopy(of expert: Int) {
    let owner = cluster.seats[traffic.owner(of: expert)]
    shadowsOf[owner] += 1
    fetching = fetching + fetching(from: owner)
    reducing = reducing + reducing(to: owner)
    shadows.append(expert)
  }

  /// The rows that move.
  package var moving: RowsBetween { between.without(shadows, of: traffic, on: cluster) }

  /// A broadcast does not go into its owner, a reduction not out of it.
  package func fetching(from owner: Int) -> Seconds {
    cluster.around(shape.expertBytes, without: owner == 0 ? cluster.workers - 1 : owner - 1)
  }
  package func reducing(to owner: Int) -> Seconds { cluster.around(shape.expertBytes, without: owner) }

  package var roofline: Roofline {
    let (seconds, link) = longest {
      bothWays(2 * $0, 2 * $1, copies: fetches(over: $2) * (fetchesAgain ? 2 : 1) + reduces(over: $2))
    }
    return Roofline(
      compute: computing, communicate: communicating, busiestLink: seconds, link: link,
      busiestSeat: busy.indices.max { busy[$0] + busyWithWeights[$0] < busy[$1] + busyWithWeights[$1] } ?? 0,
      work: rows.reduce(Flops(0)) { $0 + shape.flops(rows: $1) }, workers: cluster.workers)
  }

  /// One after the other.
  package var serial: Seconds { computing + communicating }
  /// Of the busiest worker forward and of the busiest one back: all meet in between.
  private var computing: Seconds { busiest { rows, _ in rows } + busiest { $0 + $1 } }
  private func busiest(_ seconds: (_ rows: Double, _ weights: Double) -> Double) -> Seconds {
    var most = 0.0
    for seat in busy.indices { most = max(most, seconds(busy[seat], busyWithWeights[seat])) }
    return Seconds(most)
  }
  private var communicating: Seconds {
    let there = busiestLink { up, down, _ in (up, down) }
    let back = busiestLink { up, down, _ in (down, up) }
    return (there + back) * 2 + copying
  }

  /// No schedule is faster than its busiest worker, its busiest link, which carries rows there and back, and its copies.
  package var leastForward: Seconds { max(busiest { rows, _ in rows }, linkForward, inSeries(fetching)) }
  package var leastBackward: Seconds {
    max(busiest { $0 + $1 }, linkBackward, inSeries(fetchesAgain ? fetching + reducing : reducing))
  }
  /// Every worker but one sends in a copy, and every one but one receives: of three and more, some do so in any two.
  private func inSeries(_ copies: Seconds) -> Seconds { cluster.workers > 2 ? copies : Seconds(0) }
  package var least: Seconds { leastForward + leastBackward }
  package var linkForward: Seconds { busiestLink { bothWays($0, $1, copies: fetches(over: $2)) } }
  package var linkBackward: Seconds {
    busiestLink { bothWays($0, $1, copies: reduces(over: $2) + (fetchesAgain ? fetches(over: $2) : 0)) }
  }

  private func bothWays(_ up: Double, _ down: Double, copies: Int) -> (Double, Double) {
    let rows = up + down + Double(copies) * (shape.expertBytes / shape.rowBytes)
    return (rows, rows)
  }

  /// How many experts move over a hop of the ring, or a link on none.
  private func fetches(over hop: Int) -> Int {
    hop < 0 ? 0 : shadows.count - shadowsOf[hop + 1 == cluster.workers ? 0 : hop + 1]
  }
  private func reduces(over hop: Int) -> Int { hop < 0 ? 0 : shadows.count - shadowsOf[hop] }

  /// Seconds of the link that takes longest, where `rows` says what one carries by what goes up and down on its way there.
  private func busiestLink(_ rows: (_ up: Double, _ down: Double, _ hop: Int) -> (up: Double, down: Double)) -> Seconds
  {
    longest(rows).seconds
  }

  private func longest(_ rows: (_ up: Double, _ down: Double, _ hop: Int) -> (up: Double, down: Double))
    -> (seconds: Seconds, link: Cluster.Link?)
  {
    var (longest, busiest) = (0.0, Cluster.Link?.none)
    func see(_ time: Double, _ link: Cluster.Link) {
      if time > longest { (longest, busiest) = (time, link) }
    }
    for (index, node) in cluster.nodes.enumerated().dropLast() {
      let (up, down) = (loads.up[index], loads.down[index])
      see(rows(up, down, cluster.ring.up[index]).up * node.up.slowness, .up(index))
      see(rows(up, down, cluster.ring.down[index]).down * node.down.slowness, .down(index))
    }
    for (index, peer) in cluster.peers.enumerated() {
      let carried = rows(loads.peers[index], loads.peers[index ^ 1], cluster.ring.peers[index]).up
      see(carried * peer.cost.slowness, .peer(index))
    }
    return (Seconds(longest * shape.rowBytes.value), busiest)
  }
}

/// Rows from every worker to every other one's experts, by seat.
package struct RowsBetween {
  private let traffic: Traffic
  private let ranks: [Int]
  /// [W, W] sums over each owner's experts; nil where every worker has one expert and seats are ranks, so that the counts
  /// are that themselves.
  private let sums: [Double]?
  /// Experts whose rows do not move, by their owners' seats.
  private(set) var shadows: [Int: [Int]] = [:]
  private let known = Known()

  /// What was found of all rows, by group size.
  private final class Known { var flows: [Int: LinkFlows] = [:] }

  init(_ traffic: Traffic, on cluster: Cluster) {
    (self.traffic, ranks) = (traffic, cluster.ranks)
    let (workers, each) = (traffic.workers, traffic.experts / traffic.workers)
    guard each > 1 || cluster.ranks != Array(0..<workers) else {
      sums = nil
      return
    }
    sums = [Double](unsafeUninitializedCapacity: workers * workers) { rows, count in
      for seat in 0..<workers {
        var next = traffic.counts + cluster.ranks[seat] * traffic.experts
        for owner in 0..<workers {
          var sum = 0
          for expert in 0..<each { sum += Int(next[expert]) }
          rows[seat * workers + cluster.seats[owner]] = Double(sum)
          next += each
        }
      }
      count = workers * workers
    }
  }

  /// Those that still move if some experts are shadowed.
  func without(_ shadows: [Int], of traffic: Traffic, on cluster: Cluster) -> RowsBetween {
    guard !shadows.isEmpty else { return self }
    var left = self
    for expert in shadows { left.shadows[cluster.seats[traffic.owner(of: expert)], default: []].append(expert) }
    return left
  }

  /// Whether every expert is shadowed.
  var isStill: Bool { shadows.count == traffic.workers && shadows.reduce(0) { $0 + $1.value.count } == traffic.experts }

  /// Rows for one expert.
  @inline(__always) func rows(from seat: Int, for expert: Int) -> Double {
    Double(traffic.counts[ranks[seat] * traffic.experts + expert])
  }

  /// Rows that move from one seat to another's experts.
  func rows(from source: Int, to target: Int) -> Double {
    let all = sums.map { $0[source * traffic.workers + target] } ?? rows(from: source, for: target)
    guard let own = shadows[target] else { return all }
    return own.reduce(all) { $0 - rows(from: source, for: $1) }
  }

  /// Adds what one seat has for each of some others, shadows included, to `sums`; returns the sum of these.
  fileprivate func addAll(from source: Int, to targets: Range<Int>, _ sums: UnsafeMutablePointer<Double>) -> Double {
    guard let own = self.sums else {
      let from = traffic.counts + source * traffic.workers
      var sum = 0
      for target in targets {
        let rows = from[target]
        sums[target] += Double(rows)
        sum &+= Int(rows)
      }
      return Double(sum)
    }
    return own.withUnsafeBufferPointer { own in
      let from = own.baseAddress! + source * traffic.workers
      var sum = 0.0
      for target in targets {
        sums[target] += from[target]
        sum += from[target]
      }
      return sum
    }
  }

  /// What all rows, shadows included, load on links; made once for each group size.
  fileprivate func flows(on cluster: Cluster, _ groups: Groups) -> LinkFlows {
    if let flows = known.flows[groups.size] { return flows }
    var all = self
    all.shadows = [:]
    let flows = LinkFlows(all, on: cluster, groups)
    known.flows[groups.size] = flows
    return flows
  }
}

/// Where the rows of each round of an exchange in groups begin and end, and where they turn from their way up to their way
/// down: sums over subtrees are the loads of links. Whole numbers, so sums are exact.
private struct LinkFlows {
  /// [rounds, nodes]
  var up, down: [Double]
  /// [rounds, peers]
  var peers: [Double]
  /// [rounds, groups] that each group sends.
  var sent: [Double]

  /// A flow counts once where it begins and off again where its way up ends. O(W² + rounds·nodes).
  init(_ between: RowsBetween, on cluster: Cluster, _ groups: Groups) {
    let (workers, nodes, rounds, links) = (cluster.workers, cluster.nodes.count, groups.count, cluster.peers.count)
    up = Array(repeating: 0, count: rounds * nodes)
    down = up
    peers = Array(repeating: 0, count: rounds * links)
    sent = Array(repeating: 0, count: rounds * rounds)
    for seat in 0..<workers {
      let own = groups.group(of: seat)
      // To the seats `first..<end` of one group, for all of which the way turns at `top`.
      func flow(_ first: Int, _ end: Int, top: Int, group: Int) {
        let round = groups.round(from: own, to: group)
        let sum = down.withUnsafeMutableBufferPointer { down in
          between.addAll(from: seat, to: first..<end, down.baseAddress! + round * nodes)
        }
        up[round * nodes + seat] += sum
        up[round * nodes + top] -= sum
        down[round * nodes + top] -= sum
        sent[round * rounds + own] += sum
      }
      var (node, next) = (seat, seat + 1)
      while next < workers {
        while cluster.nodes[node].seats.upperBound <= next { node = cluster.nodes[node].parent }
        let group = groups.group(of: next)
        let end = min(cluster.nodes[node].seats.upperBound, groups.seats(of: group).upperBound)
        flow(next, end, top: node, group: group)
        next = end
      }
      (node, next) = (seat, seat)
      while next > 0 {
        while cluster.nodes[node].seats.lowerBound >= next { node = cluster.nodes[node].parent }
        let group = groups.group(of: next - 1)
        let first = max(cluster.nodes[node].seats.lowerBound, groups.seats(of: group).lowerBound)
        flow(first, next, top: node, group: group)
        next = first
      }
      for link in cluster.peersFrom[seat] {
        for target in cluster.nodes[cluster.peers[link].to].seats {
          divert(between.rows(from: seat, to: target), from: seat, to: target, over: link, on: cluster, groups)
        }
      }
    }
  }

  /// What a peer link carries leaves the tree where that link begins, and is back where it ends.
  private mutating func divert(
    _ rows: Double, from seat: Int, to target: Int, over link: Int, on cluster: Cluster, _ groups: Groups
  ) {
    let round = groups.round(from: groups.group(of: seat), to: groups.group(of: target))
    let (nodes, top) = (round * cluster.nodes.count, cluster.meeting(seat, target))
    up[nodes + top] += rows
    up[nodes + cluster.peers[link].from] -= rows
    down[nodes + top] += rows
    down[nodes + cluster.peers[link].to] -= rows
    peers[round * cluster.peers.count + link] += rows
  }

  /// Takes what goes to one seat's shadows off. O(W·shadows).
  mutating func remove(_ experts: [Int], at target: Int, _ between: RowsBetween, on cluster: Cluster, _ groups: Groups)
  {
    let (nodes, rounds, targetGroup) = (cluster.nodes.count, groups.count, groups.group(of: target))
    func take(_ seats: Range<Int>, top: Int) {
      for seat in seats {
        let rows = experts.reduce(0.0) { $0 + between.rows(from: seat, for: $1) }
        guard rows > 0 else { continue }
        let own = groups.group(of: seat)
        let round = groups.round(from: own, to: targetGroup)
        up[round * nodes + seat] -= rows
        up[round * nodes + top] += rows
        down[round * nodes + target] -= rows
        down[round * nodes + top] += rows
        sent[round * rounds + own] -= rows
        if !cluster.peers.isEmpty, let link = cluster.peer(from: seat, to: target) {
          divert(-rows, from: seat, to: target, over: link, on: cluster, groups)
        }
      }
    }
    var node = target
    while cluster.nodes[node].parent != node {
      let (inside, top) = (cluster.nodes[node].seats, cluster.nodes[node].parent)
      let all = cluster.nodes[top].seats
      take(all.lowerBound..<inside.lowerBound, top: top)
      take(inside.upperBound..<all.upperBound, top: top)
      node = top
    }
  }
}

/// The rows that each round of an exchange in groups loads on each directed link.
struct LinkLoads {
  /// [rounds, nodes] on the links up from each node and down to it.
  private(set) var up: [Double]
  private(set) var down: [Double]
  /// [rounds, peers]
  private(set) var peers: [Double]
  /// [rounds, groups] that each group sends.
  private(set) var sent: [Double]

  /// O(W² + rounds·nodes) for the first rows of a batch in such groups, O(W·shadows + rounds·nodes) for others of it.
  init(_ between: RowsBetween, on cluster: Cluster, _ groups: Groups) {
    let (nodes, rounds, links) = (cluster.nodes.count, groups.count, cluster.peers.count)
    guard !between.isStill else {
      up = Array(repeating: 0, count: rounds * nodes)
      down = up
      peers = Array(repeating: 0, count: rounds * links)
      sent = Array(repeating: 0, count: rounds * rounds)
      return
    }
    var flows = between.flows(on: cluster, groups)
    for (seat, experts) in between.shadows {
      flows.remove(experts, at: seat, between, on: cluster, groups)
    }
    (up, down, peers, sent) = (flows.up, flows.down, flows.peers, flows.sent)
    for round in 0..<rounds {
      for node in round * nodes..<(round + 1) * nodes - 1 {
        let parent = round * nodes + cluster.nodes[node - round * nodes].parent
        up[parent] += up[node]
        down[parent] += down[node]
      }
    }
  }

  /// Takes rows of the only round off their way.
  mutating func remove(_ rows: Double, from source: Int, to target: Int, on cluster: Cluster) {
    cluster.walk(
      from: source, to: target, up: { up[$0] -= rows }, down: { down[$0] -= rows }, peer: { peers[$0] -= rows })
  }
}
