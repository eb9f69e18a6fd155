/// Which experts to shadow (FasterMoE §4.1).
package enum Shadowing {
  /// Algorithm 1 of the paper, exactly: experts by load, the highest first, as long as its two formulas promise a gain.
  ///
  /// The formulas know one bandwidth, that of the slowest link, and one speed, the slowest worker's peak. They leave out
  /// what still moves next to shadows (eq. 8), so the set may cost more than it saves. `.best` does not rely on them.
  /// Also returns what they promise, without and with the set. O(E·W).
  package static func paper(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster, rows: [Int]? = nil)
    -> (experts: [Int], without: Seconds, with: Seconds)
  {
    let workers = traffic.workers
    let peak = cluster.rates.reduce(cluster.rates[0].products.peak) { min($0, $1.products.peak) }
    let bandwidth = cluster.slowestLink
    /// Three computes of the busiest worker.
    func computing(_ loads: [Int]) -> Seconds { shape.flops(rows: loads.reduce(0, max)) / peak }

    let rows = rows ?? traffic.rowsOfExperts
    var loads = (0..<workers).map { worker in traffic.owned(by: worker).reduce(0) { $0 + rows[$1] } }
    let imbalanced = computing(loads) + shape.rowBytes * (4 * Double(loads.reduce(0, max))) / bandwidth  // eq. 7
    var (least, shadows) = (imbalanced, [Int]())
    for expert in rows.indices.sorted(by: { (rows[$1], $0) < (rows[$0], $1) }) {
      let owner = traffic.owner(of: expert)
      var moved = loads
      for worker in 0..<workers where worker != owner {
        let own = Int(traffic.counts[worker * traffic.experts + expert])
        moved[owner] -= own
        moved[worker] += own
      }
      let copies = shape.expertBytes * (2 * Double(shadows.count + 1)) / bandwidth
      let shadowed = computing(moved) + copies  // eq. 8
      guard shadowed < least else { break }
      (least, loads) = (shadowed, moved)
      shadows.append(expert)
    }
    return (shadows, imbalanced, least)
  }
}

/// Experts in the order in which shadowing them relieves most: again and again the busiest worker's most popular one among
/// those that others send rows to. Every prefix is worth a look. O(W) for the next.
package struct ByExcess: Sequence, IteratorProtocol {
  private let traffic: Traffic
  private let rows: [Int]
  /// [W] each worker's experts with rows from others, the least popular first.
  private var left: [[Int]]
  private var loads: [Int]
  private let slowness: [Double]

  /// `rows` [E] of all workers. O(E·log E).
  package init(_ traffic: Traffic, rows: [Int], on cluster: Cluster) {
    (self.traffic, self.rows) = (traffic, rows)
    left = (0..<traffic.workers).map { worker in
      traffic.owned(by: worker).filter { rows[$0] > Int(traffic.counts[worker * traffic.experts + $0]) }
        .sorted { (rows[$0], $1) < (rows[$1], $0) }
    }
    loads = (0..<traffic.workers).map { worker in traffic.owned(by: worker).reduce(0) { $0 + rows[$1] } }
    slowness = cluster.seats.map { 1 / cluster.rates[$0].products.peak.value }
  }

  package mutating func next() -> Int? {
    var (busiest, most) = (-1, -1.0)
    for worker in loads.indices where !left[worker].isEmpty {
      let load = Double(loads[worker]) * slowness[worker]
      if load > most { (busiest, most) = (worker, load) }
    }
    guard busiest >= 0 else { return nil }
    let expert = left[busiest].removeLast()
    for worker in loads.indices { loads[worker] += Int(traffic.counts[worker * traffic.experts + expert]) }
    loads[busiest] -= rows[expert]
    return expert
  }
}
