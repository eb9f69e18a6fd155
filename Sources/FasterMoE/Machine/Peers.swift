import Glibc

/// The ranks of a group, seen from one of them, and what they do together.
///
/// Every method is called by all ranks in one order and returns on each when its part is done.
package protocol Peers: AnyObject {
  var rank: Int { get }
  var size: Int { get }
  /// Whether each rank can read and write what another one points to.
  var shareMemory: Bool { get }
  /// Puts every rank's `bytes` bytes into `all` [size, bytes], in the order of ranks.
  func gather(_ own: UnsafeRawPointer, bytes: Int, into all: UnsafeMutableRawPointer, from: Entrance) throws(Failure)
  /// Has memory for gathering so many bytes from each rank and for summing so many values. What has been reserved cannot
  /// fail on one rank alone later, when the others have been told that all can go on.
  func reserve(bytes: Int, values: Int) throws(Failure)
  /// Replaces `values` by their sum over all ranks, added up in the order of ranks: the same bits everywhere.
  func sum(_ values: UnsafeMutablePointer<Float>, count: Int) throws(Failure)
  /// Returns when all ranks have come, each of which is in the same call already.
  func meet() throws(Failure)
}

/// Where ranks come from when they meet.
package enum Entrance {
  /// Each from its host's code, which may be silent: the time-out counts.
  case host
  /// Each from inside a call in which all have met: whoever is late is computing, and does come.
  case call
}

extension Peers {
  package func gather(_ own: UnsafeRawPointer, bytes: Int, into all: UnsafeMutableRawPointer) throws(Failure) {
    try gather(own, bytes: bytes, into: all, from: .host)
  }
}

/// Adds `others` to `values`.
func add(_ others: UnsafePointer<Float>, to values: UnsafeMutablePointer<Float>, count: Int) {
  for at in stride(from: 0, to: count, by: 16) {
    let width = min(16, count - at)
    values.store(values.vector(at: at, first: width) + others.vector(at: at, first: width), at: at, first: width)
  }
}

/// Ranks that are threads of one process; a rank alone is one of them.
package final class SharedPeers: Peers {
  package let rank: Int
  package var size: Int { board.size }
  package var shareMemory: Bool { true }
  private let board: Board

  /// The seats of `size` ranks.
  package static func seats(_ size: Int, timeout: Seconds?) -> [SharedPeers] {
    let board = Board(size, timeout)
    return (0..<size).map { SharedPeers($0, board) }
  }

  private init(_ rank: Int, _ board: Board) {
    self.rank = rank
    self.board = board
  }

  /// A rank that goes is a lost peer to those who still wait for it.
  deinit { board.leave(rank) }

  package func reserve(bytes: Int, values: Int) {}

  package func gather(
    _ own: UnsafeRawPointer, bytes: Int, into all: UnsafeMutableRawPointer, from entrance: Entrance
  ) throws(Failure) {
    guard size > 1 else {
      memmove(all, own, bytes)
      return
    }
    board.published[rank] = own
    switch entrance {
    case .host: try board.meet(rank)
    case .call: try board.part(rank)
    }
    for peer in 0..<size {
      let from = board.published[peer]!
      if from != UnsafeRawPointer(all + peer * bytes) { memcpy(all + peer * bytes, from, bytes) }
    }
    try board.part(rank)
  }

  /// Each rank sums one slice over all ranks.
  package func sum(_ values: UnsafeMutablePointer<Float>, count: Int) throws(Failure) {
    guard size > 1 else { return }
    board.published[rank] = UnsafeRawPointer(values)
    try board.meet(rank)
    let mine = count * rank / size..<count * (rank + 1) / size
    // Into rank 0's array: it comes first in the order, and this slice of all arrays is touched by this rank alone.
    for peer in 1..<size {
      add(array(of: peer) + mine.lowerBound, to: array(of: 0) + mine.lowerBound, count: mine.count)
    }
    try board.part(rank)
    if rank != 0 { values.update(from: array(of: 0), count: count) }
    try board.part(rank)
  }

  package func meet() throws(Failure) {
    if size > 1 { try board.part(rank) }
  }

  private func array(of peer: Int) -> UnsafeMutablePointer<Float> {
    UnsafeMutableRawPointer(mutating: board.published[peer]!).assumingMemoryBound(to: Float.self)
  }
}

/// Where the threads of a group meet. All of them get past a meeting or none: the lock decides who was too late.
private final class Board: @unchecked Sendable {
  let size: Int
  let published: UnsafeMutablePointer<UnsafeRawPointer?>
  private let timeout: Seconds?
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let changed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private var hasCome: [Bool]
  private var come = 0
  private var meetings = 0
  private var failure: Failure?

  init(_ size: Int, _ timeout: Seconds?) {
    self.size = size
    self.timeout = timeout
    hasCome = Array(repeating: false, count: size)
    published = .allocate(capacity: size)
    published.initialize(repeating: nil, count: size)
    mutex.initialize(to: pthread_mutex_t())
    changed.initialize(to: pthread_cond_t())
    pthread_mutex_init(mutex, nil)
    var clock = pthread_condattr_t()
    pthread_condattr_init(&clock)
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC)
    pthread_cond_init(changed, &clock)
    pthread_condattr_destroy(&clock)
  }

  deinit {
    pthread_cond_destroy(changed)
    pthread_mutex_destroy(mutex)
    changed.deallocate()
    mutex.deallocate()
    published.deallocate()
  }

  /// Waits for all ranks, each coming from its host's code, for as long as a host may be silent.
  func meet(_ rank: Int) throws(Failure) { try wait(rank, timeout) }

  /// Waits for all ranks, each inside the library already: they do come, so nobody may give up and let its memory go
  /// while another one still uses it.
  func part(_ rank: Int) throws(Failure) { try wait(rank, nil) }

  private func wait(_ rank: Int, _ timeout: Seconds?) throws(Failure) {
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    if let failure { throw failure }
    hasCome[rank] = true
    come += 1
    if come == size {
      come = 0
      for peer in 0..<size { hasCome[peer] = false }
      meetings += 1
      pthread_cond_broadcast(changed)
      return
    }
    let mine = meetings
    var deadline = timespec()
    if let timeout {
      let end = Seconds.now.value + min(timeout.value, 1e9)
      deadline = timespec(tv_sec: Int(end), tv_nsec: Int((end - end.rounded(.down)) * 1e9))
    }
    while meetings == mine && failure == nil {
      if timeout == nil {
        pthread_cond_wait(changed, mutex)
      } else if pthread_cond_timedwait(changed, mutex, &deadline) == ETIMEDOUT, meetings == mine, failure == nil {
        let missing = (0..<size).filter { !hasCome[$0] }.map { "rank \($0)" }.joined(separator: ", ")
        fail(Failure(.timeout, "\(missing) did not come for \(timeout!.value) s"))
      }
    }
    if meetings == mine { throw failure! }
  }

  func leave(_ rank: Int) {
    pthread_mutex_lock(mutex)
    if failure == nil { fail(Failure(.peer, "rank \(rank) has left the group")) }
    pthread_mutex_unlock(mutex)
  }

  private func fail(_ failure: Failure) {
    self.failure = failure
    pthread_cond_broadcast(changed)
  }
}
