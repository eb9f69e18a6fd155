import CHints

/// Gradients of weights: sums of outer products over rows.
package enum Outer {
  /// Columns of a left factor that make a task.
  #if WIDE_VECTORS
    package static let columnsAtOnce = 128
  #else
    package static let columnsAtOnce = 16 * PackedTile.columns
  #endif

  /// gradient [left width, stride] += share · leftᵀ·right over `rows`, for the columns of `left` in `range`; or = where it
  /// `writes`. The range begins at a multiple of 16.
  ///
  /// `byRows` says how the gradient is walked: along its rows, for few rows of the factors, or down its columns.
  package static func add(
    _ left: Panels, _ range: Range<Int>, _ right: Panels, rows: Int, times share: Float,
    to gradient: UnsafeMutablePointer<Float>, stride: Int, writes: Bool, byRows: Bool, on desk: Product.Desk
  ) {
    // What is written is not read soon: it need not pass through the caches, where it would first be read.
    let streams = writes && right.width % 16 == 0 && stride % 16 == 0 && UInt(bitPattern: gradient) % 64 == 0

    func place(_ column: Int, _ block: Int) -> UnsafeMutablePointer<Float> { gradient + (column * stride + block * 16) }
    /// Asks for a tile's place if that is added to: at once, or if rows are many for what is returned, while they are summed.
    func ask(_ block: Int, _ blocks: Int, _ column: Int, _ columns: Int) -> Asks {
      var asks = Asks(in: desk.asks)
      guard !writes else { return asks }
      if rows < Tiles.manyRows {
        Prefetch.write(place(column, block), stride: stride, rows: columns, columns: blocks * 16)
      } else {
        for i in 0..<columns {
          for j in 0..<blocks { asks.write(place(column + i, block + j)) }
        }
      }
      return asks
    }
    /// Puts a tile of `columns` × `blocks` · 16 in its place.
    func finish(_ tile: UnsafePointer<Float>, _ block: Int, _ blocks: Int, _ column: Int, _ columns: Int) {
      for i in 0..<columns {
        let row = place(column + i, block)
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
    }
    /// The tile of some columns × some right blocks: straight to its place, or by way of the desk where an edge cuts it.
    func makeTile(_ block: Int, _ blocks: Int, _ column: Int, _ columns: Int) {
      let asks = ask(block, blocks, column, columns)
      func outer(_ sink: Tiles.Sink, to: UnsafeMutablePointer<Float>, stride: Int) {
        Tiles.outer(
          left, from: column, right, block: block, blocks: blocks, rows: rows, times: share, sink, to: to,
          stride: stride, asks)
      }
      let isUncut = columns == Tiles.outerRows(at: column) && (block + blocks) * 16 <= right.width
      if isUncut, streams {
        outer(.streaming, to: place(column, block), stride: stride)
      } else if isUncut, !writes {
        outer(.adding, to: place(column, block), stride: stride)
      } else {
        outer(.desk, to: desk.tile, stride: blocks * 16)
        finish(desk.tile, block, blocks, column, columns)
      }
    }
    /// All columns × some right blocks, at most `atOnce` of them in a tile.
    func walk(_ some: Range<Int>, atOnce: Int) {
      var column = range.lowerBound
      while column < range.upperBound {
        let columns = min(Tiles.outerRows(at: column), range.upperBound - column)
        for block in Swift.stride(from: some.lowerBound, to: some.upperBound, by: atOnce) {
          makeTile(block, min(atOnce, some.upperBound - block), column, columns)
        }
        column += columns
      }
    }
    if byRows {
      let (atOnce, together) = alongRows(rows: rows, of: right.blocks)
      for block in Swift.stride(from: 0, to: right.blocks, by: together) {
        walk(block..<min(right.blocks, block + together), atOnce: atOnce)
      }
    } else {
      // The right blocks of one round stay in the first caches while the left columns stream by.
      #if WIDE_VECTORS
        for block in Swift.stride(from: 0, to: right.blocks, by: Tiles.outerBlocks) {
          walk(block..<min(right.blocks, block + Tiles.outerBlocks), atOnce: Tiles.outerBlocks)
        }
      #else
        for column in Swift.stride(from: range.lowerBound, to: range.upperBound, by: columnsAtOnce) {
          let columns = column..<min(range.upperBound, column + columnsAtOnce)
          let packed = Packed(left, columns, rows: rows, in: desk.scratch)
          for block in 0..<right.blocks {
            packed.forEachTile(right, block, tile: desk.tile) { column, columns, tile, isWhole in
              if isWhole { finish(tile, block, 1, column, columns) } else { _ = ask(block, 1, column, columns) }
            }
          }
        }
      #endif
    }
    if streams { hint_written_past() }
  }

  /// How many of the right factor's blocks a tile takes, and how many are walked along a gradient's rows before its next rows.
  ///
  /// On Intel's processors those that 24 KiB hold, half of the first cache, which with 16 rows is 1.4 times as fast as all of
  /// them. AMD's were measured with all.
  private static func alongRows(rows: Int, of blocks: Int) -> (atOnce: Int, together: Int) {
    #if WIDE_VECTORS
      if Choices.isIntel { return (2, max(2, (24 << 10) / 64 / rows / 2 * 2)) }
    #endif
    return (Tiles.outerBlocks, blocks)
  }

  /// Floats of a desk's scratch for products over `rows` rows.
  static func scratch(rows: Int) -> Int {
    #if WIDE_VECTORS
      0
    #else
      Packed.floats(rows: rows)
    #endif
  }
}

#if !WIDE_VECTORS
  /// Columns of a left factor, six side by side, and a block of a right one, as AVX2 needs them for many rows.
  ///
  /// A tile of 12 registers passes two lines of its factors in 6 cycles, so they must come from the first cache; where panels
  /// are a multiple of its size apart, those of a column fight for 12 of its 64 sets.
  private struct Packed {
    /// Most rows of the right factor at a time: half of the first cache.
    private static let mostRows = 20 * Panels.height

    private let columns: Range<Int>
    private let rows: Int
    private let left: UnsafeMutablePointer<Float>
    private let right: UnsafeMutablePointer<Float>

    /// From a tile's columns to those of the next one: a row is copied as 8 floats, of which the last two are overwritten.
    private static func apart(rows: Int) -> Int { (rows * PackedTile.columns + 2 + 15) / 16 * 16 }

    static func floats(rows: Int) -> Int {
      Outer.columnsAtOnce / PackedTile.columns * apart(rows: rows) + mostRows * 16 + Panels.height * lineFloats
    }

    /// A row of all columns, and what a copy of 8 may read behind them.
    private static let lineFloats = Outer.columnsAtOnce + 16

    init(_ factor: Panels, _ columns: Range<Int>, rows: Int, in scratch: UnsafeMutablePointer<Float>) {
      (self.columns, self.rows) = (columns, rows)
      right = scratch
      let lines = scratch + Packed.mostRows * 16
      left = lines + Panels.height * Packed.lineFloats
      let blocks = columns.lowerBound / 16..<(columns.upperBound + 15) / 16
      Panels.forEach(rows: rows) { first, high in
        // First in their order, then six by six: what was just stored in other pieces is slow to load.
        for block in blocks {
          let from = factor.panel(first) + block &* high &* 16
          let to = lines + (block &- blocks.lowerBound) &* 16
          for i in 0..<high { to.store(from.vector(at: i &* 16), at: i &* Packed.lineFloats) }
        }
        for tile in 0..<tiles {
          let from = lines + tile &* PackedTile.columns
          let to = left + (tile &* Packed.apart(rows: rows) &+ first &* PackedTile.columns)
          for i in 0..<high {
            let eight = UnsafeRawPointer(from + i &* Packed.lineFloats).loadUnaligned(as: SIMD8<Float>.self)
            UnsafeMutableRawPointer(to + i &* PackedTile.columns).storeBytes(of: eight, as: SIMD8<Float>.self)
          }
        }
      }
    }

    private var tiles: Int { (columns.count + PackedTile.columns - 1) / PackedTile.columns }

    /// Calls `body` with each tile of all columns × a block of `factor`: before its last rows are added up, and when it is whole.
    @inline(__always)
    func forEachTile(
      _ factor: Panels, _ block: Int, tile: UnsafeMutablePointer<Float>,
      _ body: (_ column: Int, _ columns: Int, _ tile: UnsafeMutablePointer<Float>, _ isWhole: Bool) -> Void
    ) {
      for from in stride(from: 0, to: rows, by: Packed.mostRows) {
        let count = min(Packed.mostRows, rows - from)
        let isLast = from + count == rows
        Panels.forEach(rows: count) { first, high in
          let block = factor.panel(from &+ first) + block &* high &* 16
          for i in 0..<high { right.store(block.vector(at: i &* 16), at: (first &+ i) &* 16) }
        }
        for index in 0..<tiles {
          let column = columns.lowerBound + index * PackedTile.columns
          let width = min(PackedTile.columns, columns.upperBound - column)
          // Tiles that wait for more rows stand side by side.
          let tile = count == rows ? tile : tile + index * PackedTile.columns * 16
          if from == 0 { tile.update(repeating: 0, count: PackedTile.columns * 16) }
          if isLast { body(column, width, tile, false) }
          PackedTile.run(
            left + index * Packed.apart(rows: rows) + from * PackedTile.columns, right, count, tile)
          if isLast { body(column, width, tile, true) }
        }
      }
    }
  }
#endif
