import Glibc

/// Who fills and uses the memory that a wire carries while it is on its way. Streams are known by the tags that they were
/// given, 0 or more.
package protocol Freight: AnyObject {
  /// How many bytes of a stream may be under way by now: those that are there to be sent, or have room to arrive in.
  func ready(_ tag: Int) -> Int
  /// The next `bytes` bytes of a stream that comes in, from `at` on, are here.
  func arrived(_ tag: Int, at: Int, bytes: Int)
  /// Whether somebody here is at work on what came or on what shall go, so that nobody else is to blame for the wait.
  var isBusy: Bool { get }
}

/// When something moved or was done, by the clock of `Seconds.now`.
package struct Movement: BitwiseCopyable {
  /// When it could first have begun: what lies between this and `begin` is the wait for somebody else.
  package var asked: Seconds
  package var begin: Seconds
  package var end: Seconds

  package init(from begin: Seconds, to end: Seconds) { (asked, self.begin, self.end) = (begin, begin, end) }
}

/// Moves large volumes between ranks over a transport: cut in pieces, several under way to every peer at once.
///
/// Only the thread that calls `run` talks to the transport. It polls, and sleeps when nothing moves, so that the cores
/// belong to whoever computes. The steady state allocates nothing.
package final class Wire {
  /// Bytes of a piece: below the limit where a transport stops sending at once and first asks the receiver, since that
  /// question waits behind whatever the receiver itself is sending and makes the two directions take turns.
  package let piece: Int
  /// What Open MPI sends at once over TCP.
  package static let usualPiece = 60 << 10
  /// Bytes under way to each of so many peers: less than a link moves between two looks makes it wait for the next one, which
  /// may take some milliseconds where somebody computes on this core; more than a link is quick to move is in the way of what
  /// others need first. The same on all ranks, whatever each has seen of its links: answers to the one with less would wait
  /// behind what the others have sent ahead.
  private static func share(peers: Int) -> Int {
    switch peers {
    case ...1: 960 << 10
    case 2: 240 << 10
    default: 120 << 10
    }
  }
  /// So many more are asked for.
  private static let ahead = 120 << 10

  /// One direction between this rank and a peer.
  private struct Stream {
    let peer: Int
    let receiving: Bool
    let base: UnsafeMutableRawPointer
    let bytes: Int
    /// Its tag for the freight, or -1: all bytes are there, and nobody asks when they have come.
    let tag: Int
    /// Streams of one direction begin in the order of their steps.
    let step: Int
    /// The stream that brings the bytes which this one passes on, or -1.
    let source: Int
    /// Where to say when its first byte could go, when one first went, and when the last had come; nobody asks if nil.
    let times: UnsafeMutablePointer<Movement>?
    var started = 0
    var moved = 0
    /// Of the requests under way the oldest, in the stream's ring.
    var oldest = 0
    var underWay = 0
  }

  private let transport: any Transport
  private let timeout: Seconds?
  /// Bytes under way to a peer with which no more pieces begin.
  private let window: Int
  /// Most requests of one stream, all of whose pieces but the last are whole.
  private let places: Int
  /// [W, 2] bytes under way to each peer and from it, of all streams: with a window for each stream, the next step's would
  /// take its share of the link before this one's is through.
  private let underWay: UnsafeMutablePointer<Int>
  private var capacity: Int
  private var streams: UnsafeMutablePointer<Stream>
  /// A ring of `places` requests for each stream.
  private var requests: UnsafeMutablePointer<UnsafeMutableRawPointer?>
  private var count = 0
  private var freight: (any Freight)?
  /// When this rank last looked what had moved, and when it had before that.
  private var looked = Seconds(0)
  private var lookedBefore = Seconds(0)
  /// Why nothing can move any more.
  package private(set) var failure: Failure?
  /// Whether the transport may still touch memory that it was given.
  package private(set) var isEntangled = false
  /// Names a rank for people.
  package var name: (Int) -> String = { "rank \($0)" }

  package init(_ transport: any Transport, timeout: Seconds?) {
    self.transport = transport
    self.timeout = timeout
    piece = transport.longestMessage
    // Two pieces, however long they are.
    window = max(Wire.share(peers: transport.size - 1), 2 * piece)
    places = (window + Wire.ahead + piece - 1) / piece
    underWay = .allocate(capacity: 2 * transport.size)
    underWay.initialize(repeating: 0, count: 2 * transport.size)
    capacity = 4 * transport.size
    streams = .allocate(capacity: capacity)
    requests = .allocate(capacity: capacity * places)
  }

  deinit {
    streams.deinitialize(count: count)
    streams.deallocate()
    requests.deallocate()
    underWay.deallocate()
  }

  /// Adds a stream to `peer`, one of a step. Those of one step, to different peers, go side by side; those of the next begin
  /// when all bytes of the ones before are under way. So both ends agree which message meets which, if they agree about the
  /// steps.
  package func send(
    _ bytes: UnsafeRawPointer, _ count: Int, to peer: Int, following source: Int = -1, step: Int = 0, tag: Int = -1,
    times: UnsafeMutablePointer<Movement>? = nil
  ) {
    add(UnsafeMutableRawPointer(mutating: bytes), count, peer, receiving: false, source, step, tag, times)
  }

  /// Adds a stream from `peer`; returns its number, for `following`.
  @discardableResult
  package func receive(
    _ bytes: UnsafeMutableRawPointer, _ count: Int, from peer: Int, step: Int = 0, tag: Int = -1,
    times: UnsafeMutablePointer<Movement>? = nil
  ) -> Int {
    add(bytes, count, peer, receiving: true, -1, step, tag, times)
    return self.count - 1
  }

  private func add(
    _ bytes: UnsafeMutableRawPointer, _ count: Int, _ peer: Int, receiving: Bool, _ source: Int, _ step: Int,
    _ tag: Int, _ times: UnsafeMutablePointer<Movement>?
  ) {
    if self.count == capacity {
      let more = UnsafeMutablePointer<Stream>.allocate(capacity: 2 * capacity)
      more.moveInitialize(from: streams, count: capacity)
      // Streams are added before any of them has begun: no request is under way.
      streams.deallocate()
      requests.deallocate()
      (streams, capacity) = (more, 2 * capacity)
      requests = .allocate(capacity: capacity * places)
    }
    (streams + self.count).initialize(
      to: Stream(
        peer: peer, receiving: receiving, base: bytes, bytes: count, tag: tag, step: step, source: source, times: times)
    )
    self.count += 1
  }

  /// Returns when all that was added has moved.
  package func run(_ freight: (any Freight)? = nil) throws(Failure) {
    self.freight = freight
    defer {
      self.freight = nil
      streams.deinitialize(count: count)
      count = 0
    }
    if let failure { throw failure }
    do throws(Failure) {
      try move()
    } catch {
      failure = error
      isEntangled = (0..<count).contains { streams[$0].underWay > 0 }
      throw error
    }
  }

  private func move() throws(Failure) {
    var idle = 0
    looked = Seconds.now
    var since = looked
    while true {
      (lookedBefore, looked) = (looked, Seconds.now)
      var (isOpen, hasMoved) = (false, false)
      // The step that each direction is in.
      var (sending, receiving) = (Int.max, Int.max)
      for index in 0..<count where streams[index].started < streams[index].bytes {
        if streams[index].receiving {
          receiving = min(receiving, streams[index].step)
        } else {
          sending = min(sending, streams[index].step)
        }
      }
      for index in 0..<count {
        let stream = streams + index
        if try take(stream) { hasMoved = true }
        if stream.pointee.step <= (stream.pointee.receiving ? receiving : sending) { try start(stream) }
        if stream.pointee.moved < stream.pointee.bytes { isOpen = true }
      }
      guard isOpen else { return }
      if hasMoved {
        idle = 0
        continue
      }
      if idle == 0 || freight?.isBusy ?? false { since = looked }
      idle += 1
      if let timeout, looked.value - since.value > timeout.value { throw tooLate(timeout) }
      pause(idle)
    }
  }

  /// Takes what has moved; whether anything has.
  private func take(_ stream: UnsafeMutablePointer<Stream>) throws(Failure) -> Bool {
    var hasMoved = false
    while stream.pointee.underWay > 0 {
      let request = ring(stream)[stream.pointee.oldest]
      guard try transport.isDone(request, peer: stream.pointee.peer) else { break }
      let size = min(piece, stream.pointee.bytes - stream.pointee.moved)
      if let times = stream.pointee.times {
        // It began to move after the look that found nothing moved; and it is here before anybody hears of it.
        if stream.pointee.moved == 0 { times.pointee.begin = max(times.pointee.asked, lookedBefore) }
        if stream.pointee.moved + size == stream.pointee.bytes { times.pointee.end = .now }
      }
      if stream.pointee.receiving, stream.pointee.tag >= 0 {
        freight?.arrived(stream.pointee.tag, at: stream.pointee.moved, bytes: size)
      }
      stream.pointee.moved += size
      stream.pointee.oldest = (stream.pointee.oldest + 1) % places
      stream.pointee.underWay -= 1
      underWay[lane(of: stream)] -= size
      hasMoved = true
    }
    return hasMoved
  }

  /// Starts the pieces that are there to be moved and have room.
  private func start(_ stream: UnsafeMutablePointer<Stream>) throws(Failure) {
    let lane = lane(of: stream)
    let most = stream.pointee.receiving ? window + Wire.ahead : window
    guard stream.pointee.started < stream.pointee.bytes, underWay[lane] < most else { return }
    var ready = stream.pointee.bytes
    if stream.pointee.source >= 0 { ready = streams[stream.pointee.source].moved }
    if stream.pointee.tag >= 0 { ready = min(ready, freight?.ready(stream.pointee.tag) ?? ready) }
    while stream.pointee.started < stream.pointee.bytes, underWay[lane] < most {
      let size = min(piece, stream.pointee.bytes - stream.pointee.started)
      guard stream.pointee.started + size <= ready else { return }
      if stream.pointee.started == 0 { stream.pointee.times?.pointee.asked = looked }
      let place = (stream.pointee.oldest + stream.pointee.underWay) % places
      // Counted before: a transport that fails to start may have taken the bytes all the same.
      stream.pointee.underWay += 1
      underWay[lane] += size
      ring(stream)[place] = try transport.start(
        stream.pointee.base + stream.pointee.started, size, peer: stream.pointee.peer,
        receiving: stream.pointee.receiving)
      stream.pointee.started += size
    }
  }

  /// This rank cannot go on with what the others have begun.
  package func end(_ failure: Failure) {
    self.failure = Failure(.peer, "the group has ended on this rank: \(failure.message)")
  }

  private func lane(of stream: UnsafeMutablePointer<Stream>) -> Int {
    2 * stream.pointee.peer + (stream.pointee.receiving ? 1 : 0)
  }

  private func ring(_ stream: UnsafeMutablePointer<Stream>) -> UnsafeMutablePointer<UnsafeMutableRawPointer?> {
    requests + (stream - streams) * places
  }

  /// Leaves the core to others: for a moment while an answer may be near, then longer.
  private func pause(_ idle: Int) {
    guard idle > 32 else {
      sched_yield()
      return
    }
    var time = timespec(tv_sec: 0, tv_nsec: idle > 256 ? 200_000 : 40_000)
    nanosleep(&time, nil)
  }

  private func tooLate(_ timeout: Seconds) -> Failure {
    var late: [Int] = []
    for index in 0..<count where streams[index].moved < streams[index].bytes && !late.contains(streams[index].peer) {
      late.append(streams[index].peer)
    }
    return Failure(
      .timeout, "nothing came from or went to \(late.map(name).joined(separator: ", ")) for \(timeout.value) s")
  }
}
