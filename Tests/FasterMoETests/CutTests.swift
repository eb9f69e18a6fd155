import Testing

@testable import FasterMoE

/// How blocks are cut into tasks: every row and every column is some task's, once.
@Suite struct CutTests {
  private static func block(_ rows: Int) -> Block { Block(expert: 0, row: 0, rows: Int32(rows), previous: -1) }

  @Test(arguments: [1, 2, 3, 8, 64]) func tasksCoverAllOnce(threads: Int) {
    for blocks in [1, 2, 3, 7, 8, 100] {
      let cut = Cut(blocks: blocks, threads: threads)
      #expect(cut.forwardTasks % cut.parts == 0 && cut.backwardTasks % cut.parts == 0)
      for rows in [1, 2, 11, 12, 13, 64, 128, 129, 240, 241, 576] {
        let block = Self.block(rows)
        func covers(_ width: Int, _ part: (Int) -> Range<Int>) -> Bool {
          (0..<cut.parts).flatMap { part($0) } == Array(0..<width)
        }
        #expect(covers(rows) { cut.rows(block, $0) } && covers(rows) { cut.singleRows(block, $0) })
        if cut.isByColumns(block) {
          #expect(cut.forwardTasks == 2 * cut.parts && cut.backwardTasks == 3 * cut.parts)
          #expect(rows <= Workspace.gateRows)
          for width in [1, 31, 32, 33, 100, 1024] {
            #expect(covers(width) { cut.columns(width, $0) })
            #expect(!cut.columns(width, 0).isEmpty, "the first keeps what all need")
            #expect((0..<cut.parts).allSatisfy { cut.columns(width, $0).lowerBound % 32 == 0 })
          }
        }
      }
    }
  }

  /// One expert with few rows is work for all threads, and experts enough are left whole.
  @Test func fewRowsAreCutByColumnsWhereThreadsWouldWait() {
    for rows in [1, 8, 12, 40, 128] {
      #expect(Cut(blocks: 1, threads: 2).isByColumns(Self.block(rows)))
      #expect(!Cut(blocks: 2, threads: 2).isByColumns(Self.block(rows)))
      #expect(Cut(blocks: 4, threads: 8).isByColumns(Self.block(rows)))
      #expect(!Cut(blocks: 5, threads: 8).isByColumns(Self.block(rows)))
      #expect(!Cut(blocks: 1, threads: 1).isByColumns(Self.block(rows)))
    }
    #expect(!Cut(blocks: 1, threads: 2).isByColumns(Self.block(576)))
    let cut = Cut(blocks: 1, threads: 4)
    #expect((0..<cut.parts).count { !cut.columns(1024, $0).isEmpty } == 4)
    // Else rows are, but not into parts that read all weights for a few.
    let some = Cut(blocks: 3, threads: 2)
    #expect((0..<some.parts).count { !some.rows(Self.block(47), $0).isEmpty } == 1)
    #expect((0..<some.parts).count { !some.rows(Self.block(128), $0).isEmpty } == 2)
    #expect((0..<some.parts).count { !some.rows(Self.block(576), $0).isEmpty } == some.parts)
  }
}
