import Synchronization

/// One batch on its trip through one layer: gate, plan, forward, backward, each once and in this order.
///
/// It keeps what backward needs and no more: the pre-activations of every row and, in the same place for forward and
/// backward, one row of width d for each slot. Everything else is computed again from the caller's tokens.
package final class Pass: TeamWork {
  /// What has been done; the next call must fit.
  package enum Stage { case idle, gated, planned, forwarded, finished }

  package private(set) var stage = Stage.idle
  private let team: Team
  /// Kept from begin to end, so that a layer outlives its passes.
  private(set) var layer: Layer?
  private var memory: Region?

  var tokens: UnsafePointer<Float>?
  package private(set) var count = 0
  /// Whether the layer's gate chose, so that backward goes on into the gate.
  private(set) var isGated = false
  package private(set) var balanceLoss = 0.0
  package private(set) var zLoss = 0.0

  private var store: Store!
  private var workspace: Workspace!
  private var blocks = 0
  private var job = Job.gate
  private enum Job { case gate, forward, backward }

  /// Arrays of this pass, R = n·k slots.
  struct Store {
    var routing: Routing
    /// [n, E] in panels: logits, then their gradients.
    let logits: Panels
    /// [R, h] in panels, each expert's rows beginning a panel: pre-activations, then their gradients.
    let inner: Panels
    /// The linear half of gated experts.
    let innerLinear: Panels
    /// [R, d] row-major: expert outputs, then gradients of expert inputs.
    let rows: UnsafeMutablePointer<Float>
    /// [n, k]
    let gradWeights: UnsafeMutablePointer<Float>
    /// Sums over tokens of each gate task: probabilities [tasks, E padded] and squared log-sums [tasks].
    let probabilitySums: UnsafeMutablePointer<Float>
    let squareSums: UnsafeMutablePointer<Double>
    let expertSums: UnsafeMutablePointer<Double>
    /// [E padded] each expert's share of all choices.
    let shares: UnsafeMutablePointer<Float>
    let blocks: UnsafeMutablePointer<Block>
    /// Tasks done of each block: those that make its rows' gradients, those that make its weights' gradients.
    let rowTasksDone: UnsafeMutablePointer<Atomic<Int>>
    let weightTasksDone: UnsafeMutablePointer<Atomic<Int>>

    init(_ shape: Shape, tokens n: Int, losses: RouterLosses, _ arena: inout Arena) {
      let slots = n * shape.choices
      let experts = Panels.padded(shape.experts)
      let tasks = losses.needProbabilities ? Pass.gateTasks(n) : 0
      let most = Block.mostBlocks(slots: slots, experts: shape.experts)
      routing = Routing(arena: &arena, slots: slots, experts: shape.experts)
      logits = Panels(arena.take(n * experts), width: shape.experts)
      inner = Panels(arena.take(slots * Panels.padded(shape.hidden)), width: shape.hidden)
      innerLinear = Panels(
        arena.take(shape.activation.isGated ? slots * Panels.padded(shape.hidden) : 0), width: shape.hidden)
      rows = arena.take(slots * shape.model)
      gradWeights = arena.take(slots)
      probabilitySums = arena.take(tasks * experts)
      squareSums = arena.take(tasks)
      expertSums = arena.take(shape.experts)
      shares = arena.take(experts)
      blocks = arena.take(most)
      rowTasksDone = arena.take(most)
      weightTasksDone = arena.take(most)
    }
  }

  init(team: Team) { self.team = team }

  package var group: Group { layer!.group }
  package var shape: Shape { layer!.shape }

  static func tooMany(_ n: Int) -> Failure { Failure(.argument, "n x top_k must fit 31 bits, but n is \(n)") }
  static func gateTasks(_ n: Int) -> Int { (n + Workspace.gateRows - 1) / Workspace.gateRows }

  // MARK: The trip

  func begin(in layer: Layer, _ tokens: UnsafePointer<Float>?, _ n: Int) throws(Failure) {
    let shape = layer.shape
    guard n <= Int(Int32.max) / shape.choices else { throw Pass.tooMany(n) }
    _ = try checkedProduct(
      "n x (top_k x (d_model + d_hidden) + experts)", n,
      shape.choices * 2 * (shape.model + shape.hidden) + shape.experts)
    var size = Arena()
    _ = Store(shape, tokens: n, losses: layer.losses, &size)
    if capacity < size.bytes {
      memory = nil
      memory = try Region(bytes: size.bytes, for: "the activations of a batch")
    }
    workspace = try layer.workspace()
    var arena = Arena(over: memoryBase)
    store = Store(shape, tokens: n, losses: layer.losses, &arena)
    self.layer = layer
    self.tokens = tokens
    count = n
    stage = .gated
    (isGated, balanceLoss, zLoss) = (false, 0, 0)
  }

  func gate() {
    isGated = true
    let layer = layer!
    let (n, shape, losses) = (count, layer.shape, layer.losses)
    run(.gate)
    store.routing.sort(slots: n * shape.choices, experts: shape.experts)
    guard losses.needProbabilities, n > 0 else { return }
    let padded = Panels.padded(shape.experts)
    store.expertSums.update(repeating: 0, count: shape.experts)
    var squares = 0.0
    for task in 0..<Pass.gateTasks(n) {
      for expert in 0..<shape.experts {
        store.expertSums[expert] += Double(store.probabilitySums[task * padded + expert])
      }
      squares += store.squareSums[task]
    }
    balanceLoss = losses.balanceLoss(
      counts: store.routing.counts, sums: store.expertSums, experts: shape.experts, tokens: n, choices: shape.choices)
    zLoss = losses.z * squares / Double(n)
    for expert in 0..<padded {
      store.shares[expert] =
        expert < shape.experts ? Float(Double(store.routing.counts[expert]) / Double(n * shape.choices)) : 0
    }
  }

  func route(_ choices: UnsafePointer<Int32>?, _ weights: UnsafePointer<Float>?) {
    let slots = count * layer!.shape.choices
    if let choices, let weights {
      store.routing.choices.update(from: choices, count: slots)
      store.routing.weights.update(from: weights, count: slots)
    }
    store.routing.sort(slots: slots, experts: layer!.shape.experts)
  }

  /// Who goes where; valid until the pass ends.
  package var routing: Routing { store.routing }

  package func plan(_ request: PlanRequest, wantsReport: Bool) throws(Failure) -> PlanReport? {
    guard stage == .gated else { throw wrongStage("plan") }
    try request.check(workers: 1)
    let rates = wantsReport ? try group.rates() : nil
    stage = .planned
    return rates.map { PlanReport.alone(counts: store.routing.counts, shape: shape, rates: $0) }
  }

  /// y [n, d] of the batch.
  package func forward(_ output: UnsafeMutablePointer<Float>?) throws(Failure) {
    guard stage == .gated || stage == .planned else { throw wrongStage("forward") }
    guard count == 0 || output != nil else { throw Failure(.argument, "output is NULL, but there are \(count) tokens") }
    workspace = try layer!.workspace()
    self.output = output
    blocks = Block.cut(firstRow: store.routing.firstRow, experts: layer!.shape.experts, into: store.blocks)
    run(.forward)
    stage = .forwarded
  }

  /// Gradients: adds to the layer's, overwrites `gradTokens` [n, d] and, where wanted, `gradWeights` [n, k].
  package func backward(
    _ gradOutput: UnsafePointer<Float>?, gradTokens: UnsafeMutablePointer<Float>?,
    gradWeights: UnsafeMutablePointer<Float>?
  ) throws(Failure) {
    guard stage == .forwarded else { throw wrongStage("backward") }
    guard count == 0 || gradOutput != nil else {
      throw Failure(.argument, "grad_output is NULL, but there are \(count) tokens")
    }
    guard count == 0 || gradTokens != nil else {
      throw Failure(.argument, "grad_tokens is NULL, but there are \(count) tokens")
    }
    guard gradWeights == nil || !isGated else {
      throw Failure(
        .argument, "grad_weights must be NULL: the layer's own gate made this pass and takes that gradient itself")
    }
    workspace = try layer!.workspace()
    self.gradOutput = gradOutput
    self.gradTokens = gradTokens
    for block in 0..<blocks {
      (store.rowTasksDone + block).initialize(to: Atomic(0))
      (store.weightTasksDone + block).initialize(to: Atomic(0))
    }
    run(.backward)
    gradWeights?.update(from: store.gradWeights, count: count * layer!.shape.choices)
    stage = .finished
  }

  /// The trip is over, at whatever stage; the memory goes back to the layer.
  package func end() {
    guard let layer else { return }
    self.layer = nil
    stage = .idle
    tokens = nil
    layer.recycle(self)
  }

  private var output: UnsafeMutablePointer<Float>?
  private var gradOutput: UnsafePointer<Float>?
  private var gradTokens: UnsafeMutablePointer<Float>?

  private func run(_ job: Job) {
    guard count > 0 else { return }
    self.job = job
    team.run(self)
  }

  package override func work(thread: Int) {
    let layer = layer!
    let context = PassContext(
      thread: thread, team: team, layer: layer, store: store, workspace: workspace, desk: workspace.desk(thread),
      tokens: tokens!, count: count)
    switch job {
    case .gate: context.chooseExperts()
    case .forward: context.forward(blocks: blocks, output: output!)
    case .backward:
      context.backward(blocks: blocks, gradOutput: gradOutput!, gradTokens: gradTokens!, throughGate: isGated)
    }
  }

  private func wrongStage(_ call: String) -> Failure {
    let done =
      switch stage {
      case .idle: "is over"
      case .gated: "is gated"
      case .planned: "is planned"
      case .forwarded: "has gone forward"
      case .finished: "has gone backward"
      }
    return Failure(
      .stage, "\(call) does not fit: the pass \(done); the order is gate or route, plan, forward, backward, each once")
  }

  private var capacity: Int {
    switch memory {
    case .some(let region): region.bytes
    case .none: 0
    }
  }

  private var memoryBase: UnsafeMutableRawPointer {
    switch memory {
    case .some(let region): region.base
    case .none: preconditionFailure("a pass has memory from begin on")
    }
  }
}

/// One thread's view of a running pass; the stages are its methods.
struct PassContext {
  let thread: Int
  let team: Team
  let layer: Layer
  let store: Pass.Store
  let workspace: Workspace
  let desk: Workspace.Desk
  /// [n, d]
  let tokens: UnsafePointer<Float>
  let count: Int

  var shape: Shape { layer.shape }
}
