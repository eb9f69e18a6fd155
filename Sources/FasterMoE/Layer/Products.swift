import CHints

/// What the stages are made of: products, sums over rows, and rows summed for tokens.
extension PassContext {
  func product(_ left: Panels, _ factor: Factor) -> Product { Product(left, factor, on: desk.first) }
  /// Another product of the same size beside the first.
  func secondProduct(_ left: Panels, _ factor: Factor) -> Product { Product(left, factor, on: desk.second) }

  // MARK: Sums over rows

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

  /// Notes where the results of some rows go, once for all their columns, and what they are multiplied by if `weighted`.
  func findResults(_ first: Int, _ rows: Int, weighted: Bool) {
    for i in 0..<rows {
      let (source, row) = source(first + i)
      desk.results[i] = source.result(row)
      if weighted { desk.resultScales[i] = source.weight(row) }
    }
  }

  /// Writes a tile of `product` as rows of width d where they go, those from `row` on of the ones that were found, plus a bias
  /// or another tile; each times its token's weight if `weighted`.
  @inline(__always)
  func storeRows(
    _ tile: UnsafeMutablePointer<Float>, _ row: Int, _ high: Int, _ column: Int, bias: UnsafeMutablePointer<Float>?,
    adding second: UnsafeMutablePointer<Float>?, weighted: Bool
  ) {
    let (places, scales) = (desk.results + row, desk.resultScales + row)
    for half in stride(from: column, to: min(column + Strip.width, shape.model), by: 16) {
      let width = min(16, shape.model - half)
      let added = bias?.vector(at: half, first: width) ?? .zero
      for i in 0..<high {
        let at = i * Strip.width + half - column
        var sum = tile.vector(at: at) + (second?.vector(at: at) ?? added)
        if weighted { sum = sum.times(Vector(repeating: scales[i]), plus: Vector.zero) }
        places[i].store(sum, at: half, first: width)
      }
    }
  }

  /// Lists where such a tile will be written.
  @inline(__always)
  func listRows(_ row: Int, _ high: Int, _ column: Int, in asks: inout Asks) {
    let places = desk.results + row
    for half in stride(from: column, to: min(column + Strip.width, shape.model), by: 16) {
      for i in 0..<high { asks.write(places[i] + half) }
    }
  }

  /// Each token's rows, summed, where experts have not written that already: y_i = Σ_j s_ij · expert_ij(x_i) if `weighted`,
  /// grad_tokens of a pass that the caller routed if not.
  func combine(into sums: UnsafeMutablePointer<Float>, weighted: Bool) {
    if store.isDirect { return clearDropped(sums) }
    forEachToken { token in
      for column in stride(from: 0, to: shape.model, by: 16) {
        let width = min(16, shape.model - column)
        sums.store(sumOfRows(token, column, width, weighted: weighted), at: token * shape.model + column, first: width)
      }
    }
  }

  /// Zeroes what no expert has written: all that is left to do where results go directly to their tokens.
  func clearDropped(_ output: UnsafeMutablePointer<Float>) {
    let piece = 256
    while case let first = team.take() * piece, first < count {
      for token in first..<min(first + piece, count) where store.routing.rows[token] < 0 {
        (output + token * shape.model).update(repeating: 0, count: shape.model)
      }
    }
  }

  /// Σ_j of a token's rows in [R, d], in the order of its choices, each times its weight if `weighted`; 16 columns. Where
  /// results are direct its only row stands with the token, and has been weighted.
  @inline(__always)
  func sumOfRows(_ token: Int, _ column: Int, _ width: Int, weighted: Bool) -> Vector {
    assert(!(weighted && store.isDirect))
    var sum = Vector.zero
    for slot in token * shape.choices..<(token + 1) * shape.choices {
      let row = Int(store.routing.rows[slot])
      guard row >= 0 else { continue }
      let values = results.vector(at: (store.isDirect ? slot : row) * shape.model + column, first: width)
      if weighted { sum.addProduct(values, Vector(repeating: store.routing.weights[slot])) } else { sum += values }
    }
    return sum
  }

  /// Asks for some columns of a token's rows in [R, d], which stand wherever their experts' rows do, or with the token.
  @inline(__always)
  func prefetchRows(_ token: Int, _ column: Int, _ columns: Int) {
    for slot in token * shape.choices..<(token + 1) * shape.choices {
      let row = store.isDirect ? slot : Int(store.routing.rows[slot])
      if row >= 0 { Prefetch.read(results + column, stride: shape.model, rows: row..<row + 1, columns: columns) }
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
