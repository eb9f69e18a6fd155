/// What one batch asks of a cluster, as far as no shadow and no schedule changes it: found once, when first asked for.
package final class Demand {
  package let traffic: Traffic
  package let shape: Shape
  package let cluster: Cluster
  /// [E] rows of all workers.
  package let rows: UnsafeMutableBufferPointer<Int>
  // Tables of the cluster.
  /// [W] the rank at each seat, and the seat of each rank.
  let ranks, seats: UnsafeMutableBufferPointer<Int>
  /// [W] by seat.
  private let rates: UnsafeMutableBufferPointer<Unmanaged<WorkerRates>>
  /// [nodes] of the cluster, and the hop of its ring that each one's links are part of.
  let nodes: UnsafeMutableBufferPointer<Cluster.Node>
  let hopsUp, hopsDown: UnsafeMutableBufferPointer<Int>

  /// [E] what all rows of each expert take at its owner.
  let whole: ComputeSeconds
  private let memory = Scratch()
  /// [E] what each worker's own rows for an expert take, by seat; nil till the first is asked for.
  private var copies: UnsafeMutableBufferPointer<UnsafeMutablePointer<Double>?>?
  /// [W, W] rows from each seat to each one's experts; nil where every worker has one expert and seats are ranks, so that
  /// the counts are that themselves.
  private let sums: UnsafeMutableBufferPointer<Double>?
  /// Of the groups that were asked for; few.
  @exclusivity(unchecked) private var loads: [(size: Int, loads: LinkLoads)] = []
  @exclusivity(unchecked) private var rounds: [(size: Int, rounds: RoundSeconds)] = []

  /// Seconds for rows, forward or back, and for gradients of weights.
  struct ComputeSeconds {
    let rows, weights: UnsafeMutableBufferPointer<Double>

    init(_ count: Int, in memory: Scratch) { (rows, weights) = (memory.take(count, of: 0), memory.take(count, of: 0)) }

    /// Rows, and behind them weights.
    init(_ both: UnsafeMutablePointer<Double>, _ count: Int) {
      rows = UnsafeMutableBufferPointer(start: both, count: count)
      weights = UnsafeMutableBufferPointer(start: both + count, count: count)
    }

    init(copying other: ComputeSeconds, in memory: Scratch) {
      (rows, weights) = (memory.copy(other.rows), memory.copy(other.weights))
    }

    @inline(__always) func add(_ seconds: (rows: Seconds, weights: Seconds), at place: Int) {
      rows[place] += seconds.rows.value
      weights[place] += seconds.weights.value
    }
  }

  /// Of groups of one size: [rounds, E] what a round's rows take at the owner, and in how many blocks they come; [rounds, W]
  /// by seat the sums of all experts of each owner, of weights [W] over all rounds.
  struct RoundSeconds {
    let each: ComputeSeconds
    let blocksOfEach: UnsafeMutableBufferPointer<Double>
    let rows, weights, blocks: UnsafeMutableBufferPointer<Double>
  }

  /// O(W·E).
  package init(_ traffic: Traffic, _ shape: Shape, on cluster: Cluster) {
    (self.traffic, self.shape, self.cluster) = (traffic, shape, cluster)
    let (workers, experts) = (traffic.workers, traffic.experts)
    let tables = cluster.tables
    (ranks, seats, rates, nodes) = (tables.ranks, tables.seats, tables.rates, tables.nodes)
    (hopsUp, hopsDown) = (tables.hopsUp, tables.hopsDown)
    rows = memory.take(experts, of: 0)
    for source in 0..<workers {
      let counts = traffic.counts + source * experts
      for expert in 0..<experts { rows[expert] &+= Int(counts[expert]) }
    }
    let (whole, rows) = (ComputeSeconds(experts, in: memory), rows)
    self.whole = whole
    for owner in 0..<workers {
      rates[seats[owner]]._withUnsafeGuaranteedRef { rates in
        let handling = shape.handling(at: rates)
        for expert in traffic.owned(by: owner) {
          whole.add(shape.seconds(rows: rows[expert], at: rates, handling), at: expert)
        }
      }
    }
    let each = experts / workers
    guard each > 1 || tables.ranks.indices.contains(where: { tables.ranks[$0] != $0 }) else {
      sums = nil
      return
    }
    let sums: UnsafeMutableBufferPointer<Double> = memory.take(workers * workers)
    for seat in 0..<workers {
      var next = traffic.counts + ranks[seat] * experts
      for owner in 0..<workers {
        var sum = 0
        for expert in 0..<each { sum &+= Int(next[expert]) }
        sums[seat * workers + seats[owner]] = Double(sum)
        next += each
      }
    }
    self.sums = sums
  }

  /// The seat of an expert's owner.
  @inline(__always) func owner(of expert: Int) -> Int { seats[traffic.owner(of: expert)] }

  /// Rows for one expert.
  @inline(__always) func rows(from seat: Int, for expert: Int) -> Int {
    Int(traffic.counts[ranks[seat] * traffic.experts + expert])
  }

  /// Rows for another seat's experts.
  func rows(from source: Int, to target: Int) -> Double {
    sums.map { $0[source * traffic.workers + target] } ?? Double(rows(from: source, for: target))
  }

  /// Adds what one seat has for each of some others to `loads`; returns the sum of these.
  func addRows(from source: Int, to targets: Range<Int>, _ loads: UnsafeMutablePointer<Double>) -> Double {
    guard let sums else {
      let from = traffic.counts + source * traffic.workers
      var sum = 0
      for target in targets {
        // Signed: that is what vectors can turn into floating point.
        loads[target] += Double(Int32(bitPattern: from[target]))
        sum &+= Int(from[target])
      }
      return Double(sum)
    }
    let from = sums.baseAddress! + source * traffic.workers
    var sum = 0.0
    for target in targets {
      loads[target] += from[target]
      sum += from[target]
    }
    return sum
  }

  /// [W] what each seat's own rows for an expert take there, remembered. O(W) at first.
  func copy(of expert: Int) -> ComputeSeconds {
    if copies == nil { copies = memory.take(traffic.experts, of: nil) }
    if let known = copies![expert] { return ComputeSeconds(known, traffic.workers) }
    let copy = copy(of: expert, in: memory)
    copies![expert] = copy.rows.baseAddress!
    return copy
  }

  /// The same in `scratch`, if it is not remembered.
  func copy(of expert: Int, in scratch: Scratch) -> ComputeSeconds {
    if let known = copies?[expert] { return ComputeSeconds(known, traffic.workers) }
    let both: UnsafeMutableBufferPointer<Double> = scratch.take(2 * traffic.workers, of: 0)
    let copy = ComputeSeconds(both.baseAddress!, traffic.workers)
    add([expert], atOnce: 1, to: copy)
    return copy
  }

  /// Adds what each seat's own rows for some experts take there; the sums of each `atOnce` of these stand together. Row by row
  /// of the counts.
  func add(_ experts: [Int], atOnce: Int, to sums: ComputeSeconds) {
    for seat in 0..<traffic.workers {
      rates[seat]._withUnsafeGuaranteedRef { rates in
        let handling = shape.handling(at: rates)
        for (index, expert) in experts.enumerated() {
          let seconds = shape.seconds(rows: rows(from: seat, for: expert), at: rates, handling)
          sums.add(seconds, at: index / atOnce * traffic.workers + seat)
        }
      }
    }
  }

  /// What all rows load on links in such groups.
  func loads(_ groups: Groups) -> LinkLoads {
    for known in loads where known.size == groups.size { return known.loads }
    let made = LinkLoads(self, groups, in: memory)
    loads.append((groups.size, made))
    return made
  }

  /// What the rows that each round brings to each expert take there. O(W·E + rounds·E) at first.
  func rounds(_ groups: Groups) -> RoundSeconds {
    for known in rounds where known.size == groups.size { return known.rounds }
    let (workers, experts) = (traffic.workers, traffic.experts)
    let each = experts / workers
    let (of, all) = (groups.count * experts, groups.count * workers)
    let made = RoundSeconds(
      each: ComputeSeconds(of, in: memory), blocksOfEach: memory.take(of, of: 0), rows: memory.take(all, of: 0),
      weights: memory.take(workers, of: 0), blocks: memory.take(all, of: 0))
    let mark = memory.mark
    // Neighbouring ranks whose experts are in one group.
    let starts: UnsafeMutableBufferPointer<Int> = memory.take(workers + 1)
    let groupOf: UnsafeMutableBufferPointer<Int> = memory.take(workers)
    var runs = 0
    for rank in 0..<workers {
      groupOf[rank] = groups.group(of: seats[rank])
      guard rank == 0 || groupOf[rank] != groupOf[rank - 1] else { continue }
      starts[runs] = rank
      runs += 1
    }
    starts[runs] = workers
    let rows = groups.count == 1 ? self.rows : memory.take(groups.count * experts, of: 0)
    for source in 0..<workers where groups.count > 1 {
      for run in 0..<runs {
        let (first, end) = (starts[run] * each, starts[run + 1] * each)
        let round = groups.round(from: groupOf[source], to: groupOf[starts[run]])
        let (sums, counts) = (rows.baseAddress! + round * experts, traffic.counts + source * experts)
        for expert in first..<end { sums[expert] &+= Int(counts[expert]) }
      }
    }
    for owner in 0..<workers {
      rates[seats[owner]]._withUnsafeGuaranteedRef { rates in
        let handling = shape.handling(at: rates)
        for round in 0..<groups.count {
          let first = round * experts + owner * each
          for place in first..<first + each where rows[place] > 0 {
            let seconds = shape.seconds(rows: rows[place], at: rates, handling)
            made.each.rows[place] = seconds.rows.value
            made.each.weights[place] = seconds.weights.value
            made.blocksOfEach[place] = Double((rows[place] + Block.mostRows - 1) / Block.mostRows)
          }
        }
      }
      add(made, groups, of: owner, to: made.rows, made.weights, made.blocks) { _ in true }
    }
    memory.release(to: mark)
    rounds.append((groups.size, made))
    return made
  }

  /// Adds what a round's rows of some of an owner's experts take, and their blocks, to sums at its seat.
  @inline(__always)
  func add(
    _ known: RoundSeconds, _ groups: Groups, of owner: Int, to rows: UnsafeMutableBufferPointer<Double>,
    _ weights: UnsafeMutableBufferPointer<Double>, _ blocks: UnsafeMutableBufferPointer<Double>,
    where isCounted: (Int) -> Bool
  ) {
    let (workers, experts, seat, owned) = (traffic.workers, traffic.experts, seats[owner], traffic.owned(by: owner))
    for round in 0..<groups.count {
      var sums = (rows: 0.0, weights: 0.0, blocks: 0.0)
      for expert in owned where isCounted(expert) {
        sums.rows += known.each.rows[round * experts + expert]
        sums.weights += known.each.weights[round * experts + expert]
        sums.blocks += known.blocksOfEach[round * experts + expert]
      }
      rows[round * workers + seat] = sums.rows
      weights[seat] += sums.weights
      blocks[round * workers + seat] = sums.blocks
    }
  }
}
