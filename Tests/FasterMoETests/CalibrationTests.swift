import Foundation
import Testing

@testable import FasterMoE

@Suite struct CalibrationTests {
  private static func rates(_ base: Double) -> ComputeRates {
    let rates = base * SIMD8(1, 2, 3, 4, 5, 6, 7, 8)
    return ComputeRates(products: rates, weightGrads: rates / 2, rowHandling: ByteRate(base))
  }

  private static func link(_ latency: Double, _ rate: Double) -> Calibration.Link {
    Calibration.Link(latency: Seconds(latency), rate: ByteRate(rate))
  }

  /// Ranks at [host, package, NUMA node].
  private static func places(_ at: [[Int32]]) throws -> Places {
    Places(
      try at.map {
        var place = try PeerTests.place("h\($0[0])", "\($0[0])", cores: "pack:2 [numa] core:4 pu:2")
        (place.package, place.numaNode) = ($0[1], $0[2])
        return place
      })
  }

  // MARK: A group as a cluster

  @Test func aMessageCostsWhatWasMeasured() throws {
    let places = try Self.places([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    let calibration = Calibration(
      rates: (1...4).map { Self.rates(Double($0) * 1e9) }, withinHosts: Self.link(4e-6, 8e9),
      betweenHosts: Self.link(3e-5, 1e9), messageSlowdown: 1.5)
    let cluster = try Cluster(Cluster.Document(places, calibration))
    #expect(cluster.ranks == places.leaves && cluster.ranks == [0, 2, 1, 3])
    let (near, far) = (cluster.cost(from: 0, to: 1), cluster.cost(from: 1, to: 2))
    #expect(abs(near.latency - 4e-6) < 1e-12 && near.slowness == 1 / 8e9)
    #expect(abs(far.latency - 3e-5) < 1e-12 && far.slowness == 1 / 1e9)
    #expect(
      cluster.messageSlowdown == 1.5
        && cluster.rates[1].products == WorkerRates(Self.rates(3e9)).products,
      "rank 2 is on seat 1")
    // Two ranks on each host share its link: an eighth of the rate, for twice as many.
    #expect(abs(try #require(cluster.remoteShare) - 1 / 16) < 1e-12)
    // Alone on their hosts, ranks have no links of their own.
    let apart = try Cluster(
      Cluster.Document(
        try Self.places([[0, 0, 0], [1, 0, 0]]),
        Calibration(
          rates: [Self.rates(1), Self.rates(1)], withinHosts: nil, betweenHosts: Self.link(3e-5, 1e9),
          messageSlowdown: 1)))
    #expect(abs(apart.cost(from: 0, to: 1).latency - 3e-5) < 1e-12)
    #expect(apart.remoteShare == nil, "nothing to balance against")
    // Who shares memory has none at all.
    let together = try Cluster(
      Cluster.Document(
        try Self.places([[0, 0, 0], [0, 0, 0]]),
        Calibration(
          rates: [Self.rates(1), Self.rates(1)], withinHosts: nil, betweenHosts: nil, messageSlowdown: 1)))
    #expect(together.cost(from: 0, to: 1) == Cluster.Cost())
  }

  /// Rounds of a pass go by `leaves`, plans by the seats of a cluster: they must be one order.
  @Test func seatsAreLeaves() throws {
    var numbers = Numbers(77)
    for _ in 0..<200 {
      let workers = 1 + numbers.below(12)
      let places = try Self.places(
        (0..<workers).map { _ in (0..<3).map { _ in Int32(numbers.below(3)) } })
      let calibration = Calibration(
        rates: (0..<workers).map { _ in Self.rates(1e9) }, withinHosts: Self.link(1e-6, 1e9),
        betweenHosts: Self.link(1e-5, 1e8), messageSlowdown: 1)
      let cluster = try Cluster(Cluster.Document(places, calibration))
      #expect(cluster.ranks == places.leaves, "\(places.all.map { [$0.package, $0.numaNode] }) on \(places.host)")
    }
  }

  @Test func theBusiestWayOutIsThatOfHalf() throws {
    #expect(try Self.places([[0, 0, 0], [0, 1, 0]]).busiestWayOut == 0)
    #expect(try Self.places([[0, 0, 0], [1, 0, 0]]).busiestWayOut == 1)
    #expect(try Self.places([[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]).busiestWayOut == 3)
    #expect(try Self.places([[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [2, 0, 0]]).busiestWayOut == 6)
  }

  // MARK: Measured

  /// Ranks with one thread each, on hosts of two.
  private static func onGroups(_ size: Int, _ body: @escaping (Group) throws -> Void) {
    let box = Mailbox()
    onThreads(size) { rank in
      var options = Group.Options()
      (options.threads, options.pins, options.timeout) = (1, false, Seconds(60))
      try body(Group.over(Mailbox.Seat(rank, size, box), options, failure: nil))
    }
  }

  @Test(arguments: [2, 4]) func allRanksKnowTheSame(size: Int) throws {
    nonisolated(unsafe) var documents = [Cluster.Document?](repeating: nil, count: size)
    let lock = NSLock()
    Self.onGroups(size) { group in
      try group.calibrate(for: Seconds(0.2))
      let calibration = group.calibration!
      #expect(
        calibration.rates.count == size && calibration.messageSlowdown >= 1
          && calibration.betweenHosts == nil)
      let link = try #require(calibration.withinHosts)
      #expect(link.latency > Seconds(0) && link.rate > ByteRate(0) && link.rate.value.isFinite)
      let cluster = try group.cluster()
      #expect(cluster.ranks == group.leaves)
      lock.withLock { documents[group.rank] = cluster.document }
    }
    #expect(documents.allSatisfy { $0 != nil && $0 == documents[0] })
  }

  /// As a profile travels from rank 0, with or without links.
  @Test(arguments: [false, true]) func aCalibrationTravelsWhole(isLinked: Bool) {
    let box = Mailbox()
    onThreads(3) { rank in
      let peers = WirePeers(Mailbox.Seat(rank, 3, box), timeout: Seconds(20))
      let sent = Calibration(
        rates: (1...3).map { Self.rates(Double($0) / 3) }, withinHosts: isLinked ? Self.link(0, 1 / 7) : nil,
        betweenHosts: isLinked ? Self.link(1e-5, 1e300) : nil, messageSlowdown: 2 + 1 / 3)
      let got = try peers.share(rank == 0 ? sent : nil)
      #expect(got.withinHosts == sent.withinHosts && got.betweenHosts == sent.betweenHosts)
      #expect(got.messageSlowdown == sent.messageSlowdown && got.rates == sent.rates)
    }
  }

  @Test func theMiddleIsNeverAnExtreme() {
    #expect(middle([3]) == 3 && middle([9, 1, 5]) == 5 && middle([1, 100, 2, 3, 0]) == 2)
  }
}
