/// A machine room as numbers: workers, how fast each computes, and the links between them.
///
/// The links are a tree of places with a worker at each leaf, plus peer links that join two places directly. A **seat** is
/// a worker's position among the leaves in tree order, where neighbours share the nearest links; a **node** is any point
/// of the tree: the seats 0..<W, then the places, each before its parent, the root last.
///
/// It never changes: `ring`, which is found by walking all the rest, is set at the end of `init`, and with it the `tables`
/// of its hops.
package final class Cluster: @unchecked Sendable {
  /// As it was read.
  package let document: Document
  package let workers: Int
  /// [W] rank at each seat, and the seat of each rank.
  package let ranks: [Int]
  package let seats: [Int]
  /// [W] by seat.
  package let rates: [WorkerRates]
  /// [nodes]
  package let nodes: [Node]
  /// [nodes] as the document calls them.
  package let names: [String]
  /// Both directions of a link are neighbours: 2i and 2i + 1.
  package let peers: [PeerLink]
  /// [W] the peer links that lead away from each seat.
  package let peersFrom: [[Int]]
  /// The ring of all seats: hop i leads from seat i to the next one, the last to the first.
  @exclusivity(unchecked) package private(set) var ring: Ring
  /// What planning reads by the thousand.
  let tables: Tables
  private let memory = Scratch()
  /// How many times longer computing takes while the worker's messages move; 1: no matter.
  package let slowdown: Double
  /// How many times longer messages take while their workers compute.
  package let messageSlowdown: Double

  /// Time of `latency + bytes · slowness`; a link without limit has neither.
  package struct Cost: Equatable, Sendable {
    /// Seconds per byte.
    package var slowness = 0.0
    package var latency = 0.0
  }

  package struct Node: Sendable {
    /// The node above; the root is its own.
    package var parent: Int
    /// The seats below: a range, as seats are in tree order.
    package var seats: Range<Int>
    /// The link to the parent, and from it.
    package var up: Cost
    package var down: Cost
  }

  /// One direction of a peer link: from all workers in one node to all in another.
  package struct PeerLink: Sendable {
    package let from: Int
    package let to: Int
    package let cost: Cost
  }

  package struct Ring: Sendable {
    /// [W]
    package var costs: [Cost] = []
    /// The hop whose bytes cost most, what they cost on all others, and the latency of all hops.
    package var slowest = 0
    package var slownessOfOthers = 0.0
    package var latency = 0.0
    /// The hop that each link is part of, or -1: [nodes] up, [nodes] down, [peers].
    package var up: [Int] = []
    package var down: [Int] = []
    package var peers: [Int] = []
  }

  /// The same as the arrays, without their counts of who holds them: these would take a tenth of the time of planning for
  /// few workers. Held by the cluster.
  struct Tables {
    let ranks, seats: UnsafeMutableBufferPointer<Int>
    let rates: UnsafeMutableBufferPointer<Unmanaged<WorkerRates>>
    let nodes: UnsafeMutableBufferPointer<Node>
    /// [nodes] the hop of the ring that each one's links are part of, or -1.
    let hopsUp, hopsDown: UnsafeMutableBufferPointer<Int>
  }

  /// More would not fit any table of pairs.
  package static let mostWorkers = 16384

  package init(_ document: Document) throws(Failure) {
    let layout = try Layout(document)
    self.document = document
    workers = document.workers.count
    (ranks, seats, nodes, names) = (layout.ranks, layout.seats, layout.nodes, layout.names)
    rates = try Layout.rates(of: layout.ranks, document)
    peers = try layout.peers(document.peers ?? [])
    (slowdown, messageSlowdown) = (document.slowdown ?? 1, document.messageSlowdown ?? 1)
    for (key, slowdown) in [("computing_slowdown", slowdown), ("message_slowdown", messageSlowdown)] {
      guard slowdown >= 1, slowdown.isFinite else {
        throw Failure(.file, "\(key) is \(slowdown); it must be 1 or more")
      }
    }
    let (count, links) = (workers, peers)
    var leaving = layout.ranks.map { _ in [Int]() }
    for (link, peer) in links.enumerated() {
      for seat in layout.nodes[peer.from].seats { leaving[seat].append(link) }
    }
    peersFrom = leaving
    tables = Tables(
      ranks: memory.copy(ranks), seats: memory.copy(seats), rates: memory.copy(rates.map(Unmanaged.passUnretained)),
      nodes: memory.copy(nodes), hopsUp: memory.take(nodes.count), hopsDown: memory.take(nodes.count))
    ring = Ring(
      up: Array(repeating: -1, count: nodes.count), down: Array(repeating: -1, count: nodes.count),
      peers: Array(repeating: -1, count: peers.count))
    var ring = ring
    for seat in 0..<count where count > 1 {
      let next = (seat + 1) % count
      walk(
        from: seat, to: next, up: { ring.up[$0] = seat }, down: { ring.down[$0] = seat },
        peer: { ring.peers[$0] = seat })
      ring.costs.append(cost(from: seat, to: next))
    }
    for (hop, cost) in ring.costs.enumerated() {
      ring.latency += cost.latency
      if cost.slowness > ring.costs[ring.slowest].slowness { ring.slowest = hop }
    }
    for (hop, cost) in ring.costs.enumerated() where hop != ring.slowest {
      ring.slownessOfOthers = max(ring.slownessOfOthers, cost.slowness)
    }
    _ = (tables.hopsUp.initialize(from: ring.up), tables.hopsDown.initialize(from: ring.down))
    self.ring = ring
  }

  // MARK: Routes

  /// The lowest node above both.
  package func meeting(_ a: Int, _ b: Int) -> Int {
    var node = a
    while !nodes[node].seats.contains(b) { node = nodes[node].parent }
    return node
  }

  /// The peer link that joins two seats, if one does: it is then their only way.
  package func peer(from source: Int, to target: Int) -> Int? {
    peersFrom[source].first { nodes[peers[$0].to].seats.contains(target) }
  }

  /// Walks the links of the flow between two seats: over the peer link that joins them, else over their meeting.
  @inline(__always)
  package func walk(
    from source: Int, to target: Int, up: (Int) -> Void, down: (Int) -> Void, peer: (Int) -> Void
  ) {
    var (leave, enter) = (0, 0)
    if let joining = self.peer(from: source, to: target) {
      (leave, enter) = (peers[joining].from, peers[joining].to)
      peer(joining)
    } else {
      leave = meeting(source, target)
      enter = leave
    }
    var node = source
    while node != leave {
      up(node)
      node = nodes[node].parent
    }
    node = target
    while node != enter {
      down(node)
      node = nodes[node].parent
    }
  }

  /// What a message between two seats costs if nothing else moves: the narrowest link's bytes, every link's latency.
  package func cost(from source: Int, to target: Int) -> Cost {
    var total = Cost()
    func add(_ link: Cost) {
      total.slowness = max(total.slowness, link.slowness)
      total.latency += link.latency
    }
    walk(
      from: source, to: target, up: { add(nodes[$0].up) }, down: { add(nodes[$0].down) }, peer: { add(peers[$0].cost) })
    return total
  }

  /// `bytes` along the ring, cut into pieces that follow each other, but not over one hop: how an expert is broadcast
  /// (not into its owner) and a gradient reduced (not out of its owner).
  package func around(_ bytes: Bytes, without hop: Int) -> Seconds {
    guard workers > 1 else { return Seconds(0) }
    let slowness = hop == ring.slowest ? ring.slownessOfOthers : ring.costs[ring.slowest].slowness
    return Seconds(bytes.value * slowness + ring.latency - ring.costs[hop].latency)
  }

  /// The slowest link of all: W_net of the paper's formulas, which know one bandwidth.
  package var slowestLink: ByteRate {
    let tree = nodes.reduce(0) { max($0, $1.up.slowness, $1.down.slowness) }
    return ByteRate(1 / tree)
  }

  // MARK: Links by name

  /// One direction of a link.
  package enum Link: Equatable, Sendable {
    /// From a node to the place around it, and from there.
    case up(Int), down(Int)
    case peer(Int)
  }

  package func words(for link: Link) -> String {
    switch link {
    case .up(let node): "\(names[node]) -> \(names[nodes[node].parent])"
    case .down(let node): "\(names[nodes[node].parent]) -> \(names[node])"
    case .peer(let link): "\(names[peers[link].from]) -> \(names[peers[link].to])"
    }
  }

  // MARK: What may leave a place

  /// The share of a worker's choices that may leave `place`, a node above it, so that the place's link is busy no longer
  /// than the worker's own: W_net/(M·W_local) for M workers in the place (FasterMoE §4.3). nil where the worker's link has no
  /// limit, so that there is nothing to balance against.
  package func remoteShare(of seat: Int, leaving place: Int) -> Double? {
    let own = max(nodes[seat].up.slowness, nodes[seat].down.slowness)
    guard own > 0, place != seat else { return nil }
    let net = max(nodes[place].up.slowness, nodes[place].down.slowness) * Double(nodes[place].seats.count)
    return net > own ? own / net : 1
  }

  /// The smallest share over all workers for leaving the widest places that divide them; nil if no worker's link has a
  /// limit or the workers are one place.
  package var remoteShare: Double? {
    guard workers > 1 else { return nil }
    return (0..<workers).compactMap { remoteShare(of: $0, leaving: widestPlace(of: $0)) }.min()
  }

  /// The node around a seat that is next below the lowest one in which all are together.
  package func widestPlace(of seat: Int) -> Int {
    var place = seat
    while nodes[nodes[place].parent].seats.count < workers { place = nodes[place].parent }
    return place
  }
}
