extension Group {
  /// The group as numbers. All ranks call together; `refused` is why the caller knows already that it cannot be.
  package func cluster(refused: Failure? = nil) throws(Failure) -> Cluster {
    try agree(
      .clusterOfGroup,
      failure { () throws(Failure) in
        if let refused { throw refused }
        guard calibration != nil else {
          throw Failure(.stage, "nothing was measured yet: fmoe_group_calibrate comes first, or a profile")
        }
      })
    return try Cluster(Cluster.Document(places, calibration!))
  }
}

extension Group {
  /// Measures how fast the group is, for about `budget`, and has rank 0 write that to the profile. All ranks call it together.
  package func calibrate(for budget: Seconds) throws(Failure) {
    var tools: (Calibrator, TrainingProbe)?
    var own = failure { () throws(Failure) in
      guard budget.value > 0, budget.value.isFinite else {
        throw Failure(.argument, "seconds must be a positive finite number, not \(budget.value)")
      }
      tools = (try Calibrator(self), try TrainingProbe(self))
    }
    try agree(.calibrate, own, same: [budget.value.bitPattern, 0, 0, 0, 0, 0, 0, 0])
    let (calibrator, probe) = tools!
    let measured = try calibrator.measure(for: budget) { budget throws(Failure) in try probe.measure(for: budget) }
    own = failure { () throws(Failure) in try keep(measured) }
    try agree(.calibrate, own, from: .call)
    take(measured)
  }

  /// [W] how fast each worker trains, measured when first asked for: by all at once, since each is slower while the others
  /// work. All ranks call it together, in `call`.
  func rates(in call: Notice.Call) throws(Failure) -> [WorkerRates] {
    if let rates { return rates }
    var mine: ComputeRates?
    let own = failure { () throws(Failure) in mine = try TrainingProbe(self).measure(for: Seconds(0), least: 3) }
    try agree(call, own, from: .call)
    let all = try peers.gathered(mine!).map { WorkerRates($0) }
    rates = all
    return all
  }
}

/// Measures how fast a worker trains, with what it will do: whole passes through small layers.
///
/// Two layers have experts of one size but tokens of different widths: so what rows cost besides products shows.
private final class TrainingProbe {
  private let narrow: Layer
  private let wide: Layer
  private let memory: Region
  private let (tokens, output, gradTokens):
    (UnsafeMutablePointer<Float>, UnsafeMutablePointer<Float>, UnsafeMutablePointer<Float>)
  private let choices: UnsafeMutablePointer<Int32>
  private let weights: UnsafeMutablePointer<Float>

  /// Values of an expert's matrix are 2^17; there are as many experts as outgrow the second cache.
  private static let (narrowModel, wideModel, matrix, experts) = (256, 1024, 1 << 17, 16)
  /// Experts that take many rows.
  private static let few = 4

  /// Takes all the memory that measuring needs.
  init(_ group: Group) throws(Failure) {
    let alone = Group(alone: group)
    func layer(_ model: Int, _ experts: Int) throws(Failure) -> Layer {
      let shape = try Shape(
        model: model, hidden: TrainingProbe.matrix / model, experts: experts, choices: 1, activation: .geluTanh)
      return try Layer.together(alone) { Layer.Options(shape, seed: 1) }
    }
    narrow = try layer(TrainingProbe.narrowModel, TrainingProbe.experts)
    wide = try layer(TrainingProbe.wideModel, TrainingProbe.few)
    let rows = TrainingProbe.few * ComputeRates.sampledRows.last!
    let floats = max(
      rows * TrainingProbe.narrowModel, TrainingProbe.few * TrainingProbe.handledRows * TrainingProbe.wideModel)
    memory = try Region(
      bytes: (3 * floats + 2 * rows) * MemoryLayout<Float>.stride, for: "measuring the speed of training")
    var arena = Arena(over: memory.base)
    (tokens, output, gradTokens) = (arena.take(floats), arena.take(floats), arena.take(floats))
    (choices, weights) = (arena.take(rows), arena.take(rows))
    for at in 0..<floats { tokens[at] = Float(at % 1009) / 1009 - 0.5 }
    weights.update(repeating: 1, count: rows)
    // A worker that meets the layers' memory for the first time would be slow.
    for layer in [narrow, wide] {
      _ = try pass(layer, experts: layer.shape.experts, rows: 1)
    }
    _ = try pass(narrow, experts: TrainingProbe.few, rows: ComputeRates.sampledRows.last!)
  }

  /// Repeats all samples for about `budget`, but `least` times at least; one repeat takes about 0.1 s of one core.
  func measure(for budget: Seconds, least: Int = 1) throws(Failure) -> ComputeRates {
    let end = Seconds.now + budget
    let rows = ComputeRates.sampledRows
    var laps = Array(repeating: [Lap](), count: rows.count + 1)
    repeat {
      for (sample, rows) in rows.enumerated() {
        // Few rows take little time, and all experts to outgrow the caches.
        laps[sample].append(
          try pass(narrow, experts: rows > 100 ? TrainingProbe.few : TrainingProbe.experts, rows: rows))
      }
      laps[rows.count].append(try pass(wide, experts: TrainingProbe.few, rows: TrainingProbe.handledRows))
    } while Seconds.now < end || laps[0].count < least
    func middleOf(_ sample: Int) -> Lap {
      Lap(
        experts: laps[sample][0].experts, forward: middle(laps[sample].map(\.forward)),
        backward: middle(laps[sample].map(\.backward)))
    }
    // The same products, and rows that are wider.
    let (less, more) = (middleOf(rows.firstIndex(of: TrainingProbe.handledRows)!), middleOf(rows.count))
    let bytes = narrow.shape.rowBytes * Double(2 * TrainingProbe.few * TrainingProbe.handledRows)
    let slower = more.forward.value + more.backward.value - less.forward.value - less.backward.value
    let ratio = Double(TrainingProbe.wideModel) / Double(TrainingProbe.narrowModel) - 1
    let handling = bytes * ratio / Seconds(max(slower, 1e-9))

    var rates = ComputeRates(products: .zero, weightGrads: .zero, rowHandling: handling)
    for (sample, rows) in rows.enumerated() {
      let lap = middleOf(sample)
      let flops = narrow.shape.flops(rows: rows * lap.experts).value / 3
      let handled = (narrow.shape.rowBytes * Double(rows * lap.experts) / handling).value
      // Backward takes the rows as long as forward does, and the rest for weights. A disturbed clock may say otherwise.
      rates.products[sample] = flops / max(lap.forward.value - handled, lap.forward.value / 2)
      rates.weightGrads[sample] = flops / max(lap.backward.value - lap.forward.value, lap.backward.value / 4)
    }
    return rates
  }
  private static let handledRows = 192

  private struct Lap {
    let experts: Int
    let forward, backward: Seconds
  }

  private func pass(_ layer: Layer, experts: Int, rows: Int) throws(Failure) -> Lap {
    let count = experts * rows
    for token in 0..<count { choices[token] = Int32(token % experts) }
    let pass = try layer.route(tokens: tokens, count: count, choices: choices, weights: weights)
    defer { pass.end() }
    let start = Seconds.now
    try pass.forward(output)
    let between = Seconds.now
    try pass.backward(tokens, gradTokens: gradTokens, gradWeights: nil)
    return Lap(
      experts: experts, forward: Seconds(between.value - start.value),
      backward: Seconds(Seconds.now.value - between.value))
  }
}
