import Glibc

/// One worker's part of an MoE layer: the parameters and gradients of its experts and of the gate, and the passes that
/// batches make through it.
package final class Layer {
  package let group: Group
  package let shape: Shape
  package let rule: any Gate
  package let losses: RouterLosses
  /// The coefficient of the noisy gate's loss, which stands for its balance loss.
  let variation: Double
  /// Of the gate's matrix: E, or 2·E where it also learns the width of its noise.
  let columns: Int
  /// How far the gate's input is jittered in training; 0: not at all.
  let jitter: Float
  /// By how much the bias of each expert moves after a batch; 0: there is none.
  let biasStep: Float
  var hasBias: Bool { biasStep > 0 }
  let seed: UInt64
  /// Whether the gate does what it only does in training; equal on all ranks whenever they gate.
  package var isTraining = true
  /// The experts that will be shadowed in passes which the gate begins later, rising; equal on all ranks whenever they gate.
  /// Only a gate that limits what leaves a place asks for that: it counts them as local, so the passes must shadow them.
  private(set) var awaited: [Int] = []
  /// Whether predictions say which.
  private var awaitsPredicted = true
  /// [E] how many levels of the tree of places a row of this worker crosses on its way to each expert.
  let crossings: UnsafeMutablePointer<Int32>
  /// The experts that this worker owns.
  package let owned: Range<Int>
  /// The layer's number in its group, and that of its latest pass: equal on all ranks.
  let number: Int
  private var passes = 0
  /// How many of its passes were in training, by which the gate draws: equal on all ranks, too. So looking at other tokens in
  /// between changes no training.
  var trainings = 0
  let values: Parameters
  let gradients: Parameters
  /// From AdamW's first step on, or from a file that has them.
  var moments: Moments?
  private let zeroing: Zeroing
  /// Whether the experts' gradients are 0, whatever their memory holds: the next backward writes instead of adding.
  private var gradientsBegin = false
  /// Passes whose batch is done; their memory serves the next ones.
  private var idle: [Pass] = []

  package struct Options {
    package let shape: Shape
    package let gate: any Gate
    /// What else must be equal on all ranks for their gates to be.
    package let gateNumbers: SIMD4<UInt64>
    package let losses: RouterLosses
    package let jitter: Float
    package let biasStep: Float
    package let seed: UInt64

    package init(
      _ shape: Shape, gate: any Gate = TopKGate(), gateNumbers: SIMD4<UInt64> = .zero,
      losses: RouterLosses = RouterLosses(), jitter: Float = 0, biasStep: Float = 0, seed: UInt64
    ) {
      self.shape = shape
      self.gate = gate
      self.gateNumbers = gateNumbers
      self.losses = losses
      (self.jitter, self.biasStep) = (jitter, biasStep)
      self.seed = seed
    }

    var same: Notice.Same {
      let activation: UInt64 =
        switch shape.activation {
        case .gelu: 0
        case .geluTanh: 1
        case .relu: 2
        case .silu: 3
        case .swiglu: 4
        }
      func pair(_ high: Int, _ low: Int) -> UInt64 { UInt64(high) << 32 | UInt64(low) }
      return [
        pair(shape.model, shape.hidden), pair(shape.experts, shape.choices), activation << 32 | gateNumbers[0], seed,
        losses.balance.bitPattern, losses.z.bitPattern, gateNumbers[1],
        gateNumbers[2] ^ pair(Int(jitter.bitPattern), Int(biasStep.bitPattern)) ^ gateNumbers[3],
      ]
    }
  }

  /// Makes every rank's part of a layer; `options` may fail on one of them, which the others then hear of.
  package static func together(_ group: Group, _ options: () throws(Failure) -> Options) throws(Failure) -> Layer {
    var given: Options?
    var own = failure { () throws(Failure) in
      given = try options()
      guard given!.shape.experts % group.size == 0 else {
        throw Failure(.argument, "\(given!.shape.experts) experts cannot be shared equally by \(group.size) workers")
      }
    }
    try group.agree(.createLayer, own, same: given?.same ?? .init(repeating: 0))
    var made: Layer?
    own = failure { () throws(Failure) in made = try Layer(group, given!) }
    try group.agree(.createLayer, own, from: .call)
    group.layers += 1
    return made!
  }

  private init(_ group: Group, _ options: Options) throws(Failure) {
    self.group = group
    shape = options.shape
    rule = options.gate
    losses = RouterLosses(balance: rule.isNoisy ? 0 : options.losses.balance, z: options.losses.z)
    variation = rule.isNoisy ? options.losses.balance : 0
    columns = shape.experts * (rule.isNoisy ? 2 : 1)
    (jitter, biasStep) = (options.jitter, options.biasStep)
    seed = options.seed
    number = group.layers
    let each = shape.experts / group.size
    owned = group.rank * each..<(group.rank + 1) * each
    values = try Parameters(shape, columns: columns, owned: each, hasBias: options.biasStep > 0)
    gradients = try Parameters(shape, columns: columns, owned: each)
    zeroing = Zeroing(gradients.base, gradients.floats, group.team)
    crossings = .allocate(capacity: shape.experts)
    for expert in 0..<shape.experts { crossings[expert] = group.crossings(to: expert / each) }
    _ = try workspace()
    // What gate and reduceGradients need of it.
    try group.peers.reserve(
      bytes: rule.numbersTold(choices: shape.choices) * shape.experts * MemoryLayout<UInt32>.stride,
      values: columns * shape.model)
    for tensor in values.drawn(shape, owned: owned, seed: options.seed) {
      group.team.run(Drawing(tensor, group.team))
    }
  }

  /// The plan of a request that no prediction decides; in training it is the same one again and again.
  func unmeasured(_ request: PlanRequest, _ traffic: Traffic) -> Plan {
    let plan = Plan.unmeasured(request, traffic, again: lastUnmeasured)
    lastUnmeasured = plan
    return plan
  }
  private var lastUnmeasured: Plan?

  /// The group as numbers, if it was calibrated and has links; made once for each calibration.
  var cluster: Cluster? { get throws(Failure) { try known()?.cluster } }

  /// What the links between hosts say may leave one, if they were measured and those within hosts were too.
  var measuredShare: Double? { get throws(Failure) { try known()?.share } }

  private func known() throws(Failure) -> Known? {
    guard let calibration = group.calibration, !group.peers.shareMemory, group.size > 1 else { return nil }
    if latest?.calibration !== calibration {
      let cluster = try Cluster(Cluster.Document(group.places, calibration))
      latest = Known(
        calibration: calibration, cluster: cluster, share: calibration.betweenHosts == nil ? nil : cluster.remoteShare)
    }
    return latest
  }
  private var latest: Known?
  private struct Known {
    let calibration: Calibration
    let cluster: Cluster
    let share: Double?
  }

  deinit { crossings.deallocate() }

  /// Has the host say which experts will be shadowed, or with nil leaves it to predictions, anew.
  package func awaitShadows(_ shadows: [Int]?) throws(Failure) {
    guard rule.limitsPlaces else {
      throw Failure(.argument, "the layer's gate limits nothing, so it asks for no shadows before it chooses")
    }
    awaited = shadows ?? []
    awaitsPredicted = shadows == nil
  }

  /// Takes what was predicted best for a batch as what will be best for the next one.
  func awaitPredicted(_ shadows: [Int]) { if awaitsPredicted { awaited = shadows } }

  /// Whether predictions of the best shadows are of use.
  var wantsPredicted: Bool { rule.limitsPlaces && awaitsPredicted }

  /// Tensors by name, borrowed for the layer's life.
  package struct Tensors {
    package let gate: UnsafeMutablePointer<Float>
    package let inward, outward: UnsafeMutablePointer<Float>
    package let inwardLinear, inwardBias, outwardBias, noise, bias: UnsafeMutablePointer<Float>?
  }

  package var valueTensors: Tensors { Layer.tensors(values) }
  package var gradientTensors: Tensors {
    settleGradients()
    return Layer.tensors(gradients)
  }

  package func zeroGradients() {
    group.team.run(zeroing)
    gradientsBegin = false
  }

  /// As `zeroGradients`, but leaves the writing to the next backward.
  package func beginGradients() {
    gradients.gate.update(repeating: 0, count: columns * shape.model)
    gradientsBegin = true
  }

  /// Makes the memory of gradients hold what they are.
  func settleGradients() { if gradientsBegin { zeroGradients() } }

  /// Whether the backward that is about to run must write all gradients of experts; from then on they are there.
  func takeBegunGradients() -> Bool {
    defer { gradientsBegin = false }
    return gradientsBegin
  }

  /// Makes every gradient that of the mean over workers of their losses, which the experts' are from backward on.
  package func reduceGradients() throws(Failure) {
    try group.agree(.reduce, nil, same: [UInt64(number), 0, 0, 0, 0, 0, 0, 0])
    settleGradients()
    guard group.size > 1 else { return }
    let count = columns * shape.model
    try group.peers.sum(gradients.gate, count: count)
    let share = 1 / Float(group.size)
    for index in 0..<count { gradients.gate[index] *= share }
  }

  /// A pass for `tokens` [n, d] by the layer's gate; `refused` is why the caller knows already that it cannot be.
  package func gate(tokens: UnsafePointer<Float>?, count n: Int, refused: Failure? = nil) throws(Failure) -> Pass {
    try together(.gate, n) { () throws(Failure) in
      if let refused { throw refused }
      let pass = try begin(tokens, n)
      pass.gate()
      return pass
    }
  }

  /// A pass for `tokens` [n, d] by the caller's own choices and weights, both [n, k].
  package func route(
    tokens: UnsafePointer<Float>?, count n: Int, choices: UnsafePointer<Int32>?, weights: UnsafePointer<Float>?,
    refused: Failure? = nil
  ) throws(Failure) -> Pass {
    try together(.route, n) { () throws(Failure) in
      if let refused { throw refused }
      try check(choices, weights, n)
      let pass = try begin(tokens, n)
      pass.route(choices, weights)
      return pass
    }
  }

  /// Has all ranks begin a pass, choose and tell each other their counts, or none.
  private func together(_ call: Notice.Call, _ n: Int, _ begin: () throws(Failure) -> Pass) throws(Failure) -> Pass {
    var begun: Pass?
    let own = failure { () throws(Failure) in begun = try begin() }
    do throws(Failure) {
      let all = try group.agree(
        call, own,
        same: [UInt64(number), UInt64(passes), isTraining ? 1 : 0, PlanRequest.hash(of: awaited), 0, 0, 0, 0],
        words: Notice.Words(number: max(0, n)))
      passes += 1
      if isTraining { trainings += 1 }
      try begun!.choose(number: passes, training: trainings) { Int(all[$0].words.number) }
    } catch {
      begun?.end()
      throw error
    }
    return begun!
  }

  private func check(_ choices: UnsafePointer<Int32>?, _ weights: UnsafePointer<Float>?, _ n: Int) throws(Failure) {
    if n > 0 {
      guard let choices else { throw Failure(.argument, "choices is NULL, but there are \(n) tokens") }
      guard weights != nil else { throw Failure(.argument, "weights is NULL, but there are \(n) tokens") }
      guard n <= Int(Int32.max) / shape.choices else { throw Pass.tooMany(n) }
      for slot in 0..<n * shape.choices where choices[slot] < -1 || choices[slot] >= shape.experts {
        throw Failure(
          .argument,
          "choice \(slot % shape.choices) of token \(slot / shape.choices) is expert \(choices[slot]), not -1 or one of 0..\(shape.experts - 1)"
        )
      }
    }
  }

  private func begin(_ tokens: UnsafePointer<Float>?, _ n: Int) throws(Failure) -> Pass {
    guard n >= 0 else { throw Failure(.argument, "n must not be negative, not \(n)") }
    guard n == 0 || tokens != nil else { throw Failure(.argument, "tokens is NULL, but n is \(n)") }
    let pass = idle.popLast() ?? Pass(team: group.team, workers: group.size)
    do throws(Failure) {
      try pass.begin(in: self, tokens, n)
    } catch {
      idle.append(pass)
      throw error
    }
    return pass
  }

  /// Takes back a pass that is over, unless a failed transport may still touch its memory.
  func recycle(_ pass: Pass) {
    if !pass.isEntangled { idle.append(pass) }
  }

  func workspace(_ slots: Workspace.Slots = .ring) throws(Failure) -> Workspace {
    let threads = group.team.threads
    let bytes = Workspace(shape, columns: columns, threads: threads, slots).bytes
    // Rows that come differ from batch to batch: some room saves asking again.
    let room = if case .rows = slots { bytes / 8 } else { 0 }
    return Workspace(
      shape, columns: columns, threads: threads, slots, over: try group.workspace(bytes: bytes, room: room))
  }

  private static func tensors(_ block: borrowing Parameters) -> Tensors {
    Tensors(
      gate: block.gate, inward: block.inward, outward: block.outward, inwardLinear: block.inwardLinear,
      inwardBias: block.inwardBias, outwardBias: block.outwardBias, noise: block.noise,
      bias: block.bias)
  }
}

/// Draws a tensor's values, all threads at once; each value depends on its index alone.
private final class Drawing: TeamWork {
  private let tensor: Parameters.Drawn
  private let team: Team

  init(_ tensor: Parameters.Drawn, _ team: Team) {
    self.tensor = tensor
    self.team = team
  }

  override func work(thread: Int) {
    while case let start = team.take() * Zeroing.piece, start < tensor.count {
      for index in start..<min(start + Zeroing.piece, tensor.count) {
        tensor.values[index] = tensor.random.uniform(tensor.first + index, bound: tensor.bound)
      }
    }
  }
}

/// Fills a tensor block with zeros, all threads at once.
private final class Zeroing: TeamWork {
  /// Floats of one task.
  static let piece = 1 << 20
  private let base: UnsafeMutablePointer<Float>
  private let count: Int
  private let team: Team

  init(_ base: UnsafeMutablePointer<Float>, _ count: Int, _ team: Team) {
    self.base = base
    self.count = count
    self.team = team
  }

  override func work(thread: Int) {
    while case let start = team.take() * Zeroing.piece, start < count {
      memset(base + start, 0, min(Zeroing.piece, count - start) * MemoryLayout<Float>.stride)
    }
  }
}
