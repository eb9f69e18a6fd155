/// What ran when in one pass, measured always: it costs a look at the clock a task and one a look at the messages.
///
/// Every thread writes to a lane of its own: the calling thread its calls, its waits for other ranks and the streams of
/// rows that it moves, each thread of the team its tasks. Lanes are bounded. One that is full keeps what it has and counts
/// what comes after it. Their memory serves one pass after the other.
final class Recording {
  enum Kind: UInt8 {
    // Calls, on the caller's lane.
    case gateCall, routeCall, planCall, forwardCall, backwardCall
    // The caller waits until all ranks have come, also there.
    case meetTokens, meetCounts, meetForward, meetBackward, meetExperts, meetCopies
    // Streams between this rank and another, also there.
    case send, fetch, giveBack, reduce
    // Jobs that the team's threads share.
    case gate, packRows, packCopies, clearGrads, addCopyGrads, combine, combineGrads, gateGrads
    // Tasks of one block of an expert's rows.
    case experts, expertGrads, weightGrads
  }

  /// The other end of a stream.
  enum Peer: BitwiseCopyable { case none, from(Int), to(Int) }

  struct Entry: BitwiseCopyable {
    let kind: Kind
    var peer = Peer.none
    /// The block of a task, the round of a stream, or the place of its expert among the shadows.
    var place: Int32 = -1
    /// Those of a block's task, or those that a stream carries; 0 where a kind has none and for most tasks that make some columns
    /// of all rows, so that sums over tasks are right.
    var rows: Int32 = 0
    var bytes = 0
    var times: Movement
  }

  /// One thread's.
  struct Lane {
    fileprivate struct Head: BitwiseCopyable {
      var count = 0
      var leftOut = 0
      var capacity = 0
    }
    fileprivate let head: UnsafeMutablePointer<Head>
    fileprivate let first: UnsafeMutablePointer<Entry>

    fileprivate init(_ arena: inout Arena, capacity: Int) {
      head = arena.take(1)
      first = arena.take(capacity)
    }

    var entries: UnsafeBufferPointer<Entry> { UnsafeBufferPointer(start: first, count: head.pointee.count) }
    /// How many entries came after the lane was full.
    var leftOut: Int { head.pointee.leftOut }

    fileprivate func forget() { (head.pointee.count, head.pointee.leftOut) = (0, 0) }

    /// Where the entry is from now on, unless the lane is full.
    @discardableResult
    func add(_ entry: Entry) -> UnsafeMutablePointer<Entry>? {
      guard head.pointee.count < head.pointee.capacity else {
        head.pointee.leftOut += 1
        return nil
      }
      let place = first + head.pointee.count
      place.initialize(to: entry)
      head.pointee.count += 1
      return place
    }

    func add(_ kind: Kind, from begin: Seconds) {
      add(Entry(kind: kind, times: Movement(from: begin, to: .now)))
    }

    /// Adds a task of a block that began at `begin` and ends now, which it returns.
    ///
    /// Where the task before it was of the same kind and block and ended just before, the two become one: the weights of a
    /// block alone are some dozen tasks.
    @discardableResult
    @inline(never)
    func addTask(_ kind: Kind, block: Int, rows: Int, from begin: Seconds) -> Seconds {
      let end = Seconds.now
      if head.pointee.count > 0, head.pointee.leftOut == 0 {
        let last = first + (head.pointee.count - 1)
        if last.pointee.kind == kind, last.pointee.place == block,
          begin.value - last.pointee.times.end.value < Lane.pause.value
        {
          last.pointee.times.end = end
          // The tasks of rows share these out, each task of weights goes over all.
          if kind != .weightGrads { last.pointee.rows += Int32(rows) }
          return end
        }
      }
      add(Entry(kind: kind, place: Int32(block), rows: Int32(rows), times: Movement(from: begin, to: end)))
      return end
    }

    /// Longer ones are to be seen.
    private static let pause = Seconds(5e-6)
  }

  private let threads: Int
  private var memory: Region?
  private var (callerRoom, threadRoom) = (0, 0)
  /// The calling thread's; those of the team.
  private(set) var caller: Lane!
  private var team: [Lane] = []

  init(threads: Int) { self.threads = threads }

  /// Room for what a pass records before it knows what it has to do. Forgets the pass before.
  func begin() throws(Failure) {
    try reserve(caller: Recording.mostCalls, thread: Recording.mostJobs)
    caller.forget()
    for lane in team { lane.forget() }
  }

  /// Room for a pass that computes so many blocks and exchanges with so many ranks.
  func reserve(blocks: Int, peers: Int, shadows: Int) throws(Failure) {
    // Rows and copies go and come, there and back, forward and backward.
    let streams = 8 * (peers + shadows)
    // One each for outputs, gradients of rows and of weights, and more where threads have shared a block.
    let tasks = min(8 * blocks + 16, Recording.mostTasks)
    try reserve(caller: Recording.mostCalls + streams, thread: Recording.mostJobs + tasks)
  }

  func lane(_ thread: Int) -> Lane { team[thread] }

  static let mostCalls = 16
  static let mostJobs = 16
  /// Of one thread, half a megabyte.
  static let mostTasks = 1 << 13

  func reserve(caller callerNeed: Int, thread threadNeed: Int) throws(Failure) {
    guard callerRoom < callerNeed || threadRoom < threadNeed else { return }
    // Batches differ: some room saves asking again.
    let (callerNeed, threadNeed) = (max(callerRoom, callerNeed * 9 / 8), max(threadRoom, threadNeed * 9 / 8))
    func lanes(_ arena: inout Arena) -> [Lane] {
      (0...threads).map { Lane(&arena, capacity: $0 == 0 ? callerNeed : threadNeed) }
    }
    var size = Arena()
    _ = lanes(&size)
    let larger = try Region(bytes: size.bytes, for: "the times of a batch")
    var arena = Arena(over: larger.base)
    let made = lanes(&arena)
    for (index, lane) in made.enumerated() {
      lane.head.initialize(to: Lane.Head(capacity: index == 0 ? callerNeed : threadNeed))
      guard let before = team.isEmpty ? nil : index == 0 ? caller : team[index - 1] else { continue }
      for entry in before.entries { lane.add(entry) }
      lane.head.pointee.leftOut = before.leftOut
    }
    memory = consume larger
    (callerRoom, threadRoom) = (callerNeed, threadNeed)
    caller = made[0]
    team = Array(made.dropFirst())
  }
}
