import Foundation
import Testing

@testable import FasterMoE

@Suite struct AuctionTests {
  /// Holders of jobs, and in how many rounds they were found.
  private static func assign(_ values: [[Float]]) throws -> (holders: [Int], rounds: Int) {
    let (jobs, bidders) = (values.count, values[0].count)
    var size = Arena()
    _ = Auction(arena: &size, jobs: jobs, experts: bidders)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let auction = Auction(arena: &arena, jobs: jobs, experts: bidders)
    for job in stride(from: 0, to: jobs, by: 16) {
      for bidder in stride(from: 0, to: bidders, by: 16) {
        for row in job..<min(job + 16, jobs) {
          for column in bidder..<min(bidder + 16, bidders) {
            auction.square[(row - job) * 16 + column - bidder] = values[row][column]
          }
        }
        auction.setSquare(of: job, to: bidder)
      }
    }
    let rounds = auction.run()
    return ((0..<jobs).map { Int(auction.holders[$0]) }, rounds)
  }

  /// The generator of the published vectors.
  private static func golden(_ seed: UInt64, _ jobs: Int, _ bidders: Int) -> [[Float]] {
    var state = seed
    return (0..<jobs).map { _ in
      (0..<bidders).map { _ in
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return Float(Double(state >> 33) / 2_147_483_648)
      }
    }
  }

  private static func sum(_ values: [[Float]], _ holders: [Int]) -> Double {
    zip(values, holders).reduce(0) { $0 + Double($1.0[$1.1]) }
  }

  /// The highest sum that there is, each bidder taking `each`: the Hungarian method on a square of places.
  private static func optimum(_ values: [[Float]], each: Int) -> Double {
    let n = values[0].count * each
    func cost(_ row: Int, _ column: Int) -> Double { row < values.count ? -Double(values[row][column / each]) : 0 }
    var (u, v) = ([Double](repeating: 0, count: n + 1), [Double](repeating: 0, count: n + 1))
    var (match, way) = ([Int](repeating: 0, count: n + 1), [Int](repeating: 0, count: n + 1))
    for row in 1...n {
      match[0] = row
      var column = 0
      var least = [Double](repeating: .infinity, count: n + 1)
      var used = [Bool](repeating: false, count: n + 1)
      repeat {
        used[column] = true
        var (delta, next) = (Double.infinity, 0)
        for j in 1...n where !used[j] {
          let reduced = cost(match[column] - 1, j - 1) - u[match[column]] - v[j]
          if reduced < least[j] { (least[j], way[j]) = (reduced, column) }
          if least[j] < delta { (delta, next) = (least[j], j) }
        }
        for j in 0...n {
          if used[j] {
            u[match[j]] += delta
            v[j] -= delta
          } else {
            least[j] -= delta
          }
        }
        column = next
      } while match[column] != 0
      repeat {
        match[column] = match[way[column]]
        column = way[column]
      } while column != 0
    }
    return v[0]
  }

  /// The same auction, job by job and by sorting.
  private static func assignPlainly(_ values: [[Float]]) -> (holders: [Int], rounds: Int) {
    let (jobs, bidders) = (values.count, values[0].count)
    let each = (jobs + bidders - 1) / bidders
    let finite = values.joined().filter(\.isFinite)
    let (low, high) = (finite.min() ?? 0, finite.max() ?? 0)
    let step = max((high - low) / 50, 1e-4)
    func value(_ job: Int, _ bidder: Int) -> Float {
      job < jobs && values[job][bidder].isFinite ? values[job][bidder] - low : 0
    }
    var prices = [Float](repeating: 0, count: each * bidders)
    var holders = prices.map { _ in -1 }
    for round in 1... {
      var bids = holders.map { $0 < 0 ? 0 : step }
      var winners = holders
      for bidder in 0..<bidders {
        let wanted = each - holders.count { $0 == bidder }
        let worth = prices.indices.map { value($0, bidder) - prices[$0] }
        let others = prices.indices.filter { holders[$0] != bidder }.sorted { (worth[$0], $1) > (worth[$1], $0) }
        guard wanted > 0 else { continue }
        let bar = worth[others[min(wanted, others.count - 1)]]
        for job in others.prefix(wanted) where worth[job] - bar + step > bids[job] {
          (bids[job], winners[job]) = (worth[job] - bar + step, bidder)
        }
      }
      for job in prices.indices { prices[job] += bids[job] }
      holders = winners
      if !holders.contains(-1) { return (Array(holders.prefix(jobs)), round) }
    }
    fatalError()
  }

  /// Tokens of all kinds of values, ties and fillers among them, go to whom the plain auction gives them, in as many rounds.
  @Test func itIsTheAuctionJobByJob() throws {
    var numbers = Numbers(52)
    for (jobs, bidders) in [(1, 1), (9, 1), (3, 7), (16, 4), (33, 8), (64, 64), (130, 64), (257, 5), (500, 17)] {
      let random = (0..<jobs).map { _ in numbers.array(bidders) }
      let kinds = [
        random, random.map { row in row.map { ($0 * 3).rounded() } },
        random.map { row in row.enumerated().map { $1 - Float($0) / Float(bidders) } },
        random.map { row in row.map { 1e4 + $0 } },
      ]
      for (kind, values) in (kinds + degenerate(jobs, bidders)).enumerated() {
        let (got, wanted) = (try Self.assign(values), Self.assignPlainly(values))
        #expect(got.holders == wanted.holders && got.rounds == wanted.rounds, "\(jobs) for \(bidders), kind \(kind)")
      }
    }
  }

  @Test func publishedAssignmentsComeOut() throws {
    let cases: [(UInt64, Int, Int, [[Int]]?, Double, Double)] = [
      (1, 8, 2, [[6, 2, 4, 3], [1, 7, 5, 0]], 5.150743, 5.150743),
      (2, 12, 4, [[8, 7, 9], [2, 0, 5], [10, 3, 11], [1, 6, 4]], 9.185708, 9.207640),
      (3, 32, 4, nil, 23.811947, 23.811947),
    ]
    for (seed, jobs, bidders, lists, sum, best) in cases {
      let values = Self.golden(seed, jobs, bidders)
      let got = try Self.assign(values)
      if let lists {
        for (bidder, list) in lists.enumerated() {
          #expect(Set((0..<jobs).filter { got.holders[$0] == bidder }) == Set(list))
        }
      }
      #expect(abs(Self.sum(values, got.holders) - sum) < 1e-5)
      #expect(abs(Self.optimum(values, each: jobs / bidders) - best) < 1e-5)
    }
  }

  /// Everyone gets as many, up to what does not divide, and the sum is within a step a job of the highest.
  @Test func everyoneGetsAsManyAndTheSumIsNearTheHighest() throws {
    var numbers = Numbers(50)
    for (jobs, bidders) in [(1, 1), (7, 1), (1, 5), (4, 5), (5, 5), (12, 4), (13, 4), (40, 8), (41, 8), (90, 3)] {
      for kind in 0..<4 {
        let values = (0..<jobs).map { _ in
          numbers.array(bidders).enumerated().map { place, value in
            switch kind {
            case 0: value
            case 1: value - Float(place)  // all like the first ones best
            case 2: (value * 4).rounded()  // many ties
            default: 1e8 + value * 100  // hardly told apart in single precision
            }
          }
        }
        let got = try Self.assign(values)
        let each = (jobs + bidders - 1) / bidders
        for bidder in 0..<bidders {
          let count = got.holders.count { $0 == bidder }
          #expect(jobs % bidders == 0 ? count == each : count <= each)
        }
        let all = values.joined()
        let step = max(Double(all.max()! - all.min()!) / 50, 1e-4)
        let rest = Double(each * bidders) * step + (kind == 3 ? 1e3 : 0)
        #expect(Self.sum(values, got.holders) >= Self.optimum(values, each: each) - rest - 1e-3)
        #expect(got.rounds < Auction.mostRounds)
      }
    }
  }

  @Test func scoresWithoutAnOrderStillShareOut() throws {
    for (n, experts) in [(64, 8), (1024, 16), (5, 8), (67, 8)] {
      // Values whose differences are no numbers end the auction by its bound of rounds.
      var numbers = Numbers(54)
      let huge = (0..<n).map { _ in numbers.array(experts).map { $0 * 3.3e38 } }
      for (kind, logits) in (degenerate(n, experts) + [huge]).enumerated() {
        let got = try Self.assign(logits)
        #expect(got.rounds <= Auction.mostRounds)
        let counts = (0..<experts).map { expert in got.holders.count { $0 == expert } }
        #expect(counts.reduce(0, +) == n && counts.allSatisfy { $0 <= (n + experts - 1) / experts }, "\(kind)")
        if n % experts == 0 { #expect(Set(counts) == [n / experts]) }
      }
    }
  }

  @Test func baseSharesOutInTrainingAlone() throws {
    var numbers = Numbers(51)
    let logits = skewed(&numbers, 50, 4)
    let free = try elect(TopKGate(), logits, choices: 1, Spread(tokens: [50]))
    let trained = try elect(BaseGate(), logits, choices: 1, Spread(tokens: [20, 0, 30]))
    #expect(trained.counts.map { $0.max()! } == [5, 0, 8] && trained.totals.reduce(0, +) == 50)
    let first = try Self.assign(Array(logits[..<20]))
    #expect(trained.picks[..<20].map { $0[0] } == first.holders)
    #expect(trained.moved == zip(trained.picks, free.picks).count { $0 != $1 })
    for (token, pick) in trained.picks.enumerated() {
      #expect(abs(trained.weights[token][0] - 1 / (1 + exp(-logits[token][pick[0]]))) < 1e-6)
    }
    let evaluated = try elect(BaseGate(), logits, choices: 1, Spread(tokens: [50], isTraining: false))
    #expect(evaluated.picks == free.picks)
  }
}
