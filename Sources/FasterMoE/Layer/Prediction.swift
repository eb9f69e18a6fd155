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
    // All at once, since each is slower while the others work.
    let rates = try peers.gathered(try probe.measure(for: isLinked ? budget * 0.4 : budget))
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

/// Passes in which rows travel while experts compute.
private final class OverlapProbe {
  static let mostSlowdown = 4.0
  private let layer: Layer
  private let memory: Region
  private let tokens, output, gradTokens: UnsafeMutablePointer<Float>
  private let choices: UnsafeMutablePointer<Int32>
  private let weights: UnsafeMutablePointer<Float>
  private let rows: Int
  /// What was sent, and how: of the latest step.
  private var traffic: Traffic
  private let counts: Region
  private var plan: Plan?

  /// Sizes with which messages take `seconds` and computing as long, as far as that goes.
  static func shape(of group: Group, on cluster: Cluster, seconds: Double) throws(Failure) -> (shape: Shape, rows: Int)
  {
    func shape(_ hidden: Int) throws(Failure) -> Shape {
      try Shape(model: 512, hidden: hidden, experts: 2 * group.size, choices: 1, activation: .geluTanh)
    }
    func roofline(_ hidden: Int, _ rows: Int) throws(Failure) -> Roofline {
      let region = try OverlapProbe.counts(group.size, rows)
      var arena = Arena(over: region.base)
      let traffic = OverlapProbe.even(rows, group.size, &arena)
      return Volumes(traffic, try shape(hidden), on: cluster).roofline
    }
    let (hidden, rows) = (512, 2048)
    let first = try roofline(hidden, rows)
    let scaled = first.busiestLink.value > 0 ? seconds / first.busiestLink.value : 1
    let used = max(128, min(4096, Int(Double(rows) * scaled))) / 64 * 64
    let second = try roofline(hidden, used)
    let wide = Double(hidden) * second.busiestLink.value / max(second.compute.value, 1e-9)
    return (try shape(max(64, min(4096, Int(wide) / 16 * 16))), used)
  }

  private static func counts(_ workers: Int, _ rows: Int) throws(Failure) -> Region {
    var size = Arena()
    _ = Traffic(arena: &size, workers: workers, experts: 2 * workers)
    return try Region(bytes: size.bytes, for: "the counts of a batch")
  }

  /// `rows` of each worker, as many to each expert but for a remainder.
  private static func even(_ rows: Int, _ workers: Int, _ arena: inout Arena) -> Traffic {
    let traffic = Traffic(arena: &arena, workers: workers, experts: 2 * workers)
    for worker in 0..<workers {
      for expert in 0..<2 * workers {
        let extra = expert < rows % (2 * workers) ? 1 : 0
        traffic.counts[worker * 2 * workers + expert] = UInt32(rows / (2 * workers) + extra)
      }
    }
    return traffic
  }

  init(_ layer: Layer, rows: Int) throws(Failure) {
    (self.layer, self.rows) = (layer, rows)
    let floats = rows * layer.shape.model
    memory = try Region(bytes: (3 * floats + 2 * rows) * MemoryLayout<Float>.stride, for: "measuring passes")
    counts = try OverlapProbe.counts(layer.group.size, rows)
    var arena = Arena(over: counts.base)
    traffic = OverlapProbe.even(rows, layer.group.size, &arena)
    arena = Arena(over: memory.base)
    (tokens, output, gradTokens) = (arena.take(floats), arena.take(floats), arena.take(floats))
    (choices, weights) = (arena.take(rows), arena.take(rows))
    for at in 0..<floats { tokens[at] = Float(at % 1009) / 1009 - 0.5 }
    for token in 0..<rows {
      choices[token] = Int32(token % layer.shape.experts)
      weights[token] = 1
    }
  }

  func step() throws(Failure) {
    let pass = try layer.route(tokens: tokens, count: rows, choices: choices, weights: weights)
    defer { pass.end() }
    _ = try pass.plan(wantsReport: false) {
      var request = PlanRequest()
      (request.shadowing, request.schedule, request.groupSize) = (.never, .pairwise, 1)
      return request
    }
    plan = pass.plan
    try pass.forward(output)
    try pass.backward(tokens, gradTokens: gradTokens, gradWeights: nil)
  }

  func predicted(on cluster: Cluster) -> Seconds {
    let forecast = Forecast(plan!, traffic, layer.shape, on: cluster, of: layer.group.rank)
    return forecast.forward.seconds + forecast.backward.seconds
  }
}
