import CHints

/// Products of an expert's very few rows with a transposed weight matrix, where nothing counts but how fast weights come.
///
/// Weights meet the rows lane by lane as they stand, and only sums are turned. So an element is 16 chains, one for each
/// lane of the depth, added in pairs at the end: other bits than one chain has. Whoever chooses must look at what no plan
/// and no number of workers or threads changes: all rows that an expert gets in a step.
package enum Dots {
  /// Most rows that it takes.
  package static let most = 4
  /// Floats of sums, and of what is left of weights at their ends, that it needs.
  package static let scratch = (most + 1) * FewRows.columns * 16

  /// tile [rows, 32 apart] = left [rows, depth] · weights [16, depth]ᵀ; all rows in one panel.
  package static func product(
    _ left: Panels, rows: Int, weights: UnsafePointer<Float>, depth: Int, scratch sums: UnsafeMutablePointer<Float>,
    into tile: UnsafeMutablePointer<Float>
  ) {
    #if WIDE_VECTORS
      switch rows {
      case 1: all(DotTile<1, 8>.self, left, rows, weights, depth, sums)
      case 2: all(DotTile<2, 8>.self, left, rows, weights, depth, sums)
      case 3: all(DotTile<3, 8>.self, left, rows, weights, depth, sums)
      default: all(DotTile<4, 4>.self, left, rows, weights, depth, sums)
      }
    #else
      switch rows {
      case 1: all(DotTile<1, 4>.self, left, rows, weights, depth, sums)
      case 2: all(DotTile<2, 2>.self, left, rows, weights, depth, sums)
      case 3: all(DotTile<3, 1>.self, left, rows, weights, depth, sums)
      default: all(DotTile<4, 1>.self, left, rows, weights, depth, sums)
      }
    #endif
    for row in 0..<rows {
      var chains = transposed(sums + row * FewRows.columns * 16, stride: 16)
      for pairs in [8, 4, 2, 1] {
        for i in 0..<pairs { chains[i] += chains[i + pairs] }
      }
      tile.store(chains[0], at: row * Strip.width)
    }
  }

  /// All 16 weight rows, R at a time: 8, as many lines of them as a cache set holds, where their sums fit the registers.
  @inline(__always)
  private static func all<let M: Int, let R: Int>(
    _: DotTile<M, R>.Type, _ left: Panels, _ rows: Int, _ weights: UnsafePointer<Float>, _ depth: Int,
    _ sums: UnsafeMutablePointer<Float>
  ) {
    let (whole, rest) = (depth / 16, depth % 16)
    sums.update(repeating: 0, count: rows * FewRows.columns * 16)
    for row in stride(from: 0, to: FewRows.columns, by: R) {
      DotTile<M, R>.run(left.base, weights + row * depth, depth, whole, sums + row * 16)
    }
    guard rest > 0 else { return }
    let ends = sums + most * FewRows.columns * 16
    for row in 0..<FewRows.columns {
      ends.store((weights + row * depth).vector(at: whole * 16, first: rest), at: row * 16)
    }
    for row in stride(from: 0, to: FewRows.columns, by: R) {
      DotTile<M, R>.run(left.base + whole * rows * 16, ends + row * 16, 16, 1, sums + row * 16)
    }
  }
}

/// M rows × R weight rows, 16 lanes of each product, added to `sums` [M, 16, 16].
private enum DotTile<let M: Int, let R: Int> {
  /// `blocks` of 16 columns, of weight rows that are `apart`.
  @inline(never)
  static func run(
    _ rows: UnsafePointer<Float>, _ weights: UnsafePointer<Float>, _ apart: Int, _ blocks: Int,
    _ sums: UnsafeMutablePointer<Float>
  ) {
    var sums0 = InlineArray<R, Vector> { sums.vector(at: $0 &* 16) }
    var sums1 = InlineArray<R, Vector> { M > 1 ? sums.vector(at: 256 &+ $0 &* 16) : .zero }
    var sums2 = InlineArray<R, Vector> { M > 2 ? sums.vector(at: 512 &+ $0 &* 16) : .zero }
    var sums3 = InlineArray<R, Vector> { M > 3 ? sums.vector(at: 768 &+ $0 &* 16) : .zero }
    var x = rows
    var w = weights
    // In the order of memory, what comes 16 KiB after these rows.
    var ahead = FewRows.Ahead(weights, rows: R, depth: apart, later: R &* apart &+ 4096)
    for _ in 0..<blocks {
      ahead.ask(R)
      let x0 = x.vector()
      let x1 = M > 1 ? x.vector(at: 16) : .zero
      let x2 = M > 2 ? x.vector(at: 32) : .zero
      let x3 = M > 3 ? x.vector(at: 48) : .zero
      for i in 0..<R {
        let weight = w.vector(at: i &* apart)
        sums0[unchecked: i].addProduct(weight, x0)
        if M > 1 { sums1[unchecked: i].addProduct(weight, x1) }
        if M > 2 { sums2[unchecked: i].addProduct(weight, x2) }
        if M > 3 { sums3[unchecked: i].addProduct(weight, x3) }
      }
      x += M &* 16
      w += 16
    }
    for i in 0..<R {
      sums.store(sums0[unchecked: i], at: i &* 16)
      if M > 1 { sums.store(sums1[unchecked: i], at: 256 &+ i &* 16) }
      if M > 2 { sums.store(sums2[unchecked: i], at: 512 &+ i &* 16) }
      if M > 3 { sums.store(sums3[unchecked: i], at: 768 &+ i &* 16) }
    }
  }
}
