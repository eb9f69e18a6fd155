import Synchronization

/// One batch on its trip through one layer: gate, plan, forward, backward, each once and in this order.
///
/// It keeps what backward needs and no more: for this worker's tokens one row of width d for each slot, in the same
/// place for forward and backward; for the rows that its experts compute their pre-activations. Everything else is
/// computed again from the caller's tokens.
package final class Pass: TeamWork {
  /// What has been done; the next call must fit.
  package enum Stage { case idle, gated, planned, forwarded, finished }

  package private(set) var stage = Stage.idle
  private let team: Team
  /// Kept from begin to end, so that a layer outlives its passes.
  private(set) var layer: Layer?
  /// Behind `store` and behind `inbox`.
  private var memory: Region?
  private var inboxMemory: Region?

  var tokens: UnsafePointer<Float>?
  package private(set) var count = 0
  /// Whether the layer's gate chose, so that backward goes on into the gate.
  private(set) var isGated = false
  package private(set) var balanceLoss = 0.0
  package private(set) var zLoss = 0.0

  private var store: Store!
  private var inbox: Inbox!
  private var workspace: Workspace!
  private var blocks = 0
  private var request = PlanRequest()
  private var rounds: Rounds!
  private let journey: Journey
  private var number = 0
  private var tokensOfAll = 0
  private var job = Job.gate
  private enum Job {
    case gate, packCopies, send, expertsForward, combineForward
    case clearCopyGrads, sendGrads, expertsBackward, addCopyGrads, combineBackward
  }
  /// Experts that every worker computes its own rows for.
  private var shadows: [Int] = []
  /// Where others left their gradients of copies.
  private var copyGrads: [UnsafeMutablePointer<Float>] = []

  /// What belongs to this worker's tokens, R = n·k slots.
  struct Store {
    var routing: Routing
    /// [n, E] in panels: logits, then their gradients.
    let logits: Panels
    /// [W, E]
    let traffic: Traffic
    let moves: Moves
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

    init(_ shape: Shape, tokens n: Int, workers: Int, losses: RouterLosses, _ arena: inout Arena) {
      let slots = n * shape.choices
      let experts = Panels.padded(shape.experts)
      let tasks = losses.needProbabilities ? Pass.gateTasks(n) : 0
      routing = Routing(arena: &arena, slots: slots, experts: shape.experts)
      logits = Panels(arena.take(n * experts), width: shape.experts)
      traffic = Traffic(arena: &arena, workers: workers, experts: shape.experts)
      moves = Moves(arena: &arena, traffic)
      rows = arena.take(slots * shape.model)
      gradWeights = arena.take(slots)
      probabilitySums = arena.take(tasks * experts)
      squareSums = arena.take(tasks)
      expertSums = arena.take(shape.experts)
      shares = arena.take(experts)
    }
  }

  init(team: Team, workers: Int) {
    self.team = team
    journey = Journey(workers: workers)
  }

  deinit {
    // What a failed transport may still write to is never given back.
    guard isEntangled else { return }
    memory.take()?.abandon()
    inboxMemory.take()?.abandon()
  }

  /// Whether a transport failed while it had memory of this pass.
  private(set) var isEntangled = false

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
    let workers = layer.group.size
    var size = Arena()
    _ = Store(shape, tokens: n, workers: workers, losses: layer.losses, &size)
    if Pass.capacity(memory) < size.bytes {
      memory = nil
      memory = try Region(bytes: size.bytes, for: "the tokens of a batch")
    }
    workspace = try layer.workspace()
    var arena = Arena(over: Pass.base(memory))
    store = Store(shape, tokens: n, workers: workers, losses: layer.losses, &arena)
    self.layer = layer
    self.tokens = tokens
    count = n
    stage = .gated
    (isGated, balanceLoss, zLoss) = (false, 0, 0)
    request = PlanRequest()
    shadows.removeAll()
    store.moves.shadow(shadows)
  }

  func gate() {
    isGated = true
    let layer = layer!
    let (n, shape, losses) = (count, layer.shape, layer.losses)
    run(.gate, n)
    store.routing.count(slots: n * shape.choices, experts: shape.experts)
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
    zLoss = losses.z * squares / Double(n)
  }

  /// Hears all workers' counts, and knows then how much its experts will have to do and how busy all experts are.
  func hearCounts(number: Int, tokensOfAll: Int) throws(Failure) {
    let (shape, losses, traffic) = (shape, layer!.losses, store.traffic)
    self.number = number
    let own = traffic.counts + group.rank * shape.experts
    for expert in 0..<shape.experts { own[expert] = UInt32(store.routing.counts[expert]) }
    try group.peers.gather(own, bytes: shape.experts * MemoryLayout<UInt32>.stride, into: traffic.counts)
    for worker in 0..<traffic.workers where traffic.rows(at: worker) > Int(Int32.max) {
      throw Failure(.argument, "\(traffic.rows(at: worker)) rows for the experts of rank \(worker) do not fit 31 bits")
    }
    guard isGated, losses.needProbabilities, count > 0 else { return }
    for expert in 0..<Panels.padded(shape.experts) {
      store.shares[expert] =
        expert < shape.experts
        ? Float(Double(traffic.rows(for: expert)) / Double(tokensOfAll * shape.choices)) : 0
    }
    balanceLoss = losses.balanceLoss(
      shares: store.shares, sums: store.expertSums, experts: shape.experts, tokens: count)
  }

  func route(_ choices: UnsafePointer<Int32>?, _ weights: UnsafePointer<Float>?) {
    let slots = count * layer!.shape.choices
    if let choices, let weights {
      store.routing.choices.update(from: choices, count: slots)
      store.routing.weights.update(from: weights, count: slots)
    }
    store.routing.count(slots: slots, experts: layer!.shape.experts)
  }

  /// Who goes where; valid until the pass ends.
  package var routing: Routing { store.routing }

  /// Decides how the pass is to go; predictions only if some rank wants a report, the same on all.
  package func plan(wantsReport: Bool, _ request: () throws(Failure) -> PlanRequest) throws(Failure) -> PlanReport? {
    let peers = group.peers
    var asked: PlanRequest?
    let own = failure { () throws(Failure) in
      guard stage == .gated else { throw wrongStage("plan") }
      asked = try request()
      try asked!.checkPlayable(workers: peers.size)
      guard !wantsReport || peers.shareMemory else {
        throw Failure(
          .unsupported, "predictions over a transport need measured links, which are not in this version yet")
      }
    }
    let all = try group.agree(
      .plan, own, same: same(asked?.same ?? (0, 0, 0)), words: [wantsReport ? 1 : 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    var report: PlanReport?
    if (0..<peers.size).contains(where: { all[$0].words[0] != 0 }) {
      report = PlanReport.inPlace(store.traffic, shape: shape, rates: try group.rates(in: .plan))
    }
    self.request = asked!
    switch asked!.shadowing {
    case .everyExpert: shadows = peers.size > 1 ? Array(0..<shape.experts) : []
    default: shadows = peers.size > 1 ? asked!.shadows : []
    }
    stage = .planned
    return report
  }

  /// y [n, d] of the batch.
  package func forward(_ output: UnsafeMutablePointer<Float>?) throws(Failure) {
    let own = failure { () throws(Failure) in
      guard stage == .gated || stage == .planned else { throw wrongStage("forward") }
      guard count == 0 || output != nil else {
        throw Failure(.argument, "output is NULL, but there are \(count) tokens")
      }
      try openInbox()
      workspace = try layer!.workspace()
    }
    let all = try group.agree(.forward, own, same: same(), words: addresses)
    self.output = output
    lookAround(all)
    cutBlocks()
    try throughExperts(send: .send, arriving: inbox.tokens, compute: .expertsForward)
    run(.combineForward, count)
    stage = .forwarded
  }

  /// Gradients: adds to the layer's, overwrites `gradTokens` [n, d] and, where wanted, `gradWeights` [n, k].
  package func backward(
    _ gradOutput: UnsafePointer<Float>?, gradTokens: UnsafeMutablePointer<Float>?,
    gradWeights: UnsafeMutablePointer<Float>?
  ) throws(Failure) {
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
      workspace = try layer!.workspace(isOverlapped ? .rows(arrivedRows) : .ring)
    }
    self.gradOutput = gradOutput
    self.gradTokens = gradTokens
    lookAround(try group.agree(.backward, own, same: same(), words: addresses))
    clearTasks()
    run(.clearCopyGrads, shadows.count)
    try throughExperts(send: .sendGrads, arriving: inbox.grads, compute: .expertsBackward)
    try gatherCopyGrads()
    run(.combineBackward, count)
    gradWeights?.update(from: store.gradWeights, count: count * shape.choices)
    stage = .finished
  }

  // MARK: Between workers

  /// What all ranks must have in common in a call on this pass.
  private func same(_ request: (UInt64, UInt64, UInt64) = (0, 0, 0)) -> Notice.Same {
    [UInt64(layer!.number), UInt64(number), request.0, request.1, request.2, 0, 0, 0]
  }

  /// Where the others find this worker's rows, if they share its memory.
  private var addresses: Notice.Words {
    func address(_ pointer: UnsafeRawPointer?) -> UInt64 { UInt64(UInt(bitPattern: pointer)) }
    return [
      address(tokens), address(gradOutput), address(store.routing.slots), address(store.routing.firstRow),
      address(store.routing.weights), address(store.rows), address(store.gradWeights),
      address(layer!.values.base), address(inbox?.copyGrads), 0,
    ]
  }

  /// Whether backward does not use the copies that forward has fetched (ZeRO stage 3).
  private var fetchesAgain: Bool { request.shadowing == .everyExpert }

  /// Whether rows travel while experts compute.
  private var isOverlapped: Bool { !group.peers.shareMemory && group.size > 1 && request.schedule != .coarse }

  /// Rows that come to this worker's experts.
  private var arrivedRows: Int { inbox.arrivals.firstRow[rounds.count * layer!.owned.count + shadows.count] }

  /// In which rounds rows go to their experts. All ranks find the same.
  private func chooseRounds() -> Rounds {
    guard isOverlapped else { return Rounds(order: group.ranks, groupSize: group.size) }
    if request.groupSize > 0 { return Rounds(order: group.leaves, groupSize: request.groupSize) }
    // So many workers at a time that an expert has rows enough in each round to be worth its weights' way to the core.
    let all = (0..<group.size).reduce(0) { $0 + store.traffic.rows(at: $1) }
    let usual = max(1, all / (group.size * shape.experts))
    return Rounds(order: group.leaves, groupSize: (Pass.rowsWorthTheirWeights + usual - 1) / usual)
  }
  private static var rowsWorthTheirWeights: Int { 4 * Panels.height }

  /// Cuts the rows of each round into blocks.
  private func cutBlocks() {
    let experts = layer!.owned.count
    inbox.latest.update(repeating: -1, count: experts + shadows.count)
    blocks = 0
    for round in 0..<rounds.count {
      inbox.roundBlocks[round] = blocks
      blocks += Block.cut(
        firstRow: inbox.arrivals.firstRow + round * experts, experts: experts, inOrder: !group.peers.shareMemory,
        into: inbox.blocks, behind: blocks, latest: inbox.latest)
    }
    inbox.roundBlocks[rounds.count] = blocks
    blocks += Block.cut(
      firstRow: inbox.arrivals.firstRow + rounds.count * experts, experts: shadows.count, firstExpert: experts,
      inOrder: !group.peers.shareMemory, into: inbox.blocks, behind: blocks, latest: inbox.latest)
    inbox.roundBlocks[rounds.count + 1] = blocks
    clearTasks()
  }

  private func clearTasks() {
    for block in 0..<blocks {
      (inbox.rowTasksDone + block).initialize(to: Atomic(0))
      (inbox.weightTasksDone + block).initialize(to: Atomic(0))
    }
  }

  /// Room for the rows that will come to this worker's experts, and their list.
  private func openInbox() throws(Failure) {
    let overWire = !group.peers.shareMemory
    store.moves.shadow(shadows)
    store.routing.sort(slots: count * shape.choices, experts: shape.experts, store.moves)
    rounds = chooseRounds()
    var size = Arena()
    _ = Inbox(shape, store.moves, shadows.count, rounds, at: group.rank, overWire: overWire, &size)
    if Pass.capacity(inboxMemory) < size.bytes {
      inboxMemory = nil
      // The share of a worker among several differs from batch to batch: some room saves asking again.
      let room = group.size > 1 ? size.bytes / 8 : 0
      inboxMemory = try Region(bytes: size.bytes + room, for: "the rows of a worker's experts")
    }
    var arena = Arena(over: Pass.base(inboxMemory))
    inbox = Inbox(shape, store.moves, shadows.count, rounds, at: group.rank, overWire: overWire, &arena)
    inbox.arrivals.sort(store.moves, shadows, at: group.rank, rounds, arePacked: overWire)
  }

  /// Finds the rows of all workers, and the parameters of shadowed experts: in their own memory, or in what came from
  /// them over the transport.
  private func lookAround(_ all: UnsafeMutablePointer<Notice>) {
    let (rank, d, moves) = (group.rank, shape.model, store.moves)
    func floats(_ worker: Int, _ index: Int) -> UnsafeMutablePointer<Float>? {
      UnsafeMutablePointer(bitPattern: UInt(all[worker].words[index]))
    }
    var before = 0
    for worker in 0..<group.size {
      let place = inbox.sources + worker
      if worker == rank || group.peers.shareMemory {
        place.initialize(
          to: Source(
            tokens: floats(worker, 0), grads: floats(worker, 1),
            slots: UnsafePointer(bitPattern: UInt(all[worker].words[2])), rows: floats(worker, 5),
            weights: floats(worker, 4), gradWeights: floats(worker, 6), shape))
      } else {
        place.initialize(
          to: Source(
            tokens: inbox.tokens + before * d, grads: inbox.grads + before * d, rows: inbox.results + before * d, shape)
        )
        before += moves.rows(from: worker, to: rank)
      }
    }
    for (index, expert) in shadows.enumerated() {
      let owner = moves.traffic.owner(of: expert)
      // Blocks of parameters have one form on all workers.
      let theirs = expert - moves.traffic.owned(by: owner).lowerBound
      let values =
        group.peers.shareMemory
        ? ExpertTensors(layer!.values, theirs, shape, shift: floats(owner, 7)! - layer!.values.base)
        : ExpertTensors(copy: inbox.copyValues + index * inbox.copyFloats, shape)
      let grads = ExpertTensors(copy: inbox.copyGrads + index * inbox.copyFloats, shape)
      (inbox.copies + index).initialize(to: (values: values, grads: grads))
    }
    copyGrads.removeAll(keepingCapacity: true)
    for worker in 0..<group.size where worker != rank && group.peers.shareMemory && !shadows.isEmpty {
      copyGrads.append(floats(worker, 8)!)
    }
    if !group.peers.shareMemory && !shadows.isEmpty { copyGrads.append(inbox.copySums) }
  }

  /// Has the owners of shadowed experts add what all workers made of their gradients.
  private func gatherCopyGrads() throws(Failure) {
    guard !shadows.isEmpty else { return }
    run(.addCopyGrads, shadows.count)
    if group.peers.shareMemory { try group.peers.meet() }
  }

  /// Rows to their experts, through them, and back.
  ///
  /// Where workers share memory, experts read and write rows where they stand. Over a transport rows are packed and sent,
  /// computed and sent back: coarsely one after the other, or else each as soon as it can.
  private func throughExperts(send: Job, arriving: UnsafeMutablePointer<Float>, compute: Job) throws(Failure) {
    guard let peers = group.peers as? WirePeers else {
      run(compute, arrivedRows)
      return try group.peers.meet()
    }
    do throws(Failure) {
      run(send, count)
      // Steps: rows there, copies there; rows back, gradients of copies back.
      for round in 0..<rounds.count { addArrivals(peers, round, arriving, step: isOverlapped ? round : 0) }
      if compute == .expertsForward || fetchesAgain {
        run(.packCopies, shadows.count)
        addCopies(peers, step: rounds.count)
      }
      beginJourney(computing: compute)
      defer { journey.end() }
      if isOverlapped {
        addWayBack(peers, compute)
        try moveWhileComputing(peers.wire)
      } else {
        try peers.wire.run(journey)
        run(compute, arrivedRows)
        addWayBack(peers, compute)
        try peers.wire.run(journey)
      }
    } catch {
      isEntangled = group.isEntangled
      throw error
    }
  }

  private func addWayBack(_ peers: WirePeers, _ compute: Job) {
    let step = rounds.count + shadows.count
    for round in 0..<rounds.count { addReturns(peers, round, step: isOverlapped ? step + round : step) }
    if compute == .expertsBackward { addReductions(peers, step: step + rounds.count) }
  }

  private func beginJourney(computing job: Job) {
    journey.begin(
      inbox, rounds, shadows.map { store.traffic.owner(of: $0) }, at: group.rank, experts: layer!.owned.count,
      rowTasks: PassContext.rowTasks(blocks, threads: team.threads), weightTasks: PassContext.weightTasks(shape),
      rowBytes: shape.model * MemoryLayout<Float>.stride, fetches: job == .expertsForward || fetchesAgain)
    self.job = job
  }

  private func moveWhileComputing(_ wire: Wire) throws(Failure) {
    if blocks > 0 { team.begin(self) }
    defer {
      if blocks > 0 { team.finish() }
    }
    do throws(Failure) {
      try wire.run(journey)
    } catch {
      journey.cut()
      throw error
    }
  }

  /// The parameters of every shadowed expert along the chain that begins at its owner.
  private func addCopies(_ peers: WirePeers, step: Int) {
    let (before, after) = peers.neighbours
    let bytes = inbox.copyFloats * MemoryLayout<Float>.stride
    for (index, expert) in shadows.enumerated() {
      let owner = store.traffic.owner(of: expert)
      let copy = inbox.copyValues + index * inbox.copyFloats
      var source = -1
      if owner != peers.rank {
        source = peers.wire.receive(copy, bytes, from: before, step: step + index, tag: Journey.copy(index, group.size))
      }
      if after != owner { peers.wire.send(copy, bytes, to: after, following: source, step: step + index) }
    }
  }

  /// The gradients of every shadowed expert along the chain that ends at its owner: each adds its own to what comes.
  private func addReductions(_ peers: WirePeers, step: Int) {
    let (before, after) = peers.neighbours
    let bytes = inbox.copyFloats * MemoryLayout<Float>.stride
    for (index, expert) in shadows.enumerated() {
      let owner = store.traffic.owner(of: expert)
      let tag = Journey.reduction(index, shadows.count, group.size)
      let sums = inbox.copySums + index * inbox.copyFloats
      if before == owner {
        peers.wire.send(inbox.copyGrads + index * inbox.copyFloats, bytes, to: after, step: step + index, tag: tag)
      } else {
        let source = peers.wire.receive(sums, bytes, from: before, step: step + index, tag: tag)
        if owner != peers.rank { peers.wire.send(sums, bytes, to: after, following: source, step: step + index) }
      }
    }
  }

  /// Rows of this worker to the experts of others, and of others to its own.
  private func addArrivals(
    _ peers: WirePeers, _ round: Int, _ arriving: UnsafeMutablePointer<Float>, step: Int
  ) {
    let (sources, targets) = partners(round)
    peers.forEachOther { peer in
      guard sources.contains(peer) else { return }
      receive(
        peers, arriving + arrivingBefore(peer) * shape.model, store.moves.rows(from: peer, to: peers.rank), peer, step,
        tag: Journey.arrival(peer))
    }
    peers.forEachOther { peer in
      guard targets.contains(peer) else { return }
      send(
        peers, inbox.outgoing + leavingBefore(peer) * shape.model, store.moves.rows(from: peers.rank, to: peer), peer,
        step, tag: -1)
    }
  }

  /// What became of them, the same way back.
  private func addReturns(_ peers: WirePeers, _ round: Int, step: Int) {
    let (sources, targets) = partners(round)
    peers.forEachOther { peer in
      guard targets.contains(peer) else { return }
      // What this worker sends to another one is in one piece, if it is anything.
      let owned = store.traffic.owned(by: peer)
      let first = owned.first { !store.moves.shadowed[$0] }.map { store.routing.firstRow[$0] } ?? 0
      receive(
        peers, store.rows + first * shape.model, store.moves.rows(from: peers.rank, to: peer), peer, step, tag: -1)
    }
    peers.forEachOther { peer in
      guard sources.contains(peer) else { return }
      send(
        peers, inbox.results + arrivingBefore(peer) * shape.model, store.moves.rows(from: peer, to: peers.rank), peer,
        step, tag: Journey.giveBack(peer, group.size))
    }
  }

  private func partners(_ round: Int) -> (sources: ArraySlice<Int>, targets: ArraySlice<Int>) {
    (rounds.sources(of: group.rank, in: round), rounds.targets(of: group.rank, in: round))
  }

  private func receive(
    _ peers: WirePeers, _ to: UnsafeMutablePointer<Float>, _ rows: Int, _ peer: Int, _ step: Int, tag: Int
  ) {
    guard rows > 0 else { return }
    peers.wire.receive(to, rows * shape.model * MemoryLayout<Float>.stride, from: peer, step: step, tag: tag)
  }

  private func send(
    _ peers: WirePeers, _ from: UnsafeMutablePointer<Float>, _ rows: Int, _ peer: Int, _ step: Int, tag: Int
  ) {
    guard rows > 0 else { return }
    peers.wire.send(from, rows * shape.model * MemoryLayout<Float>.stride, to: peer, step: step, tag: tag)
  }

  /// Rows that come from workers before `peer`.
  private func arrivingBefore(_ peer: Int) -> Int {
    (0..<peer).reduce(0) { $0 + ($1 == group.rank ? 0 : store.moves.rows(from: $1, to: group.rank)) }
  }

  /// Rows that leave for workers before `peer`.
  private func leavingBefore(_ peer: Int) -> Int {
    (0..<peer).reduce(0) { $0 + ($1 == group.rank ? 0 : store.moves.rows(from: group.rank, to: $1)) }
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

  /// Has the team do a job that is empty where `size` is 0.
  private func run(_ job: Job, _ size: Int) {
    guard size > 0 else { return }
    self.job = job
    team.run(self)
  }

  package override func work(thread: Int) {
    let layer = layer!
    let context = PassContext(
      thread: thread, team: team, layer: layer, store: store, inbox: inbox, journey: journey,
      workspace: workspace, desk: workspace.desk(thread), tokens: tokens, count: count)
    switch job {
    case .gate: context.chooseExperts()
    case .packCopies: context.packCopies(shadows)
    case .clearCopyGrads: context.clearCopyGrads(shadows)
    case .addCopyGrads: context.addCopyGrads(shadows, from: copyGrads)
    case .send: context.packTokens()
    case .expertsForward: context.forward(blocks: blocks)
    case .combineForward: context.combine(into: output!)
    case .sendGrads: context.packGrads(gradOutput!)
    case .expertsBackward: context.backward(blocks: blocks)
    case .combineBackward:
      if isGated { context.backwardThroughGate(into: gradTokens!) } else { context.combineGrads(into: gradTokens!) }
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

  private static func capacity(_ region: borrowing Region?) -> Int {
    switch region {
    case .some(let region): region.bytes
    case .none: 0
    }
  }

  private static func base(_ region: borrowing Region?) -> UnsafeMutableRawPointer {
    switch region {
    case .some(let region): region.base
    case .none: preconditionFailure("a pass has memory by now")
    }
  }
}

/// One thread's view of a running pass; the stages are its methods.
struct PassContext {
  let thread: Int
  let team: Team
  let layer: Layer
  let store: Pass.Store
  /// There from forward on.
  let inbox: Inbox!
  let journey: Journey
  let workspace: Workspace
  let desk: Workspace.Desk
  /// [n, d]; nil only where n is 0.
  let tokens: UnsafePointer<Float>!
  let count: Int

  var shape: Shape { layer.shape }

  @inline(__always) func source(_ row: Int) -> (Source, Int) {
    let origin = inbox.arrivals.origins[row]
    return (inbox.sources[Int(origin.worker)], Int(origin.row))
  }
  /// A row that this worker's experts compute: its token, its output's gradient, and where its result goes.
  @inline(__always) func tokenRow(_ row: Int) -> UnsafePointer<Float> {
    let (source, at) = source(row)
    return source.token(at)
  }
  @inline(__always) func gradRow(_ row: Int) -> UnsafePointer<Float> {
    let (source, at) = source(row)
    return source.grad(at)
  }
  @inline(__always) func resultRow(_ row: Int) -> UnsafeMutablePointer<Float> {
    let (source, at) = source(row)
    return source.result(at)
  }
}
