/// The rows that each round of an exchange in groups loads on each directed link.
struct LinkLoads {
  /// [rounds, nodes] on the links up from each node and down to it.
  let up, down: UnsafeMutableBufferPointer<Double>
  /// [rounds, peers]
  let peers: UnsafeMutableBufferPointer<Double>
  /// [rounds, groups] that each group sends.
  let sent: UnsafeMutableBufferPointer<Double>

  /// Nothing moves.
  private init(none demand: Demand, _ groups: Groups, in memory: Scratch) {
    up = memory.take(groups.count * demand.nodes.count, of: 0)
    down = memory.take(groups.count * demand.nodes.count, of: 0)
    peers = memory.take(groups.count * demand.cluster.peers.count, of: 0)
    sent = memory.take(groups.count * groups.count, of: 0)
  }

  init(copying other: LinkLoads, in memory: Scratch) {
    (up, down) = (memory.copy(other.up), memory.copy(other.down))
    (peers, sent) = (memory.copy(other.peers), memory.copy(other.sent))
  }

  /// Of all rows. O(W² + rounds·nodes).
  ///
  /// At first a flow counts once where it begins, and off again where its way turns from up to down, at the lowest node above
  /// both ends; likewise from its other end. Sums over subtrees are what links carry. Whole numbers, so sums are exact.
  init(_ demand: Demand, _ groups: Groups, in memory: Scratch) {
    self.init(none: demand, groups, in: memory)
    let (cluster, nodes) = (demand.cluster, demand.nodes)
    for seat in 0..<cluster.workers {
      let own = groups.group(of: seat)
      // To the seats `first..<end` of one group, for all of which the way turns at `top`.
      func flow(_ first: Int, _ end: Int, top: Int, group: Int) {
        let round = groups.round(from: own, to: group)
        let sum = demand.addRows(from: seat, to: first..<end, down.baseAddress! + round * nodes.count)
        up[round * nodes.count + seat] += sum
        up[round * nodes.count + top] -= sum
        down[round * nodes.count + top] -= sum
        sent[round * groups.count + own] += sum
      }
      var (node, next) = (seat, seat + 1)
      while next < cluster.workers {
        while nodes[node].seats.upperBound <= next { node = nodes[node].parent }
        let group = groups.group(of: next)
        let end = min(nodes[node].seats.upperBound, groups.seats(of: group).upperBound)
        flow(next, end, top: node, group: group)
        next = end
      }
      (node, next) = (seat, seat)
      while next > 0 {
        while nodes[node].seats.lowerBound >= next { node = nodes[node].parent }
        let group = groups.group(of: next - 1)
        let first = max(nodes[node].seats.lowerBound, groups.seats(of: group).lowerBound)
        flow(first, next, top: node, group: group)
        next = first
      }
      guard !cluster.peers.isEmpty else { continue }
      for link in cluster.peersFrom[seat] {
        for target in nodes[cluster.peers[link].to].seats {
          divert(demand.rows(from: seat, to: target), from: seat, to: target, over: link, cluster, groups)
        }
      }
    }
    for round in 0..<groups.count {
      let (up, down) = (up.baseAddress! + round * nodes.count, down.baseAddress! + round * nodes.count)
      for node in 0..<nodes.count - 1 {
        up[nodes[node].parent] += up[node]
        down[nodes[node].parent] += down[node]
      }
    }
  }

  /// What a peer link carries leaves the tree where that link begins, and is back where it ends.
  private func divert(
    _ rows: Double, from seat: Int, to target: Int, over link: Int, _ cluster: Cluster, _ groups: Groups
  ) {
    let round = groups.round(from: groups.group(of: seat), to: groups.group(of: target))
    let (first, top, peer) = (round * cluster.nodes.count, cluster.meeting(seat, target), cluster.peers[link])
    up[first + top] += rows
    up[first + peer.from] -= rows
    down[first + top] += rows
    down[first + peer.to] -= rows
    peers[round * cluster.peers.count + link] += rows
  }

  /// Of what is left without some shadows. O(rounds·nodes + W·shadows) where the loads of all rows are known.
  init(_ demand: Demand, without shadows: [Int], _ groups: Groups, in memory: Scratch) {
    guard shadows.count < demand.traffic.experts else {
      self.init(none: demand, groups, in: memory)
      return
    }
    self.init(copying: demand.loads(groups), in: memory)
    for expert in shadows {
      let target = demand.owner(of: expert)
      let group = groups.group(of: target)
      for seat in 0..<demand.traffic.workers where seat != target {
        let rows = Double(demand.rows(from: seat, for: expert))
        guard rows > 0 else { continue }
        let own = groups.group(of: seat)
        let round = groups.round(from: own, to: group)
        sent[round * groups.count + own] -= rows
        remove(rows, from: seat, to: target, round: round, demand)
      }
    }
  }

  /// Takes rows of a round off their way.
  @inline(__always)
  func remove(_ rows: Double, from source: Int, to target: Int, round: Int, _ demand: Demand) {
    let (nodes, cluster) = (demand.nodes, demand.cluster)
    let first = round * nodes.count
    guard cluster.peers.isEmpty else {
      cluster.walk(
        from: source, to: target, up: { up[first + $0] -= rows }, down: { down[first + $0] -= rows },
        peer: { peers[round * cluster.peers.count + $0] -= rows })
      return
    }
    var node = source
    while !nodes[node].seats.contains(target) {
      up[first + node] -= rows
      node = nodes[node].parent
    }
    let top = node
    node = target
    while node != top {
      down[first + node] -= rows
      node = nodes[node].parent
    }
  }
}
