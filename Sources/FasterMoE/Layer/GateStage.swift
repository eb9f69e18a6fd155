/// From tokens to choices, and from the gradients of the weights back to tokens and gate.
extension PassContext {
  /// Logits, choices and weights of all tokens, by tasks of `gateRows` tokens.
  func chooseExperts() {
    let (d, experts) = (shape.model, shape.experts)
    while case let task = team.take(), let rows = gateRows(task) {
      desk.tokens.fill(rows: rows.count) { tokens + (rows.lowerBound + $0) * d }
      let scores = product(desk.tokens, Factor(transposing: layer.values.gate, depth: d, columns: experts))
      forEachTile(rows.count, scores) { column, first, high, tile, _ in
        store.logits.put(tile, high: high, row: rows.lowerBound + first, column: column)
      }
      let sums = layer.losses.needProbabilities ? store.probabilitySums + task * Panels.padded(experts) : nil
      sums?.update(repeating: 0, count: Panels.padded(experts))
      var squares = 0.0
      for token in rows { choose(token, addingProbabilitiesTo: sums, squares: &squares) }
      if layer.losses.needProbabilities { store.squareSums[task] = squares }
    }
  }

  private func choose(_ token: Int, addingProbabilitiesTo sums: UnsafeMutablePointer<Float>?, squares: inout Double) {
    let (k, experts) = (shape.choices, shape.experts)
    let choices = store.routing.choices + token * k
    let weights = store.routing.weights + token * k
    readLogits(token)
    if k == 1 || sums != nil {
      let logSum = TopK.softmax(desk.logits, experts: experts, into: desk.probabilities)
      squares += Double(logSum) * Double(logSum)
    }
    if let sums {
      for block in stride(from: 0, to: Panels.padded(experts), by: 16) {
        sums.store(sums.vector(at: block) + desk.probabilities.vector(at: block), at: block)
      }
    }
    TopK.choose(desk.logits, experts: experts, choices: k, into: choices)
    if k == 1 {
      weights[0] = desk.probabilities[Int(choices[0])]
    } else {
      readLogits(token)
      for choice in 0..<k { weights[choice] = desk.logits[Int(choices[choice])] }
      TopK.softmaxOfChosen(weights, choices: k)
    }
  }

  /// grad_tokens = what came back from the experts + what goes through the gate; adds the gate's gradient.
  func backwardThroughGate(into gradTokens: UnsafeMutablePointer<Float>) {
    let (d, experts) = (shape.model, shape.experts)
    while case let task = team.take(), let rows = gateRows(task) {
      for token in rows { backwardThroughChoice(token) }
      let gate = Factor(layer.values.gate, depth: experts, columns: d)
      forEachTile(rows.count, product(store.logits.from(rows.lowerBound), gate)) { column, first, high, tile, _ in
        for row in first + Panels.height..<max(first + Panels.height, min(first + 2 * Panels.height, rows.count)) {
          prefetchRows(rows.lowerBound + row, column, min(Strip.width, d - column))
        }
        for i in 0..<high {
          let token = rows.lowerBound + first + i
          for block in stride(from: column, to: min(column + Strip.width, d), by: 16) {
            let width = min(16, d - block)
            let sum = sumOfRows(token, block, width, weighted: false)
            gradTokens.store(
              sum + tile.vector(at: i * Strip.width + block - column), at: token * d + block, first: width)
          }
        }
      }
    }
    team.barrier()
    // Each task takes some columns of the gate's gradient and sums over all tokens, gateRows at a time.
    while case let column = team.take() * Workspace.gateColumns, column < d {
      let columns = Panels(desk.columns.base, width: min(Workspace.gateColumns, d - column))
      var task = 0
      while let rows = gateRows(task) {
        columns.fill(rows: rows.count) { tokens + (rows.lowerBound + $0) * d + column }
        addOuter(
          store.logits.from(rows.lowerBound), 0..<experts, columns, rows: rows.count, times: 1,
          to: layer.gradients.gate + column, stride: d)
        task += 1
      }
    }
  }

  /// The gradient in one token's logits, in their place.
  private func backwardThroughChoice(_ token: Int) {
    let (k, experts) = (shape.choices, shape.experts)
    var logSum: Float = 0
    if k == 1 || layer.losses.needProbabilities {
      readLogits(token)
      logSum = TopK.softmax(desk.logits, experts: experts, into: desk.probabilities)
    }
    desk.gradLogits.update(repeating: 0, count: Panels.padded(experts))
    TopK.backward(
      choices: store.routing.choices + token * k, weights: store.routing.weights + token * k,
      gradWeights: store.gradWeights + token * k, choices: k, probabilities: desk.probabilities, experts: experts,
      addingTo: desk.gradLogits)
    if layer.losses.needProbabilities {
      layer.losses.backward(
        probabilities: desk.probabilities, logSum: logSum, shares: store.shares, experts: experts, tokens: count,
        addingTo: desk.gradLogits)
    }
    forEachBlock(of: token) { to, block in to.store(desk.gradLogits.vector(at: block)) }
  }

  /// One token's logits side by side, -∞ behind the last expert.
  private func readLogits(_ token: Int) {
    forEachBlock(of: token) { from, block in desk.logits.store(from.vector(), at: block) }
    for expert in shape.experts..<Panels.padded(shape.experts) { desk.logits[expert] = -.infinity }
  }

  /// The 16-expert blocks of one token's logits: where each stands, and its first expert.
  @inline(__always)
  private func forEachBlock(of token: Int, _ body: (UnsafeMutablePointer<Float>, Int) -> Void) {
    let first = token / Panels.height * Panels.height
    let step = min(Panels.height, count - first) * Panels.lanes
    var at = store.logits.panel(first) + (token - first) * Panels.lanes
    for block in 0..<store.logits.blocks {
      body(at, block * Panels.lanes)
      at += step
    }
  }

  private func gateRows(_ task: Int) -> Range<Int>? {
    let first = task * Workspace.gateRows
    return first < count ? first..<min(first + Workspace.gateRows, count) : nil
  }
}

extension Panels {
  /// Puts a tile of `product` in place: `high` rows from `row` on, a panel's, and 32 columns from `column` on.
  @inline(__always)
  func put(_ tile: UnsafePointer<Float>, high: Int, row: Int, column: Int) {
    for half in 0..<2 where column / 16 + half < blocks {
      let to = panel(row) + (column / 16 + half) * high * 16
      for i in 0..<high { to.store(tile.vector(at: i * Strip.width + half * 16), at: i * 16) }
    }
  }
}
