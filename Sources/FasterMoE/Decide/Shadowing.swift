/// Which experts to shadow (FasterMoE §4.1).
package enum Shadowing {
  /// Algorithm 1 of the paper, exactly: experts by load, the highest first, as long as its two formulas promise a gain.
  ///
  /// The formulas know one bandwidth, that of the slowest link, and one speed, the slowest worker's peak. They leave out
  /// what still moves next to shadows (eq. 8), so the set may cost more than it saves. `.best` does not rely on them.
  /// Also returns what they promise, without and with the set. O((E + W)·shadows).
  package static func paper(_ demand: Demand) -> (experts: [Int], without: Seconds, with: Seconds) {
    let (traffic, shape, cluster, rows) = (demand.traffic, demand.shape, demand.cluster, demand.rows)
    let workers = traffic.workers
    let peak = cluster.rates.reduce(cluster.rates[0].products.peak) { min($0, $1.products.peak) }
    let bandwidth = cluster.slowestLink
    /// Three computes of the busiest worker.
    func computing(_ loads: [Int]) -> Seconds { shape.flops(rows: loads.reduce(0, max)) / peak }

    var loads = (0..<workers).map { worker in traffic.owned(by: worker).reduce(0) { $0 + rows[$1] } }
    let imbalanced = computing(loads) + shape.rowBytes * (4 * Double(loads.reduce(0, max))) / bandwidth  // eq. 7
    var (least, shadows) = (imbalanced, [Int]())
    var isLeft = [Bool](repeating: true, count: rows.count)
    while let expert = highest(rows, isLeft) {
      isLeft[expert] = false
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

  /// The first of those with most rows.
  private static func highest(_ rows: UnsafeMutableBufferPointer<Int>, _ isLeft: [Bool]) -> Int? {
    var highest: Int?
    for expert in 0..<rows.count where isLeft[expert] {
      if highest.map({ rows[$0] < rows[expert] }) ?? true { highest = expert }
    }
    return highest
  }
}

/// Experts in the order in which shadowing them relieves most: again and again the busiest worker's most popular one among
/// those that others send rows to. Every prefix is worth a look. O(E + W) for the next.
package struct ByExcess: Sequence, IteratorProtocol {
  private let demand: Demand
  /// [E] whether an expert that others send rows to did not come yet.
  private var isLeft: [Bool]
  /// [W]
  private var loads: [Int]
  private let slowness: [Double]

  /// O(E + W).
  package init(_ demand: Demand) {
    self.demand = demand
    let (traffic, rows) = (demand.traffic, demand.rows)
    isLeft = [Bool](repeating: false, count: rows.count)
    loads = [Int](repeating: 0, count: traffic.workers)
    for worker in 0..<traffic.workers {
      for expert in traffic.owned(by: worker) {
        isLeft[expert] = rows[expert] > Int(traffic.counts[worker * traffic.experts + expert])
        loads[worker] += rows[expert]
      }
    }
    slowness = demand.cluster.seats.map { 1 / demand.cluster.rates[$0].products.peak.value }
  }

  package mutating func next() -> Int? {
    let (traffic, rows) = (demand.traffic, demand.rows)
    var (busiest, most) = (-1, -1.0)
    for worker in loads.indices {
      let load = Double(loads[worker]) * slowness[worker]
      if load > most, traffic.owned(by: worker).contains(where: { isLeft[$0] }) { (busiest, most) = (worker, load) }
    }
    guard busiest >= 0 else { return nil }
    // Of those with equal rows the first.
    var expert = -1
    for other in traffic.owned(by: busiest) where isLeft[other] {
      if expert < 0 || rows[expert] < rows[other] { expert = other }
    }
    isLeft[expert] = false
    for worker in loads.indices { loads[worker] += Int(traffic.counts[worker * traffic.experts + expert]) }
    loads[busiest] -= rows[expert]
    return expert
  }
}
