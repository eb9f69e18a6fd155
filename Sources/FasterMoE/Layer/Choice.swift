/// How a pass finds out which experts each token goes to, and what all workers have for them.
extension Pass {
  /// The layer's gate is to choose.
  func gate() {
    isGated = true
    if layer!.rule.limitsPlaces { awaited = layer!.awaited }
  }

  /// The caller has chosen.
  func route(_ choices: UnsafePointer<Int32>?, _ weights: UnsafePointer<Float>?) {
    defer { wasReady = .now }
    let slots = count * layer!.shape.choices
    if let choices, let weights {
      store.routing.choices.update(from: choices, count: slots)
      store.routing.weights.update(from: weights, count: slots)
    }
  }

  /// Lets the gate choose, tells all workers what this one has for each expert and hears it from them. It knows then how
  /// much its experts will have to do and how busy all experts are. `tokens` are those of each rank.
  func choose(number: Int, training: Int, tokens: (Int) -> Int) throws(Failure) {
    let (layer, shape, group) = (layer!, shape, group)
    recordMeeting(.meetTokens)
    (self.number, self.training) = (number, training)
    let rule: any Gate = isGated ? layer.rule : TopKGate()
    let desk = workspace.desk(0)
    store.crossings.update(from: layer.crossings, count: shape.experts)
    for expert in awaited ?? [] { store.crossings[expert] = 0 }
    let bias = isGated ? store.bias : nil
    if let bias { bias.update(from: layer.values.bias!, count: shape.experts) }
    random = RandomStream(seed: layer.seed, stream: Pass.firstStream + UInt64(training))
    firstToken = (0..<group.rank).reduce(0) { $0 + tokens($1) }
    let batch = GateBatch(
      tokens: count, choices: shape.choices, experts: shape.experts, rank: group.rank, workers: group.size,
      firstToken: firstToken, tokensOfAll: (0..<group.size).reduce(0) { $0 + tokens($1) }, isTraining: isTraining,
      random: random, scores: store.logits, picks: store.routing.choices, weights: store.routing.weights,
      bias: bias, crossings: store.crossings, levels: group.levels.count, measuredShare: measuredShare,
      told: store.told,
      numbers: rule.numbersTold(choices: shape.choices), loads: store.loads, scratch: store.scratch,
      logits: desk.logits, probabilities: desk.probabilities)
    if isGated { run(.gate, floats: floatsAtGate) }
    moved = rule.settle(batch)
    let varies = isGated && isTraining && layer.variation != 0
    if isGated && (varies || layer.losses.needProbabilities) { sumTasks() }
    if varies { VariationLoss.tell(store.expertSums, experts: shape.experts, batch.told(by: batch.rank)) }
    wasReady = .now
    func tell() throws(Failure) {
      try group.peers.gather(
        batch.told(by: group.rank), bytes: batch.numbers * shape.experts * MemoryLayout<UInt32>.stride,
        into: batch.told, from: .call)
    }
    try tell()
    recordMeeting(.meetCounts)
    store.shares.update(repeating: 0, count: Panels.padded(shape.experts))
    moved += rule.hear(batch, counts: store.traffic.counts, shares: store.shares)
    if rule.tellsAgain {
      batch.count(into: batch.told(by: group.rank))
      try tell()
      batch.takeCounts(store.traffic.counts)
    }
    store.routing.count(slots: count * shape.choices, experts: shape.experts)
    for worker in 0..<group.size where store.traffic.rows(at: worker) > Int(Int32.max) {
      throw Failure(
        .argument, "\(store.traffic.rows(at: worker)) rows for the experts of rank \(worker) do not fit 31 bits")
    }
    if varies {
      balanceLoss = VariationLoss.hear(batch, times: layer.variation, slopes: store.slopes)
    } else if isGated && count > 0 {
      balanceLoss = layer.losses.balanceLoss(
        shares: store.shares, sums: store.expertSums, experts: shape.experts, tokens: count)
    }
    recording.caller.add(isGated ? .gateCall : .routeCall, from: began)
  }

  /// Streams before are those of the parameters.
  private static let firstStream: UInt64 = 1 << 32
  /// What the gate's input is jittered by has streams of its own, behind those of 2^47 passes.
  static let firstJitter: UInt64 = 1 << 48

  /// Adds up what the gate's tasks have left of their tokens, in the order of tasks.
  private func sumTasks() {
    let (experts, padded) = (shape.experts, Panels.padded(shape.experts))
    store.expertSums.update(repeating: 0, count: 2 * experts)
    var squares = 0.0
    for task in 0..<Pass.gateTasks(count) {
      for kind in 0..<2 {
        for expert in 0..<experts {
          store.expertSums[kind * experts + expert] += Double(store.taskSums[(task * 2 + kind) * padded + expert])
        }
      }
      squares += store.squareSums[task]
    }
    if count > 0 { zLoss = layer!.losses.z * squares / Double(count) }
  }
}
