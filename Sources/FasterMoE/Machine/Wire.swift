import Glibc

/// Moves large volumes between ranks over a transport: cut in pieces, several under way to every peer at once.
///
/// Only the thread that calls `run` talks to the transport. It polls, and sleeps when nothing moves, so that the cores
/// belong to whoever computes. The steady state allocates nothing.
package final class Wire {
  /// Bytes of a piece: below the limit where MPI stops sending at once and first asks the receiver, since that question
  /// waits behind whatever the receiver itself is sending and makes the two directions take turns.
  package static let piece = 60 * 1024
  /// Most pieces under way in one stream.
  private static let mostUnderWay = 16

  /// One direction between this rank and a peer.
  private struct Stream {
    let peer: Int
    let receiving: Bool
    let base: UnsafeMutableRawPointer
    let bytes: Int
    /// The stream that brings the bytes which this one passes on, or -1: they are all there.
    let source: Int
    /// What is done to each arrived piece, by its place and size, before a stream passes it on.
    let arrived: ((Int, Int) -> Void)?
    var started = 0
    var moved = 0
    /// Requests under way, oldest first, in a ring.
    var requests = InlineArray<16, UnsafeMutableRawPointer?>(repeating: nil)
    var oldest = 0
    var underWay = 0
  }

  private let transport: any Transport
  private let timeout: Seconds?
  /// Sent pieces under way in one stream; received ones are asked for two ahead of that.
  private let window: Int
  private let capacity: Int
  private let streams: UnsafeMutablePointer<Stream>
  private var count = 0
  /// Why nothing can move any more.
  package private(set) var failure: Failure?
  /// Whether the transport may still touch memory that it was given.
  package private(set) var isEntangled = false
  /// Names a rank for people.
  package var name: (Int) -> String = { "rank \($0)" }

  package init(_ transport: any Transport, timeout: Seconds?) {
    self.transport = transport
    self.timeout = timeout
    // Some eight pieces in all keep a link busy; more only wait in the system's buffers.
    window = max(2, min(Wire.mostUnderWay - 2, 8 / max(1, transport.size - 1)))
    capacity = 2 * transport.size
    streams = .allocate(capacity: capacity)
  }

  deinit {
    streams.deinitialize(count: count)
    streams.deallocate()
  }

  package func send(_ bytes: UnsafeRawPointer, _ count: Int, to peer: Int, following source: Int = -1) {
    add(UnsafeMutableRawPointer(mutating: bytes), count, peer, receiving: false, source, nil)
  }

  /// Returns the stream's number, for `following`.
  @discardableResult
  package func receive(
    _ bytes: UnsafeMutableRawPointer, _ count: Int, from peer: Int, arrived: ((Int, Int) -> Void)? = nil
  ) -> Int {
    add(bytes, count, peer, receiving: true, -1, arrived)
    return self.count - 1
  }

  private func add(
    _ bytes: UnsafeMutableRawPointer, _ count: Int, _ peer: Int, receiving: Bool, _ source: Int,
    _ arrived: ((Int, Int) -> Void)?
  ) {
    precondition(self.count < capacity, "two streams a peer")
    (streams + self.count).initialize(
      to: Stream(peer: peer, receiving: receiving, base: bytes, bytes: count, source: source, arrived: arrived))
    self.count += 1
  }

  /// Returns when all that was added has moved.
  package func run() throws(Failure) {
    defer {
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
    var since = Seconds.now
    while true {
      var (isOpen, hasMoved) = (false, false)
      for index in 0..<count {
        if try advance(streams + index) { hasMoved = true }
        if streams[index].moved < streams[index].bytes { isOpen = true }
      }
      guard isOpen else { return }
      if hasMoved {
        idle = 0
        continue
      }
      if idle == 0 { since = Seconds.now }
      idle += 1
      if let timeout, Seconds.now.value - since.value > timeout.value { throw tooLate(timeout) }
      pause(idle)
    }
  }

  /// Takes what has moved and starts what may; whether anything has moved.
  private func advance(_ stream: UnsafeMutablePointer<Stream>) throws(Failure) -> Bool {
    var hasMoved = false
    let most = stream.pointee.receiving ? window + 2 : window
    while stream.pointee.underWay > 0 {
      let request = stream.pointee.requests[stream.pointee.oldest]
      guard try transport.isDone(request, peer: stream.pointee.peer) else { break }
      let size = min(Wire.piece, stream.pointee.bytes - stream.pointee.moved)
      stream.pointee.arrived?(stream.pointee.moved, size)
      stream.pointee.moved += size
      stream.pointee.oldest = (stream.pointee.oldest + 1) % Wire.mostUnderWay
      stream.pointee.underWay -= 1
      hasMoved = true
    }
    let ready = stream.pointee.source < 0 ? stream.pointee.bytes : streams[stream.pointee.source].moved
    while stream.pointee.started < ready, stream.pointee.underWay < most {
      let size = min(Wire.piece, stream.pointee.bytes - stream.pointee.started)
      let place = (stream.pointee.oldest + stream.pointee.underWay) % Wire.mostUnderWay
      stream.pointee.requests[place] = try transport.start(
        stream.pointee.base + stream.pointee.started, size, peer: stream.pointee.peer,
        receiving: stream.pointee.receiving)
      stream.pointee.started += size
      stream.pointee.underWay += 1
    }
    return hasMoved
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
