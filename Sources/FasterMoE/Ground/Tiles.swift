import CHints

/// The inner loops of products: small tiles of the result that stay in registers from the first term to the last.
///
/// Every element is one chain of fused multiply-adds in the order of its terms, whatever the tile's shape. So how rows
/// and columns are cut, and for how many threads, never changes a bit of the result.
package enum Tiles {
  /// Room that the tiles of any kernel take, of products of up to `rows` rows.
  static func floats(rows: Int) -> Int { max(rows * Strip.width, Outer.columnsAtOnce * outerBlocks * 16) }

  /// tile [high, 32] += panel [high, depth] · strip [depth, 32]; or = where it `begins`. `next` is the panel that will come
  /// after this one; `asks` are asked for meanwhile.
  @inline(__always)
  static func product(
    panel: UnsafePointer<Float>, high: Int, strip: UnsafePointer<Float>, depth: Int,
    into tile: UnsafeMutablePointer<Float>, begins: Bool, next: UnsafePointer<Float>, _ asks: Asks
  ) {
    let steps = (depth &+ 15) / 16
    #if WIDE_VECTORS
      let pending = asks.inSteps(steps)
      // Strips are never packed in parts.
      // 12 × 2 sums, two columns and a broadcast: 27 of the 32 registers.
      switch high {
      case 12: ProductTile<12, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 11: ProductTile<11, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 10: ProductTile<10, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 9: ProductTile<9, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 8: ProductTile<8, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 7: ProductTile<7, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 6: ProductTile<6, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 5: ProductTile<5, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 4: ProductTile<4, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 3: ProductTile<3, 2>.run(panel, high, strip, depth, tile, next, pending)
      case 2: ProductTile<2, 2>.run(panel, high, strip, depth, tile, next, pending)
      default: ProductTile<1, 2>.run(panel, high, strip, depth, tile, next, pending)
      }
    #else
      if begins { tile.update(repeating: 0, count: high &* Strip.width) }
      // 6 rows of two 8-float registers each are 12 sums of the 16 registers.
      var row = 0
      func narrow<let M: Int>(_: ProductTile<M, 1>.Type, _ row: Int, _ next: UnsafePointer<Float>) {
        let shares = (high &+ 5) / 6 &* 2
        for half in 0..<2 {
          ProductTile<M, 1>.run(
            panel + row &* 16, high, strip + half &* 16, depth, tile + (row &* 32 &+ half &* 16), next,
            asks.inSteps(steps, share: row / 6 &* 2 &+ half, of: shares))
        }
      }
      while row < high {
        switch high &- row {
        case 6...: narrow(ProductTile<6, 1>.self, row, row &+ 6 < high ? panel + (row &* 16 &+ 96) : next)
        case 5: narrow(ProductTile<5, 1>.self, row, next)
        case 4: narrow(ProductTile<4, 1>.self, row, next)
        case 3: narrow(ProductTile<3, 1>.self, row, next)
        case 2: narrow(ProductTile<2, 1>.self, row, next)
        default: narrow(ProductTile<1, 1>.self, row, next)
        }
        row &+= 6
      }
    #endif
  }

  /// Rows and column blocks of the largest tile of `outer`: with AVX-512 8 × 3 sums, three columns and a broadcast; with AVX2
  /// 6 × 1 of two registers each.
  #if WIDE_VECTORS
    static let outerRows = 8, outerBlocks = 3
  #else
    static let outerRows = 6, outerBlocks = 1
  #endif

  /// From so many rows on, four panels, most of the time of a tile of `outer` is that of panels with another one behind them.
  /// Only tiles for AVX-512 ask for the next one.
  #if WIDE_VECTORS
    static let manyRows = 4 * Panels.height
  #else
    static let manyRows = Int.max
  #endif

  /// How many rows the tile of `outer` at a column of `left` has: tiles do not reach over a block of 16.
  @inline(__always) static func outerRows(at column: Int) -> Int { min(outerRows, 16 &- column % 16) }

  /// How a tile of `outer` is put in its place.
  enum Sink {
    /// Times a share, added to what stands there.
    case adding
    /// Times a share, past the caches; each vector is a line of memory.
    case streaming
    /// As it is, for whoever knows what of it has a place.
    case desk
  }

  /// Σ over `rows` of left[row, from..<from + outerRows(at: from)]ᵀ · right[row, blocks], put by `sink` where rows of `stride`
  /// floats begin at `place`.
  ///
  /// Both factors are panels of the same rows; `from` is a column of `left` where a tile begins, `block` one of
  /// `right`'s blocks, of which `blocks` (1...outerBlocks) are taken.
  @inline(__always)
  static func outer(
    _ left: Panels, from column: Int, _ right: Panels, block: Int, blocks: Int, rows: Int, times share: Float,
    _ sink: Sink, to place: UnsafeMutablePointer<Float>, stride: Int, _ asks: Asks
  ) {
    // Sinks are types, since a choice among stores within a tile costs it its registers.
    switch sink {
    case .adding: outer(AddingSink.self, left, column, right, block, blocks, rows, share, place, stride, asks)
    case .streaming: outer(StreamingSink.self, left, column, right, block, blocks, rows, share, place, stride, asks)
    case .desk: outer(DeskSink.self, left, column, right, block, blocks, rows, share, place, stride, asks)
    }
  }

  @inline(__always)
  private static func outer<S: TileSink>(
    _: S.Type, _ left: Panels, _ column: Int, _ right: Panels, _ block: Int, _ blocks: Int, _ rows: Int,
    _ share: Float, _ place: UnsafeMutablePointer<Float>, _ stride: Int, _ asks: Asks
  ) {
    #if WIDE_VECTORS
      switch blocks {
      case 3: OuterTile<8, 3, S>.run(left, column, right, block, rows, share, place, stride, asks)
      case 2: OuterTile<8, 2, S>.run(left, column, right, block, rows, share, place, stride, asks)
      default: OuterTile<8, 1, S>.run(left, column, right, block, rows, share, place, stride, asks)
      }
    #else
      if outerRows(at: column) == 6 {
        OuterTile<6, 1, S>.run(left, column, right, block, rows, share, place, stride, asks)
      } else {
        OuterTile<4, 1, S>.run(left, column, right, block, rows, share, place, stride, asks)
      }
    #endif
  }
}

private protocol TileSink {
  static func put(_ sum: Vector, times share: Vector, at to: UnsafeMutablePointer<Float>)
}

private enum AddingSink: TileSink {
  @inline(__always) static func put(_ sum: Vector, times share: Vector, at to: UnsafeMutablePointer<Float>) {
    to.store(sum.times(share, plus: to.vector()))
  }
}

private enum StreamingSink: TileSink {
  @inline(__always) static func put(_ sum: Vector, times share: Vector, at to: UnsafeMutablePointer<Float>) {
    hint_write_past(to, sum.times(share, plus: Vector.zero))
  }
}

private enum DeskSink: TileSink {
  @inline(__always) static func put(_ sum: Vector, times share: Vector, at to: UnsafeMutablePointer<Float>) {
    to.store(sum)
  }
}

/// M rows × N vectors of a product's result, in `tile`, which has rows of 32; with AVX2 added to what stands there.
///
/// Each vector column of sums is an array of its own: that is what the optimiser turns into registers.
private enum ProductTile<let M: Int, let N: Int> {
  @inline(never)
  static func run(
    _ panel: UnsafePointer<Float>, _ high: Int, _ strip: UnsafePointer<Float>, _ depth: Int,
    _ tile: UnsafeMutablePointer<Float>, _ next: UnsafePointer<Float>, _ pending: Asks.Pending
  ) {
    var pending = pending
    #if WIDE_VECTORS
      var sums0 = InlineArray<M, Vector>(repeating: .zero)
      var sums1 = InlineArray<M, Vector>(repeating: .zero)
    #else
      var sums0 = InlineArray<M, Vector> { tile.vector(at: $0 &* 32) }
      var sums1 = InlineArray<M, Vector> { N > 1 ? tile.vector(at: $0 &* 32 &+ 16) : .zero }
    #endif
    var (a, again, b, later) = (panel, hint_any_place(panel)!, strip, next)
    var left = depth
    while left > 0 {
      pending.ask()
      #if !WIDE_VECTORS
        // A line of each row every 16 terms is too much to wait for, from the second cache or behind it.
        for i in 0..<M { hint_read_soon(later + i &* 16) }
        later += high &* 16
      #endif
      let terms = min(16, left)
      for _ in 0..<terms / atOnce {
        for term in 0..<atOnce { add(a + term, again + term, b + term &* 32, &sums0, &sums1) }
        a += atOnce
        again += atOnce
        b += atOnce &* 32
      }
      for _ in 0..<terms % atOnce {
        add(a, again, b, &sums0, &sums1)
        a += 1
        again += 1
        b += 32
      }
      a += high &* 16 &- terms
      again += high &* 16 &- terms
      left &-= 16
    }
    for i in 0..<M {
      tile.store(sums0[unchecked: i], at: i &* 32)
      if N > 1 { tile.store(sums1[unchecked: i], at: i &* 32 &+ 16) }
    }
  }

  /// Terms between two looks at how many are left.
  #if WIDE_VECTORS
    private static var atOnce: Int { 4 }
  #else
    private static var atOnce: Int { 1 }
  #endif
  /// Rows whose term is loaded once, into a register, for both vectors. Of the others each multiplication reads it itself,
  /// which takes no instruction of its own: a core that runs another thread beside has too few of those, not of reads.
  private static var shared: Int { 4 }

  /// One term of all sums: one of each row of the panel, times the row of the strip at `b`. `again` is `a`; if the compiler
  /// knew, it would load each only once.
  @inline(__always)
  private static func add(
    _ a: UnsafePointer<Float>, _ again: UnsafePointer<Float>, _ b: UnsafePointer<Float>,
    _ sums0: inout InlineArray<M, Vector>, _ sums1: inout InlineArray<M, Vector>
  ) {
    let b0 = b.vector()
    let b1 = N > 1 ? b.vector(at: 16) : .zero
    for i in 0..<M {
      let x = Vector(repeating: a[i &* 16])
      sums0[unchecked: i].addProduct(x, b0)
      if N > 1 { sums1[unchecked: i].addProduct(i < shared ? x : Vector(repeating: again[i &* 16]), b1) }
    }
  }
}

/// M columns of `left` × N blocks of `right`, summed over rows, straight from registers to their place.
private enum OuterTile<let M: Int, let N: Int, Sink: TileSink> {
  @inline(never)
  static func run(
    _ left: Panels, _ column: Int, _ right: Panels, _ block: Int, _ rows: Int, _ share: Float,
    _ place: UnsafeMutablePointer<Float>, _ stride: Int, _ asks: Asks
  ) {
    var sums0 = InlineArray<M, Vector>(repeating: .zero)
    var sums1 = InlineArray<M, Vector>(repeating: .zero)
    var sums2 = InlineArray<M, Vector>(repeating: .zero)
    var first = 0
    #if WIDE_VECTORS
      if rows >= Tiles.manyRows {
        // Whole panels, two rows at a time, while the same rows of the next one are asked for: no prefetcher foresees the way
        // there. Where that is the last one and lower, other lines are, which costs nothing that counts.
        var pending = asks.inSteps(Panels.count(rows) &- 1)
        let size = Panels.height &* 16
        let (leftOn, rightOn) = (size &* left.blocks, size &* right.blocks)
        var panelOfLeft = UnsafePointer(left.base) + ((column / 16) &* size &+ column % 16)
        var panelOfRight = UnsafePointer(right.base) + (block &* size)
        while first &+ Panels.height < rows {
          pending.ask()
          var (a, b) = (panelOfLeft, panelOfRight)
          for _ in 0..<hint_any_count(Panels.height / 2) {
            for row in 0..<2 {
              hint_read_soon(a + (leftOn &+ row &* 16))
              for i in 0..<N { hint_read_soon(b + (rightOn &+ i &* size &+ row &* 16)) }
              add(a + row &* 16, b + row &* 16, size, &sums0, &sums1, &sums2)
            }
            a += 32
            b += 32
          }
          panelOfLeft += leftOn
          panelOfRight += rightOn
          first &+= Panels.height
        }
      }
    #endif
    while first < rows {
      let high = min(Panels.height, rows &- first)
      let size = high &* 16
      var a = UnsafePointer(left.panel(first)) + ((column / 16) &* size &+ column % 16)
      var b = UnsafePointer(right.panel(first)) + (block &* size)
      for _ in 0..<high {
        add(a, b, size, &sums0, &sums1, &sums2)
        a += 16
        b += 16
      }
      first &+= high
    }
    let factor = Vector(repeating: share)
    for i in 0..<M {
      let row = place + i &* stride
      Sink.put(sums0[unchecked: i], times: factor, at: row)
      if N > 1 { Sink.put(sums1[unchecked: i], times: factor, at: row + 16) }
      if N > 2 { Sink.put(sums2[unchecked: i], times: factor, at: row + 32) }
    }
  }

  /// What one row adds to all sums: M of its left columns from `a`, times its right blocks, `size` apart from `b`.
  @inline(__always)
  private static func add(
    _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ size: Int, _ sums0: inout InlineArray<M, Vector>,
    _ sums1: inout InlineArray<M, Vector>, _ sums2: inout InlineArray<M, Vector>
  ) {
    let b0 = b.vector()
    let b1 = N > 1 ? b.vector(at: size) : .zero
    let b2 = N > 2 ? b.vector(at: 2 &* size) : .zero
    for i in 0..<M {
      let x = Vector(repeating: a[i])
      sums0[unchecked: i].addProduct(x, b0)
      if N > 1 { sums1[unchecked: i].addProduct(x, b1) }
      if N > 2 { sums2[unchecked: i].addProduct(x, b2) }
    }
  }
}

#if !WIDE_VECTORS
  /// 6 columns of a left factor × 16 of a right one, both packed, [rows, 6] and [rows, 16], added to `tile` [6, 16].
  enum PackedTile {
    static let columns = 6

    @inline(never)
    static func run(
      _ left: UnsafePointer<Float>, _ right: UnsafePointer<Float>, _ rows: Int, _ tile: UnsafeMutablePointer<Float>
    ) {
      var sums = InlineArray<6, Vector> { tile.vector(at: $0 &* 16) }
      var (a, b) = (left, right)
      for _ in 0..<rows {
        let row = b.vector()
        for i in 0..<columns { sums[unchecked: i].addProduct(Vector(repeating: a[i]), row) }
        a += columns
        b += 16
      }
      for i in 0..<columns { tile.store(sums[unchecked: i], at: i &* 16) }
    }
  }
#endif
