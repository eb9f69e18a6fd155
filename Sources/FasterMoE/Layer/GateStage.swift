/// From tokens to choices, and from the gradients of the weights back to tokens and gate.
extension PassContext {
  /// Whether anything is summed over tokens, for losses.
  private var needsSums: Bool { layer.losses.needProbabilities || varies }
  /// Whether the noisy gate has its loss.
  private var varies: Bool { noise != nil && layer.variation != 0 }

  /// Scores, choices and weights of all tokens, by tasks of `gateRows` tokens.
  func chooseExperts() {
    let (d, padded) = (shape.model, Panels.padded(shape.experts))
    while case let task = team.take(), let rows = gateRows(task) {
      desk.tokens.fill(rows: rows.count) { tokens + (rows.lowerBound + $0) * d }
      jitter?.apply(to: desk.tokens, rows: rows.count, token: firstToken + rows.lowerBound)
      let scores = product(desk.tokens, Factor(transposing: layer.values.gate, depth: d, columns: layer.columns))
      let kernel = Choices.transposed(rows: rows.count, scores.factor, threads: team.threads)
      Product.forEachTile(rows.count, in: 0..<layer.columns, by: kernel, scores) { column, first, high, tile, _ in
        store.logits.put(tile, high: high, row: rows.lowerBound + first, column: column)
      }
      let sums = needsSums ? store.taskSums + task * 2 * padded : nil
      sums?.update(repeating: 0, count: 2 * padded)
      var squares = 0.0
      for token in rows { choose(token, addingTo: sums, squares: &squares) }
      if needsSums { store.squareSums[task] = squares }
    }
  }

  private func choose(_ token: Int, addingTo sums: UnsafeMutablePointer<Float>?, squares: inout Double) {
    let (k, experts, padded) = (shape.choices, shape.experts, Panels.padded(shape.experts))
    let picks = store.routing.choices + token * k
    let weights = store.routing.weights + token * k
    readScores(token)
    if layer.losses.needProbabilities || layer.rule.weighing.needsProbabilities(choices: k) {
      let logSum = TopK.softmax(desk.scores, experts: experts, into: desk.probabilities)
      squares += Double(logSum) * Double(logSum)
    }
    choose(into: picks, weights)
    guard let sums else { return }
    if varies {
      for choice in 0..<k { sums[Int(picks[choice])] += weights[choice] }
      _ = desk.noise.findBars(desk.scores, picks, choices: k, rest: desk.logits)
      desk.noise.addLoad(to: sums + padded)
    } else {
      for block in stride(from: 0, to: padded, by: 16) {
        sums.store(sums.vector(at: block) + desk.probabilities.vector(at: block), at: block)
      }
    }
  }

  /// Chooses by the scores of the desk, and by the bias where there is one, and weighs; leaves the scores without those that were chosen in `logits`.
  private func choose(into picks: UnsafeMutablePointer<Int32>, _ weights: UnsafeMutablePointer<Float>) {
    let (k, experts) = (shape.choices, shape.experts)
    let padded = Panels.padded(experts)
    if let bias = store.bias {
      for block in stride(from: 0, to: padded, by: 16) {
        desk.logits.store(Bias.preference(desk.scores.vector(at: block), bias.vector(at: block)), at: block)
      }
      for expert in experts..<padded { desk.logits[expert] = -.infinity }
    } else {
      desk.logits.update(from: desk.scores, count: padded)
    }
    TopK.choose(desk.logits, experts: experts, choices: k, into: picks)
    layer.rule.weighing.weigh(
      picks, choices: k, logits: desk.scores, probabilities: desk.probabilities, into: weights)
  }

  /// grad_tokens = what came back from the experts + what goes through the gate.
  func backwardThroughGate(into gradTokens: UnsafeMutablePointer<Float>) {
    let d = shape.model
    while case let task = team.take(), let rows = gateRows(task) {
      for token in rows { backwardThroughChoice(token) }
      let gate = product(
        store.logits.from(rows.lowerBound), Factor(layer.values.gate, depth: layer.columns, columns: d))
      let kernel = Choices.straight(rows: rows.count, gate.factor, threads: team.threads)
      Product.forEachTile(rows.count, in: 0..<d, by: kernel, gate) { column, first, high, tile, _ in
        for row in first + Panels.height..<max(first + Panels.height, min(first + 2 * Panels.height, rows.count)) {
          prefetchRows(rows.lowerBound + row, column, min(Strip.width, d - column))
        }
        for i in 0..<high {
          let token = rows.lowerBound + first + i
          for block in stride(from: column, to: min(column + Strip.width, d), by: 16) {
            let width = min(16, d - block)
            let sum = sumOfRows(token, block, width, weighted: false)
            var throughGate = tile.vector(at: i * Strip.width + block - column)
            if let jitter { throughGate *= jitter.factors(firstToken + token, block) }
            gradTokens.store(sum + throughGate, at: token * d + block, first: width)
          }
        }
      }
    }
  }

  /// Adds the gate's gradient: each task takes some columns of it and sums over all tokens, gateRows at a time.
  func makeGateGradients() {
    let d = shape.model
    while case let column = team.take() * Workspace.gateColumns, column < d {
      let columns = Panels(desk.columns.base, width: min(Workspace.gateColumns, d - column))
      var task = 0
      while let rows = gateRows(task) {
        columns.fill(rows: rows.count) { tokens + (rows.lowerBound + $0) * d + column }
        jitter?.apply(to: columns, rows: rows.count, token: firstToken + rows.lowerBound, column: column)
        Outer.add(
          store.logits.from(rows.lowerBound), 0..<layer.columns, columns, rows: rows.count, times: 1,
          to: layer.gradients.gate + column, stride: d, writes: false,
          byRows: Choices.outerByRows(rows: rows.count, weights: layer.columns * d, threads: team.threads),
          on: desk.first)
        task += 1
      }
    }
  }

  /// The gradient in one token's scores, in their place.
  private func backwardThroughChoice(_ token: Int) {
    let (k, experts, weighing) = (shape.choices, shape.experts, layer.rule.weighing)
    let ds = store.gradWeights + token * k
    var (picks, weights) = (store.routing.choices + token * k, store.routing.weights + token * k)
    var logSum: Float = 0
    readScores(token)
    if layer.losses.needProbabilities || weighing.needsProbabilities(choices: k) {
      logSum = TopK.softmax(desk.scores, experts: experts, into: desk.probabilities)
    }
    if layer.rule.dropsWeighedChoices || varies {
      // What was dropped took part in the softmax: the same choices again as before anything was dropped.
      (picks, weights) = (desk.picks, desk.weights)
      choose(into: picks, weights)
    }
    desk.gradScores.update(repeating: 0, count: Panels.padded(layer.columns))
    if noise != nil && !varies { desk.noise.clearGradients() }
    if varies {
      let slopes = store.slopes
      for choice in 0..<k { ds[choice] += slopes[Int(picks[choice])] }
      let bars = desk.noise.findBars(desk.scores, picks, choices: k, rest: desk.logits)
      desk.noise.backwardLoad(
        slopes + Panels.padded(experts), picks, choices: k, bars: bars, addingTo: desk.gradScores)
    }
    weighing.backward(
      picks, choices: k, weights: weights, gradWeights: ds, probabilities: desk.probabilities, experts: experts,
      addingTo: desk.gradScores)
    if layer.losses.needProbabilities {
      layer.losses.backward(
        probabilities: desk.probabilities, logSum: logSum, shares: store.shares, experts: experts, tokens: count,
        addingTo: desk.gradScores)
    }
    if noise != nil { desk.noise.backward(desk.gradScores) }
    forEachBlock(of: token) { to, block in to.store(desk.gradScores.vector(at: block)) }
  }

  /// One token's scores side by side, noise included, -∞ behind the last expert.
  private func readScores(_ token: Int) {
    forEachBlock(of: token) { from, block in desk.scores.store(from.vector(), at: block) }
    if let noise { desk.noise.add(to: desk.scores, noise, token: firstToken + token) }
    for expert in shape.experts..<Panels.padded(shape.experts) { desk.scores[expert] = -.infinity }
  }

  /// The 16-expert blocks of one token's logits: where each stands, and its first expert.
  @inline(__always)
  private func forEachBlock(of token: Int, _ body: (UnsafeMutablePointer<Float>, Int) -> Void) {
    for block in 0..<store.logits.blocks {
      body(store.logits.block(block, row: token, of: count), block * Panels.lanes)
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
