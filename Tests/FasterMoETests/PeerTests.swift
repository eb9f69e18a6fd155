import Foundation
import Testing

@testable import FasterMoE

/// Runs `body` on `count` threads of its own, one for each rank, and records what it throws.
func onThreads(_ count: Int, _ body: @escaping (Int) throws -> Void) {
  nonisolated(unsafe) let body = body
  let threads = (0..<count).map { rank in
    let done = DispatchSemaphore(value: 0)
    Thread {
      do { try body(rank) } catch { Issue.record("rank \(rank): \(error)") }
      done.signal()
    }.start()
    return done
  }
  for done in threads { done.wait() }
}

/// A transport between threads: messages queue up for each pair of ranks and arrive only after some tests, at random.
final class Mailbox: @unchecked Sendable {
  private let lock = NSLock()
  private var waiting: [[Int]: [Message]] = [:]
  private var random = Numbers(30)

  private final class Message {
    let bytes: UnsafeMutableRawPointer
    let count: Int
    var isDone = false
    var testsLeft: Int
    init(_ bytes: UnsafeMutableRawPointer, _ count: Int, _ testsLeft: Int) {
      (self.bytes, self.count, self.testsLeft) = (bytes, count, testsLeft)
    }
  }

  final class Seat: Transport {
    let rank: Int
    let size: Int
    let longestMessage = Wire.usualPiece
    let box: Mailbox
    private var open: [Message] = []
    init(_ rank: Int, _ size: Int, _ box: Mailbox) { (self.rank, self.size, self.box) = (rank, size, box) }

    func start(_ bytes: UnsafeMutableRawPointer, _ count: Int, peer: Int, receiving: Bool)
      -> UnsafeMutableRawPointer?
    {
      let message = box.lock.withLock {
        let message = Message(bytes, count, box.random.below(4))
        box.waiting[receiving ? [peer, rank, 1] : [rank, peer, 0], default: []].append(message)
        return message
      }
      return Unmanaged.passRetained(message).toOpaque()
    }

    func isDone(_ request: UnsafeMutableRawPointer?, peer: Int) -> Bool {
      let message = Unmanaged<Message>.fromOpaque(request!)
      return box.lock.withLock {
        for pair in [[rank, peer], [peer, rank]] { box.move(pair) }
        let mine = message.takeUnretainedValue()
        mine.testsLeft -= 1
        guard mine.isDone, mine.testsLeft < 0 else { return false }
        message.release()
        return true
      }
    }
  }

  private func move(_ pair: [Int]) {
    while let from = waiting[pair + [0]]?.first, let to = waiting[pair + [1]]?.first {
      precondition(from.count == to.count, "sizes agree")
      memcpy(to.bytes, from.bytes, from.count)
      (from.isDone, to.isDone) = (true, true)
      waiting[pair + [0]]!.removeFirst()
      waiting[pair + [1]]!.removeFirst()
    }
  }
}

@Suite struct PeerTests {
  private static func onWires(_ size: Int, _ body: @escaping (WirePeers) throws -> Void) {
    let box = Mailbox()
    onThreads(size) { rank in try body(WirePeers(Mailbox.Seat(rank, size, box), timeout: Seconds(20))) }
  }

  /// What rank r has at place i.
  private static func value(_ rank: Int, _ i: Int) -> Float {
    Float((rank * 31 + i * 7) % 1000) / 8 + 1 / Float(rank + 3)
  }

  @Test(arguments: [1, 2, 3, 5, 8])
  func everybodyHearsEverybody(size: Int) {
    Self.onWires(size) { peers in
      var own = [UInt64(peers.rank), UInt64(peers.rank * peers.rank)]
      var all = [UInt64](repeating: 9, count: 2 * size)
      for _ in 0..<3 { try peers.gather(&own, bytes: 16, into: &all) }
      let expected = (0..<UInt64(size)).flatMap { [$0, $0 * $0] }
      #expect(all == expected)
    }
    nonisolated(unsafe) let seats = SharedPeers.seats(size, timeout: nil)
    onThreads(size) { rank in
      var all = [UInt64](repeating: 9, count: size)
      for round in 0..<50 {
        var own = UInt64(rank + round)
        try seats[rank].gather(&own, bytes: 8, into: &all)
        let expected = (0..<size).map { UInt64($0 + round) }
        #expect(all == expected)
      }
    }
  }

  /// Small and large ones take different ways to the same bits.
  @Test(arguments: [1, 2, 3, 4, 7], [1, 5, 1000, 4097, 40_001])
  func sumsAreInTheOrderOfRanks(size: Int, count: Int) {
    let expected = (0..<count).map { i in
      (1..<size).reduce(Self.value(0, i)) { $0 + Self.value($1, i) }
    }
    Self.onWires(size) { peers in
      var values = (0..<count).map { Self.value(peers.rank, $0) }
      try peers.sum(&values, count: count)
      #expect(values == expected)
    }
    nonisolated(unsafe) let seats = SharedPeers.seats(size, timeout: nil)
    onThreads(size) { rank in
      var values = (0..<count).map { Self.value(rank, $0) }
      try seats[rank].sum(&values, count: count)
      #expect(values == expected)
    }
  }

  /// A stream's times: it is ready, begins to move, has moved; its receiver has it no sooner than it was there to be sent.
  @Test func streamsSayWhenTheyMoved() {
    let (size, bytes) = (3, 3 * Wire.usualPiece + 5)
    let times = UnsafeMutablePointer<Movement>.allocate(capacity: 2 * size * size)
    times.initialize(repeating: Movement(from: Seconds(0), to: Seconds(0)), count: 2 * size * size)
    defer { times.deallocate() }
    nonisolated(unsafe) let sent = times
    nonisolated(unsafe) let received = times + size * size
    let start = Seconds.now
    Self.onWires(size) { peers in
      var (from, into) = ([UInt8](repeating: 1, count: bytes), [UInt8](repeating: 0, count: size * bytes))
      try from.withUnsafeMutableBytes { from in
        try into.withUnsafeMutableBytes { into in
          for peer in 0..<size where peer != peers.rank {
            peers.wire.receive(
              into.baseAddress! + peer * bytes, bytes, from: peer, times: received + peer * size + peers.rank)
            peers.wire.send(from.baseAddress!, bytes, to: peer, times: sent + peers.rank * size + peer)
          }
          // One is late: the others wait for it, and that is not when its bytes move.
          if peers.rank == 0 { usleep(200_000) }
          try peers.wire.run()
        }
      }
    }
    let end = Seconds.now
    for (pair, from) in (0..<size * size).map({ ($0, sent[$0]) }) where pair / size != pair % size {
      for times in [from, received[pair]] {
        #expect(start <= times.asked && times.asked <= times.begin && times.begin < times.end && times.end <= end)
      }
      #expect(from.asked <= received[pair].end)
      if pair / size == 0 { #expect(received[pair].begin.value - received[pair].asked.value > 0.1) }
    }
  }

  /// Links that have each moved at most so many pieces by the next look, and know the most that were under way.
  private final class Links: Transport {
    let (rank, size, speed): (Int, Int, Int)
    let longestMessage: Int
    /// The longest message so far.
    private(set) var longest = 0
    /// To each peer, then from each.
    private(set) var lanes: [(begun: Int, ended: Int, mayEnd: Int, most: Int)]
    private let naps: UInt32
    /// So often nothing has moved yet.
    private var looksToWait: Int

    init(
      rank: Int, of size: Int, speed: Int, naps: UInt32 = 0, looksToWait: Int = 0, longestMessage: Int = Wire.usualPiece
    ) {
      self.longestMessage = longestMessage
      self.looksToWait = looksToWait
      (self.rank, self.size, self.speed, self.naps) = (rank, size, speed, naps)
      lanes = Array(repeating: (0, 0, 0, 0), count: 2 * size)
    }

    func start(_ bytes: UnsafeMutableRawPointer, _ count: Int, peer: Int, receiving: Bool) -> UnsafeMutableRawPointer? {
      let lane = peer + (receiving ? size : 0)
      lanes[lane].begun += 1
      longest = max(longest, count)
      lanes[lane].most = max(lanes[lane].most, lanes[lane].begun - lanes[lane].ended)
      return UnsafeMutableRawPointer(bitPattern: lane << 32 + lanes[lane].begun)
    }

    func isDone(_ request: UnsafeMutableRawPointer?, peer: Int) -> Bool {
      let (lane, number) = Int(bitPattern: request).quotientAndRemainder(dividingBy: 1 << 32)
      // They end in the order in which they began; of a later step's none may have ended yet.
      guard number == lanes[lane].ended + 1, lanes[lane].ended < lanes[lane].mayEnd else {
        looksToWait -= 1
        if looksToWait < 0 { lanes[lane].mayEnd = min(lanes[lane].begun, lanes[lane].ended + speed) }
        usleep(naps)
        return false
      }
      lanes[lane].ended += 1
      return true
    }
  }

  /// Where one of two ranks had 32 pieces under way and the other 8, steps at 250 Mbit/s took 1.5 times as long as with 8 or 32
  /// on both: so how many there are depends on nothing but the count of ranks, and their length: as many bytes in short ones.
  @Test(arguments: [2, 3, 5, 100], [Wire.usualPiece, 16 << 10, 20_032, 200 << 10])
  func equallyManyAreUnderWayOnAnyLink(ranks: Int, piece: Int) throws {
    var bytes = [UInt8](repeating: 0, count: 100 * piece + 5)
    /// Two steps to and from each of up to two peers, the second of which begins before the first is through.
    func most(rank: Int, speed: Int, naps: UInt32 = 0, first: Int) throws -> (sent: Set<Int>, received: Set<Int>) {
      let links = Links(rank: rank, of: ranks, speed: speed, naps: naps, longestMessage: piece)
      let wire = Wire(links, timeout: Seconds(20))
      let peers = [0, 1, ranks - 1].filter { $0 != rank }
      try bytes.withUnsafeMutableBytes { bytes in
        for (step, count) in [first * piece, bytes.count].enumerated() {
          for peer in Set(peers) {
            wire.receive(bytes.baseAddress!, count, from: peer, step: step)
            wire.send(bytes.baseAddress!, count, to: peer, step: step)
          }
        }
        try wire.run()
      }
      let sending = links.lanes[..<ranks].filter { $0.begun > 0 }
      let receiving = links.lanes[ranks...].filter { $0.begun > 0 }
      for lane in sending + receiving { #expect(lane.ended == first + 101) }
      #expect(links.longest == piece)
      #expect(sending.count == Set(peers).count && receiving.count == sending.count)
      return (Set(sending.map(\.most)), Set(receiving.map(\.most)))
    }
    let (sent, received) = try most(rank: 0, speed: 1, first: 1)
    #expect(sent.count == 1 && sent.first! >= 2)
    let share = max([2: 960 << 10, 3: 240 << 10][ranks] ?? 120 << 10, 2 * piece)
    #expect(sent.first! == (share + piece - 1) / piece)
    #expect(received.count == 1 && received.first! > sent.first!, "what was asked for need not be copied")
    for (rank, speed, naps, first) in [
      (ranks - 1, 1, 0, 3), (0, 1, 0, 40), (0, 2, 0, 40), (0, 100, 1000, 40), (ranks - 1, 100, 0, 40),
    ] {
      let other = try most(rank: rank, speed: speed, naps: UInt32(naps), first: first)
      #expect(other == (sent, received))
    }
  }

  /// Small messages of many steps need not wait for each other.
  @Test func bytesCountNotPieces() throws {
    let links = Links(rank: 0, of: 5, speed: 1, looksToWait: 10)
    let wire = Wire(links, timeout: Seconds(20))
    var bytes = [UInt8](repeating: 0, count: 20 * 64)
    try bytes.withUnsafeMutableBytes { bytes in
      for step in 0..<20 { wire.send(bytes.baseAddress! + 64 * step, 64, to: 1, step: step) }
      try wire.run()
    }
    #expect(links.lanes[1].ended == 20)
    #expect(links.lanes[1].most > 3)
  }

  @Test(arguments: [1, 2, 3, 5], [1, 40_001])
  func broadcastAndReduceGoAlongTheChain(size: Int, count: Int) {
    for root in 0..<size {
      Self.onWires(size) { peers in
        peers.chain = Array((0..<size).reversed())
        var values = (0..<count).map { Self.value(peers.rank, $0) }
        try peers.broadcast(&values, count: count, from: root)
        let sent = (0..<count).map { Self.value(root, $0) }
        #expect(values == sent)
        values = (0..<count).map { Self.value(peers.rank, $0) }
        try peers.reduce(&values, count: count, to: root)
        // The chain begins behind the root and ends with it.
        let order = (1...size).map { (root + size * 2 - $0) % size }
        let expected = (0..<count).map { i in
          order.dropFirst().reduce(Self.value(order[0], i)) { $0 + Self.value($1, i) }
        }
        let untouched = (0..<count).map { Self.value(peers.rank, $0) }
        #expect(values == (peers.rank == root ? expected : untouched))
      }
    }
  }

  @Test func aSilentPeerIsTimedOutByName() {
    let box = Mailbox()
    onThreads(2) { rank in
      let peers = WirePeers(Mailbox.Seat(rank, 3, box), timeout: Seconds(0.2))
      var (own, all) = (UInt8(1), [UInt8](repeating: 0, count: 3))
      for _ in 0..<2 {
        let failed = failure { () throws(Failure) in try peers.gather(&own, bytes: 1, into: &all) }
        #expect(failed?.kind == .timeout && failed!.message.contains("rank 2"))
      }
      #expect(peers.wire.isEntangled, "what was given to rank 2 may still move")
    }
    nonisolated(unsafe) let seats = SharedPeers.seats(3, timeout: Seconds(0.2))
    onThreads(2) { rank in
      var (own, all) = (UInt8(1), [UInt8](repeating: 0, count: 3))
      let failed = failure { () throws(Failure) in try seats[rank].gather(&own, bytes: 1, into: &all) }
      #expect(failed?.kind == .timeout && failed!.message.contains("rank 2"))
    }
  }

  // MARK: Places

  static func place(_ host: String, _ system: String, cores: String, processors: [Int]? = nil) throws -> Place {
    var place = Place(try Topology(description: cores))
    place.host = .init(repeating: 0)
    place.system = .init(repeating: 0)
    for (at, byte) in host.utf8.enumerated() { place.host[at] = byte }
    for (at, byte) in system.utf8.enumerated() { place.system[at] = byte }
    if let processors {
      place.processors = .init(repeating: 0)
      for processor in processors { place.processors[processor / 64] |= 1 << UInt64(processor % 64) }
      place.cores = Int32(processors.count)
    }
    return place
  }

  @Test func ranksOfOneMachineShareItsCores() throws {
    let node = try Self.place("a", "1", cores: "pack:2 [numa] core:4 pu:2")
    let other = try Self.place("b", "2", cores: "core:4 pu:1")
    let places = Places([node, other, node])
    #expect(places.host == [0, 1, 0])
    #expect(places.leaves == [0, 2, 1], "neighbours on the chain are on one host")
    #expect(places.sharing(of: 0) == (0, 2, true) && places.sharing(of: 2) == (1, 2, true))
    #expect(places.sharing(of: 1) == (0, 1, true))
    // Containers of one system share its cores too, whatever they call themselves.
    let inside = try Self.place("c", "1", cores: "pack:2 [numa] core:4 pu:2")
    #expect(Places([node, inside]).sharing(of: 1) == (1, 2, true))
    // Bound apart by mpirun: each has its own.
    let low = try Self.place("a", "1", cores: "core:8 pu:1", processors: [0, 1, 2, 3])
    let high = try Self.place("a", "1", cores: "core:8 pu:1", processors: [4, 5, 6, 7])
    #expect(Places([low, high]).sharing(of: 1) == (0, 1, true))
    // Partly the same: the scheduler decides.
    let middle = try Self.place("a", "1", cores: "core:8 pu:1", processors: [2, 3, 4, 5])
    #expect(Places([low, middle]).sharing(of: 0) == (0, 2, false))
  }

  @Test func levelsAreThoseThatDivide() throws {
    let machine = try Topology(description: "pack:2 [numa] core:4 pu:2")
    func share(_ host: String, _ index: Int, of count: Int) throws -> Place {
      var place = try Self.place(host, host, cores: "pack:2 [numa] core:4 pu:2")
      place.settle(on: machine.cores[machine.share(of: index, among: count)])
      return place
    }
    let one = try (0..<4).map { try share("a", $0, of: 4) }
    #expect(Places(one).levels == [[0, 0, 2, 2]], "two packages, each with one node")
    let two = try (0..<4).map { try share($0 < 2 ? "a" : "b", $0 % 2, of: 2) }
    #expect(Places(two).levels == [[0, 0, 2, 2], [0, 1, 2, 3]], "two hosts of two packages")
    #expect(Places([one[0]]).levels == [] && Places([one[0], one[1]]).levels == [])
    let fine = try Group.local(
      4,
      {
        var o = Group.Options(); o.threads = 1; return o
      }())
    #expect(fine[3].crossings(to: 3) == 0 && fine[3].levels == fine[0].levels)
  }

  @Test func sharesAreWholeNodesOrPartsOfOne() throws {
    func shares(_ machine: String, _ count: Int) throws -> [Range<Int>] {
      let topology = try Topology(description: machine)
      return (0..<count).map { topology.share(of: $0, among: count) }
    }
    #expect(try shares("pack:2 [numa] core:4 pu:2", 2) == [0..<4, 4..<8])
    #expect(try shares("pack:2 [numa] core:4 pu:2", 1) == [0..<8])
    #expect(try shares("pack:2 [numa] core:5 pu:1", 4) == [0..<2, 2..<5, 5..<7, 7..<10], "no worker over two nodes")
    #expect(try shares("pack:2 [numa] core:4 pu:1", 3) == [0..<2, 2..<5, 5..<8])
    #expect(try shares("core:4 pu:1", 4) == [0..<1, 1..<2, 2..<3, 3..<4])
    #expect(try shares("core:2 pu:1", 3).allSatisfy(\.isEmpty), "too few are left to the scheduler")
  }

  @Test func machinesThatTakeDaysToDescribeAreRefused() throws {
    let machines = [
      "66666666", "core:4097 pu:1", "pack:4096 core:17 pu:1", "pack:2 [numa] core:4096 pu:9", "2 2 99999",
    ]
    for machine in machines {
      let refused = failure { () throws(Failure) in _ = try Topology(description: machine) }
      #expect(refused?.kind == .topology && refused?.message.contains("65536 in all") == true, "\(machine)")
    }
    let odd = try Topology(description: "pack:2(memory=999999999) [numa(memory=17179869184)] L2:2 core:4 pu:2")
    #expect(odd.cores.count == 16, "only counts count")
  }
}
