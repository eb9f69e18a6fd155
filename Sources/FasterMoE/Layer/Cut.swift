/// How the work on rows of blocks is cut into tasks, each of which one thread does.
///
/// Where there are plenty of blocks, a task is a block, or some of its rows where they are many. Where half of the threads
/// or more would have none, few rows are cut by columns: forward in two stages, backward in three, each of which needs all
/// of the one before. No cut changes a bit.
struct Cut {
  private let threads: Int
  /// Tasks of a block in each stage; some may be empty.
  let parts: Int
  private let cutsColumns: Bool

  init(blocks: Int, threads: Int) {
    self.threads = threads
    cutsColumns = blocks > 0 && 2 * blocks <= threads
    let rowParts = threads == 1 || blocks == 0 ? 1 : max(1, (8 * threads + blocks - 1) / blocks)
    parts = cutsColumns ? max(rowParts, threads) : rowParts
  }

  var forwardTasks: Int { cutsColumns ? 2 * parts : parts }
  var backwardTasks: Int { cutsColumns ? 3 * parts : parts }

  /// Whether the tasks of `block` take columns: all threads work on it then, or else some would wait for a stage to end.
  func isByColumns(_ block: Block) -> Bool {
    let rows = Int(block.rows)
    return cutsColumns && rows <= Workspace.gateRows && (rows <= Choices.mostRows || Panels.count(rows) < parts)
  }

  /// Rows of part `part` of `block`, whole panels except at its end. Each part reads or packs the expert's weights again, so
  /// parts are not small.
  func rows(_ block: Block, _ part: Int) -> Range<Int> {
    let rows = Int(block.rows)
    let pieces = min(parts, max(1, rows / Cut.fewestRows))
    guard part < pieces else { return 0..<0 }
    let panels = Panels.count(rows)
    let low = panels * part / pieces * Panels.height
    return low..<max(low, min(rows, panels * (part + 1) / pieces * Panels.height))
  }

  private static let fewestRows = 4 * Panels.height

  /// Rows of part `part` where rows have nothing in common.
  func singleRows(_ block: Block, _ part: Int) -> Range<Int> {
    Int(block.rows) * part / parts..<Int(block.rows) * (part + 1) / parts
  }

  /// Columns of part `part` of `width`, whole strips except at its end; the first part has some. One for each thread: rows
  /// are copied for each.
  func columns(_ width: Int, _ part: Int) -> Range<Int> {
    let strips = (width + Strip.width - 1) / Strip.width
    let pieces = min(threads, strips)
    guard part < pieces else { return 0..<0 }
    let low = strips * part / pieces * Strip.width
    return low..<max(low, min(width, strips * (part + 1) / pieces * Strip.width))
  }
}
