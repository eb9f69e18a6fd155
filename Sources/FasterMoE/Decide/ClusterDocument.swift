// A cluster's JSON form, and how its places become seats and nodes.

extension Cluster {
  /// The JSON form; docs/model.md describes it.
  package struct Document: Codable, Equatable, Sendable {
    /// 1, the version of this form.
    package var version = 1
    package var places: [Place] = []
    /// In the order of ranks.
    package var workers: [Worker] = []
    package var peers: [Peer]?
    package var slowdown: Double?
    package var messageSlowdown: Double?
    enum CodingKeys: String, CodingKey {
      case version = "fastermoe_cluster"
      case places, workers
      case peers = "peer_links"
      case slowdown = "computing_slowdown"
      case messageSlowdown = "message_slowdown"
    }
    package init() {}

    package struct Link: Codable, Equatable, Sendable {
      /// Missing: infinite.
      package var bandwidth: Double?
      /// Missing: none.
      package var latency: Double?
      enum CodingKeys: String, CodingKey {
        case bandwidth = "bytes_per_second"
        case latency = "latency_seconds"
      }
    }

    package struct Place: Codable, Equatable, Sendable {
      package var name: String
      /// The place around it; only the root has none.
      package var `in`: String?
      /// The link to the place around it, and from it; missing: as `up`; both missing: infinite.
      package var up: Link?
      package var down: Link?
    }

    package struct Worker: Codable, Equatable, Sendable {
      package var name: String
      package var `in`: String
      package var up: Link?
      package var down: Link?
      package var flops: [RateCurve.Sample]
      /// Missing: as `flops`.
      package var weightFlops: [RateCurve.Sample]?
      /// Missing: infinite.
      package var rowHandling: Double?
      enum CodingKeys: String, CodingKey {
        case name, `in`, up, down
        case flops = "flops_per_second"
        case weightFlops = "weight_gradient_flops_per_second"
        case rowHandling = "row_bytes_per_second"
      }
    }

    package struct Peer: Codable, Equatable, Sendable {
      package var from: String
      package var to: String
      package var there: Link
      /// Missing: as `there`.
      package var back: Link?
    }
  }

  /// Puts the places of a document in order.
  struct Layout {
    var ranks: [Int] = []
    var seats: [Int]
    var nodes: [Node] = []
    /// [nodes]
    var names: [String] = []
    private var nodeOf: [String: Int] = [:]

    init(_ document: Document) throws(Failure) {
      let (places, workers) = (document.places, document.workers)
      guard document.version == 1 else {
        throw Failure(.file, "fastermoe_cluster is \(document.version); this version reads 1")
      }
      guard !workers.isEmpty else { throw Failure(.file, "there are no workers") }
      guard workers.count <= mostWorkers else {
        throw Failure(.file, "\(workers.count) workers are more than the \(mostWorkers) that a cluster may have")
      }
      // Places first, then workers, each by its name.
      var index: [String: Int] = [:]
      for (at, name) in (places.map(\.name) + workers.map(\.name)).enumerated() {
        guard !name.isEmpty else { throw Failure(.file, "a name is empty") }
        guard index.updateValue(at, forKey: name) == nil else {
          throw Failure(.file, "two places or workers are called \"\(name)\"")
        }
      }
      var around: [Int] = []
      var root = -1
      for (name, home) in places.map({ ($0.name, $0.in) }) + workers.map({ ($0.name, Optional($0.in)) }) {
        if let home {
          guard let place = index[home] else {
            throw Failure(.file, "\"\(name)\" is in \"\(home)\", which is not there")
          }
          guard place < places.count else {
            throw Failure(.file, "\"\(name)\" is in \"\(home)\", which is a worker and holds nothing")
          }
          around.append(place)
        } else {
          guard root < 0 else {
            throw Failure(
              .file, "\"\(places[root].name)\" and \"\(name)\" are both in no place; only one may be the root")
          }
          root = around.count
          around.append(root)
        }
      }
      var children = Array(repeating: [Int](), count: around.count)
      for (at, home) in around.enumerated() where at != root { children[home].append(at) }
      seats = Array(repeating: 0, count: workers.count)

      // From the root down: what a walk does not reach lies on a circle.
      var order: [Int] = root >= 0 ? [root] : []
      var next = 0
      while next < order.count {
        order.append(contentsOf: children[order[next]])
        next += 1
      }
      let reached = Set(order)
      if let lost = around.indices.first(where: { !reached.contains($0) }) {
        let name = lost < places.count ? places[lost].name : workers[lost - places.count].name
        throw Failure(.file, "\"\(name)\" is in places that go round in a circle, not in a tree")
      }
      // Subtrees by their lowest rank, so that seats follow ranks wherever the tree lets them.
      var lowest = around.indices.map { $0 < places.count ? Int.max : $0 - places.count }
      for at in order.reversed() where at != root { lowest[around[at]] = min(lowest[around[at]], lowest[at]) }
      var pending = [root]
      var seatOf = Array(repeating: -1, count: around.count)
      while let at = pending.popLast() {
        if at >= places.count {
          seatOf[at] = ranks.count
          seats[at - places.count] = ranks.count
          ranks.append(at - places.count)
        }
        pending.append(contentsOf: children[at].sorted { (lowest[$0], $0) > (lowest[$1], $1) })
      }
      // Nodes: seats, then places from the leaves up.
      var node = seatOf
      var count = workers.count
      for at in order.reversed() where at < places.count {
        node[at] = count
        count += 1
      }
      nodes = Array(repeating: Node(parent: 0, seats: 0..<0, up: Cost(), down: Cost()), count: count)
      for at in order.reversed() {
        let own = node[at]
        if at >= places.count { nodes[own].seats = own..<own + 1 }
        nodes[own].parent = node[around[at]]
        let (name, up, down) =
          at < places.count
          ? (places[at].name, places[at].up, places[at].down)
          : (workers[at - places.count].name, workers[at - places.count].up, workers[at - places.count].down)
        guard at != root || (up == nil && down == nil) else {
          throw Failure(.file, "\"\(name)\" has a link up, but is in no place")
        }
        guard up != nil || down == nil else { throw Failure(.file, "\"\(name)\" has a link down and none up") }
        nodes[own].up = try Layout.cost(up, "the link up from \"\(name)\"")
        nodes[own].down = try Layout.cost(down ?? up, "the link down to \"\(name)\"")
        guard at != root, !nodes[own].seats.isEmpty else { continue }
        let above = nodes[node[around[at]]].seats
        nodes[node[around[at]]].seats =
          above.isEmpty
          ? nodes[own].seats
          : min(above.lowerBound, nodes[own].seats.lowerBound)..<max(above.upperBound, nodes[own].seats.upperBound)
      }
      names = Array(repeating: "", count: count)
      for (name, at) in index { (nodeOf[name], names[node[at]]) = (node[at], name) }
    }

    /// Both directions of every peer link.
    func peers(_ given: [Document.Peer]) throws(Failure) -> [PeerLink] {
      var links: [PeerLink] = []
      for peer in given {
        for name in [peer.from, peer.to] where nodeOf[name] == nil {
          throw Failure(.file, "a peer link joins \"\(name)\", which is not there")
        }
        let (a, b) = (nodeOf[peer.from]!, nodeOf[peer.to]!)
        guard !nodes[a].seats.overlaps(nodes[b].seats), !nodes[a].seats.isEmpty, !nodes[b].seats.isEmpty else {
          throw Failure(.file, "a peer link joins \"\(peer.from)\" and \"\(peer.to)\", which are not workers apart")
        }
        for link in links
        where nodes[link.from].seats.overlaps(nodes[a].seats) && nodes[link.to].seats.overlaps(nodes[b].seats) {
          throw Failure(.file, "two peer links join workers of \"\(peer.from)\" and \"\(peer.to)\"")
        }
        let what = "the peer link between \"\(peer.from)\" and \"\(peer.to)\""
        links.append(PeerLink(from: a, to: b, cost: try Layout.cost(peer.there, what)))
        links.append(PeerLink(from: b, to: a, cost: try Layout.cost(peer.back ?? peer.there, what)))
      }
      return links
    }

    /// Of each of `ranks`; neighbours that are as fast share theirs.
    static func rates(of ranks: [Int], _ document: Document) throws(Failure) -> [WorkerRates] {
      var all: [WorkerRates] = []
      var last: Document.Worker?
      for rank in ranks {
        let worker = document.workers[rank]
        let isSame =
          last.map {
            $0.flops == worker.flops && $0.weightFlops == worker.weightFlops && $0.rowHandling == worker.rowHandling
          } ?? false
        all.append(isSame ? all[all.count - 1] : try rates(worker))
        last = worker
      }
      return all
    }

    private static func rates(_ worker: Document.Worker) throws(Failure) -> WorkerRates {
      let name = "worker \"\(worker.name)\""
      let handling = worker.rowHandling ?? .infinity
      guard handling > 0 else {
        throw Failure(.file, "\(name) has \(handling) row_bytes_per_second; it must be positive")
      }
      let products = try curve(worker.flops, "flops_per_second", name)
      return WorkerRates(
        products: products,
        weightGrads: try worker.weightFlops.map { samples throws(Failure) in
          try curve(samples, "weight_gradient_flops_per_second", name)
        } ?? products, rowHandling: ByteRate(handling))
    }

    private static func curve(_ samples: [RateCurve.Sample], _ key: String, _ worker: String) throws(Failure)
      -> RateCurve
    {
      guard !samples.isEmpty else { throw Failure(.file, "\(worker) has no \(key)") }
      for (index, sample) in samples.enumerated() {
        guard sample.rows >= 1, index == 0 || sample.rows > samples[index - 1].rows else {
          throw Failure(.file, "\(worker): rows of \(key) must be positive and rise, not \(sample.rows)")
        }
        guard sample.rate.value > 0, sample.rate.value.isFinite else {
          throw Failure(
            .file,
            "\(worker): \(key) at \(sample.rows) rows is \(sample.rate.value); it must be positive and finite"
          )
        }
      }
      return RateCurve(samples)
    }

    private static func cost(_ link: Document.Link?, _ what: String) throws(Failure) -> Cost {
      let (bandwidth, latency) = (link?.bandwidth ?? .infinity, link?.latency ?? 0)
      guard bandwidth > 0 else {
        throw Failure(.file, "\(what) has \(bandwidth) bytes_per_second; it must be positive")
      }
      guard latency >= 0, latency.isFinite else {
        throw Failure(.file, "\(what) has \(latency) latency_seconds; it must be finite, 0 or more")
      }
      return Cost(slowness: 1 / bandwidth, latency: latency)
    }
  }
}

extension Cluster.Document {
  /// A calibrated group: its hosts, their packages and NUMA nodes where these set ranks apart, and a worker for each rank.
  ///
  /// What was measured within hosts limits each worker's link, what was measured between them each host's. A message from
  /// host to host takes both latencies, twice half of each.
  package init(_ ranks: Places, _ calibration: Calibration) {
    func link(_ measured: Calibration.Link?, latency: Double) -> Link? {
      measured.map { Link(bandwidth: $0.rate.value, latency: latency) }
    }
    let within = calibration.withinHosts?.latency.value ?? 0
    let between = max(0, (calibration.betweenHosts?.latency.value ?? 0) - within)
    if ranks.hosts > 1 { places.append(Place(name: "network")) }
    for (rank, place) in ranks.all.enumerated() {
      let onHost = ranks.all.indices.filter { ranks.host[$0] == ranks.host[rank] }.map { ranks.all[$0] }
      let onPackage = onHost.filter { $0.package == place.package }
      var home = ranks.hosts > 1 ? "network" : nil
      func enter(_ name: String, up: Link? = nil) {
        if !places.contains(where: { $0.name == name }) { places.append(Place(name: name, in: home, up: up)) }
        home = name
      }
      // Names of hosts may be cut or broken; their numbers are their own.
      let host = "host \(ranks.host[rank]) (\(place.hostName))"
      enter(host, up: ranks.hosts > 1 ? link(calibration.betweenHosts, latency: between / 2) : nil)
      if onHost.contains(where: { $0.package != place.package }) { enter("\(host) package \(place.package)") }
      if onPackage.contains(where: { $0.numaNode != place.numaNode }) { enter("\(home!) node \(place.numaNode)") }
      workers.append(
        Worker(
          name: "rank \(rank)", in: home!, up: link(calibration.withinHosts, latency: within / 2),
          flops: ComputeRates.samples(calibration.rates[rank].products),
          weightFlops: ComputeRates.samples(calibration.rates[rank].weightGrads),
          rowHandling: calibration.rates[rank].rowHandling.value))
    }
    messageSlowdown = calibration.messageSlowdown
  }
}

extension Cluster.Document {
  /// The same kind of cluster with another number of workers: the places in the root, or the workers in it, again and
  /// again, each with all that is in it, until there are so many.
  package func repeated(to count: Int) throws(Failure) -> Cluster.Document {
    guard count > 0 else { throw Failure(.argument, "a cluster cannot have \(count) workers") }
    guard let root = places.first(where: { $0.in == nil }) else { throw Failure(.file, "there is no root") }
    var home: [String: String] = [:]
    for place in places { home[place.name] = place.in }
    /// The place or worker in the root that one is in.
    func part(_ name: String, in place: String?) -> String {
      var (part, around) = (name, place)
      // A document that goes round in a circle is not read.
      while let next = around, next != root.name { (part, around) = (next, home[next]) }
      return part
    }
    struct Part {
      var places: [Place] = []
      var workers: [Worker] = []
      var peers: [Peer] = []
    }
    var (order, parts, partOf) = ([String](), [String: Part](), [String: String]())
    func enter(_ name: String, in place: String?) -> String {
      let part = part(name, in: place)
      partOf[name] = part
      if parts[part] == nil {
        order.append(part)
        parts[part] = Part()
      }
      return part
    }
    for place in places where place.name != root.name {
      parts[enter(place.name, in: place.in), default: Part()].places.append(place)
    }
    for worker in workers { parts[enter(worker.name, in: worker.in), default: Part()].workers.append(worker) }
    for peer in peers ?? [] {
      guard let part = partOf[peer.from], part == partOf[peer.to] else {
        throw Failure(
          .argument, "the peer link between \"\(peer.from)\" and \"\(peer.to)\" joins places that would be repeated")
      }
      parts[part]!.peers.append(peer)
    }

    var made = self
    (made.places, made.workers, made.peers) = ([root], [], peers == nil ? nil : [])
    var next = 0
    while made.workers.count < count {
      let (part, round) = (parts[order[next % order.count]]!, next / order.count)
      func called(_ name: String) -> String { round == 0 || name == root.name ? name : "\(name)+\(round)" }
      for var place in part.places {
        (place.name, place.in) = (called(place.name), place.in.map(called))
        made.places.append(place)
      }
      for var worker in part.workers {
        (worker.name, worker.in) = (called(worker.name), called(worker.in))
        made.workers.append(worker)
      }
      for var peer in part.peers {
        (peer.from, peer.to) = (called(peer.from), called(peer.to))
        made.peers!.append(peer)
      }
      next += 1
      guard made.workers.count > 0 || next < order.count else { throw Failure(.file, "there are no workers") }
    }
    guard made.workers.count == count else {
      throw Failure(
        .argument, "places as in this cluster do not add up to \(count) workers, only to \(made.workers.count)")
    }
    return made
  }
}
