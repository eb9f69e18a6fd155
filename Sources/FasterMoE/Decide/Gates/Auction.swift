import CHints

/// Shares jobs out among bidders, each taking as many, so that the sum of values is near its highest: Bertsekas' auction,
/// with the bids of BASE layers.
///
/// Every bidder wants K = ⌈jobs/bidders⌉. Each round, one that holds fewer bids for the best others at their prices: as much
/// as makes the next best one, its bar, as good, and a little more. The highest bid for a job takes it and raises its price;
/// ties stay with the holder, then go to the lower bidder. When every job has a holder, each holds K. The rounds are
/// bounded: jobs that are left then go, in order, to whoever values them most and has room. Where jobs are not a multiple
/// of K, jobs without value fill up, so that a bidder may get fewer.
package struct Auction {
  /// [jobs] who holds each, after `run`.
  package let holders: UnsafeMutablePointer<Int32>
  private let jobs: Int
  private let bidders: Int
  /// K, and K for each bidder; the arrays of places are some lanes longer, which nobody ever wants.
  private let each: Int
  private let places: Int
  private let padded: Int
  /// [bidders, padded], and of one bidder at the prices.
  private let values, worth: UnsafeMutablePointer<Float>
  private let prices, bids: UnsafeMutablePointer<Float>
  private let winners: UnsafeMutablePointer<Int32>
  /// What may be among the best of a bidder: its worth and its job.
  private let found: UnsafeMutablePointer<Float>
  private let foundJobs: UnsafeMutablePointer<Int32>
  private let held: UnsafeMutablePointer<Int>

  /// [16, 16] what 16 jobs are worth to 16 bidders, for `setSquare`.
  package let square: UnsafeMutablePointer<Float>

  package static let mostRounds = 1000
  package static let lanes = 16

  package init(arena: inout Arena, jobs: Int, experts: Int) {
    self.jobs = jobs
    bidders = experts
    each = (jobs + experts - 1) / experts
    places = each * experts
    padded = (places + Auction.lanes - 1) / Auction.lanes * Auction.lanes
    holders = arena.take(padded)
    values = arena.take(experts * padded)
    worth = arena.take(padded)
    (prices, bids) = (arena.take(padded), arena.take(padded))
    winners = arena.take(padded)
    (found, foundJobs) = (arena.take(padded + Auction.lanes), arena.take(padded))
    held = arena.take(experts)
    square = arena.take(Auction.lanes * Auction.lanes)
  }

  /// Sets the values of `square`, a row for each job from `job` on; of those bidders and jobs that there are. Jobs come in
  /// order, 16 at a time.
  package func setSquare(of job: Int, to bidder: Int) {
    let turned = transposed(square, stride: Auction.lanes)
    for row in 0..<min(Auction.lanes, bidders - bidder) {
      (values + (bidder + row) * padded).store(turned[row], at: job)
    }
  }

  /// Returns how many rounds it took.
  @discardableResult
  package func run() -> Int {
    let step = prepare()
    for round in 1...Auction.mostRounds {
      // Who holds a job bids a little to keep it.
      forEachBlock { block in
        let isHeld = holders.lanes(at: block) .>= 0
        bids.store(Vector.zero.replacing(with: step, where: isHeld), at: block)
      }
      winners.update(from: holders, count: padded)
      for bidder in 0..<bidders where held[bidder] < each { bid(bidder, step) }
      for job in 0..<places where winners[job] != holders[job] {
        if holders[job] >= 0 { held[Int(holders[job])] -= 1 }
        held[Int(winners[job])] += 1
      }
      forEachBlock { block in
        prices.store(prices.vector(at: block) + bids.vector(at: block), at: block)
      }
      holders.update(from: winners, count: padded)
      if (0..<bidders).allSatisfy({ held[$0] == each }) { return round }
    }
    for job in 0..<places where holders[job] < 0 {
      var best = -1
      for bidder in 0..<bidders where held[bidder] < each {
        if best < 0 || values[bidder * padded + job] > values[best * padded + job] { best = bidder }
      }
      holders[job] = Int32(best)
      held[best] += 1
    }
    return Auction.mostRounds
  }

  @inline(__always) private func forEachBlock(_ body: (Int) -> Void) {
    for block in stride(from: 0, to: padded, by: Auction.lanes) { body(block) }
  }

  /// Values above the lowest, which those that are not finite count as; returns the step of bids.
  private func prepare() -> Float {
    // Only jobs have values.
    for bidder in 0..<bidders {
      (values + bidder * padded + jobs).update(repeating: .nan, count: padded - jobs)
    }
    var (lows, highs) = (Vector(repeating: .infinity), Vector(repeating: -.infinity))
    for block in stride(from: 0, to: bidders * padded, by: Auction.lanes) {
      let value = values.vector(at: block)
      let isFinite = value - value .== 0
      lows = lows.replacing(with: value, where: isFinite .& (value .< lows))
      highs = highs.replacing(with: value, where: isFinite .& (value .> highs))
    }
    let (low, high) = (lows.lowest, highs.highest)
    for block in stride(from: 0, to: bidders * padded, by: Auction.lanes) {
      let value = values.vector(at: block)
      values.store((value - low).replacing(with: 0, where: value - value .!= 0), at: block)
    }
    prices.update(repeating: 0, count: places)
    (prices + places).update(repeating: .infinity, count: padded - places)
    holders.update(repeating: -1, count: padded)
    held.update(repeating: 0, count: bidders)
    return low < high ? max((high - low) / 50, 1e-4) : 1e-4
  }

  private func bid(_ bidder: Int, _ step: Float) {
    let wanted = each - held[bidder]
    // A lone bidder wants all there is, and has no bar.
    let best = min(wanted + 1, places - held[bidder])
    let (count, low, high) = find(bidder, atLeast: best)
    let bar = findBar(best, count, from: low, to: high)
    // Of those that equal the bar, the first.
    var equal = best - self.count(count, Auction.float(Auction.order(bar) + 1)) - (wanted == best ? 0 : 1)
    for place in 0..<count where found[place] >= bar {
      if found[place] == bar {
        guard equal > 0 else { continue }
        equal -= 1
      }
      let job = Int(foundJobs[place])
      let bid = found[place] - bar + step
      if bid > bids[job] { (bids[job], winners[job]) = (bid, Int32(bidder)) }
    }
  }

  /// Finds a bidder's best jobs that it does not hold, `least` or some more, in their order. Returns how many, and their
  /// least worth and the highest.
  private func find(_ bidder: Int, atLeast least: Int) -> (count: Int, low: Float, high: Float) {
    let row = values + bidder * padded
    let mine = SIMD16(repeating: Int32(bidder))
    // The best of each of many groups: the lowest of those has so many at or above it.
    let (blocks, parts) = (padded / Auction.lanes, (least + Auction.lanes - 1) / Auction.lanes)
    var lowest = Vector(repeating: parts <= blocks ? .infinity : -.infinity)
    var highest = Vector(repeating: -.infinity)
    var block = 0
    for part in 0..<parts {
      var best = Vector(repeating: -.infinity)
      while block < (part + 1) * blocks / parts {
        let at = block * Auction.lanes
        let value = (row.vector(at: at) - prices.vector(at: at))
          .replacing(with: -.infinity, where: holders.lanes(at: at) .== mine)
        worth.store(value, at: at)
        best = best.replacing(with: value, where: value .> best)
        block += 1
      }
      lowest = lowest.replacing(with: best, where: best .< lowest)
      highest = highest.replacing(with: best, where: best .> highest)
    }
    let limit = lowest.lowest
    var count = 0
    if limit > -.infinity {
      forEachBlock { at in
        var marks = hint_at_least(worth.vector(at: at), Vector(repeating: limit))
        while marks != 0 {
          let job = at + marks.trailingZeroBitCount
          (found[count], foundJobs[count]) = (worth[job], Int32(job))
          count += 1
          marks &= marks - 1
        }
      }
    } else {
      for job in 0..<places where holders[job] != bidder {
        // What has no price that is a number is the last choice.
        (found[count], foundJobs[count]) = (worth[job] == worth[job] ? worth[job] : -.infinity, Int32(job))
        count += 1
      }
    }
    found.store(Vector(repeating: -.infinity), at: count)
    return (count, limit, highest.highest)
  }

  /// The lowest of the `best` highest of those that were found, which are all in a range.
  private func findBar(_ best: Int, _ count: Int, from: Float, to: Float) -> Float {
    // By halving the range, in the order of all floats: `best` are at or above its lower end, not so many at the upper.
    var (low, high) = (Int64(Auction.order(from)), Int64(Auction.order(to)) + 1)
    while high - low > 1 {
      let middle = (low + high) >> 1
      let value = Auction.float(Int32(middle))
      let above = self.count(count, value)
      if above == best { return lowest(count, atLeast: value) }
      if above > best { low = middle } else { high = middle }
    }
    return Auction.float(Int32(low))
  }

  private func lowest(_ count: Int, atLeast value: Float) -> Float {
    var lowest = Vector(repeating: .infinity)
    for block in stride(from: 0, to: count, by: Auction.lanes) {
      let worth = found.vector(at: block)
      lowest = lowest.replacing(with: worth, where: (worth .>= value) .& (worth .< lowest))
    }
    return lowest.lowest
  }

  private func count(_ count: Int, _ value: Float) -> Int {
    var all = 0
    for block in stride(from: 0, to: count, by: Auction.lanes) {
      all += hint_at_least(found.vector(at: block), Vector(repeating: value)).nonzeroBitCount
    }
    return all
  }

  /// Whole numbers in the order of floats.
  private static func order(_ value: Float) -> Int32 {
    let bits = Int32(bitPattern: value.bitPattern)
    return bits ^ (bits >> 31 & .max)
  }
  private static func float(_ order: Int32) -> Float {
    Float(bitPattern: UInt32(bitPattern: order ^ (order >> 31 & .max)))
  }
}

extension UnsafeMutablePointer<Int32> {
  fileprivate func lanes(at offset: Int) -> SIMD16<Int32> {
    UnsafeRawPointer(self + offset).loadUnaligned(as: SIMD16<Int32>.self)
  }
}
