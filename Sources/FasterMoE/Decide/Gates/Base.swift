/// The gate of BASE layers (Lewis et al. 2021): in training, a worker's tokens are shared out among all experts so that
/// each gets as many, ⌈n/E⌉ at most, and the sum of scores is about as high as can be. In evaluation each token has its
/// highest score. Weights are logistic.
package struct BaseGate: Gate {
  package init() {}
  package var weighing: Weighing { .logistic }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int {
    var size = Arena()
    _ = Auction(arena: &size, jobs: tokens, experts: experts)
    return size.bytes / MemoryLayout<UInt64>.stride
  }

  package func settle(_ batch: GateBatch) -> Int {
    var moved = 0
    if batch.isTraining, batch.tokens > 0 {
      var arena = Arena(over: UnsafeMutableRawPointer(batch.scratch))
      let auction = Auction(arena: &arena, jobs: batch.tokens, experts: batch.experts)
      for token in 0..<batch.tokens {
        for expert in 0..<batch.experts { auction.set(batch.score(token, expert), of: token, to: expert) }
      }
      auction.run()
      for token in 0..<batch.tokens where batch.picks[token] != auction.holders[token] {
        batch.picks[token] = auction.holders[token]
        batch.weigh(token, by: weighing)
        moved += 1
      }
    }
    batch.count(into: batch.told(by: batch.rank))
    return moved
  }
}

/// Shares jobs out among bidders, each taking as many, so that the sum of values is near its highest: Bertsekas' auction,
/// with the bids of BASE layers.
///
/// Every bidder wants K = ⌈jobs/bidders⌉. Each round, one that holds fewer bids for the best others at their prices: as much
/// as makes the next best one as good, and a little more. The highest bid for a job takes it and raises its price; ties
/// stay with the holder, then go to the lower bidder. When every job has a holder, each holds K. The rounds are bounded:
/// jobs that are left then go, in order, to whoever values them most and has room. Where jobs are not a multiple of K,
/// jobs without value fill up, so that a bidder may get fewer.
package struct Auction {
  /// [jobs] who holds each, after `run`.
  package let holders: UnsafeMutablePointer<Int32>
  private let jobs: Int
  private let bidders: Int
  /// K, and K for each bidder.
  private let each: Int
  private let places: Int
  /// [bidders, places]
  private let values: UnsafeMutablePointer<Float>
  private let prices, bids: UnsafeMutablePointer<Float>
  private let winners: UnsafeMutablePointer<Int32>
  private let keys: UnsafeMutablePointer<UInt64>
  private let held: UnsafeMutablePointer<Int>

  package static let mostRounds = 1000

  package init(arena: inout Arena, jobs: Int, experts: Int) {
    self.jobs = jobs
    bidders = experts
    each = (jobs + experts - 1) / experts
    places = each * experts
    holders = arena.take(places)
    values = arena.take(experts * places)
    (prices, bids) = (arena.take(places), arena.take(places))
    winners = arena.take(places)
    keys = arena.take(places)
    held = arena.take(experts)
  }

  package func set(_ value: Float, of job: Int, to bidder: Int) { values[bidder * places + job] = value }

  /// Returns how many rounds it took.
  @discardableResult
  package func run() -> Int {
    let step = prepare()
    for round in 1...Auction.mostRounds {
      // Who holds a job bids a little to keep it.
      for job in 0..<places {
        bids[job] = holders[job] < 0 ? 0 : step
        winners[job] = holders[job]
      }
      for bidder in 0..<bidders where held[bidder] < each { bid(Int32(bidder), step) }
      var isDone = true
      held.update(repeating: 0, count: bidders)
      for job in 0..<places {
        prices[job] += bids[job]
        holders[job] = winners[job]
        if winners[job] < 0 { isDone = false } else { held[Int(winners[job])] += 1 }
      }
      if isDone { return round }
    }
    for job in 0..<places where holders[job] < 0 {
      var best = -1
      for bidder in 0..<bidders where held[bidder] < each {
        if best < 0 || values[bidder * places + job] > values[best * places + job] { best = bidder }
      }
      holders[job] = Int32(best)
      held[best] += 1
    }
    return Auction.mostRounds
  }

  /// Values above the lowest, which those that are not finite count as; returns the step of bids.
  private func prepare() -> Float {
    var (low, high) = (Float.infinity, -Float.infinity)
    for bidder in 0..<bidders {
      for job in 0..<jobs {
        let value = values[bidder * places + job]
        if value.isFinite { (low, high) = (min(low, value), max(high, value)) }
      }
    }
    for bidder in 0..<bidders {
      for job in 0..<places {
        let value = job < jobs ? values[bidder * places + job] : .nan
        values[bidder * places + job] = value.isFinite ? value - low : 0
      }
    }
    prices.update(repeating: 0, count: places)
    holders.update(repeating: -1, count: places)
    held.update(repeating: 0, count: bidders)
    return low < high ? max((high - low) / 50, 1e-4) : 1e-4
  }

  private func bid(_ bidder: Int32, _ step: Float) {
    let row = values + Int(bidder) * places
    let wanted = each - held[Int(bidder)]
    var others = 0
    for job in 0..<places where holders[job] != bidder {
      keys[others] = Highest.key(row[job] - prices[job], job)
      others += 1
    }
    // A lone bidder wants all there is.
    let best = min(wanted + 1, others)
    Highest.select(best, of: keys, others)
    var next = 0
    for place in 1..<best where keys[place] < keys[next] { next = place }
    let bar = Highest.index(keys[next])
    for place in 0..<best where place != next || wanted == best {
      let job = Highest.index(keys[place])
      let bid = (row[job] - prices[job]) - (row[bar] - prices[bar]) + step
      if bid > bids[job] { (bids[job], winners[job]) = (bid, bidder) }
    }
  }
}
