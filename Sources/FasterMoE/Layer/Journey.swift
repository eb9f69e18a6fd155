import Synchronization

/// The rows of a pass on their way between workers while its experts compute: what is here already, and what is done and
/// may go back. The calling thread moves rows and the team computes; they meet here.
final class Journey: Freight {
  /// Bytes of a row.
  private var rowBytes = 0
  private var worker = 0
  private var inbox: Pass.Inbox?
  private var parts = 1
  /// Rows of each worker that are here.
  private let arrivedRows: UnsafeMutablePointer<Atomic<Int>>
  /// Per worker: its rows that are done, the first block with rows of it that is not known to be done, and the end of
  /// these blocks. Only the calling thread looks here.
  private let returns: UnsafeMutablePointer<(rows: Int, block: Int, end: Int)>
  private let workers: Int
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

  /// Nothing is here but `worker`'s own rows, nothing is done; tasks of a block are `parts`.
  func begin(_ inbox: Pass.Inbox, _ rounds: Rounds, at worker: Int, parts: Int, rowBytes: Int) {
    (self.inbox, self.worker, self.parts, self.rowBytes) = (inbox, worker, parts, rowBytes)
    for round in 0..<rounds.count {
      for source in rounds.sources(of: worker, in: round) {
        arrivedRows[source].store(source == worker ? .max : 0, ordering: .relaxed)
        returns[source] = (0, inbox.roundBlocks[round], inbox.roundBlocks[round + 1])
      }
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

  func arrived(_ source: Int, at: Int, bytes: Int) {
    // A row that is partly here counts once it is.
    arrivedRows[source].store((at + bytes) / rowBytes, ordering: .releasing)
  }

  /// Results go back from the first on without a gap: blocks of a round are in the order of rows.
  func ready(_ source: Int) -> Int {
    let inbox = inbox!
    while returns[source].block < returns[source].end {
      let index = returns[source].block
      guard inbox.rowTasksDone[index].load(ordering: .acquiring) == parts else { break }
      let block = inbox.blocks[index]
      var row = Int(block.row + block.rows) - 1
      while row >= Int(block.row), inbox.arrivals.origins[row].worker != source { row -= 1 }
      if row >= Int(block.row) { returns[source].rows = Int(inbox.arrivals.origins[row].row) + 1 }
      returns[source].block = index + 1
    }
    return returns[source].rows * rowBytes
  }

  var isBusy: Bool { busy.load(ordering: .relaxed) > 0 }

  // MARK: The team's

  /// Waits until `rows` are here and begins to compute; false if they never will be.
  @inline(__always)
  func wait(_ team: Team, for rows: Range<Int>) -> Bool {
    if isUnderWay.load(ordering: .acquiring) { waitForRows(team, rows) }
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
