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
package final class Volumes {
  let demand: Demand
  private let memory: Scratch
  /// [W] by seat.
  private let busy: Demand.ComputeSeconds
  /// [1, nodes] and [1, peers] rows on their way to experts; they come back in the other direction.
  private let loads: LinkLoads
  /// [W] by seat: shadowed experts of each owner.
  let shadowsOf: UnsafeMutableBufferPointer<Int>
  @exclusivity(unchecked) private(set) package var shadows: [Int] = []
  /// Shadows that are played as one step.
  package let copiesAtOnce: Int
  /// [shadows / copiesAtOnce, W] by seat: of each worker's own rows, where several are played as one.
  private let buckets: Demand.ComputeSeconds?
  /// What all copies take one after the other, as every schedule moves them.
  private var copying: Seconds { fetching * (fetchesAgain ? 2 : 1) + reducing }
  @exclusivity(unchecked) private var fetching = Seconds(0)
  @exclusivity(unchecked) private var reducing = Seconds(0)
  /// Whether backward fetches the shadows again (ZeRO stage 3).
  @exclusivity(unchecked) package var fetchesAgain = false { didSet { links = nil } }
  /// What the busiest links take forward and back, once asked for.
  @exclusivity(unchecked) private var links: (forward: Seconds, backward: Seconds)?

  /// With `shadows`, in the order in which they are fetched. O(W·(W + E)).
  package convenience init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster, shadows: [Int] = []) {
    self.init(Demand(traffic, shape, on: cluster), shadows: shadows)
  }

  /// Of a batch that was looked at before: O(E + W·shadows). In `memory`, as long as it is not released there.
  package convenience init(_ demand: Demand, shadows: [Int] = [], in memory: Scratch = Scratch()) {
    self.init(demand, shadows, atOnce: 0, memory)
  }

  /// Every expert shadowed, and fetched again for backward (ZeRO stage 3).
  ///
  /// Where that makes more steps of more workers than are worth looking at, some copies are played as one, each still far
  /// shorter than the whole; implementations fetch in buckets, too. O(W·E).
  package convenience init(everyExpertOf demand: Demand) {
    let experts = demand.traffic.experts
    let atOnce = max(1, (experts * demand.traffic.workers + Volumes.mostSteps - 1) / Volumes.mostSteps)
    self.init(demand, Array(0..<experts), atOnce: atOnce, Scratch())
    fetchesAgain = true
  }
  private static let mostSteps = 1 << 22

  /// `atOnce` is 0 where what single copies take is remembered for others of the same batch.
  private init(_ demand: Demand, _ shadows: [Int], atOnce: Int, _ memory: Scratch) {
    (self.demand, self.memory, copiesAtOnce) = (demand, memory, max(1, atOnce))
    let (workers, experts) = (demand.traffic.workers, demand.traffic.experts)
    busy = Demand.ComputeSeconds(workers, in: memory)
    shadowsOf = memory.take(workers, of: 0)
    let all = Groups(workers: workers, size: workers)
    loads = LinkLoads(demand, without: shadows, all, in: memory)
    buckets =
      atOnce > 0 ? Demand.ComputeSeconds((shadows.count + atOnce - 1) / atOnce * workers, in: memory) : nil
    let isShadow = memory.take(experts, of: false)
    for expert in shadows { isShadow[expert] = true }
    let each = experts / workers
    for owner in 0..<workers {
      let seat = demand.seats[owner]
      for expert in owner * each..<(owner + 1) * each where !isShadow[expert] {
        busy.rows[seat] += demand.whole.rows[expert]
        busy.weights[seat] += demand.whole.weights[expert]
      }
    }
    if let buckets { demand.add(shadows, atOnce: atOnce, to: buckets) }
    for expert in shadows { addCopy(of: expert) }
    for step in 0..<countOfCopies { addBusy(computing(step)) }
  }

  /// The same, to be changed in `memory`. O(W + links).
  private init(copying other: Volumes, in memory: Scratch) {
    precondition(other.buckets == nil)
    (demand, copiesAtOnce, buckets, self.memory) = (other.demand, 1, nil, memory)
    (busy, loads) = (
      Demand.ComputeSeconds(copying: other.busy, in: memory), LinkLoads(copying: other.loads, in: memory)
    )
    (shadowsOf, shadows) = (memory.copy(other.shadowsOf), other.shadows)
    (fetching, reducing, fetchesAgain) = (other.fetching, other.reducing, other.fetchesAgain)
  }

  /// What no schedule takes less than with one more shadow, or with that in place of another. O(W + links).
  func least(with expert: Int?, without other: Int? = nil) -> Seconds {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    let changed = Volumes(copying: self, in: memory)
    if let other { changed.change(other, isMore: false, demand.copy(of: other, in: memory)) }
    if let expert { changed.change(expert, isMore: true, demand.copy(of: expert, in: memory)) }
    return changed.least
  }

  /// One shadow more. O(W).
  package func shadow(_ expert: Int) { change(expert, isMore: true, demand.copy(of: expert)) }

  /// One shadow more, or one less; `copy` is what each worker's own rows for it take.
  private func change(_ expert: Int, isMore: Bool, _ copy: Demand.ComputeSeconds) {
    precondition(buckets == nil)
    let (owner, sign) = (demand.owner(of: expert), isMore ? 1.0 : -1.0)
    busy.rows[owner] -= sign * demand.whole.rows[expert]
    busy.weights[owner] -= sign * demand.whole.weights[expert]
    for seat in 0..<demand.traffic.workers where seat != owner {
      let rows = demand.rows(from: seat, for: expert)
      if rows > 0 { loads.remove(sign * Double(rows), from: seat, to: owner, round: 0, demand) }
    }
    addBusy((copy.rows.baseAddress!, copy.weights.baseAddress!), sign)
    addCopy(of: expert, isMore: isMore)
  }

  private func addBusy(
    _ copy: (rows: UnsafeMutablePointer<Double>, weights: UnsafeMutablePointer<Double>), _ sign: Double = 1
  ) {
    for seat in 0..<demand.traffic.workers {
      busy.rows[seat] += sign * copy.rows[seat]
      busy.weights[seat] += sign * copy.weights[seat]
    }
  }

  private func addCopy(of expert: Int, isMore: Bool = true) {
    links = nil
    let (owner, sign) = (demand.owner(of: expert), isMore ? 1.0 : -1.0)
    shadowsOf[owner] += isMore ? 1 : -1
    fetching = fetching + fetching(from: owner) * sign
    reducing = reducing + reducing(to: owner) * sign
    if isMore { shadows.append(expert) } else { shadows.removeAll { $0 == expert } }
  }

  /// The copies as they are played.
  package var countOfCopies: Int { (shadows.count + copiesAtOnce - 1) / copiesAtOnce }

  /// [W] what each worker's own rows take in one of them.
  func computing(_ copy: Int) -> (rows: UnsafeMutablePointer<Double>, weights: UnsafeMutablePointer<Double>) {
    if let buckets {
      let first = copy * demand.traffic.workers
      return (buckets.rows.baseAddress! + first, buckets.weights.baseAddress! + first)
    }
    let one = demand.copy(of: shadows[copy])
    return (one.rows.baseAddress!, one.weights.baseAddress!)
  }

  /// Rows that move from one seat to another's experts.
  func rows(from source: Int, to target: Int) -> Int {
    var rows = Int(demand.rows(from: source, to: target))
    guard shadowsOf[target] > 0 else { return rows }
    let owned = demand.traffic.owned(by: demand.ranks[target])
    for expert in shadows where owned.contains(expert) { rows -= demand.rows(from: source, for: expert) }
    return rows
  }

  /// A broadcast does not go into its owner, a reduction not out of it.
  package func fetching(from owner: Int) -> Seconds {
    demand.cluster.around(demand.shape.expertBytes, without: owner == 0 ? demand.cluster.workers - 1 : owner - 1)
  }
  package func reducing(to owner: Int) -> Seconds { demand.cluster.around(demand.shape.expertBytes, without: owner) }

  package var roofline: Roofline {
    let again = fetchesAgain ? 2 : 1
    let (seconds, link) = longest { both(2 * ($0 + $1), copies: fetches(over: $2) * again + reduces(over: $2)) }
    var (busiest, most) = (0, -1.0)
    for seat in 0..<demand.traffic.workers where busy.rows[seat] + busy.weights[seat] > most {
      (busiest, most) = (seat, busy.rows[seat] + busy.weights[seat])
    }
    return Roofline(
      compute: computing, communicate: communicating, busiestLink: seconds, link: link, busiestSeat: busiest,
      work: demand.rows.reduce(Flops(0)) { $0 + demand.shape.flops(rows: $1) }, workers: demand.traffic.workers)
  }

  /// One after the other.
  package var serial: Seconds { computing + communicating }
  /// Of the busiest worker forward and of the busiest one back: all meet in between.
  private var computing: Seconds { busiestForward + busiestBackward }
  private var busiestForward: Seconds {
    var most = 0.0
    for seat in 0..<demand.traffic.workers { most = max(most, busy.rows[seat]) }
    return Seconds(most)
  }
  private var busiestBackward: Seconds {
    var most = 0.0
    for seat in 0..<demand.traffic.workers { most = max(most, busy.rows[seat] + busy.weights[seat]) }
    return Seconds(most)
  }
  private var communicating: Seconds { moving + copying }
  /// Rows alone.
  private var moving: Seconds {
    let there = longest { there, _, _ in there }.seconds
    let back = longest { _, back, _ in back }.seconds
    return (there + back) * 2
  }
  /// No coarse plan is faster.
  var leastSerial: Seconds { computing + moving + leastCopying }

  /// No schedule is faster than its busiest worker, its busiest link, which carries rows there and back, and its copies.
  package var leastForward: Seconds { max(busiestForward, linkForward, inSeries(fetching)) }
  package var leastBackward: Seconds {
    max(busiestBackward, linkBackward, inSeries(fetchesAgain ? fetching + reducing : reducing))
  }
  /// Every worker but one sends in a copy, and every one but one receives: of three and more, some do so in any two.
  private func inSeries(_ copies: Seconds) -> Seconds { demand.traffic.workers > 2 ? copies : Seconds(0) }
  package var least: Seconds { leastForward + leastBackward }
  package var linkForward: Seconds { busiestLinks.forward }
  package var linkBackward: Seconds { busiestLinks.backward }
  private var busiestLinks: (forward: Seconds, backward: Seconds) {
    if let links { return links }
    let again = fetchesAgain ? 1 : 0
    let found = (
      forward: longest { both($0 + $1, copies: fetches(over: $2)) }.seconds,
      backward: longest { both($0 + $1, copies: reduces(over: $2) + fetches(over: $2) * again) }.seconds
    )
    links = found
    return found
  }
  /// What no schedule of the copies takes less than: one after the other or, of two workers, on the hop that carries most.
  package var leastCopying: Seconds {
    guard demand.traffic.workers == 2 else { return copying }
    var most = 0.0
    for (hop, cost) in demand.cluster.ring.costs.enumerated() {
      most = max(most, Double(fetches(over: hop) * (fetchesAgain ? 2 : 1) + reduces(over: hop)) * cost.slowness)
    }
    return Seconds(most * demand.shape.expertBytes.value)
  }

  /// Rows and copies of experts, in rows.
  @inline(__always) private func both(_ rows: Double, copies: Int) -> Double {
    copies == 0 ? rows : rows + Double(copies) * (demand.shape.expertBytes / demand.shape.rowBytes)
  }

  /// How many experts move over a hop of the ring, or a link on none.
  @inline(__always) private func fetches(over hop: Int) -> Int {
    hop < 0 ? 0 : shadows.count - shadowsOf[hop + 1 == demand.traffic.workers ? 0 : hop + 1]
  }
  @inline(__always) private func reduces(over hop: Int) -> Int { hop < 0 ? 0 : shadows.count - shadowsOf[hop] }

  /// Of the link that takes longest, where `rows` says what one carries by what goes over it and over its other direction on
  /// the rows' way there.
  @inline(__always)
  private func longest(_ rows: (_ there: Double, _ back: Double, _ hop: Int) -> Double)
    -> (seconds: Seconds, link: Cluster.Link?)
  {
    var (longest, busiest) = (0.0, Cluster.Link?.none)
    let nodes = demand.nodes
    for index in 0..<nodes.count - 1 {
      let (up, down) = (loads.up[index], loads.down[index])
      let there = rows(up, down, demand.hopsUp[index]) * nodes[index].up.slowness
      if there > longest { (longest, busiest) = (there, .up(index)) }
      let back = rows(down, up, demand.hopsDown[index]) * nodes[index].down.slowness
      if back > longest { (longest, busiest) = (back, .down(index)) }
    }
    for (index, peer) in demand.cluster.peers.enumerated() {
      let time = rows(loads.peers[index], loads.peers[index ^ 1], demand.cluster.ring.peers[index]) * peer.cost.slowness
      if time > longest { (longest, busiest) = (time, .peer(index)) }
    }
    return (Seconds(longest * demand.shape.rowBytes.value), busiest)
  }
}
