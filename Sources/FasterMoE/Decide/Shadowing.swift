/// Which experts to shadow (FasterMoE §4.1).
package enum Shadowing {
  /// Algorithm 1 of the paper, exactly: experts by load, the highest first, as long as its two formulas promise a gain.
  ///
  /// The formulas know one bandwidth, that of the slowest link, and one speed, the slowest worker's peak. They leave out
  /// what still moves next to shadows (eq. 8), so the set may cost more than it saves. `.best` does not rely on them.
  /// Also returns what they promise, without and with the set. O(E·log E + W·shadows).
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
    // Mostly few are taken.
    var rest: [Int]?
    while let expert = shadows.count < 4 ? highest(rows, isLeft) : rest?.popLast() {
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
      if shadows.count == 4 { rest = rows.indices.filter { isLeft[$0] }.sorted { (rows[$0], $1) < (rows[$1], $0) } }
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
/// those that others send rows to. Every prefix is worth a look. O(W) for the next.
package struct ByExcess: Sequence, IteratorProtocol {
  private let demand: Demand
  /// [W] how many experts of each worker have rows from others and did not come yet; and these, the least popular first,
  /// once the worker was the busiest.
  private var countsLeft: [Int]
  private var left: [[Int]?]
  /// [W]
  private var loads: [Int]
  private let slowness: [Double]

  /// O(E + W).
  package init(_ demand: Demand) {
    self.demand = demand
    let (traffic, rows) = (demand.traffic, demand.rows)
    loads = [Int](repeating: 0, count: traffic.workers)
    (countsLeft, left) = (loads, loads.map { _ in nil })
    for worker in 0..<traffic.workers {
      for expert in traffic.owned(by: worker) {
        countsLeft[worker] += ByExcess.comes(expert, from: worker, demand) ? 1 : 0
        loads[worker] += rows[expert]
      }
    }
    slowness = demand.cluster.seats.map { 1 / demand.cluster.rates[$0].products.peak.value }
  }

  private static func comes(_ expert: Int, from worker: Int, _ demand: Demand) -> Bool {
    demand.rows[expert] > Int(demand.traffic.counts[worker * demand.traffic.experts + expert])
  }

  package mutating func next() -> Int? {
    let (traffic, rows) = (demand.traffic, demand.rows)
    var (busiest, most) = (-1, -1.0)
    for worker in loads.indices where countsLeft[worker] > 0 {
      let load = Double(loads[worker]) * slowness[worker]
      if load > most { (busiest, most) = (worker, load) }
    }
    guard busiest >= 0 else { return nil }
    if left[busiest] == nil {
      left[busiest] = traffic.owned(by: busiest).filter { ByExcess.comes($0, from: busiest, demand) }
        .sorted { (rows[$0], $1) < (rows[$1], $0) }
    }
    let expert = left[busiest]!.removeLast()
    countsLeft[busiest] -= 1
    for worker in loads.indices { loads[worker] += Int(traffic.counts[worker * traffic.experts + expert]) }
    loads[busiest] -= rows[expert]
    return expert
  }
}

/// What can be a little different about one expert in a list of shadows.
enum ShadowChange {
  case adding, replacing(Int), leaving, moving(toFront: Bool)

  static func all(of expert: Int, in shadows: [Int]) -> some Sequence<ShadowChange> {
    let place = shadows.firstIndex(of: expert)
    return (0..<(place == nil ? shadows.count + 1 : 3)).lazy.compactMap { number -> ShadowChange? in
      guard let place else { return number == 0 ? .adding : .replacing(number - 1) }
      switch number {
      case 0: return .leaving
      case 1: return place == 0 ? nil : .moving(toFront: true)
      default: return place == shadows.count - 1 ? nil : .moving(toFront: false)
      }
    }
  }

  func applied(_ expert: Int, to shadows: [Int]) -> [Int] {
    var changed = shadows
    switch self {
    case .adding: changed.append(expert)
    case .replacing(let place): changed[place] = expert
    case .leaving: changed.removeAll { $0 == expert }
    case .moving(let toFront):
      changed.removeAll { $0 == expert }
      changed.insert(expert, at: toFront ? 0 : changed.count)
    }
    return changed
  }
}
