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

  package func owner(of expert: Int) -> Int { expert / (experts / workers) }

  /// Rows that go from one worker to another's experts.
  package func rows(from source: Int, to owner: Int) -> Int {
    owned(by: owner).reduce(0) { $0 + Int(counts[source * experts + $1]) }
  }

  /// Rows that `worker` computes.
  package func rows(at worker: Int) -> Int { (0..<workers).reduce(0) { $0 + rows(from: $1, to: worker) } }

  /// [E] rows of all workers for each expert. O(W·E).
  package var rowsOfExperts: [Int] {
    var rows = [Int](repeating: 0, count: experts)
    for source in 0..<workers {
      for expert in 0..<experts { rows[expert] += Int(counts[source * experts + expert]) }
    }
    return rows
  }

  /// Rows of all workers for `expert`.
  package func rows(for expert: Int) -> Int { (0..<workers).reduce(0) { $0 + Int(counts[$1 * experts + expert]) } }
}

/// The rounds in which workers exchange rows: they form groups, and in round r every group sends to the r-th group before
/// it on a ring and receives from the r-th behind it (FasterMoE §4.2). Round 0 stays in the group.
package struct Rounds {
  /// Workers by place: neighbours are near each other. The first `groupSize` are the first group, and so on; the last
  /// group may be smaller.
  package let order: [Int]
  package let groupSize: Int
  package var count: Int { (order.count + groupSize - 1) / groupSize }

  package init(order: [Int], groupSize: Int) {
    self.order = order
    self.groupSize = min(max(1, groupSize), order.count)
  }

  /// One round in which everybody sends to everybody.
  package static func coarse(_ workers: Int) -> Rounds { Rounds(order: Array(0..<workers), groupSize: workers) }

  /// The workers whose rows come to `worker` in `round`.
  package func sources(of worker: Int, in round: Int) -> ArraySlice<Int> { group(groupOf(worker) + round) }

  /// The workers to whom `worker` sends in `round`.
  package func targets(of worker: Int, in round: Int) -> ArraySlice<Int> { group(groupOf(worker) + count - round) }

  private func groupOf(_ worker: Int) -> Int { order.firstIndex(of: worker)! / groupSize }
  private func group(_ index: Int) -> ArraySlice<Int> {
    let first = index % count * groupSize
    return order[first..<min(first + groupSize, order.count)]
  }
}

/// The rows that one worker's experts compute: by round, then by expert, then by the worker they come from, then in that
/// one's order.
///
/// In one round with workers in order that is how one worker alone would have sorted the whole batch, so that sums have
/// the same bits.
package struct Arrivals {
  /// A row by where it came from: the worker and the place among all rows that this one sends here.
  package struct Origin {
    package let worker: Int32
    package let row: Int32
  }
  /// [rounds, E/W] + 1 first row of each owned expert in each round.
  package let firstRow: UnsafeMutablePointer<Int>
  /// [rows]
  package let origins: UnsafeMutablePointer<Origin>

  package init(arena: inout Arena, rows: Int, experts: Int, rounds: Int) {
    firstRow = arena.take(rounds * experts + 1)
    origins = arena.take(rows)
  }

  /// Lists what `traffic` brings to `worker`. O(rows + W·E).
  package func sort(_ traffic: Traffic, at worker: Int, _ rounds: Rounds) {
    let owned = traffic.owned(by: worker)
    func count(_ source: Int, _ expert: Int) -> Int { Int(traffic.counts[source * traffic.experts + expert]) }
    firstRow[0] = 0
    for round in 0..<rounds.count {
      let sources = rounds.sources(of: worker, in: round)
      let first = firstRow + round * owned.count
      for (index, expert) in owned.enumerated() {
        first[index + 1] = sources.reduce(first[index]) { $0 + count($1, expert) }
      }
      for (position, source) in sources.enumerated() {
        var place: Int32 = 0
        for (index, expert) in owned.enumerated() {
          // Rows of the workers before this one come first.
          var row = sources.prefix(position).reduce(first[index]) { $0 + count($1, expert) }
          for _ in 0..<count(source, expert) {
            origins[row] = Origin(worker: Int32(source), row: place)
            row += 1
            place += 1
          }
        }
      }
    }
  }
}
