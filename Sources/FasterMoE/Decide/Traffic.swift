/// How many rows go from every worker to every expert: the counts of all ranks side by side.
package struct Traffic {
  package let workers: Int
  package let experts: Int
  /// [W, E], each below 2^31.
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

  /// Rows of all workers for `expert`.
  package func rows(for expert: Int) -> Int { (0..<workers).reduce(0) { $0 + Int(counts[$1 * experts + expert]) } }
}

/// What still moves of a batch when some experts are shadowed: every worker computes its own rows for those (FasterMoE §4.1).
package struct Moves {
  package let traffic: Traffic
  /// [E]
  package let shadowed: UnsafeMutablePointer<Bool>

  package init(arena: inout Arena, _ traffic: Traffic) {
    self.traffic = traffic
    shadowed = arena.take(traffic.experts)
  }

  package func shadow(_ experts: [Int]) {
    shadowed.update(repeating: false, count: traffic.experts)
    for expert in experts { shadowed[expert] = true }
  }

  /// Rows that go from `source` through `expert` as its owner's expert, not as a copy.
  @inline(__always)
  package func rows(from source: Int, for expert: Int) -> Int {
    shadowed[expert] ? 0 : Int(traffic.counts[source * traffic.experts + expert])
  }

  /// Rows that go from one worker to another, or stay at the experts that it owns.
  package func rows(from source: Int, to owner: Int) -> Int {
    traffic.owned(by: owner).reduce(0) { $0 + rows(from: source, for: $1) }
  }

  /// Rows that `worker` computes.
  package func rows(at worker: Int) -> Int {
    var rows = (0..<traffic.workers).reduce(0) { $0 + self.rows(from: $1, to: worker) }
    for expert in 0..<traffic.experts where shadowed[expert] {
      rows += Int(traffic.counts[worker * traffic.experts + expert])
    }
    return rows
  }

  /// Calls `body` with every expert in the order in which a worker sorts its rows: those that are shadowed last, so that
  /// what goes to one other worker is in one piece.
  @inline(__always)
  package func forEachExpert(_ body: (Int) -> Void) {
    for expert in 0..<traffic.experts where !shadowed[expert] { body(expert) }
    for expert in 0..<traffic.experts where shadowed[expert] { body(expert) }
  }
}

/// The rounds of Groups (FasterMoE §4.2), by rank.
package struct Rounds {
  package let groups: Groups
  /// [W] the rank at each seat, and the seat of each rank.
  private let ranks: [Int]
  private let seats: [Int]
  package var count: Int { groups.count }

  package init(_ groups: Groups, ranks: [Int], seats: [Int]) {
    (self.groups, self.ranks, self.seats) = (groups, ranks, seats)
  }

  /// The workers whose rows come to `worker` in `round`.
  package func sources(of worker: Int, in round: Int) -> ArraySlice<Int> {
    ranks[groups.seats(of: groups.source(of: group(of: worker), round: round))]
  }

  /// The workers to whom `worker` sends in `round`.
  package func targets(of worker: Int, in round: Int) -> ArraySlice<Int> {
    ranks[groups.seats(of: groups.target(of: group(of: worker), round: round))]
  }

  private func group(of worker: Int) -> Int { groups.group(of: seats[worker]) }
}

/// The rows that one worker computes: by round, then by expert, then by the worker they come from, then in that one's
/// order; and behind all rounds its own rows for experts that are shadowed, its own ones among them.
///
/// In one round with workers in order that is how one worker alone would have sorted the whole batch, so that sums have
/// the same bits.
package struct Arrivals {
  /// A row by where it came from: the worker and the place, among all of this worker's sorted rows or, where rows come
  /// packed, among those that it sends here.
  package struct Origin {
    package let worker: Int32
    package let row: Int32
  }
  /// [rounds, E/W] + [shadows] + 1 first row of each owned expert in each round, then of each shadow.
  package let firstRow: UnsafeMutablePointer<Int>
  /// [rows]
  package let origins: UnsafeMutablePointer<Origin>

  package init(arena: inout Arena, rows: Int, segments: Int) {
    firstRow = arena.take(segments + 1)
    origins = arena.take(rows)
  }

  /// Lists what `moves` brings to `worker`; `arePacked` says whether rows come from others. O(rows + W·E).
  package func sort(_ moves: Moves, _ shadows: [Int], at worker: Int, _ rounds: Rounds, arePacked: Bool) {
    let owned = moves.traffic.owned(by: worker)
    firstRow[0] = 0
    for round in 0..<rounds.count {
      let sources = rounds.sources(of: worker, in: round)
      let first = firstRow + round * owned.count
      for (index, expert) in owned.enumerated() {
        first[index + 1] = sources.reduce(first[index]) { $0 + moves.rows(from: $1, for: expert) }
      }
      for (position, source) in sources.enumerated() {
        let isPacked = arePacked && source != worker
        var place = 0
        moves.forEachExpert { expert in
          let count = moves.rows(from: source, for: expert)
          if owned.contains(expert) {
            // Rows of the workers before this one come first.
            let row = sources.prefix(position).reduce(first[expert - owned.lowerBound]) {
              $0 + moves.rows(from: $1, for: expert)
            }
            fill(row, count, source, place)
            if isPacked { place += count }
          }
          if !isPacked { place += Int(moves.traffic.counts[source * moves.traffic.experts + expert]) }
        }
      }
    }
    let first = firstRow + rounds.count * owned.count
    for (index, expert) in shadows.enumerated() {
      let count = Int(moves.traffic.counts[worker * moves.traffic.experts + expert])
      first[index + 1] = first[index] + count
      guard count > 0 else { continue }
      var place = 0
      var isBefore = true
      moves.forEachExpert {
        if $0 == expert { isBefore = false }
        if isBefore { place += Int(moves.traffic.counts[worker * moves.traffic.experts + $0]) }
      }
      fill(first[index], count, worker, place)
    }
  }

  private func fill(_ row: Int, _ count: Int, _ worker: Int, _ place: Int) {
    for index in 0..<count { origins[row + index] = Origin(worker: Int32(worker), row: Int32(place + index)) }
  }
}
