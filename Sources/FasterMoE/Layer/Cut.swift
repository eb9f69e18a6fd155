/// How the work on rows of blocks is cut into tasks, each of which one thread does.
///
/// Where there are plenty of blocks, a task is a block. Where there are not, many rows are cut by rows; few rows, which the
/// weights meet where they stand, by columns: forward in two stages, backward in three, each of which needs all of the one
/// before. No cut changes a bit.
struct Cut {
  private let threads: Int
  /// Tasks of a block in each stage; some may be empty.
  let parts: Int
  private let cutsColumns: Bool

  init(blocks: Int, threads: Int) {
    self.threads = threads
    parts = threads == 1 || blocks == 0 ? 1 : max(1, (8 * threads + blocks - 1) / blocks)
    cutsColumns = threads > 1 && blocks < 4 * threads
  }

  var forwardTasks: Int { cutsColumns ? 2 * parts : parts }
  var backwardTasks: Int { cutsColumns ? 3 * parts : parts }

  /// Whether the tasks of `block` take columns.
  func isByColumns(_ block: Block) -> Bool {
    let rows = Int(block.rows)
    return cutsColumns && (rows <= Choices.mostRows || Panels.count(rows) < parts && rows <= Workspace.gateRows)
  }

  /// Rows of part `part` of `block`, whole panels except at its end. Each part reads or packs the expert's weights again.
  func rows(_ block: Block, _ part: Int) -> Range<Int> {
    let rows = Int(block.rows)
    if rows <= Choices.mostRows { return part == 0 ? 0..<rows : 0..<0 }
    let panels = Panels.count(rows)
    let low = panels * part / parts * Panels.height
    let high = min(rows, panels * (part + 1) / parts * Panels.height)
    return low..<max(low, high)
  }

  /// Rows of part `part` where rows have nothing in common.
  func singleRows(_ block: Block, _ part: Int) -> Range<Int> {
    Int(block.rows) * part / parts..<Int(block.rows) * (part + 1) / parts
  }

  /// Columns of part `part` of `width`, whole strips except at its end; the first part has some. A few for each thread: rows
  /// are copied for each.
  func columns(_ width: Int, _ part: Int) -> Range<Int> {
    let strips = (width + Strip.width - 1) / Strip.width
    let pieces = min(parts, 2 * threads, strips)
    guard part < pieces else { return 0..<0 }
    let low = strips * part / pieces * Strip.width
    return low..<max(low, min(width, strips * (part + 1) / pieces * Strip.width))
  }
}
