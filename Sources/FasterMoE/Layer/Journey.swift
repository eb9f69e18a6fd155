import Synchronization

/// The rows and copies of a pass on their way between workers while its experts compute: what is here already, and what is
/// done and may go on. The calling thread moves them and the team computes; they meet here.
final class Journey: Freight {
  // Tags of streams, with W workers: 0..<W rows of a worker that come, then results that go back to it, then copies of
  // experts that come, then gradients of theirs that go.
  static func arrival(_ worker: Int) -> Int { worker }
  static func giveBack(_ worker: Int, _ workers: Int) -> Int { workers + worker }
  static func copy(_ index: Int, _ workers: Int) -> Int { 2 * workers + index }
  static func reduction(_ index: Int, _ copies: Int, _ workers: Int) -> Int { 2 * workers + copies + index }

  private let workers: Int
  private var inbox: Inbox?
  private var worker = 0
  /// Experts that this worker owns.
  private var experts = 0
  /// Tasks of a block.
  private var rowTasks = 1
  private var weightTasks = 1
  private var rowBytes = 0
  /// Rows of each worker that are here.
  private let arrivedRows: UnsafeMutablePointer<Atomic<Int>>
  /// Per worker: its rows that are done, the first block with rows of it that is not known to be done, and the end of
  /// these blocks. Only the calling thread looks here.
  private let returns: UnsafeMutablePointer<(rows: Int, block: Int, end: Int)>
  /// Of each shadowed expert whether its parameters are here, and whether they always were.
  private var copies: [Copy] = []
  private var isOwn: [Bool] = []
  private final class Copy { let isHere = Atomic<Bool>(false) }
  /// Threads that compute just now.
  private let busy = Atomic<Int>(0)
  /// Whether rows still move, so that tasks must look whether theirs are here.
  private let isUnderWay = Atomic<Bool>(false)
  /// Whether they never will.
  private let isCut = Atomic<Bool>(false)

  init(workers: Int) {
    self.workers = workers
    arrivedRows = .allocate(capacity: workers)
    for worker in 0..<workers { (arrivedRows + worker).initialize(to: Atomic(0)) }
    returns = .allocate(capacity: workers)
    returns.initialize(repeating: (0, 0, 0), count: workers)
  }

  deinit {
    arrivedRows.deinitialize(count: workers)
    arrivedRows.deallocate()
    returns.deallocate()
  }

  // MARK: The calling thread's

  /// Nothing is here but `worker`'s own rows and, of the copies that `owners` have, its own and, if it
  /// `fetches` none, all; nothing is done.
  func begin(
    _ inbox: Inbox, _ rounds: Rounds, _ owners: [Int], at worker: Int, experts: Int, rowTasks: Int,
    weightTasks: Int, rowBytes: Int, fetches: Bool
  ) {
    (self.inbox, self.worker, self.experts) = (inbox, worker, experts)
    (self.rowTasks, self.weightTasks, self.rowBytes) = (rowTasks, weightTasks, rowBytes)
    for round in 0..<rounds.count {
      for source in rounds.sources(of: worker, in: round) {
        arrivedRows[source].store(source == worker ? .max : 0, ordering: .relaxed)
        returns[source] = (0, inbox.roundBlocks[round].lowerBound, inbox.roundBlocks[round].upperBound)
      }
    }
    while copies.count < owners.count { copies.append(Copy()) }
    isOwn.removeAll(keepingCapacity: true)
    for (index, owner) in owners.enumerated() {
      isOwn.append(owner == worker)
      copies[index].isHere.store(owner == worker || !fetches, ordering: .relaxed)
    }
    isUnderWay.store(true, ordering: .releasing)
  }

  /// The rows stay where they are; whoever waits for one goes on without.
  func cut() { isCut.store(true, ordering: .releasing) }

  /// All have moved.
  func end() {
    isUnderWay.store(false, ordering: .relaxed)
    inbox = nil
  }

  func arrived(_ tag: Int, at: Int, bytes: Int) {
    if tag < workers {
      // A row that is partly here counts once it is.
      arrivedRows[tag].store((at + bytes) / rowBytes, ordering: .releasing)
    } else {
      let inbox = inbox!
      if tag - 2 * workers < isOwn.count {
        let index = tag - 2 * workers
        if at + bytes == inbox.copyFloats * 4 { copies[index].isHere.store(true, ordering: .releasing) }
      } else if case let index = tag - 2 * workers - isOwn.count, !isOwn[index] {
        let floats = index * inbox.copyFloats + at / 4
        add(inbox.copyGrads + floats, to: inbox.copySums + floats, count: bytes / 4)
      }
    }
  }

  func ready(_ tag: Int) -> Int {
    if tag < workers { return .max }
    if tag < 2 * workers { return readyResults(tag - workers) }
    if tag < 2 * workers + isOwn.count { return .max }
    return areCopyGradsDone(tag - 2 * workers - isOwn.count) ? .max : 0
  }

  /// Results go back from the first on without a gap: blocks of a round are in the order of rows.
  private func readyResults(_ source: Int) -> Int {
    let inbox = inbox!
    while returns[source].block < returns[source].end {
      let index = returns[source].block
      guard inbox.rowTasksDone[index].load(ordering: .acquiring) == rowTasks else { break }
      let block = inbox.blocks[index]
      var row = Int(block.row + block.rows) - 1
      while row >= Int(block.row), inbox.arrivals.origins[row].worker != source { row -= 1 }
      if row >= Int(block.row) { returns[source].rows = Int(inbox.arrivals.origins[row].row) + 1 }
      returns[source].block = index + 1
    }
    return returns[source].rows * rowBytes
  }

  /// Blocks of an expert add to its gradients one after the other: all have once the latest has.
  private func areCopyGradsDone(_ index: Int) -> Bool {
    let inbox = inbox!
    let latest = Int(inbox.latest[experts + index])
    return latest < 0 || inbox.weightTasksDone[latest].load(ordering: .acquiring) == weightTasks
  }

  var isBusy: Bool { busy.load(ordering: .relaxed) > 0 }

  // MARK: The team's

  /// Waits until some rows of a block, and its expert, are here and begins to compute; false if they never will be.
  /// `ready` becomes the time from which the thread computes, if that is later.
  @inline(__always)
  func wait(_ team: Team, for block: Block, _ rows: Range<Int>, _ ready: inout Seconds) -> Bool {
    if isUnderWay.load(ordering: .acquiring) {
      waitForRows(team, Int(block.row) + rows.lowerBound..<Int(block.row) + rows.upperBound)
      if Int(block.expert) >= experts {
        let copy = copies[Int(block.expert) - experts]
        team.wait { copy.isHere.load(ordering: .acquiring) || self.isCut.load(ordering: .acquiring) }
      }
      ready = .now
    }
    return begin()
  }

  private func waitForRows(_ team: Team, _ rows: Range<Int>) {
    let origins = inbox!.arrivals.origins
    var seen: Int32 = -1
    for row in rows.reversed() where origins[row].worker != seen {
      // The last row of each worker: the others of this worker have come before it.
      seen = origins[row].worker
      team.wait {
        self.arrivedRows[Int(seen)].load(ordering: .acquiring) > Int(origins[row].row)
          || self.isCut.load(ordering: .acquiring)
      }
    }
  }

  /// Begins to compute; false if there is no point any more.
  @inline(__always)
  func begin() -> Bool {
    if isCut.load(ordering: .relaxed) { return false }
    busy.wrappingAdd(1, ordering: .relaxed)
    return true
  }

  @inline(__always)
  func isDone() { busy.wrappingSubtract(1, ordering: .relaxed) }
}
