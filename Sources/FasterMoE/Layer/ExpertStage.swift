import Synchronization

/// The experts' work: rows in, rows out, and the same way back.
extension PassContext {
  // MARK: Forward

  /// y_i = Σ_j s_ij · expert_ij(x_i).
  func forward(blocks: Int, output: UnsafeMutablePointer<Float>) {
    let parts = rowTasks(blocks)
    while case let task = team.take(), task < blocks * parts {
      let block = store.blocks[task / parts]
      let rows = cut(block, task % parts, of: parts)
      if !rows.isEmpty { forward(block, rows) }
    }
    team.barrier()
    forEachToken { token in
      for column in stride(from: 0, to: shape.model, by: 16) {
        let width = min(16, shape.model - column)
        output.store(sumOfRows(token, column, width, weighted: true), at: token * shape.model + column, first: width)
      }
    }
  }

  /// Some rows of a block through its expert.
  private func forward(_ block: Block, _ rows: Range<Int>) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = layer.expert(block)
    let slot = workspace.slot(thread)
    let first = Int(block.row) + rows.lowerBound
    slot.tokens.fill(rows: rows.count) { tokens + token(ofRow: first + $0) * d }
    let inward = product(slot.tokens, Factor(transposing: expert.inward, depth: d, columns: h))
    let linear = expert.inwardLinear.map { secondProduct(slot.tokens, Factor(transposing: $0, depth: d, columns: h)) }
    forEachTile(rows.count, inward, linear) { column, row, high, tile, linearTile in
      let place = HiddenTile(
        tile: tile, linearTile: linearTile, column: column, high: high, inner: store.inner.panel(first + row),
        innerLinear: store.innerLinear.panel(first + row), hidden: slot.hidden.panel(row), blocks: slot.hidden.blocks)
      switch shape.activation {
      case .gelu: place.activate(Gelu.self, bias: expert.inwardBias!, h)
      case .geluTanh: place.activate(GeluTanh.self, bias: expert.inwardBias!, h)
      case .relu: place.activate(Relu.self, bias: expert.inwardBias!, h)
      case .silu: place.activate(Silu.self, bias: expert.inwardBias!, h)
      case .swiglu: place.activateGated()
      }
    }
    let outward = product(slot.hidden, Factor(transposing: expert.outward, depth: h, columns: d))
    forEachTile(rows.count, outward) { column, row, high, tile, _ in
      storeRows(tile, first + row, high, column, bias: expert.outwardBias, adding: nil)
    }
  }

  // MARK: Backward

  /// Gradients of rows, weights and routing weights; then grad_tokens, through the gate if it chose.
  ///
  /// Blocks go in order. Each has tasks that make its rows' gradients and, `ahead` blocks later, tasks that make its
  /// weights' gradients from them. Tasks are taken in one order, so whoever waits, waits for a task already under way.
  func backward(
    blocks: Int, gradOutput: UnsafePointer<Float>, gradTokens: UnsafeMutablePointer<Float>, throughGate: Bool
  ) {
    let rowTasks = rowTasks(blocks)
    let weightTasks = self.weightTasks
    let ahead = workspace.slots - 1
    let perBlock = rowTasks + weightTasks
    while case let task = team.take(), task < (blocks + ahead) * perBlock {
      let (round, part) = task.quotientAndRemainder(dividingBy: perBlock)
      if part < rowTasks {
        guard round < blocks else { continue }
        if round >= workspace.slots { wait(for: store.weightTasksDone + (round - workspace.slots), weightTasks) }
        let rows = cut(store.blocks[round], part, of: rowTasks)
        if !rows.isEmpty { backward(round, rows, gradOutput) }
        store.rowTasksDone[round].wrappingAdd(1, ordering: .releasing)
      } else {
        let index = round - ahead
        guard index >= 0 else { continue }
        let block = store.blocks[index]
        wait(for: store.rowTasksDone + index, rowTasks)
        if block.previous >= 0 { wait(for: store.weightTasksDone + Int(block.previous), weightTasks) }
        addWeightGradients(index, part - rowTasks)
        store.weightTasksDone[index].wrappingAdd(1, ordering: .releasing)
      }
    }
    team.barrier()
    if throughGate {
      backwardThroughGate(into: gradTokens)
    } else {
      forEachToken { token in
        for column in stride(from: 0, to: shape.model, by: 16) {
          let width = min(16, shape.model - column)
          gradTokens.store(
            sumOfRows(token, column, width, weighted: false), at: token * shape.model + column, first: width)
        }
        // Dropped slots have no row that would write theirs.
        for choice in 0..<shape.choices where store.routing.rows[token * shape.choices + choice] < 0 {
          store.gradWeights[token * shape.choices + choice] = 0
        }
      }
    }
  }

  /// Some rows of a block backwards: gradients of their pre-activations, inputs and routing weights.
  private func backward(_ index: Int, _ rows: Range<Int>, _ gradOutput: UnsafePointer<Float>) {
    let (d, h) = (shape.model, shape.hidden)
    let block = store.blocks[index]
    let expert = layer.expert(block)
    let slot = workspace.slot(index)
    let first = Int(block.row) + rows.lowerBound
    let scales = slot.scales + rows.lowerBound
    slot.tokens.from(rows.lowerBound).fill(rows: rows.count) { tokens + token(ofRow: first + $0) * d }
    slot.grads.from(rows.lowerBound).fill(rows: rows.count) { gradOutput + token(ofRow: first + $0) * d }
    for row in 0..<rows.count { scales[row] = store.routing.weights[Int(store.routing.slots[first + row])] }
    desk.rowSums.update(repeating: 0, count: rows.count * 16)
    let outward = product(slot.grads.from(rows.lowerBound), Factor(expert.outward, depth: d, columns: h))
    forEachTile(rows.count, outward) { column, row, high, tile, _ in
      let place = HiddenTile(
        tile: tile, linearTile: tile, column: column, high: high, inner: store.inner.panel(first + row),
        innerLinear: store.innerLinear.panel(first + row), hidden: slot.hidden.panel(rows.lowerBound + row),
        blocks: slot.hidden.blocks)
      let sums = desk.rowSums + row * 16
      switch shape.activation {
      case .gelu: place.deactivate(Gelu.self, scales + row, sums)
      case .geluTanh: place.deactivate(GeluTanh.self, scales + row, sums)
      case .relu: place.deactivate(Relu.self, scales + row, sums)
      case .silu: place.deactivate(Silu.self, scales + row, sums)
      case .swiglu: place.deactivateGated(scales + row, sums)
      }
    }
    let inward = product(store.inner.from(first), Factor(expert.inward, depth: h, columns: d))
    let linear = expert.inwardLinear.map {
      secondProduct(store.innerLinear.from(first), Factor($0, depth: h, columns: d))
    }
    forEachTile(rows.count, inward, linear) { column, row, high, tile, linearTile in
      storeRows(tile, first + row, high, column, bias: nil, adding: linear.map { _ in linearTile })
    }
    // ds = <dy, out> = <dy·W2, a> + <dy, b2>: the output row itself need not be kept.
    for row in 0..<rows.count {
      let slotOfRow = Int(store.routing.slots[first + row])
      var sum = desk.rowSums.vector(at: row * 16)
      if let bias = expert.outwardBias {
        let grad = gradOutput + token(ofRow: first + row) * d
        for column in stride(from: 0, to: d, by: 16) {
          let width = min(16, d - column)
          sum.addProduct(grad.vector(at: column, first: width), UnsafePointer(bias).vector(at: column, first: width))
        }
      }
      store.gradWeights[slotOfRow] = sum.sum()
    }
  }

  // MARK: Weight gradients

  /// Tasks that make one block's weight gradients; each takes `columnsPerTask` rows of one matrix.
  private var weightTasks: Int {
    pieces(shape.model) + pieces(shape.hidden) * (shape.activation.isGated ? 2 : 1)
  }
  private static var columnsPerTask: Int { 128 }
  private func pieces(_ width: Int) -> Int { (width + PassContext.columnsPerTask - 1) / PassContext.columnsPerTask }

  /// One task's share of dW2 += dyᵀ·(s a), dW1 += duᵀ·x and the biases' sums.
  private func addWeightGradients(_ index: Int, _ part: Int) {
    let (d, h) = (shape.model, shape.hidden)
    let block = store.blocks[index]
    let grads = layer.expertGradients(block)
    let slot = workspace.slot(index)
    let rows = Int(block.rows)
    func range(_ piece: Int, _ width: Int) -> Range<Int> {
      piece * PassContext.columnsPerTask..<min(width, (piece + 1) * PassContext.columnsPerTask)
    }
    if part < pieces(d) {
      let outputs = range(part, d)
      addOuter(slot.grads, outputs, slot.hidden, rows: rows, to: grads.outward, stride: h)
      if let bias = grads.outwardBias { addSums(slot.grads, outputs, rows: rows, scales: slot.scales, to: bias) }
    } else {
      let (matrix, piece) = (part - pieces(d)).quotientAndRemainder(dividingBy: pieces(h))
      let inner = (matrix == 0 ? store.inner : store.innerLinear).from(Int(block.row))
      let units = range(piece, h)
      addOuter(inner, units, slot.tokens, rows: rows, to: matrix == 0 ? grads.inward : grads.inwardLinear!, stride: d)
      if let bias = grads.inwardBias { addSums(inner, units, rows: rows, scales: nil, to: bias) }
    }
  }

  /// gradient [left width, stride] += leftᵀ·right over `rows`, for the columns of `left` in `range`.
  func addOuter(
    _ left: Panels, _ range: Range<Int>, _ right: Panels, rows: Int, to gradient: UnsafeMutablePointer<Float>,
    stride: Int
  ) {
    // The right blocks of one round stay in the first caches while the left columns stream by.
    var block = 0
    while block < right.blocks {
      let blocks = min(Tiles.outerBlocks, right.blocks - block)
      var column = range.lowerBound
      while column < range.upperBound {
        Prefetch.write(
          gradient + column * stride + block * 16, stride: stride,
          rows: min(Tiles.outerRows, range.upperBound - column),
          columns: blocks * 16)
        Tiles.outer(left, from: column, right, block: block, blocks: blocks, rows: rows, into: desk.tile)
        for i in 0..<min(Tiles.outerRows, range.upperBound - column) {
          let row = gradient + (column + i) * stride
          for j in 0..<blocks {
            let at = (block + j) * 16
            let width = min(16, right.width - at)
            let sum = row.vector(at: at, first: width) + desk.tile.vector(at: (i * blocks + j) * 16)
            row.store(sum, at: at, first: width)
          }
        }
        column += Tiles.outerRows
      }
      block += blocks
    }
  }

  /// sums [width] += Σ over `rows` of the columns in `range`, each row times its scale.
  private func addSums(
    _ panels: Panels, _ range: Range<Int>, rows: Int, scales: UnsafePointer<Float>?,
    to sums: UnsafeMutablePointer<Float>
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
      sums.store(sums.vector(at: column, first: width) + sum, at: column, first: width)
    }
  }

  // MARK: Rows

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

  /// Into how many tasks a block's rows are cut: few, since each task packs the expert's weights again.
  private func rowTasks(_ blocks: Int) -> Int {
    team.threads == 1 || blocks == 0 ? 1 : max(1, (4 * team.threads + blocks - 1) / blocks)
  }

  /// Rows of part `part` of `block`, whole panels except at its end.
  private func cut(_ block: Block, _ part: Int, of parts: Int) -> Range<Int> {
    let panels = Panels.count(Int(block.rows))
    let low = panels * part / parts * Panels.height
    let high = min(Int(block.rows), panels * (part + 1) / parts * Panels.height)
    return low..<max(low, high)
  }

  @inline(__always) private func token(ofRow row: Int) -> Int { Int(store.routing.slots[row]) / shape.choices }

  private func wait(for done: UnsafeMutablePointer<Atomic<Int>>, _ tasks: Int) {
    team.wait { done.pointee.load(ordering: .acquiring) == tasks }
  }

  /// Writes a tile of `product` as rows of [R, d], plus a bias or another tile.
  @inline(__always)
  private func storeRows(
    _ tile: UnsafeMutablePointer<Float>, _ first: Int, _ high: Int, _ column: Int, bias: UnsafeMutablePointer<Float>?,
    adding second: UnsafeMutablePointer<Float>?
  ) {
    for half in stride(from: column, to: min(column + Strip.width, shape.model), by: 16) {
      let width = min(16, shape.model - half)
      let added = bias?.vector(at: half, first: width) ?? .zero
      for i in 0..<high {
        let at = i * Strip.width + half - column
        let sum = tile.vector(at: at) + (second?.vector(at: at) ?? added)
        store.rows.store(sum, at: (first + i) * shape.model + half, first: width)
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
  private func forEachToken(_ body: (Int) -> Void) {
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

extension UnsafeMutablePointer<Float> {
  @inline(__always) func vector(at offset: Int, first count: Int) -> Vector {
    UnsafePointer(self).vector(at: offset, first: count)
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

  /// Makes the tile of one panel with the packed strip, asking meanwhile for a share of the next one.
  @inline(__always)
  fileprivate func multiply(_ row: Int, _ high: Int, prefetching next: Int, _ panel: Int, _ panels: Int) {
    factor.prefetch(next, part: panel, of: panels)
    Tiles.product(panel: left.panel(row), high: high, strip: strip, depth: factor.depth, into: tile)
  }
}

/// Where 32 columns of hidden units of one panel stand, before and after the activation.
private struct HiddenTile {
  let tile: UnsafeMutablePointer<Float>
  let linearTile: UnsafeMutablePointer<Float>
  let column: Int
  let high: Int
  let inner: UnsafeMutablePointer<Float>
  let innerLinear: UnsafeMutablePointer<Float>
  let hidden: UnsafeMutablePointer<Float>
  let blocks: Int

  /// Calls `body` with each 16-unit piece of each row: its place in the tile, in the panels, and its row.
  @inline(__always)
  private func forEach(_ body: (_ inTile: Int, _ inPanel: Int, _ row: Int) -> Void) {
    for half in 0..<2 where column / 16 + half < blocks {
      let block = (column / 16 + half) &* high &* 16
      for i in 0..<high { body(i &* Strip.width &+ half &* 16, block &+ i &* 16, i) }
    }
  }

  /// u = tile + b1 is kept, a = f(u) goes on.
  @inline(__always)
  func activate<F: Nonlinearity>(_: F.Type, bias: UnsafeMutablePointer<Float>, _ h: Int) {
    for half in 0..<2 where column / 16 + half < blocks {
      let added = bias.vector(at: column + half * 16, first: min(16, h - column - half * 16))
      let block = (column / 16 + half) &* high &* 16
      for i in 0..<high {
        let u = tile.vector(at: i &* Strip.width &+ half &* 16) + added
        inner.store(u, at: block &+ i &* 16)
        hidden.store(F.value(u), at: block &+ i &* 16)
      }
    }
  }

  /// a = silu(tile) ⊙ second tile.
  func activateGated() {
    forEach { at, panel, _ in
      let (u, v) = (tile.vector(at: at), linearTile.vector(at: at))
      inner.store(u, at: panel)
      innerLinear.store(v, at: panel)
      hidden.store(Silu.value(u) * v, at: panel)
    }
  }

  /// With g = dy·W2 in the tile: sums += g ⊙ a, hidden = s·a, du = s·g ⊙ f'(u) in the place of u.
  @inline(__always)
  func deactivate<F: Nonlinearity>(
    _: F.Type, _ scales: UnsafePointer<Float>, _ sums: UnsafeMutablePointer<Float>
  ) {
    forEach { at, panel, row in
      let g = tile.vector(at: at)
      let (a, slope) = F.valueAndSlope(inner.vector(at: panel))
      let s = Vector(repeating: scales[row])
      sums.store(sums.vector(at: row &* 16).addingProduct(g, a), at: row &* 16)
      hidden.store(a * s, at: panel)
      inner.store(g * s * slope, at: panel)
    }
  }

  func deactivateGated(_ scales: UnsafePointer<Float>, _ sums: UnsafeMutablePointer<Float>) {
    forEach { at, panel, row in
      let g = tile.vector(at: at)
      let (a, slope) = Silu.valueAndSlope(inner.vector(at: panel))
      let v = innerLinear.vector(at: panel)
      let s = Vector(repeating: scales[row])
      sums.store(sums.vector(at: row &* 16).addingProduct(g, a * v), at: row &* 16)
      hidden.store(a * v * s, at: panel)
      inner.store(g * s * v * slope, at: panel)
      innerLinear.store(g * s * a, at: panel)
    }
  }
}

/// One expert's tensors.
struct ExpertTensors {
  let inward, outward: UnsafeMutablePointer<Float>
  let inwardLinear, inwardBias, outwardBias: UnsafeMutablePointer<Float>?

  init(_ block: borrowing Parameters, _ expert: Int, _ shape: Shape) {
    let matrix = expert * shape.model * shape.hidden
    inward = block.inward + matrix
    outward = block.outward + matrix
    inwardLinear = block.inwardLinear.map { $0 + matrix }
    inwardBias = block.inwardBias.map { $0 + expert * shape.hidden }
    outwardBias = block.outwardBias.map { $0 + expert * shape.model }
  }
}

extension Layer {
  fileprivate func expert(_ block: Block) -> ExpertTensors { ExpertTensors(values, Int(block.expert), shape) }
  fileprivate func expertGradients(_ block: Block) -> ExpertTensors {
    ExpertTensors(gradients, Int(block.expert), shape)
  }
}
