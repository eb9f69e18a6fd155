import CHints

/// What the stages are made of: products tile by tile, sums over rows, and rows summed for tokens.
extension PassContext {
  // MARK: Products

  /// A product under way: its factors and the desk space that its strips and tiles take.
  struct Product {
    let left: Panels
    let factor: Factor
    let strip: UnsafeMutablePointer<Float>
    let tile: UnsafeMutablePointer<Float>
    let fewRows: UnsafeMutablePointer<Float>
  }

  func product(_ left: Panels, _ factor: Factor) -> Product {
    Product(left: left, factor: factor, strip: desk.strip, tile: desk.tile, fewRows: desk.fewRows)
  }

  /// Another product of the same size beside the first.
  func secondProduct(_ left: Panels, _ factor: Factor) -> Product {
    Product(
      left: left, factor: factor, strip: desk.secondStrip, tile: desk.secondTile, fewRows: desk.secondFewRows)
  }

  /// Multiplies `rows` rows, 32 columns at a time, and calls `body` with each panel's tile while it is hot: its column,
  /// first row, height and memory, and that of the second product, if there is one, at the same place.
  @inline(__always)
  func forEachTile(
    _ rows: Int, _ product: Product, _ second: Product? = nil,
    _ body: (
      _ column: Int, _ row: Int, _ high: Int, _ tile: UnsafeMutablePointer<Float>, _ second: UnsafeMutablePointer<Float>
    ) -> Void
  ) {
    if rows <= FewRows.most, product.factor.matrixInPlace != nil {
      return forEachTileInPlace(rows, product, second, body)
    }
    let panels = Panels.count(rows)
    let few = rows <= FewRows.most && product.factor.rowsInPlace(0) != nil
    if few {
      FewRows.prepare(product.left, rows: rows, scratch: product.fewRows)
      if let second { FewRows.prepare(second.left, rows: rows, scratch: second.fewRows) }
    }
    for column in stride(from: 0, to: product.factor.columns, by: Strip.width) {
      let inPlace = few && product.multiplyInPlace(column, rows)
      if inPlace {
        _ = second?.multiplyInPlace(column, rows)
      } else {
        product.factor.pack(column, into: product.strip)
        second?.factor.pack(column, into: second!.strip)
      }
      for panel in 0..<panels {
        let row = panel * Panels.height
        let high = min(Panels.height, rows - row)
        let shift = inPlace ? row * Strip.width : 0
        if !inPlace {
          product.multiply(row, high, prefetching: column + Strip.width, panel, panels)
          second?.multiply(row, high, prefetching: column + Strip.width, panel, panels)
        }
        body(column, row, high, product.tile + shift, (second ?? product).tile + shift)
      }
    }
  }

  /// The same for few rows and a matrix whose rows are added up: some of its rows at a time, read from end to end.
  @inline(__always)
  private func forEachTileInPlace(
    _ rows: Int, _ product: Product, _ second: Product?,
    _ body: (
      _ column: Int, _ row: Int, _ high: Int, _ tile: UnsafeMutablePointer<Float>, _ second: UnsafeMutablePointer<Float>
    ) -> Void
  ) {
    let (depth, columns) = (product.factor.depth, product.factor.columns)
    product.fewRows.update(repeating: 0, count: rows * columns)
    second?.fewRows.update(repeating: 0, count: rows * columns)
    for from in stride(from: 0, to: depth, by: FewRows.depthAtOnce) {
      let isLast = from + FewRows.depthAtOnce >= depth
      for column in stride(from: 0, to: columns, by: Strip.width) {
        product.add(rows, from, column, intoTile: isLast)
        second?.add(rows, from, column, intoTile: isLast)
        guard isLast else { continue }
        Panels.forEach(rows: rows) { row, high in
          let shift = row * Strip.width
          body(column, row, high, product.tile + shift, (second ?? product).tile + shift)
        }
      }
    }
  }

  // MARK: Sums over rows

  /// gradient [left width, stride] += share · leftᵀ·right over `rows`, for the columns of `left` in `range`; or = where it
  /// `writes`.
  func addOuter(
    _ left: Panels, _ range: Range<Int>, _ right: Panels, rows: Int, times share: Float,
    to gradient: UnsafeMutablePointer<Float>, stride: Int, _ writes: Bool
  ) {
    // What is written is not read soon: it need not pass through the caches, where it would first be read.
    let streams = writes && stride % 16 == 0 && UInt(bitPattern: gradient) % 64 == 0
    @discardableResult func add(_ block: Int, _ column: Int) -> Int {
      let blocks = min(Tiles.outerBlocks, right.blocks - block)
      let columns = min(Tiles.outerRows(at: column), range.upperBound - column)
      let first = gradient + (column * stride + block * 16)
      if !writes { Prefetch.write(first, stride: stride, rows: columns, columns: blocks * 16) }
      Tiles.outer(left, from: column, right, block: block, blocks: blocks, rows: rows, into: desk.tile)
      for i in 0..<columns {
        let row = first + i * stride
        for j in 0..<blocks {
          let sum = desk.tile.vector(at: (i * blocks + j) * 16)
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
    if rows <= PassContext.fewRowsOuter {
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

  private static var fewRowsOuter: Int { 48 }

  /// sums [width] += share · Σ over `rows` of the columns in `range`, each row times its scale; or =.
  func addSums(
    _ panels: Panels, _ range: Range<Int>, rows: Int, scales: UnsafePointer<Float>?, times share: Float,
    to sums: UnsafeMutablePointer<Float>, _ writes: Bool
  ) {
    for column in stride(from: range.lowerBound, to: range.upperBound, by: 16) {
      var sum = Vector.zero
      Panels.forEach(rows: rows) { first, high in
        let at = panels.panel(first) + column * high
        for i in 0..<high {
          if let scales {
            sum.addProduct(at.vector(at: i * 16), Vector(repeating: scales[first + i]))
          } else {
            sum += at.vector(at: i * 16)
          }
        }
      }
      let width = min(16, panels.width - column)
      let before = writes ? Vector.zero : sums.vector(at: column, first: width)
      sums.store(sum.times(Vector(repeating: share), plus: before), at: column, first: width)
    }
  }

  // MARK: Rows of tokens

  /// Writes a tile of `product` as rows of width d where they go, plus a bias or another tile.
  @inline(__always)
  func storeRows(
    _ tile: UnsafeMutablePointer<Float>, _ first: Int, _ high: Int, _ column: Int, bias: UnsafeMutablePointer<Float>?,
    adding second: UnsafeMutablePointer<Float>?
  ) {
    for half in stride(from: column, to: min(column + Strip.width, shape.model), by: 16) {
      let width = min(16, shape.model - half)
      let added = bias?.vector(at: half, first: width) ?? .zero
      for i in 0..<high {
        let at = i * Strip.width + half - column
        let sum = tile.vector(at: at) + (second?.vector(at: at) ?? added)
        resultRow(first + i).store(sum, at: half, first: width)
      }
    }
  }

  /// Σ_j of a token's rows in [R, d], in the order of its choices, each times its weight if `weighted`; 16 columns.
  @inline(__always)
  func sumOfRows(_ token: Int, _ column: Int, _ width: Int, weighted: Bool) -> Vector {
    var sum = Vector.zero
    for slot in token * shape.choices..<(token + 1) * shape.choices {
      let row = Int(store.routing.rows[slot])
      guard row >= 0 else { continue }
      let values = store.rows.vector(at: row * shape.model + column, first: width)
      if weighted { sum.addProduct(values, Vector(repeating: store.routing.weights[slot])) } else { sum += values }
    }
    return sum
  }

  /// Asks for some columns of a token's rows in [R, d], which stand wherever their experts' rows do.
  @inline(__always)
  func prefetchRows(_ token: Int, _ column: Int, _ columns: Int) {
    for slot in token * shape.choices..<(token + 1) * shape.choices {
      let row = Int(store.routing.rows[slot])
      if row >= 0 { Prefetch.read(store.rows + column, stride: shape.model, rows: row..<row + 1, columns: columns) }
    }
  }

  /// Shares all tokens among the threads.
  @inline(__always)
  func forEachToken(_ body: (Int) -> Void) {
    let piece = 64
    while case let first = team.take() * piece, first < count {
      let end = min(first + piece, count)
      for token in first..<end {
        prefetchRows(min(token + 2, end - 1), 0, shape.model)
        body(token)
      }
    }
  }
}

extension PassContext.Product {
  /// Makes 32 columns of all rows from weights where they stand; false where those are too few.
  @inline(__always)
  fileprivate func multiplyInPlace(_ column: Int, _ rows: Int) -> Bool {
    guard let low = factor.rowsInPlace(column), let high = factor.rowsInPlace(column + FewRows.columns) else {
      return false
    }
    FewRows.product(left, rows: rows, weights: low, depth: factor.depth, scratch: fewRows, into: tile)
    FewRows.product(
      left, rows: rows, weights: high, depth: factor.depth, scratch: fewRows, into: tile + FewRows.columns)
    return true
  }

  /// Adds what some rows of the matrix give to 32 columns of all rows, which stand side by side until they are whole.
  @inline(__always)
  fileprivate func add(_ rows: Int, _ from: Int, _ column: Int, intoTile isLast: Bool) {
    for half in stride(from: column, to: min(column + Strip.width, factor.columns), by: 16) {
      let sums = fewRows + half * rows
      FewRows.add(
        left, rows: rows, from: from, count: min(FewRows.depthAtOnce, factor.depth - from),
        weights: factor.matrixInPlace! + (from * factor.columns + half), stride: factor.columns,
        to: sums, into: isLast ? tile + (half - column) : sums, apart: isLast ? Strip.width : 16)
    }
  }

  /// Makes the tile of one panel with the packed strip, asking meanwhile for a share of the next one.
  @inline(__always)
  fileprivate func multiply(_ row: Int, _ high: Int, prefetching next: Int, _ panel: Int, _ panels: Int) {
    factor.prefetch(next, part: panel, of: panels)
    Tiles.product(panel: left.panel(row), high: high, strip: strip, depth: factor.depth, into: tile)
  }
}
