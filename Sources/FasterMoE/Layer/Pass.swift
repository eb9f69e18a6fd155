/// One batch on its trip through one layer: gate, plan, forward, backward, each once and in this order.
///
/// It keeps what backward needs and no more: for this worker's tokens one row of width d for each slot, in the same
/// place for forward and backward, unless it is direct; for the rows that its experts compute their pre-activations. Everything else is
/// computed again from the caller's tokens.
package final class Pass: TeamWork {
  /// What has been done; the next call must fit.
  package enum Stage { case idle, gated, planned, forwarded, finished }

  package private(set) var stage = Stage.idle
  let team: Team
  /// Kept from begin to end, so that a layer outlives its passes.
  private(set) var layer: Layer?
  /// Behind `store` and behind `inbox`.
  private var memory: Region?
  var inboxMemory: Region?

  var tokens: UnsafePointer<Float>?
  package private(set) var count = 0
  /// Whether the layer's gate chose, so that backward goes on into the gate.
  var isGated = false
  private(set) var isTraining = true
  var random = RandomStream(seed: 0, stream: 0)
  /// This worker's first token among those of all.
  var firstToken = 0
  /// What may leave a place by the links that were measured, for gates that heed them.
  private(set) var measuredShare: Double?
  /// Experts that the gate counted as local since they will be shadowed; nil unless it limits what leaves a place.
  var awaited: [Int]?
  /// Choices that the gate's rule moved to other experts.
  package var moved = 0
  /// Slots without an expert.
  package var dropped: Int {
    count * shape.choices - (0..<shape.experts).reduce(0) { $0 + Int(store.routing.counts[$1]) }
  }
  package var balanceLoss = 0.0
  package var zLoss = 0.0

  var store: Store!
  var inbox: Inbox!
  var workspace: Workspace!
  var blocks = 0
  /// There from plan or forward on.
  var plan: Plan!
  var rounds: Rounds!
  /// What backward does with the blocks.
  var turns: [Turn] = []
  let journey: Journey
  let recording: Recording
  /// Whether it was planned with a prediction.
  private(set) var isPredicted = false
  /// When the call under way began, and when this rank was ready to meet the others in it.
  var began = Seconds(0)
  var wasReady = Seconds(0)
  var number = 0
  /// The number among those in training, or of the last of them before.
  var training = 0
  var job = Job.gate
  enum Job {
    case gate, packCopies, send, expertsForward, combineForward
    case clearGrads, sendGrads, expertsBackward, addCopyGrads, combineBackward, gateGrads

    /// As what it is recorded; nil for those whose tasks are.
    var kind: Recording.Kind? {
      switch self {
      case .gate: .gate
      case .packCopies: .packCopies
      case .send, .sendGrads: .packRows
      case .combineForward: .combine
      case .clearGrads: .clearGrads
      case .addCopyGrads: .addCopyGrads
      case .combineBackward: .combineGrads
      case .gateGrads: .gateGrads
      case .expertsForward, .expertsBackward: nil
      }
    }
  }
  /// Experts that every worker computes its own rows for.
  var shadows: [Int] { plan?.shadows ?? [] }
  /// Where others left their gradients of copies.
  var copyGrads: [UnsafeMutablePointer<Float>] = []

  init(team: Team, workers: Int) {
    self.team = team
    journey = Journey(workers: workers)
    recording = Recording(threads: team.threads)
  }

  deinit {
    // What a failed transport may still write to is never given back.
    guard isEntangled else { return }
    memory.take()?.abandon()
    inboxMemory.take()?.abandon()
  }

  /// Whether a transport failed while it had memory of this pass.
  var isEntangled = false

  package var group: Group { layer!.group }
  package var shape: Shape { layer!.shape }

  static func tooMany(_ n: Int) -> Failure { Failure(.argument, "n x top_k must fit 31 bits, but n is \(n)") }
  static func gateTasks(_ n: Int) -> Int { (n + Workspace.gateRows - 1) / Workspace.gateRows }

  // MARK: The trip

  func begin(in layer: Layer, _ tokens: UnsafePointer<Float>?, _ n: Int) throws(Failure) {
    began = .now
    let shape = layer.shape
    guard n <= Int(Int32.max) / shape.choices else { throw Pass.tooMany(n) }
    _ = try checkedProduct(
      "n x (top_k x (d_model + d_hidden) + experts)", n,
      shape.choices * 2 * (shape.model + shape.hidden) + layer.columns)
    var size = Arena()
    _ = Store(layer, tokens: n, &size)
    if Pass.capacity(memory) < size.bytes {
      memory = nil
      memory = try Region(bytes: size.bytes, for: "the tokens of a batch")
    }
    try recording.begin()
    workspace = try layer.workspace()
    var arena = Arena(over: Pass.base(memory))
    store = Store(layer, tokens: n, &arena)
    self.layer = layer
    self.tokens = tokens
    count = n
    stage = .gated
    (isGated, isPredicted, isTraining) = (false, false, layer.isTraining)
    (moved, balanceLoss, zLoss) = (0, 0, 0)
    awaited = nil
    measuredShare = layer.rule.heedsLinks ? try layer.measuredShare : nil
    plan = nil
    store.moves.shadow([])
    wasReady = .now
  }

  /// Who goes where; valid until the pass ends.
  package var routing: Routing { store.routing }

  /// Decides how the pass is to go; predictions only if some rank wants a report, the same on all.
  package func plan(wantsReport: Bool, _ request: () throws(Failure) -> PlanRequest) throws(Failure) -> PlanReport? {
    began = .now
    let peers = group.peers
    var asked: PlanRequest?
    var cluster: Cluster?
    let own = failure { () throws(Failure) in
      guard stage == .gated else { throw wrongStage("plan") }
      asked = try request()
      cluster = try layer!.cluster
      try asked!.checkPlayable(workers: peers.size, on: cluster)
      if peers.size > 1, let awaited { _ = try asked!.keeping(awaited) }
      guard !wantsReport || peers.shareMemory || peers.size == 1 || cluster != nil else {
        throw Failure(
          .unsupported, "predictions over a transport need measured links: fmoe_group_calibrate comes first")
      }
    }
    let all = try group.agree(
      .plan, own, same: same(asked?.same ?? (0, 0, 0)), words: Notice.Words(number: wantsReport ? 1 : 0))
    let isReported = (0..<peers.size).contains { all[$0].words.number != 0 }
    var report: PlanReport?
    if isReported && cluster == nil {
      report = PlanReport.inPlace(store.traffic, shape: shape, rates: try group.rates(in: .plan))
      isPredicted = true
    }
    report = try decide(asked!, on: cluster, isReported: isReported) ?? report
    stage = .planned
    recording.caller.add(.planCall, from: began)
    return report
  }

  /// Makes the plan: what the request leaves open is what is predicted to be best. All ranks find the same.
  ///
  /// The shadows of a gate that limits what leaves a place were chosen before it chose: what is best now is for the next
  /// pass.
  @discardableResult
  private func decide(_ asked: PlanRequest, on cluster: Cluster?, isReported: Bool = false) throws(Failure)
    -> PlanReport?
  {
    var request = asked
    if let awaited, group.size > 1 { request = try asked.keeping(awaited) }
    guard !group.peers.shareMemory, group.size > 1 else {
      // Where rows need not move, nothing is worth a copy but what is asked for.
      var inPlace = request
      inPlace.schedule = .coarse
      if group.size == 1 { (inPlace.shadowing, inPlace.shadows) = (.never, []) }
      plan = layer!.unmeasured(inPlace, store.traffic)
      return nil
    }
    guard let cluster, isReported || asked.isOpen else {
      plan = layer!.unmeasured(request, store.traffic)
      return nil
    }
    try Planner.check(workers: group.size, experts: shape.experts)
    var planner = Planner(store.traffic, shape, on: cluster)
    let (plan, report) = try planner.plan(request)
    (self.plan, isPredicted) = (plan, true)
    if awaited != nil, layer!.wantsPredicted, asked.isChoosing {
      layer!.awaitPredicted(try planner.plan(asked).plan.shadows)
    }
    return report
  }

  /// y [n, d] of the batch.
  package func forward(_ output: UnsafeMutablePointer<Float>?) throws(Failure) {
    began = .now
    results = store.isDirect ? output : store.rows
    let own = failure { () throws(Failure) in
      guard stage == .gated || stage == .planned else { throw wrongStage("forward") }
      guard count == 0 || output != nil else {
        throw Failure(.argument, "output is NULL, but there are \(count) tokens")
      }
      if stage == .gated { try decide(PlanRequest(), on: try layer!.cluster) }
      try openInbox()
      workspace = try layer!.workspace()
    }
    wasReady = .now
    let all = try group.agree(.forward, own, same: same((plan?.fingerprint ?? 0, 0, 0)), words: addresses)
    recordMeeting(.meetForward)
    self.output = output
    lookAround(all)
    try throughExperts(plan.forward, send: .send, arriving: inbox.tokens, compute: .expertsForward)
    run(.combineForward, floats: floatsOfRows)
    stage = .forwarded
    recording.caller.add(.forwardCall, from: began)
  }

  /// Gradients: adds to the layer's, overwrites `gradTokens` [n, d] and, where wanted, `gradWeights` [n, k].
  package func backward(
    _ gradOutput: UnsafePointer<Float>?, gradTokens: UnsafeMutablePointer<Float>?,
    gradWeights: UnsafeMutablePointer<Float>?
  ) throws(Failure) {
    began = .now
    let own = failure { () throws(Failure) in
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
      // While rows travel, all gradients of rows are made before those of weights, so that they can travel soon.
      workspace = try layer!.workspace(plan.overlaps ? .rows(arrivedRows) : .ring)
    }
    self.gradOutput = gradOutput
    self.gradTokens = gradTokens
    results = store.isDirect ? gradTokens : store.rows
    wasReady = .now
    lookAround(try group.agree(.backward, own, same: same(), words: addresses))
    recordMeeting(.meetBackward)
    // To a shadowed expert's gradients others add, in no order that this pass knows.
    if !shadows.isEmpty { layer!.settleGradients() }
    writesGradients = layer!.takeBegunGradients()
    let without = writesGradients ? (0..<layer!.owned.count).count { inbox.latest[$0] < 0 } : 0
    run(.clearGrads, floats: (shadows.count + without) * inbox.copyFloats)
    try throughExperts(plan.backward, send: .sendGrads, arriving: inbox.grads, compute: .expertsBackward)
    try gatherCopyGrads()
    run(.combineBackward, floats: floatsOfRows + (isGated ? floatsAtGate : 0))
    if isGated { run(.gateGrads, floats: floatsAtGate) }
    gradWeights?.update(from: store.gradWeights, count: count * shape.choices)
    if isGated && isTraining, let bias = layer!.values.bias {
      Bias.move(bias, loads: store.loads, experts: shape.experts, step: layer!.biasStep)
    }
    stage = .finished
    recording.caller.add(.backwardCall, from: began)
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
  /// Where what the experts make of this worker's rows goes.
  private(set) var results: UnsafeMutablePointer<Float>?
  var gradOutput: UnsafePointer<Float>?
  private var writesGradients = false
  private var gradTokens: UnsafeMutablePointer<Float>?

  /// All ranks have come since this one was ready.
  func recordMeeting(_ kind: Recording.Kind) {
    if group.size > 1 { recording.caller.add(kind, from: wasReady) }
  }

  /// Has the team do a job that takes the time of touching so many floats; 0: there is nothing to do.
  func run(_ job: Job, floats: Int) {
    guard floats > 0 else { return }
    self.job = job
    team.run(self, isSmall: floats < Pass.fewFloats)
  }

  /// One thread has them in its caches or reads them in some 15 microseconds, sooner than another wakes.
  static let fewFloats = 1 << 16

  var floatsOfRows: Int { Pass.floatsOfRows(count * shape.choices, shape) }
  var floatsAtGate: Int { Pass.floatsAtGate(count, columns: layer!.columns, shape) }
  /// As many as take the time of `rows` rows in all: to find one takes that of some floats, too.
  static func floatsOfRows(_ rows: Int, _ shape: Shape) -> Int { rows * (shape.model + 64) }
  /// And that of a gate: what it reads, its products, eight of which take the time of a float, and its choice among logits.
  static func floatsAtGate(_ tokens: Int, columns: Int, _ shape: Shape) -> Int {
    tokens == 0 ? 0 : (tokens + columns) * shape.model + tokens * columns * (shape.model / 8 + 8)
  }

  package override func work(thread: Int) {
    let layer = layer!
    let context = PassContext(
      thread: thread, team: team, layer: layer, store: store, inbox: inbox, journey: journey,
      workspace: workspace, desk: workspace.desk(thread), lane: recording.lane(thread), tokens: tokens,
      results: results, count: count, firstToken: firstToken, writesGradients: writesGradients,
      noise: isTraining && layer.rule.isNoisy ? random : nil, jitter: jitter)
    let start = Seconds.now
    switch job {
    case .gate: context.chooseExperts()
    case .packCopies: context.packCopies(shadows)
    case .clearGrads: context.clearGrads(shadows)
    case .addCopyGrads: context.addCopyGrads(shadows, from: copyGrads)
    case .send: context.packTokens()
    case .expertsForward: context.forward(blocks: blocks)
    case .combineForward: context.combine(into: output!, weighted: true)
    case .sendGrads: context.packGrads(gradOutput!)
    case .expertsBackward: context.backward(blocks: blocks, turns)
    case .combineBackward:
      if isGated {
        context.backwardThroughGate(into: gradTokens!)
      } else {
        context.combine(into: gradTokens!, weighted: false)
      }
    case .gateGrads: context.makeGateGradients()
    }
    if let kind = job.kind { context.lane.add(kind, from: start) }
  }

  private var jitter: Jitter? {
    let layer = layer!
    guard isTraining, layer.jitter > 0 else { return nil }
    let random = RandomStream(seed: layer.seed, stream: Pass.firstJitter + UInt64(training))
    return Jitter(random, bound: layer.jitter, width: shape.model)
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

  static func capacity(_ region: borrowing Region?) -> Int {
    switch region {
    case .some(let region): region.bytes
    case .none: 0
    }
  }

  static func base(_ region: borrowing Region?) -> UnsafeMutableRawPointer {
    switch region {
    case .some(let region): region.base
    case .none: preconditionFailure("a pass has memory by now")
    }
  }
}
