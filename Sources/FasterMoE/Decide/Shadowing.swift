/// Which experts to shadow (FasterMoE §4.1).
package enum Shadowing {
  /// Algorithm 1 of the paper, exactly: experts by load, the highest first, as long as its two formulas promise a gain.
  ///
  /// The formulas know one bandwidth, that of the slowest link, and one speed, the slowest worker's peak. They leave out
  /// what still moves next to shadows (eq. 8), so the set may cost more than it saves. `.best` does not rely on them.
  /// Also returns what they promise, without and with the set. O(E·W).
  package static func paper(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster)
    -> (experts: [Int], without: Seconds, with: Seconds)
  {
    let workers = traffic.workers
    let peak = cluster.rates.reduce(cluster.rates[0].products.peak) { min($0, $1.products.peak) }
    let bandwidth = cluster.slowestLink
    /// Three computes of the busiest worker.
    func computing(_ loads: [Int]) -> Seconds { shape.flops(rows: loads.reduce(0, max)) / peak }

    let rows = traffic.rowsOfExperts
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

  /// Experts in the order in which shadowing them relieves most: again and again the busiest worker's most popular one
  /// among those that others send rows to. Every prefix is worth a look. O(E·(W + log E)).
  package static func byExcess(_ traffic: Traffic, on cluster: Cluster) -> [Int] {
    let workers = traffic.workers
    let rows = traffic.rowsOfExperts
    func own(_ expert: Int, _ worker: Int) -> Int { Int(traffic.counts[worker * traffic.experts + expert]) }
    // Of each worker: its experts with rows from others, the least popular first.
    var left = (0..<workers).map { worker in
      traffic.owned(by: worker).filter { rows[$0] > own($0, worker) }.sorted { (rows[$0], $1) < (rows[$1], $0) }
    }
    var loads = (0..<workers).map { worker in traffic.owned(by: worker).reduce(0) { $0 + rows[$1] } }
    let slowness = cluster.seats.map { 1 / cluster.rates[$0].products.peak.value }
    var order: [Int] = []
    while let busiest = (0..<workers).filter({ !left[$0].isEmpty }).max(by: {
      (Double(loads[$0]) * slowness[$0], $1) < (Double(loads[$1]) * slowness[$1], $0)
    }) {
      let expert = left[busiest].removeLast()
      order.append(expert)
      for worker in 0..<workers { loads[worker] += own(expert, worker) }
      loads[busiest] -= rows[expert]
    }
    return order
  }
}
