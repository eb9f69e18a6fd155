import CHints

/// The experts' work: rows in, rows out, and the same way back.
extension PassContext {
  // MARK: Forward

  /// Some hidden units of some rows of a block, whose pre-activations may be written past the caches.
  func inward(_ block: Block, _ rows: Range<Int>, _ units: Range<Int>, writesPast: Bool) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(block)
    let slot = workspace.slot(thread, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    slot.tokens.fill(rows: rows.count) { tokenRow(first + $0) }
    let inward = product(slot.tokens, Factor(transposing: expert.inward, depth: d, columns: h))
    let linear = expert.inwardLinear.map { secondProduct(slot.tokens, Factor(transposing: $0, depth: d, columns: h)) }
    Product.forEachTile(
      rows.count, in: units, by: forwardKernel(block, rows, inward), inward, linear,
      ahead: { column, row, high, asks in listUnits(column, high, first, row, slot, inner: !writesPast, in: &asks) }
    ) {
      column, row, high, tile, linearTile in
      var place = hiddenTile(tile, linearTile, column, high, first, row, slot)
      place.writesPast = writesPast
      switch shape.activation {
      case .gelu: place.activate(Gelu.self, bias: expert.inwardBias!, h)
      case .geluTanh: place.activate(GeluTanh.self, bias: expert.inwardBias!, h)
      case .relu: place.activate(Relu.self, bias: expert.inwardBias!, h)
      case .silu: place.activate(Silu.self, bias: expert.inwardBias!, h)
      case .swiglu: place.activateGated()
      }
    }
    if writesPast { hint_written_past() }
  }

  /// Some columns of the outputs of some rows of a block; hidden units are made `again` where other threads made some.
  func outward(_ block: Block, _ rows: Range<Int>, _ columns: Range<Int>, again: Bool) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(block)
    let slot = workspace.slot(thread, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    if again { activateAgain(first, rows.count, into: slot.hidden) }
    let outward = product(slot.hidden, Factor(transposing: expert.outward, depth: h, columns: d))
    findResults(first, rows.count, weighted: store.isDirect)
    Product.forEachTile(
      rows.count, in: columns, by: forwardKernel(block, rows, outward), outward,
      ahead: { column, row, high, asks in listRows(row, high, column, in: &asks) }
    ) {
      column, row, high, tile, _ in
      storeRows(tile, row, high, column, bias: expert.outwardBias, adding: nil, weighted: store.isDirect)
    }
  }

  /// Hidden units of some rows from what was kept of them.
  private func activateAgain(_ first: Int, _ rows: Int, into hidden: Panels) {
    let (inner, linear) = (inbox.inner.from(first).base, inbox.innerLinear.from(first).base)
    func activate<F: Nonlinearity>(_: F.Type) {
      for at in stride(from: 0, to: rows * hidden.blocks * 16, by: 16) {
        hidden.base.store(F.value(inner.vector(at: at)), at: at)
      }
    }
    switch shape.activation {
    case .gelu: activate(Gelu.self)
    case .geluTanh: activate(GeluTanh.self)
    case .relu: activate(Relu.self)
    case .silu: activate(Silu.self)
    case .swiglu:
      for at in stride(from: 0, to: rows * hidden.blocks * 16, by: 16) {
        hidden.base.store(Silu.value(inner.vector(at: at)) * linear.vector(at: at), at: at)
      }
    }
  }

  /// How to multiply rows of a block forward. Where its expert has very few in the whole step, that decides, for it is the
  /// same for all plans, workers and threads.
  private func forwardKernel(_ block: Block, _ rows: Range<Int>, _ product: Product) -> Product.Kernel {
    inbox.rowsInStep[Int(block.expert)] <= Dots.most
      ? .dots : Choices.transposed(rows: rows.count, product.factor, threads: team.threads)
  }

  // MARK: Backward

  /// Some rows of a block backwards: gradients of their pre-activations, inputs and routing weights.
  func backward(_ index: Int, _ rows: Range<Int>) {
    let slot = workspace.slot(index, row: Int(inbox.blocks[index].row))
    keepRows(index, rows)
    clearRowSums(rows)
    activationGradients(index, rows, slot.grads.from(rows.lowerBound), 0..<shape.hidden) { place, row in
      deactivate(place, slot.scales + row, row)
    }
    setGradWeights(index, rows)
    inputGradients(index, rows, 0..<shape.model)
  }

  /// What the gradients of weights need, too: x, dy and the routing weight of some rows; and <dy, b2>, while dy is near.
  func keepRows(_ index: Int, _ rows: Range<Int>) {
    let first = Int(inbox.blocks[index].row)
    let slot = workspace.slot(index, row: first)
    let bias = values(inbox.blocks[index]).outwardBias
    slot.tokens.from(rows.lowerBound).fill(rows: rows.count) { tokenRow(first + rows.lowerBound + $0) }
    slot.grads.from(rows.lowerBound).fill(rows: rows.count) { gradRow(first + rows.lowerBound + $0) }
    for row in rows {
      let (source, at) = source(first + row)
      slot.scales[row] = source.weight(at)
      slot.biasGrads[row] = bias.map { dot(source.grad(at), $0) } ?? 0
    }
  }

  private func clearRowSums(_ rows: Range<Int>) {
    (desk.rowSums + rows.lowerBound * 16).update(repeating: 0, count: rows.count * 16)
  }

  /// g = dy·W2 of some rows and hidden units, tile by tile.
  @inline(__always)
  func activationGradients(
    _ index: Int, _ rows: Range<Int>, _ grads: Panels, _ units: Range<Int>, _ body: (HiddenTile, _ row: Int) -> Void
  ) {
    let block = inbox.blocks[index]
    let slot = workspace.slot(index, row: Int(block.row))
    let outward = product(grads, Factor(values(block).outward, depth: shape.model, columns: shape.hidden))
    Product.forEachTile(
      rows.count, in: units, by: backwardKernel(rows, outward), outward,
      ahead: { column, row, high, asks in
        listUnits(column, high, Int(block.row), rows.lowerBound + row, slot, inner: true, in: &asks)
      }
    ) {
      column, row, high, tile, _ in
      let row = rows.lowerBound + row
      body(hiddenTile(tile, tile, column, high, Int(block.row), row, slot), row)
    }
  }

  /// Lists what a tile of hidden units will write.
  @inline(__always)
  private func listUnits(
    _ column: Int, _ high: Int, _ first: Int, _ row: Int, _ slot: Workspace.Slot, inner: Bool,
    in asks: inout Asks
  ) {
    let tile = desk.first.tile
    hiddenTile(tile, tile, column, high, first, row, slot).listUnits(
      isGated: shape.activation.isGated, inner: inner, in: &asks)
  }

  @inline(__always)
  private func hiddenTile(
    _ tile: UnsafeMutablePointer<Float>, _ linearTile: UnsafeMutablePointer<Float>, _ column: Int, _ high: Int,
    _ first: Int, _ row: Int, _ slot: Workspace.Slot
  ) -> HiddenTile {
    HiddenTile(
      tile: tile, linearTile: linearTile, column: column, high: high, inner: inbox.inner.panel(first + row),
      innerLinear: inbox.innerLinear.panel(first + row), hidden: slot.hidden.panel(row), blocks: slot.hidden.blocks)
  }

  private func deactivate(_ place: HiddenTile, _ scales: UnsafePointer<Float>, _ row: Int) {
    let sums = desk.rowSums + row * 16
    switch shape.activation {
    case .gelu: place.deactivate(Gelu.self, scales, sums)
    case .geluTanh: place.deactivate(GeluTanh.self, scales, sums)
    case .relu: place.deactivate(Relu.self, scales, sums)
    case .silu: place.deactivate(Silu.self, scales, sums)
    case .swiglu: place.deactivateGated(scales, sums)
    }
  }

  /// Some rows whose g stands in the place of their hidden units.
  func deactivate(_ index: Int, _ rows: Range<Int>) {
    let block = inbox.blocks[index]
    let slot = workspace.slot(index, row: Int(block.row))
    clearRowSums(rows)
    Panels.forEach(rows: Int(block.rows)) { row, high in
      let some = max(0, rows.lowerBound - row)..<max(0, rows.lowerBound - row, min(high, rows.upperBound - row))
      for column in stride(from: 0, to: some.isEmpty ? 0 : shape.hidden, by: Strip.width) {
        var place = hiddenTile(desk.first.tile, desk.first.tile, column, high, Int(block.row), row, slot)
        place.rows = some
        place.readHidden()
        deactivate(place, slot.scales + row, row)
      }
    }
    setGradWeights(index, rows)
  }

  /// dx = du·W1 of some rows, some of its columns.
  func inputGradients(_ index: Int, _ rows: Range<Int>, _ columns: Range<Int>) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(inbox.blocks[index])
    let first = Int(inbox.blocks[index].row) + rows.lowerBound
    let inward = product(inbox.inner.from(first), Factor(expert.inward, depth: h, columns: d))
    let linear = expert.inwardLinear.map {
      secondProduct(inbox.innerLinear.from(first), Factor($0, depth: h, columns: d))
    }
    findResults(first, rows.count, weighted: false)
    Product.forEachTile(
      rows.count, in: columns, by: backwardKernel(rows, inward), inward, linear,
      ahead: { column, row, high, asks in listRows(row, high, column, in: &asks) }
    ) {
      column, row, high, tile, linearTile in
      storeRows(tile, row, high, column, bias: nil, adding: linear.map { _ in linearTile }, weighted: false)
    }
  }

  private func backwardKernel(_ rows: Range<Int>, _ product: Product) -> Product.Kernel {
    Choices.straight(rows: rows.count, product.factor, threads: team.threads)
  }

  /// ds = <dy, out> = <dy·W2, a> + <dy, b2>: the output row itself need not be kept.
  private func setGradWeights(_ index: Int, _ rows: Range<Int>) {
    let block = inbox.blocks[index]
    let slot = workspace.slot(index, row: Int(block.row))
    for row in rows {
      let (source, at) = source(Int(block.row) + row)
      source.setGradWeight(at, desk.rowSums.vector(at: row * 16).total + slot.biasGrads[row])
    }
  }

  private func dot(_ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>) -> Float {
    var sum = Vector.zero
    for column in stride(from: 0, to: shape.model, by: 16) {
      let width = min(16, shape.model - column)
      sum.addProduct(a.vector(at: column, first: width), b.vector(at: column, first: width))
    }
    return sum.total
  }

  // MARK: Weight gradients

  /// Tasks that make one block's weight gradients; each takes `Outer.columnsAtOnce` rows of one matrix.
  static func weightTasks(_ shape: Shape) -> Int {
    pieces(shape.model) + pieces(shape.hidden) * (shape.activation.isGated ? 2 : 1)
  }
  private static func pieces(_ width: Int) -> Int { (width + Outer.columnsAtOnce - 1) / Outer.columnsAtOnce }

  /// One task's share of dW2 += dyᵀ·(s a), dW1 += duᵀ·x and the biases' sums, each over W: what adds up here are the
  /// losses of all workers, and a gradient is that of their mean.
  func addWeightGradients(_ index: Int, _ part: Int) {
    let (d, h) = (shape.model, shape.hidden)
    let block = inbox.blocks[index]
    let grads = grads(block)
    let share = 1 / Float(layer.group.size)
    let slot = workspace.slot(index, row: Int(block.row))
    let rows = Int(block.rows)
    let writes = writesGradients && block.previous < 0
    let byRows = Choices.outerByRows(rows: rows, weights: d * h, threads: team.threads)
    func range(_ piece: Int, _ width: Int) -> Range<Int> {
      piece * Outer.columnsAtOnce..<min(width, (piece + 1) * Outer.columnsAtOnce)
    }
    if part < PassContext.pieces(d) {
      let outputs = range(part, d)
      Outer.add(
        slot.grads, outputs, slot.hidden, rows: rows, times: share, to: grads.outward, stride: h, writes: writes,
        byRows: byRows, on: desk.first)
      if let bias = grads.outwardBias {
        addSums(slot.grads, outputs, rows: rows, scales: slot.scales, times: share, to: bias, writes)
      }
    } else {
      let (matrix, piece) = (part - PassContext.pieces(d)).quotientAndRemainder(dividingBy: PassContext.pieces(h))
      let inner = (matrix == 0 ? inbox.inner : inbox.innerLinear).from(Int(block.row))
      let units = range(piece, h)
      Outer.add(
        inner, units, slot.tokens, rows: rows, times: share, to: matrix == 0 ? grads.inward : grads.inwardLinear!,
        stride: d, writes: writes, byRows: byRows, on: desk.first)
      if let bias = grads.inwardBias { addSums(inner, units, rows: rows, scales: nil, times: share, to: bias, writes) }
    }
  }

  // MARK: Experts

  private func values(_ block: Block) -> ExpertTensors {
    let copy = Int(block.expert) - layer.owned.count
    return copy < 0 ? ExpertTensors(layer.values, Int(block.expert), shape) : inbox.copies[copy].values
  }

  private func grads(_ block: Block) -> ExpertTensors {
    let copy = Int(block.expert) - layer.owned.count
    return copy < 0 ? ExpertTensors(layer.gradients, Int(block.expert), shape) : inbox.copies[copy].grads
  }
}
