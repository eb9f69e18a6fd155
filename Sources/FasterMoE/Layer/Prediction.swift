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
    let isLinked = !peers.shareMemory && size > 1
    let links = try calibrator.links(for: budget * 0.4)
    let rates = try rates(of: probe, for: isLinked ? budget * 0.4 : budget, in: .calibrate)
    func calibration(_ slowdown: Double) -> Calibration {
      Calibration(rates: rates, withinHosts: links.within, betweenHosts: links.between, messageSlowdown: slowdown)
    }
    let slowdown = isLinked ? try messageSlowdown(calibrator, calibration, for: budget * 0.2) : 1
    let measured = calibration(slowdown)
    own = failure { () throws(Failure) in try keep(measured) }
    try agree(.calibrate, own, from: .call)
    take(measured)
  }

  /// How many times longer messages take while workers compute: with what the prediction of passes comes true in which both
  /// take about as long. All ranks find the same.
  private func messageSlowdown(
    _ calibrator: Calibrator, _ calibration: (Double) -> Calibration, for budget: Seconds
  ) throws(Failure) -> Double {
    let unhindered = try Cluster(Cluster.Document(places, calibration(1)))
    var trial: (shape: Shape, rows: Int)?
    var own = failure { () throws(Failure) in
      trial = try OverlapProbe.shape(of: self, on: unhindered, seconds: min(0.1, budget.value / 6))
    }
    try agree(.calibrate, own, from: .call)
    var probe: OverlapProbe?
    let layer = try Layer.together(self) { Layer.Options(trial!.shape, seed: 1) }
    own = failure { () throws(Failure) in probe = try OverlapProbe(layer, rows: trial!.rows) }
    try agree(.calibrate, own, from: .call)
    try probe!.step()  // Memory that nobody has touched yet is slow.
    let measured = try calibrator.middleLap(budget, probe!.step)
    var (low, high) = (1.0, OverlapProbe.mostSlowdown)
    for _ in 0..<20 {
      let middle = (low + high) / 2
      let cluster = try Cluster(Cluster.Document(places, calibration(middle)))
      if probe!.predicted(on: cluster) < measured { low = middle } else { high = middle }
    }
    return low
  }

  /// [W] how fast each worker trains, measured when first asked for: by all at once, since each is slower while the others
  /// work. All ranks call it together, in `call`.
  func rates(in call: Notice.Call) throws(Failure) -> [WorkerRates] {
    if let rates { return rates }
    var probe: TrainingProbe?
    let own = failure { () throws(Failure) in probe = try TrainingProbe(self) }
    try agree(call, own, from: .call)
    let all = try rates(of: probe!, for: Seconds(0), least: 3, in: call).map { WorkerRates($0) }
    rates = all
    return all
  }

  /// [W] what each rank measures with its probe while all others do the same; fails on all or on none.
  private func rates(
    of probe: TrainingProbe, for budget: Seconds, least: Int = 1, in call: Notice.Call
  ) throws(Failure) -> [ComputeRates] {
    var mine: ComputeRates?
    let own = failure { () throws(Failure) in mine = try probe.measure(for: budget, least: least) }
    try agree(call, own, from: .call)
    return try peers.gathered(mine!)
  }
}

/// Tokens with one expert each, with room for what becomes of them: whole passes of a layer by `route`.
private struct ProbeBatch: ~Copyable {
  private let memory: Region
  private let tokens, output, gradTokens, weights: UnsafeMutablePointer<Float>
  private let choices: UnsafeMutablePointer<Int32>

  /// For `rows` tokens, and no more than `floats` numbers of them.
  init(rows: Int, floats: Int) throws(Failure) {
    memory = try Region(
      bytes: (3 * floats + 4 * rows) * MemoryLayout<Float>.stride + 5 * 64, for: "measuring the speed of training")
    var arena = Arena(over: memory.base)
    (tokens, output, gradTokens) = (arena.take(floats), arena.take(floats), arena.take(floats))
    (choices, weights) = (arena.take(2 * rows), arena.take(2 * rows))
    for at in 0..<floats { tokens[at] = Float(at % 1009) / 1009 - 0.5 }
    weights.update(repeating: 1, count: 2 * rows)
  }

  /// Takes `count` tokens through the layer, shared out evenly to its first `experts`. `plan` makes the plan; returns what
  /// forward and backward took.
  func pass(
    _ layer: Layer, experts: Int, count: Int, _ plan: (Pass) throws(Failure) -> Void = { _ in }
  ) throws(Failure) -> (forward: Seconds, backward: Seconds) {
    let k = layer.shape.choices
    choices.update(repeating: -1, count: k * count)
    for token in 0..<count { choices[k * token] = Int32(token % experts) }
    let pass = try layer.route(tokens: tokens, count: count, choices: choices, weights: weights)
    defer { pass.end() }
    try plan(pass)
    let start = Seconds.now
    try pass.forward(output)
    let between = Seconds.now
    try pass.backward(tokens, gradTokens: gradTokens, gradWeights: nil)
    return (Seconds(between.value - start.value), Seconds(Seconds.now.value - between.value))
  }
}

/// Measures how fast a worker trains, with what it will do: whole passes through small layers.
///
/// Two layers have experts of one size but tokens of different widths: so what rows cost besides products shows. Tokens have
/// a second choice, without an expert: with one choice alone rows would cost less here than between workers.
private final class TrainingProbe {
  private let narrow: Layer
  private let wide: Layer
  private let batch: ProbeBatch

  /// Values of an expert's matrix are 2^17; there are as many experts as outgrow the second cache.
  private static let (narrowModel, wideModel, matrix, experts) = (256, 1024, 1 << 17, 16)
  /// Experts that take many rows.
  private static let few = 4

  /// Takes all the memory that measuring needs.
  init(_ group: Group) throws(Failure) {
    let alone = Group(alone: group)
    func layer(_ model: Int, _ experts: Int) throws(Failure) -> Layer {
      let shape = try Shape(
        model: model, hidden: TrainingProbe.matrix / model, experts: experts, choices: 2, activation: .geluTanh)
      return try Layer.together(alone) { Layer.Options(shape, seed: 1) }
    }
    narrow = try layer(TrainingProbe.narrowModel, TrainingProbe.experts)
    wide = try layer(TrainingProbe.wideModel, TrainingProbe.few)
    let rows = TrainingProbe.few * ComputeRates.sampledRows.last!
    let wideRows = TrainingProbe.few * TrainingProbe.handledRows
    batch = try ProbeBatch(
      rows: rows, floats: max(rows * TrainingProbe.narrowModel, wideRows * TrainingProbe.wideModel))
    // A worker that meets the layers' memory for the first time would be slow.
    for (layer, experts, most) in [(narrow, TrainingProbe.experts, rows), (wide, TrainingProbe.few, wideRows)] {
      _ = try batch.pass(layer, experts: experts, count: experts)
      _ = try batch.pass(layer, experts: TrainingProbe.few, count: most)
    }
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
    let (forward, backward) = try batch.pass(layer, experts: experts, count: experts * rows)
    return Lap(experts: experts, forward: forward, backward: backward)
  }
}

/// Passes in which rows travel while experts compute.
private final class OverlapProbe {
  static let mostSlowdown = 4.0
  private let layer: Layer
  private let rows: Int
  private let batch: ProbeBatch
  private let traffic: EvenTraffic
  private var plan: Plan?

  /// `rows` of each worker, as many to each expert but for a remainder.
  private final class EvenTraffic {
    private let memory: Region
    let counts: Traffic

    init(_ rows: Int, workers: Int) throws(Failure) {
      let experts = OverlapProbe.expertsOfEach * workers
      var size = Arena()
      _ = Traffic(arena: &size, workers: workers, experts: experts)
      memory = try Region(bytes: size.bytes, for: "the counts of a batch")
      var arena = Arena(over: memory.base)
      counts = Traffic(arena: &arena, workers: workers, experts: experts)
      for place in 0..<workers * experts {
        counts.counts[place] = UInt32(rows / experts + (place % experts < rows % experts ? 1 : 0))
      }
    }
  }
  private static let (model, expertsOfEach) = (512, 2)

  /// Sizes with which messages take `seconds` and computing as long, as far as that goes.
  static func shape(of group: Group, on cluster: Cluster, seconds: Double) throws(Failure) -> (shape: Shape, rows: Int)
  {
    func shape(_ hidden: Int) throws(Failure) -> Shape {
      try Shape(model: model, hidden: hidden, experts: expertsOfEach * group.size, choices: 1, activation: .geluTanh)
    }
    func roofline(_ hidden: Int, _ rows: Int) throws(Failure) -> Roofline {
      let traffic = try EvenTraffic(rows, workers: group.size)
      return Volumes(traffic.counts, try shape(hidden), on: cluster).roofline
    }
    let (hidden, rows) = (512, 2048)
    let link = try roofline(hidden, rows).busiestLink.value
    let used = max(128, min(4096, link > 0 ? Int(Double(rows) * seconds / link) : rows)) / 64 * 64
    let roofline = try roofline(hidden, used)
    let wide = Double(hidden) * roofline.busiestLink.value / max(roofline.compute.value, 1e-9)
    return (try shape(max(64, min(4096, Int(wide) / 16 * 16))), used)
  }

  init(_ layer: Layer, rows: Int) throws(Failure) {
    (self.layer, self.rows) = (layer, rows)
    batch = try ProbeBatch(rows: rows, floats: rows * layer.shape.model)
    traffic = try EvenTraffic(rows, workers: layer.group.size)
  }

  func step() throws(Failure) {
    _ = try batch.pass(layer, experts: layer.shape.experts, count: rows) { pass throws(Failure) in
      _ = try pass.plan(wantsReport: false) {
        var request = PlanRequest()
        (request.shadowing, request.schedule, request.groupSize) = (.never, .pairwise, 1)
        return request
      }
      plan = pass.plan
    }
  }

  func predicted(on cluster: Cluster) -> Seconds {
    let forecast = Forecast(plan!, traffic.counts, layer.shape, on: cluster, of: layer.group.rank)
    return forecast.forward.seconds + forecast.backward.seconds
  }
}
