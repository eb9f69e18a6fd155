import CHints

/// Gradients of weights: sums of outer products over rows.
package enum Outer {
  /// gradient [left width, stride] += share · leftᵀ·right over `rows`, for the columns of `left` in `range`; or = where it
  /// `writes`.
  ///
  /// `byRows` says how the gradient is walked: along its rows or down its columns. `tile` has room for `Tiles.floats`.
  package static func add(
    _ left: Panels, _ range: Range<Int>, _ right: Panels, rows: Int, times share: Float,
    to gradient: UnsafeMutablePointer<Float>, stride: Int, writes: Bool, byRows: Bool,
    tile: UnsafeMutablePointer<Float>
  ) {
    // What is written is not read soon: it need not pass through the caches, where it would first be read.
    let streams = writes && stride % 16 == 0 && UInt(bitPattern: gradient) % 64 == 0
    @discardableResult func add(_ block: Int, _ column: Int) -> Int {
      let blocks = min(Tiles.outerBlocks, right.blocks - block)
      let columns = min(Tiles.outerRows(at: column), range.upperBound - column)
      let first = gradient + (column * stride + block * 16)
      if !writes { Prefetch.write(first, stride: stride, rows: columns, columns: blocks * 16) }
      Tiles.outer(left, from: column, right, block: block, blocks: blocks, rows: rows, into: tile)
      for i in 0..<columns {
        let row = first + i * stride
        for j in 0..<blocks {
          let sum = tile.vector(at: (i * blocks + j) * 16)
          if streams {
            hint_write_past(row + j * 16, sum.times(Vector(repeating: share), plus: Vector.zero))
          } else {
            let width = min(16, right.width - (block + j) * 16)
            let before = writes ? Vector.zero : row.vector(at: j * 16, first: width)
            row.store(sum.times(Vector(repeating: share), plus: before), at: j * 16, first: width)
          }
        }
      }
      return columns
    }
    if byRows {
      // The right factor is small, and a gradient's rows are walked from end to end.
      var column = range.lowerBound
      while column < range.upperBound {
        for block in Swift.stride(from: 0, to: right.blocks, by: Tiles.outerBlocks) { add(block, column) }
        column += Tiles.outerRows(at: column)
      }
    } else {
      // The right blocks of one round stay in the first caches while the left columns stream by.
      for block in Swift.stride(from: 0, to: right.blocks, by: Tiles.outerBlocks) {
        var column = range.lowerBound
        while column < range.upperBound { column += add(block, column) }
      }
    }
    if streams { hint_written_past() }
  }
}
