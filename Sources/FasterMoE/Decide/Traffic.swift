/// How many rows go from every worker to every expert: the counts of all ranks side by side.
package struct Traffic {
  package let workers: Int
  package let experts: Int
  /// [W, E]
  package let counts: UnsafeMutablePointer<UInt32>

  package init(arena: inout Arena, workers: Int, experts: Int) {
    self.workers = workers
    self.experts = experts
    counts = arena.take(workers * experts)
  }

  /// The experts that `worker` owns.
  package func owned(by worker: Int) -> Range<Int> {
    let each = experts / workers
    return worker * each..<(worker + 1) * each
  }

  /// Rows that go from one worker to another's experts.
  package func rows(from source: Int, to owner: Int) -> Int {
    owned(by: owner).reduce(0) { $0 + Int(counts[source * experts + $1]) }
  }

  /// Rows that `worker` computes.
  package func rows(at worker: Int) -> Int { (0..<workers).reduce(0) { $0 + rows(from: $1, to: worker) } }

  /// Rows of all workers for `expert`.
  package func rows(for expert: Int) -> Int { (0..<workers).reduce(0) { $0 + Int(counts[$1 * experts + expert]) } }
}

/// The rows that one worker's experts compute: by expert, then by the worker they come from, then in that one's order.
///
/// That is the order in which one worker alone would have sorted the whole batch, so sums have the same bits.
package struct Arrivals {
  /// A row by where it came from: the worker and the place among all rows that this one sends here.
  package struct Origin {
    package let worker: Int32
    package let row: Int32
  }
  /// [E/W + 1] first row of each owned expert.
  package let firstRow: UnsafeMutablePointer<Int>
  /// [rows]
  package let origins: UnsafeMutablePointer<Origin>

  package init(arena: inout Arena, rows: Int, experts: Int) {
    firstRow = arena.take(experts + 1)
    origins = arena.take(rows)
  }

  /// Lists what `traffic` brings to `worker`. O(rows + W·E).
  package func sort(_ traffic: Traffic, at worker: Int) {
    let owned = traffic.owned(by: worker)
    firstRow[0] = 0
    for (index, expert) in owned.enumerated() { firstRow[index + 1] = firstRow[index] + traffic.rows(for: expert) }
    for source in 0..<traffic.workers {
      var place: Int32 = 0
      for expert in owned {
        // Rows of the workers before this one come first.
        var row = firstRow[expert - owned.lowerBound]
        for earlier in 0..<source { row += Int(traffic.counts[earlier * traffic.experts + expert]) }
        for _ in 0..<Int(traffic.counts[source * traffic.experts + expert]) {
          origins[row] = Origin(worker: Int32(source), row: place)
          row += 1
          place += 1
        }
      }
    }
  }
}
