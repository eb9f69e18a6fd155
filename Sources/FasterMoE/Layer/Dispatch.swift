import Synchronization

/// A pass between workers: which rows go where, and their way there, through the experts and back.
extension Pass {
  /// What all ranks must have in common in a call on this pass.
  func same(_ request: (UInt64, UInt64, UInt64) = (0, 0, 0)) -> Notice.Same {
    [UInt64(layer!.number), UInt64(number), request.0, request.1, request.2, 0, 0, 0]
  }

  /// Where the others find this worker's rows, if they share its memory.
  var addresses: Notice.Words {
    var words = Notice.Words()
    words.tokens = UnsafeRawPointer(tokens)
    words.gradOutput = UnsafeRawPointer(gradOutput)
    words.slots = UnsafeRawPointer(store.routing.slots)
    words.weights = UnsafeRawPointer(store.routing.weights)
    words.rows = UnsafeRawPointer(store.rows)
    words.gradWeights = UnsafeRawPointer(store.gradWeights)
    words.values = UnsafeRawPointer(layer!.values.base)
    words.copyGrads = UnsafeRawPointer(inbox?.copyGrads)
    return words
  }

  /// Whether backward does not use the copies that forward has fetched (ZeRO stage 3).
  private var fetchesAgain: Bool { request.shadowing == .everyExpert }

  /// Whether rows travel while experts compute.
  var isOverlapped: Bool { !group.peers.shareMemory && group.size > 1 && request.schedule != .coarse }

  /// Rows that come to this worker's experts.
  var arrivedRows: Int { inbox.arrivals.firstRow[rounds.count * layer!.owned.count + shadows.count] }

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
  func cutBlocks() {
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

  func clearTasks() {
    for block in 0..<blocks {
      (inbox.rowTasksDone + block).initialize(to: Atomic(0))
      (inbox.weightTasksDone + block).initialize(to: Atomic(0))
    }
  }

  /// Room for the rows that will come to this worker's experts, and their list.
  func openInbox() throws(Failure) {
    let overWire = !group.peers.shareMemory
    store.moves.shadow(shadows)
    guard store.moves.rows(at: group.rank) <= Int(Int32.max) else {
      throw Failure(.argument, "\(store.moves.rows(at: group.rank)) rows to compute here do not fit 31 bits")
    }
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
  func lookAround(_ all: UnsafeMutablePointer<Notice>) {
    let (rank, d, moves) = (group.rank, shape.model, store.moves)
    func floats(_ address: UnsafeRawPointer?) -> UnsafeMutablePointer<Float>? {
      UnsafeMutableRawPointer(mutating: address)?.assumingMemoryBound(to: Float.self)
    }
    var before = 0
    for worker in 0..<group.size {
      let place = inbox.sources + worker
      if worker == rank || group.peers.shareMemory {
        place.initialize(
          to: Source(
            tokens: floats(all[worker].words.tokens), grads: floats(all[worker].words.gradOutput),
            slots: all[worker].words.slots?.assumingMemoryBound(to: Int32.self),
            rows: floats(all[worker].words.rows), weights: floats(all[worker].words.weights),
            gradWeights: floats(all[worker].words.gradWeights), shape))
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
        ? ExpertTensors(layer!.values, theirs, shape, shift: floats(all[owner].words.values)! - layer!.values.base)
        : ExpertTensors(copy: inbox.copyValues + index * inbox.copyFloats, shape)
      let grads = ExpertTensors(copy: inbox.copyGrads + index * inbox.copyFloats, shape)
      (inbox.copies + index).initialize(to: (values: values, grads: grads))
    }
    copyGrads.removeAll(keepingCapacity: true)
    for worker in 0..<group.size where worker != rank && group.peers.shareMemory && !shadows.isEmpty {
      copyGrads.append(floats(all[worker].words.copyGrads)!)
    }
    if !group.peers.shareMemory && !shadows.isEmpty { copyGrads.append(inbox.copySums) }
  }

  /// Has the owners of shadowed experts add what all workers made of their gradients.
  func gatherCopyGrads() throws(Failure) {
    guard !shadows.isEmpty else { return }
    run(.addCopyGrads, shadows.count)
    if group.peers.shareMemory { try group.peers.meet() }
  }

  /// Rows to their experts, through them, and back.
  ///
  /// Where workers share memory, experts read and write rows where they stand. Over a transport rows are packed and sent,
  /// computed and sent back: coarsely one after the other, or else each as soon as it can.
  func throughExperts(send: Job, arriving: UnsafeMutablePointer<Float>, compute: Job) throws(Failure) {
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
}
