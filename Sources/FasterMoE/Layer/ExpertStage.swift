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
    let parts = rowTasks(blocks)
    // A task begins where the one before it ended, unless the thread had to wait.
    var ready = Seconds.now
    while case let task = team.take(), task < blocks * parts {
      let block = inbox.blocks[task / parts]
      let rows = cut(block, task % parts, of: parts)
      if !rows.isEmpty, journey.wait(team, for: block, rows, &ready) {
        forward(block, rows)
        journey.isDone()
        ready = lane.addTask(.experts, block: task / parts, rows: rows.count, from: ready)
      }
      inbox.rowTasksDone[task / parts].wrappingAdd(1, ordering: .releasing)
    }
  }

  /// y_i = Σ_j s_ij · expert_ij(x_i).
  func combine(into output: UnsafeMutablePointer<Float>) {
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
    let expert = values(block)
    let slot = workspace.slot(thread, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    slot.tokens.fill(rows: rows.count) { tokenRow(first + $0) }
    let inward = product(slot.tokens, Factor(transposing: expert.inward, depth: d, columns: h))
    let linear = expert.inwardLinear.map { secondProduct(slot.tokens, Factor(transposing: $0, depth: d, columns: h)) }
    forEachTile(rows.count, inward, linear) { column, row, high, tile, linearTile in
      let place = HiddenTile(
        tile: tile, linearTile: linearTile, column: column, high: high, inner: inbox.inner.panel(first + row),
        innerLinear: inbox.innerLinear.panel(first + row), hidden: slot.hidden.panel(row), blocks: slot.hidden.blocks)
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

  /// Gradients of rows, weights and routing weights, in the order of `turns`.
  ///
  /// Tasks are taken in one order, so whoever waits, waits for a task already under way or for rows that are on their way
  /// here.
  func backward(blocks: Int, _ turns: [Turn]) {
    let rowTasks = rowTasks(blocks)
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
        makeRowGradients(blocks.lowerBound + (task - first) / rowTasks, (task - first) % rowTasks, of: rowTasks, &ready)
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
          makeRowGradients(round, part, of: rowTasks, &ready)
        } else if round >= workspace.lag {
          makeWeightGradients(round - workspace.lag, part - rowTasks, of: weightTasks, rowTasks, &ready)
        }
      }
    }
  }

  private func makeRowGradients(_ index: Int, _ part: Int, of parts: Int, _ ready: inout Seconds) {
    let block = inbox.blocks[index]
    let rows = cut(block, part, of: parts)
    if !rows.isEmpty, journey.wait(team, for: block, rows, &ready) {
      backward(index, rows)
      journey.isDone()
      ready = lane.addTask(.expertGrads, block: index, rows: rows.count, from: ready)
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

  /// grad_tokens of a pass that the caller routed.
  func combineGrads(into gradTokens: UnsafeMutablePointer<Float>) {
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

  /// Some rows of a block backwards: gradients of their pre-activations, inputs and routing weights.
  private func backward(_ index: Int, _ rows: Range<Int>) {
    let (d, h) = (shape.model, shape.hidden)
    let block = inbox.blocks[index]
    let expert = values(block)
    let slot = workspace.slot(index, row: Int(block.row))
    let first = Int(block.row) + rows.lowerBound
    let scales = slot.scales + rows.lowerBound
    slot.tokens.from(rows.lowerBound).fill(rows: rows.count) { tokenRow(first + $0) }
    slot.grads.from(rows.lowerBound).fill(rows: rows.count) { gradRow(first + $0) }
    for row in 0..<rows.count {
      let (source, at) = source(first + row)
      scales[row] = source.weight(at)
    }
    desk.rowSums.update(repeating: 0, count: rows.count * 16)
    let outward = product(slot.grads.from(rows.lowerBound), Factor(expert.outward, depth: d, columns: h))
    forEachTile(rows.count, outward) { column, row, high, tile, _ in
      let place = HiddenTile(
        tile: tile, linearTile: tile, column: column, high: high, inner: inbox.inner.panel(first + row),
        innerLinear: inbox.innerLinear.panel(first + row), hidden: slot.hidden.panel(rows.lowerBound + row),
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
    let inward = product(inbox.inner.from(first), Factor(expert.inward, depth: h, columns: d))
    let linear = expert.inwardLinear.map {
      secondProduct(inbox.innerLinear.from(first), Factor($0, depth: h, columns: d))
    }
    forEachTile(rows.count, inward, linear) { column, row, high, tile, linearTile in
      storeRows(tile, first + row, high, column, bias: nil, adding: linear.map { _ in linearTile })
    }
    // ds = <dy, out> = <dy·W2, a> + <dy, b2>: the output row itself need not be kept.
    for row in 0..<rows.count {
      let (source, at) = source(first + row)
      var sum = desk.rowSums.vector(at: row * 16)
      if let bias = expert.outwardBias {
        let grad = source.grad(at)
        for column in stride(from: 0, to: d, by: 16) {
          let width = min(16, d - column)
          sum.addProduct(grad.vector(at: column, first: width), UnsafePointer(bias).vector(at: column, first: width))
        }
      }
      source.setGradWeight(at, sum.total)
    }
  }

  // MARK: Weight gradients

  /// Tasks that make one block's weight gradients; each takes `columnsPerTask` rows of one matrix.
  static func weightTasks(_ shape: Shape) -> Int {
    pieces(shape.model) + pieces(shape.hidden) * (shape.activation.isGated ? 2 : 1)
  }
  private static var columnsPerTask: Int { 128 }
  private static func pieces(_ width: Int) -> Int { (width + columnsPerTask - 1) / columnsPerTask }

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
    func range(_ piece: Int, _ width: Int) -> Range<Int> {
      piece * PassContext.columnsPerTask..<min(width, (piece + 1) * PassContext.columnsPerTask)
    }
    if part < PassContext.pieces(d) {
      let outputs = range(part, d)
      addOuter(slot.grads, outputs, slot.hidden, rows: rows, times: share, to: grads.outward, stride: h, writes)
      if let bias = grads.outwardBias {
        addSums(slot.grads, outputs, rows: rows, scales: slot.scales, times: share, to: bias, writes)
      }
    } else {
      let (matrix, piece) = (part - PassContext.pieces(d)).quotientAndRemainder(dividingBy: PassContext.pieces(h))
      let inner = (matrix == 0 ? inbox.inner : inbox.innerLinear).from(Int(block.row))
      let units = range(piece, h)
      addOuter(
        inner, units, slot.tokens, rows: rows, times: share, to: matrix == 0 ? grads.inward : grads.inwardLinear!,
        stride: d, writes)
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

  // MARK: Cutting the work

  /// Into how many tasks a block's rows are cut: few, since each task packs the expert's weights again.
  static func rowTasks(_ blocks: Int, threads: Int) -> Int {
    threads == 1 || blocks == 0 ? 1 : max(1, (8 * threads + blocks - 1) / blocks)
  }
  private func rowTasks(_ blocks: Int) -> Int { PassContext.rowTasks(blocks, threads: team.threads) }

  /// Rows of part `part` of `block`, whole panels except at its end.
  private func cut(_ block: Block, _ part: Int, of parts: Int) -> Range<Int> {
    let panels = Panels.count(Int(block.rows))
    let low = panels * part / parts * Panels.height
    let high = min(Int(block.rows), panels * (part + 1) / parts * Panels.height)
    return low..<max(low, high)
  }

  /// `ready` is set to now if the thread had to wait.
  private func wait(for done: UnsafeMutablePointer<Atomic<Int>>, _ tasks: Int, _ ready: inout Seconds) {
    if team.wait(until: { done.pointee.load(ordering: .acquiring) == tasks }) { ready = .now }
  }
}
