/// A product under way, rows in panels times a matrix, by the kernel that its rows call for.
package struct Product {
  package enum Kernel {
    /// `Dots`: other sums than those of the others, which all have the same bits.
    case dots
    /// `FewRows`: the matrix where it stands.
    case inPlace
    /// `Tiles` with packed strips of the matrix.
    case strips
  }

  /// The memory in which a thread makes one product at a time.
  package struct Desk {
    /// Result tiles of any kernel, those of all rows of 32 columns.
    package let tile: UnsafeMutablePointer<Float>
    /// Packed columns of a matrix, `Strip.depth` of its rows.
    let strip: UnsafeMutablePointer<Float>
    /// What a tile asks for.
    let asks: UnsafeMutablePointer<UnsafeRawPointer>
    /// What kernels in place keep.
    let scratch: UnsafeMutablePointer<Float>

    /// For up to `rows` rows and matrices of no more than `longest` rows or columns.
    package init(arena: inout Arena, rows: Int, longest: Int) {
      tile = arena.take(Tiles.floats(rows: max(rows, Choices.mostRows)))
      strip = arena.take(min(longest, Strip.depth) * Strip.width)
      asks = arena.take(Asks.most)
      scratch = arena.take(max(FewRows.scratch(depth: longest), Dots.scratch, Outer.scratch(rows: rows)))
    }
  }

  let left: Panels
  let factor: Factor
  let desk: Desk

  package init(_ left: Panels, _ factor: Factor, on desk: Desk) {
    (self.left, self.factor, self.desk) = (left, factor, desk)
  }

  /// Multiplies `rows` rows, 32 columns at a time, and calls `body` with each panel's tile while it is hot: its column,
  /// first row, height and memory, and that of the second product, if there is one, at the same place. `ahead` is called
  /// before the tile is computed, to list the memory that `body` will write.
  ///
  /// `columns` are all of them or begin and end at multiples of 32. Where a kernel in place cannot take the matrix, or some
  /// of its columns, strips do.
  @inline(__always)
  package static func forEachTile(
    _ rows: Int, in columns: Range<Int>, by kernel: Kernel, _ product: Product, _ second: Product? = nil,
    ahead: (_ column: Int, _ row: Int, _ high: Int, _ asks: inout Asks) -> Void = { _, _, _, _ in },
    _ body: (
      _ column: Int, _ row: Int, _ high: Int, _ tile: UnsafeMutablePointer<Float>, _ second: UnsafeMutablePointer<Float>
    ) -> Void
  ) {
    if kernel != .strips, product.factor.matrixInPlace != nil {
      return forEachTileInPlace(rows, columns, product, second, ahead, body)
    }
    let isInPlace = kernel != .strips && product.factor.rowsInPlace(columns.lowerBound) != nil
    if isInPlace, kernel == .inPlace {
      FewRows.prepare(product.left, rows: rows, scratch: product.desk.scratch)
      if let second { FewRows.prepare(second.left, rows: rows, scratch: second.desk.scratch) }
    }
    for column in stride(from: columns.lowerBound, to: columns.upperBound, by: Strip.width) {
      if isInPlace { Panels.forEach(rows: rows) { row, high in product.askAtOnce { ahead(column, row, high, &$0) } } }
      if isInPlace, product.multiplyInPlace(column, rows, by: kernel) {
        _ = second?.multiplyInPlace(column, rows, by: kernel)
        Panels.forEach(rows: rows) { row, high in
          body(column, row, high, product.tile(row), (second ?? product).tile(row))
        }
      } else {
        forEachTileOfStrip(column, rows, product, second, ahead, body)
      }
    }
  }

  /// The same for 32 columns, packed: what the first cache holds of them meets all rows, then what stands below.
  @inline(__always)
  private static func forEachTileOfStrip(
    _ column: Int, _ rows: Int, _ product: Product, _ second: Product?,
    _ ahead: (_ column: Int, _ row: Int, _ high: Int, _ asks: inout Asks) -> Void,
    _ body: (
      _ column: Int, _ row: Int, _ high: Int, _ tile: UnsafeMutablePointer<Float>, _ second: UnsafeMutablePointer<Float>
    ) -> Void
  ) {
    let depth = product.factor.depth
    let panels = Panels.count(rows)
    for from in stride(from: 0, to: depth, by: Strip.depth) {
      let part = from..<min(depth, from + Strip.depth)
      let isLast = part.upperBound == depth
      let next =
        isLast
        ? (column + Strip.width, 0..<min(depth, Strip.depth))
        : (column, part.upperBound..<min(depth, part.upperBound + Strip.depth))
      product.factor.pack(column, part, into: product.desk.strip)
      second?.factor.pack(column, part, into: second!.desk.strip)
      for panel in 0..<panels {
        let row = panel * Panels.height
        let high = min(Panels.height, rows - row)
        var asks = Asks(in: product.desk.asks)
        product.factor.list(next.0, next.1, share: panel, of: panels, in: &asks)
        if let second {
          product.multiply(row, of: rows, part, asks)
          asks = Asks(in: product.desk.asks)
          second.factor.list(next.0, next.1, share: panel, of: panels, in: &asks)
        }
        if isLast { ahead(column, row, high, &asks) }
        (second ?? product).multiply(row, of: rows, part, asks)
        if isLast { body(column, row, high, product.tile(row), (second ?? product).tile(row)) }
      }
    }
  }

  /// The same for a matrix whose rows are added up: some of its rows at a time, read from end to end.
  @inline(__always)
  private static func forEachTileInPlace(
    _ rows: Int, _ columns: Range<Int>, _ product: Product, _ second: Product?,
    _ ahead: (_ column: Int, _ row: Int, _ high: Int, _ asks: inout Asks) -> Void,
    _ body: (
      _ column: Int, _ row: Int, _ high: Int, _ tile: UnsafeMutablePointer<Float>, _ second: UnsafeMutablePointer<Float>
    ) -> Void
  ) {
    let depth = product.factor.depth
    product.clearSums(rows, columns)
    second?.clearSums(rows, columns)
    for from in stride(from: 0, to: depth, by: FewRows.depthAtOnce) {
      let isLast = from + FewRows.depthAtOnce >= depth
      for column in stride(from: columns.lowerBound, to: columns.upperBound, by: Strip.width) {
        if isLast { Panels.forEach(rows: rows) { row, high in product.askAtOnce { ahead(column, row, high, &$0) } } }
        product.add(rows, from, column, intoTile: isLast)
        second?.add(rows, from, column, intoTile: isLast)
        guard isLast else { continue }
        Panels.forEach(rows: rows) { row, high in
          body(column, row, high, product.tile(row), (second ?? product).tile(row))
        }
      }
    }
  }

  /// Makes 32 columns of all rows from weights where they stand; false where those are too few.
  @inline(__always)
  private func multiplyInPlace(_ column: Int, _ rows: Int, by kernel: Kernel) -> Bool {
    guard let low = factor.rowsInPlace(column), let high = factor.rowsInPlace(column + FewRows.columns) else {
      return false
    }
    for half in 0..<2 {
      let (weights, tile) = (half == 0 ? low : high, desk.tile + half * FewRows.columns)
      if kernel == .dots {
        Dots.product(left, rows: rows, weights: weights, depth: factor.depth, scratch: desk.scratch, into: tile)
      } else {
        FewRows.product(left, rows: rows, weights: weights, depth: factor.depth, scratch: desk.scratch, into: tile)
      }
    }
    return true
  }

  /// Sums of 16 columns of all rows stand side by side until they are whole.
  @inline(__always) private func sums(_ column: Int, _ rows: Int) -> UnsafeMutablePointer<Float> {
    desk.scratch + column * rows
  }

  @inline(__always)
  private func clearSums(_ rows: Int, _ columns: Range<Int>) {
    sums(columns.lowerBound, rows).update(repeating: 0, count: rows * columns.count)
  }

  /// Adds what some rows of the matrix give to 32 columns of all rows.
  @inline(__always)
  private func add(_ rows: Int, _ from: Int, _ column: Int, intoTile isLast: Bool) {
    for half in stride(from: column, to: min(column + Strip.width, factor.columns), by: 16) {
      let sums = sums(half, rows)
      FewRows.add(
        left, rows: rows, from: from, count: min(FewRows.depthAtOnce, factor.depth - from),
        weights: factor.matrixInPlace! + (from * factor.columns + half), stride: factor.columns,
        to: sums, into: isLast ? desk.tile + (half - column) : sums, apart: isLast ? Strip.width : 16)
    }
  }

  /// Where the results of the panel from `row` on stand.
  @inline(__always) private func tile(_ row: Int) -> UnsafeMutablePointer<Float> { desk.tile + row &* Strip.width }

  @inline(__always)
  private func askAtOnce(_ ahead: (inout Asks) -> Void) {
    var asks = Asks(in: desk.asks)
    ahead(&asks)
    asks.askAtOnce()
  }

  /// Adds to the tile of one panel what the packed part of a strip gives, asking for `asks` meanwhile.
  @inline(__always)
  private func multiply(_ row: Int, of rows: Int, _ part: Range<Int>, _ asks: Asks) {
    func place(_ row: Int, _ from: Int) -> UnsafePointer<Float> {
      UnsafePointer(left.panel(row)) + from &* min(Panels.height, rows &- row)
    }
    let isLast = row &+ Panels.height >= rows
    Tiles.product(
      panel: place(row, part.lowerBound), high: min(Panels.height, rows &- row), strip: desk.strip, depth: part.count,
      into: tile(row), begins: part.lowerBound == 0,
      next: isLast ? place(0, part.upperBound) : place(row &+ Panels.height, part.lowerBound), asks)
  }
}
