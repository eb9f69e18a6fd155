import Glibc

/// How fast a group was found to be: the same values on all of its ranks.
package final class Calibration: Sendable {
  /// What messages take when all pairs of a level send and receive at once.
  package struct Link: Equatable, Sendable {
    /// Of one message on its way.
    package let latency: Seconds
    package let rate: ByteRate
    package init(latency: Seconds, rate: ByteRate) { (self.latency, self.rate) = (latency, rate) }
  }

  /// [W] by rank.
  package let rates: [ComputeRates]
  /// Out of a rank to the others of its host; nil if no two share a host, or if ranks share memory.
  package let withinHosts: Link?
  /// Out of a host to the others; nil if there is one.
  package let betweenHosts: Link?
  /// How many times longer messages take while their workers compute, 1 or more.
  package let messageSlowdown: Double

  package init(rates: [ComputeRates], withinHosts: Link?, betweenHosts: Link?, messageSlowdown: Double) {
    (self.rates, self.withinHosts, self.betweenHosts) = (rates, withinHosts, betweenHosts)
    self.messageSlowdown = messageSlowdown
  }
}

/// Measures a group, all ranks together and in the same order of messages.
///
/// Nobody decides alone how long: what a rank measures is the same for all once they have gathered it, and rank 0's clock
/// says when enough is enough.
final class Calibrator {
  private let peers: any Peers
  private let places: Places
  private var memory: Region?
  /// Messages out, then messages in.
  private let messages: UnsafeMutableRawPointer

  /// Takes all the memory that measuring needs.
  init(_ group: Group) throws(Failure) {
    (peers, places) = (group.peers, group.places)
    let bytes = peers.shareMemory ? 0 : 2 * max(Calibrator.mostBytes, peers.size * Calibrator.leastBytes)
    let region = try Region(bytes: bytes, for: "measuring the speed of messages")
    messages = region.base
    memory = consume region
  }

  deinit {
    // What a failed transport may still write to is never given back.
    if let peers = peers as? WirePeers, peers.wire.isEntangled { memory.take()?.abandon() }
  }

  /// Links within hosts and between them, for about `budget` in all.
  func links(for budget: Seconds) throws(Failure) -> (within: Calibration.Link?, between: Calibration.Link?) {
    guard peers.size > 1, let wire = peers as? WirePeers else { return (nil, nil) }
    let levels = [Level(of: places, by: ==), Level(of: places, by: !=)]
    let each = budget * (1 / Double(levels.count { $0.isUsed }))
    return (
      levels[0].isUsed ? try link(wire, levels[0], sharing: levels[0].mostPeers, each) : nil,
      levels[1].isUsed ? try link(wire, levels[1], sharing: places.busiestWayOut, each) : nil
    )
  }

  /// Pairs of ranks that exchange messages.
  private struct Level {
    /// [W] the peers of each rank.
    let peersOf: [[Int]]
    var mostPeers: Int { peersOf.reduce(0) { max($0, $1.count) } }
    var isUsed: Bool { mostPeers > 0 }
    /// Bytes of one exchange to each peer, at most.
    var mostBytes: Int { max(Calibrator.leastBytes, Calibrator.mostBytes / max(1, mostPeers)) }

    init(of places: Places, by areJoined: (_ host: Int, _ other: Int) -> Bool) {
      let ranks = places.host.indices
      // The next ranks first, so that no two begin with the same one.
      peersOf = ranks.map { rank in
        ranks.dropFirst().map { (rank + $0) % ranks.count }.filter { areJoined(places.host[rank], places.host[$0]) }
      }
    }
  }
  /// As many as rows of a layer often are, and the least that is worth timing.
  private static let (mostBytes, leastBytes) = (4 << 20, 64 << 10)

  /// A message to and from each peer of a level.
  private func exchange(_ wire: WirePeers, _ level: Level, bytes: Int) throws(Failure) {
    let peers = level.peersOf[wire.rank]
    for (index, peer) in peers.enumerated() {
      wire.wire.receive(messages + (peers.count + index) * bytes, bytes, from: peer)
      wire.wire.send(messages + index * bytes, bytes, to: peer)
    }
    try wire.wire.run()
  }

  /// `sharing` says how many messages of an exchange share the busiest link.
  private func link(_ wire: WirePeers, _ level: Level, sharing messages: Int, _ budget: Seconds) throws(Failure)
    -> Calibration.Link
  {
    let volley = 16
    let latency =
      try middleLap(budget * 0.15) { () throws(Failure) in
        for _ in 0..<volley { try exchange(wire, level, bytes: 8) }
      } * (1 / Double(volley))
    let bytes = try bytesThatFit(wire, level, budget * 0.1)
    let lap = try middleLap(budget * 0.75) { () throws(Failure) in try exchange(wire, level, bytes: bytes) }
    let moving = max(lap.value - latency.value, lap.value / 2)
    return Calibration.Link(latency: latency, rate: Bytes(Double(messages * bytes)) / Seconds(moving))
  }

  /// How large an exchange may be that is to take `budget` at most; the same on all ranks.
  private func bytesThatFit(_ wire: WirePeers, _ level: Level, _ budget: Seconds) throws(Failure) -> Int {
    var bytes = Calibrator.leastBytes
    while bytes < level.mostBytes {
      let lap = try middleLap(Seconds(0)) { () throws(Failure) in try exchange(wire, level, bytes: bytes) }
      guard lap.value * 4 < budget.value else { break }
      bytes = min(2 * bytes, level.mostBytes)
    }
    return bytes
  }

  /// Repeats `body` on all ranks for about `budget`, once at least: the middle one of all times, each that of the slowest
  /// rank. The same on all ranks.
  func middleLap(_ budget: Seconds, _ body: () throws(Failure) -> Void) throws(Failure) -> Seconds {
    let end = Seconds.now + budget
    var laps: [Seconds] = []
    while true {
      let start = Seconds.now
      try body()
      let now = Seconds.now
      let all = try peers.gathered((lap: now.value - start.value, left: end.value - now.value))
      laps.append(Seconds(all.reduce(1e-9) { max($0, $1.lap) }))
      guard all[0].left > 0 else { return middle(laps) }
    }
  }
}

extension Peers {
  /// Every rank's value, in the order of ranks.
  func gathered<Value: BitwiseCopyable>(_ own: Value) throws(Failure) -> [Value] {
    var all = [Value](repeating: own, count: size)
    let failed = all.withUnsafeMutableBytes { all in
      failure { () throws(Failure) in
        let stride = MemoryLayout<Value>.stride
        try gather(all.baseAddress! + rank * stride, bytes: stride, into: all.baseAddress!, from: .call)
      }
    }
    if let failed { throw failed }
    return all
  }
}
