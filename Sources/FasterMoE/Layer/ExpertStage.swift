import CHints
import Synchronization

/// What backward does with some blocks.
enum Turn {
  case rows(Range<Int>)
  case weights(Range<Int>)
  /// Each block's weight gradients `lag` blocks behind its rows', while what they need is in the caches.
  case both(Range<Int>)

  func tasks(_ rowTasks: Int, _ weightTasks: Int, lag: Int) -> Int {
    switch self {
    case .rows(let blocks): blocks.count * rowTasks
    case .weights(let blocks): blocks.count * weightTasks
    case .both(let blocks): blocks.isEmpty ? 0 : (blocks.count + lag) * (rowTasks + weightTasks)
    }
  }
}

/// The experts' work: rows in, rows out, and the same way back.
extension PassContext {
  // MARK: Forward

  /// Every row through its expert, each as soon as it is here.
  func forward(blocks: Int) {
    let cut = Cut(blocks: blocks, threads: team.threads)
    // A task begins where the one before it ended, unless the thread had to wait.
    var ready = Seconds.now
    while case let task = team.take(), task < blocks * cut.forwardTasks {
      let index = task / cut.forwardTasks
      let block = inbox.blocks[index]
      let (stage, part) = (task % cut.forwardTasks).quotientAndRemainder(dividingBy: cut.parts)
      if cut.isByColumns(block) {
        if stage == 1 { wait(for: inbox.rowTasksDone + index, cut.parts, &ready) }
        let rows = 0..<Int(block.rows)
        if stage == 0 {
          makeColumns(index, cut.columns(shape.hidden, part), rows: 0, .experts, &ready) {
            inward(block, rows, $0, writesPast: false)
          }
        } else {
          makeColumns(index, cut.columns(shape.model, part), rows: part == 0 ? rows.count : 0, .experts, &ready) {
            outward(block, rows, $0, again: true)
          }
        }
      } else if stage == 0 {
        makeRows(index, cut.rows(block, part), .experts, &ready) {
          inward(block, $0, 0..<shape.hidden, writesPast: inbox.innerIsFar)
          outward(block, $0, 0..<shape.model, again: false)
        }
      }
      inbox.rowTasksDone[index].wrappingAdd(1, ordering: .releasing)
    }
  }

  /// Some hidden units of some rows of a block, whose pre-activations may be written past the caches.
  private func inward(_ block: Block, _ rows: Range<Int>, _ units: Range<Int>, writesPast: Bool) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(block)
    let slot = workspace.slot(thread, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    slot.tokens.fill(rows: rows.count) { tokenRow(first + $0) }
    let inward = product(slot.tokens, Factor(transposing: expert.inward, depth: d, columns: h))
    let linear = expert.inwardLinear.map { secondProduct(slot.tokens, Factor(transposing: $0, depth: d, columns: h)) }
    Product.forEachTile(
      rows.count, in: units, by: forwardKernel(block, rows, inward), inward, linear,
      ahead: { column, row, high in askForUnits(column, high, first, row, slot, inner: !writesPast) }
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
  private func outward(_ block: Block, _ rows: Range<Int>, _ columns: Range<Int>, again: Bool) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(block)
    let slot = workspace.slot(thread, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    if again { activateAgain(first, rows.count, into: slot.hidden) }
    let outward = product(slot.hidden, Factor(transposing: expert.outward, depth: h, columns: d))
    Product.forEachTile(
      rows.count, in: columns, by: forwardKernel(block, rows, outward), outward,
      ahead: { column, row, high in askForRows(first + row, high, column) }
    ) {
      column, row, high, tile, _ in
      storeRows(tile, first + row, high, column, bias: expert.outwardBias, adding: nil, weighted: store.isDirect)
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

  /// Gradients of rows, weights and routing weights, in the order of `turns`.
  ///
  /// Tasks are taken in one order, so whoever waits, waits for a task already under way or for rows that are on their way
  /// here.
  func backward(blocks: Int, _ turns: [Turn]) {
    let cut = Cut(blocks: blocks, threads: team.threads)
    let rowTasks = cut.backwardTasks
    let weightTasks = PassContext.weightTasks(shape)
    var (turn, first) = (0, 0)
    var ready = Seconds.now
    while turn < turns.count {
      let task = team.take()
      while turn < turns.count, task >= first + turns[turn].tasks(rowTasks, weightTasks, lag: workspace.lag) {
        first += turns[turn].tasks(rowTasks, weightTasks, lag: workspace.lag)
        turn += 1
      }
      guard turn < turns.count else { return }
      switch turns[turn] {
      case .rows(let blocks):
        makeRowGradients(blocks.lowerBound + (task - first) / rowTasks, (task - first) % rowTasks, cut, &ready)
      case .weights(let blocks):
        let block = blocks.lowerBound + (task - first) / weightTasks
        makeWeightGradients(block, (task - first) % weightTasks, of: weightTasks, rowTasks, &ready)
      case .both(let blocks):
        let (round, part) = (task - first).quotientAndRemainder(dividingBy: rowTasks + weightTasks)
        if part < rowTasks {
          guard round < blocks.count else { continue }
          // The slot's block before this one must have left it.
          if round > workspace.lag {
            wait(for: inbox.weightTasksDone + (round - workspace.lag - 1), weightTasks, &ready)
          }
          makeRowGradients(round, part, cut, &ready)
        } else if round >= workspace.lag {
          makeWeightGradients(round - workspace.lag, part - rowTasks, of: weightTasks, rowTasks, &ready)
        }
      }
    }
  }

  private func makeRowGradients(_ index: Int, _ task: Int, _ cut: Cut, _ ready: inout Seconds) {
    let block = inbox.blocks[index]
    let all = 0..<Int(block.rows)
    let (stage, part) = task.quotientAndRemainder(dividingBy: cut.parts)
    if cut.isByColumns(block) {
      if stage > 0 { wait(for: inbox.rowTasksDone + index, stage * cut.parts, &ready) }
      switch stage {
      case 0:
        makeColumns(index, cut.columns(shape.hidden, part), rows: 0, .expertGrads, &ready) {
          // One keeps what the block's tasks share, the others read past it.
          let grads = part == 0 ? workspace.slot(index, row: Int(block.row)).grads : desk.tokens
          if part == 0 { keepRows(index, all) } else { grads.fill(rows: all.count) { gradRow(Int(block.row) + $0) } }
          activationGradients(index, all, grads, $0) { place, _ in place.keepTile() }
        }
      case 1: makeRows(index, cut.singleRows(block, part), .expertGrads, &ready) { deactivate(index, $0) }
      default:
        makeColumns(index, cut.columns(shape.model, part), rows: 0, .expertGrads, &ready) {
          inputGradients(index, all, $0)
        }
      }
    } else if stage == 0 {
      makeRows(index, cut.rows(block, part), .expertGrads, &ready) { backward(index, $0) }
    }
    inbox.rowTasksDone[index].wrappingAdd(1, ordering: .releasing)
  }

  private func makeWeightGradients(_ index: Int, _ part: Int, of parts: Int, _ rowTasks: Int, _ ready: inout Seconds) {
    let block = inbox.blocks[index]
    wait(for: inbox.rowTasksDone + index, rowTasks, &ready)
    if block.previous >= 0 { wait(for: inbox.weightTasksDone + Int(block.previous), parts, &ready) }
    if journey.begin() {
      addWeightGradients(index, part)
      journey.isDone()
      ready = lane.addTask(.weightGrads, block: index, rows: Int(block.rows), from: ready)
    }
    inbox.weightTasksDone[index].wrappingAdd(1, ordering: .releasing)
  }

  /// Some rows of a block backwards: gradients of their pre-activations, inputs and routing weights.
  private func backward(_ index: Int, _ rows: Range<Int>) {
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
  private func keepRows(_ index: Int, _ rows: Range<Int>) {
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
  private func activationGradients(
    _ index: Int, _ rows: Range<Int>, _ grads: Panels, _ units: Range<Int>, _ body: (HiddenTile, _ row: Int) -> Void
  ) {
    let block = inbox.blocks[index]
    let slot = workspace.slot(index, row: Int(block.row))
    let outward = product(grads, Factor(values(block).outward, depth: shape.model, columns: shape.hidden))
    Product.forEachTile(
      rows.count, in: units, by: backwardKernel(rows, outward), outward,
      ahead: { column, row, high in
        askForUnits(column, high, Int(block.row), rows.lowerBound + row, slot, inner: true)
      }
    ) {
      column, row, high, tile, _ in
      let row = rows.lowerBound + row
      body(hiddenTile(tile, tile, column, high, Int(block.row), row, slot), row)
    }
  }

  /// Asks for what a tile of hidden units will touch.
  @inline(__always)
  private func askForUnits(
    _ column: Int, _ high: Int, _ first: Int, _ row: Int, _ slot: Workspace.Slot, inner: Bool
  ) {
    let tile = desk.first.tile
    hiddenTile(tile, tile, column, high, first, row, slot).askForUnits(
      isGated: shape.activation.isGated, inner: inner)
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
  private func deactivate(_ index: Int, _ rows: Range<Int>) {
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
  private func inputGradients(_ index: Int, _ rows: Range<Int>, _ columns: Range<Int>) {
    let (d, h) = (shape.model, shape.hidden)
    let expert = values(inbox.blocks[index])
    let first = Int(inbox.blocks[index].row) + rows.lowerBound
    let inward = product(inbox.inner.from(first), Factor(expert.inward, depth: h, columns: d))
    let linear = expert.inwardLinear.map {
      secondProduct(inbox.innerLinear.from(first), Factor($0, depth: h, columns: d))
    }
    Product.forEachTile(
      rows.count, in: columns, by: backwardKernel(rows, inward), inward, linear,
      ahead: { column, row, high in askForRows(first + row, high, column) }
    ) {
      column, row, high, tile, linearTile in
      storeRows(
        tile, first + row, high, column, bias: nil, adding: linear.map { _ in linearTile },
        weighted: false)
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
  private func addWeightGradients(_ index: Int, _ part: Int) {
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

  // MARK: Tasks

  /// A task for some rows of a block, once they are here.
  @inline(__always)
  private func makeRows(
    _ index: Int, _ rows: Range<Int>, _ kind: Recording.Kind, _ ready: inout Seconds, _ work: (Range<Int>) -> Void
  ) {
    guard !rows.isEmpty, journey.wait(team, for: inbox.blocks[index], rows, &ready) else { return }
    work(rows)
    journey.isDone()
    ready = lane.addTask(kind, block: index, rows: rows.count, from: ready)
  }

  /// A task for some columns of all rows of a block, as which `rows` count in what is recorded.
  @inline(__always)
  private func makeColumns(
    _ index: Int, _ columns: Range<Int>, rows: Int, _ kind: Recording.Kind, _ ready: inout Seconds,
    _ work: (Range<Int>) -> Void
  ) {
    let block = inbox.blocks[index]
    guard !columns.isEmpty, journey.wait(team, for: block, 0..<Int(block.rows), &ready) else { return }
    work(columns)
    journey.isDone()
    ready = lane.addTask(kind, block: index, rows: rows, from: ready)
  }

  /// `ready` is set to now if the thread had to wait.
  private func wait(for done: UnsafeMutablePointer<Atomic<Int>>, _ tasks: Int, _ ready: inout Seconds) {
    if team.wait(until: { done.pointee.load(ordering: .acquiring) >= tasks }) { ready = .now }
  }
}
