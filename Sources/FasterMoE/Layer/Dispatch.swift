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
    words.rows = UnsafeRawPointer(results)
    words.gradWeights = UnsafeRawPointer(store.gradWeights)
    words.values = UnsafeRawPointer(layer!.values.base)
    words.copyGrads = UnsafeRawPointer(inbox?.copyGrads)
    return words
  }

  /// Rows that come to this worker's experts.
  var arrivedRows: Int { inbox.arrivals.firstRow[rounds.count * layer!.owned.count + shadows.count] }

  /// Cuts the rows that `steps` compute into blocks, in their order.
  private func cutBlocks(_ steps: [Step]) {
    let experts = layer!.owned.count
    inbox.latest.update(repeating: -1, count: experts + shadows.count)
    blocks = 0
    turns.removeAll(keepingCapacity: true)
    for step in steps {
      switch step.action {
      case .compute(let round):
        inbox.roundBlocks[round] = cut(inbox.arrivals.firstRow + round * experts, experts, firstExpert: 0)
      case .computeShadow(let index):
        inbox.shadowBlocks[index] = cut(
          inbox.arrivals.firstRow + rounds.count * experts + index, 1, firstExpert: experts + index)
      case .gradWeights where plan.overlaps:
        // In the order in which blocks were cut: each waits for the one before of its expert.
        for other in steps {
          if case .compute(let round) = other.action { turns.append(.weights(inbox.roundBlocks[round])) }
        }
      case .gradShadowWeights(let index) where plan.overlaps: turns.append(.weights(inbox.shadowBlocks[index]))
      default: break
      }
    }
    if !plan.overlaps { turns.append(.both(0..<blocks)) }
    for block in 0..<blocks {
      (inbox.rowTasksDone + block).initialize(to: Atomic(0))
      (inbox.weightTasksDone + block).initialize(to: Atomic(0))
    }
  }

  private func cut(_ firstRow: UnsafeMutablePointer<Int>, _ experts: Int, firstExpert: Int) -> Range<Int> {
    let first = blocks
    blocks += Block.cut(
      firstRow: firstRow, experts: experts, firstExpert: firstExpert, inOrder: !group.peers.shareMemory,
      into: inbox.blocks, behind: blocks, latest: inbox.latest)
    if plan.overlaps { turns.append(.rows(first..<blocks)) }
    return first..<blocks
  }

  /// Room for the rows that will come to this worker's experts, and their list.
  func openInbox() throws(Failure) {
    let overWire = !group.peers.shareMemory
    store.moves.shadow(shadows)
    guard store.moves.rows(at: group.rank) <= Int(Int32.max) else {
      throw Failure(.argument, "\(store.moves.rows(at: group.rank)) rows to compute here do not fit 31 bits")
    }
    store.routing.sort(slots: count * shape.choices, experts: shape.experts, store.moves)
    // Dropped slots have no row that would write theirs.
    store.gradWeights.update(repeating: 0, count: count * shape.choices)
    // All in one round stand as one worker would have sorted them; in more, neighbours are in one group.
    rounds =
      plan.groups.count == 1
      ? Rounds(plan.groups, ranks: group.ranks, seats: group.ranks)
      : Rounds(plan.groups, ranks: group.leaves, seats: group.seats)
    try recording.reserve(
      blocks: Block.mostBlocks(
        slots: store.moves.rows(at: group.rank), experts: rounds.count * layer!.owned.count + shadows.count),
      peers: overWire ? group.size - 1 : 0, shadows: overWire ? shadows.count : 0)
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
    let owned = store.traffic.owned(by: group.rank)
    for expert in owned { inbox.rowsInStep[expert - owned.lowerBound] = store.traffic.rows(for: expert) }
    for (index, expert) in shadows.enumerated() {
      inbox.rowsInStep[owned.count + index] = store.traffic.rows(for: expert)
    }
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
            gradWeights: floats(all[worker].words.gradWeights), isDirect: store.isDirect, shape))
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
      guard owner != rank else {
        (inbox.copies + index).initialize(
          to: (
            values: ExpertTensors(layer!.values, theirs, shape), grads: ExpertTensors(layer!.gradients, theirs, shape)
          ))
        continue
      }
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
    run(.addCopyGrads, floats: copyGrads.count * shadows.count * inbox.copyFloats)
    if group.peers.shareMemory { try meet(as: .meetCopies) }
  }

  /// Rows to their experts, through them, and back, in the order of `steps`.
  ///
  /// Where workers share memory, experts read and write rows where they stand. Over a transport rows are packed and sent,
  /// computed and sent back: coarsely one after the other, or else each as soon as its step has come.
  func throughExperts(
    _ steps: [Step], send: Job, arriving: UnsafeMutablePointer<Float>, compute: Job
  ) throws(Failure) {
    cutBlocks(steps)
    guard let peers = group.peers as? WirePeers else {
      run(compute, floats: arrivedRows * shape.model * shape.hidden)
      return try meet(as: .meetExperts)
    }
    do throws(Failure) {
      run(send, floats: floatsOfRows)
      let fetches = Plan.fetches(steps)
      if fetches { run(.packCopies, floats: shadows.count * inbox.copyFloats) }
      beginJourney(compute, fetches: fetches)
      defer { journey.end() }
      job = compute
      if plan.overlaps {
        for index in steps.indices { add(peers, steps[index].action, arriving, step: index) }
        try moveWhileComputing(peers.wire)
      } else {
        let turn = steps.firstIndex { !$0.action.communicates } ?? steps.count
        for index in 0..<turn { add(peers, steps[index].action, arriving, step: index) }
        try peers.wire.run(journey)
        run(compute, floats: arrivedRows * shape.model * shape.hidden)
        for index in turn..<steps.count { add(peers, steps[index].action, arriving, step: index) }
        try peers.wire.run(journey)
      }
    } catch {
      isEntangled = group.isEntangled
      throw error
    }
  }

  private func add(_ peers: WirePeers, _ action: Action, _ arriving: UnsafeMutablePointer<Float>, step: Int) {
    switch action {
    case .send(let round): addArrivals(peers, round, arriving, step: step)
    case .fetch(let index): addCopy(peers, index, step: step)
    case .giveBack(let round): addReturns(peers, round, step: step)
    case .reduce(let index): addReduction(peers, index, step: step)
    case .compute, .computeShadow, .gradWeights, .gradShadowWeights: break
    }
  }

  /// Waits until all ranks of this process are done.
  private func meet(as kind: Recording.Kind) throws(Failure) {
    wasReady = .now
    try group.peers.meet()
    recordMeeting(kind)
  }

  private func beginJourney(_ compute: Job, fetches: Bool) {
    let cut = Cut(blocks: blocks, threads: team.threads)
    journey.begin(
      inbox, rounds, shadows.map { store.traffic.owner(of: $0) }, at: group.rank, experts: layer!.owned.count,
      rowTasks: compute == .expertsForward ? cut.forwardTasks : cut.backwardTasks,
      weightTasks: PassContext.weightTasks(shape),
      rowBytes: shape.model * MemoryLayout<Float>.stride, fetches: fetches)
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

  /// The parameters of a shadowed expert along the chain that begins at its owner.
  private func addCopy(_ peers: WirePeers, _ index: Int, step: Int) {
    let (before, after) = peers.neighbours
    let bytes = inbox.copyFloats * MemoryLayout<Float>.stride
    let owner = store.traffic.owner(of: shadows[index])
    let copy = inbox.copyValues + index * inbox.copyFloats
    var source = -1
    if owner != peers.rank {
      source = peers.wire.receive(
        copy, bytes, from: before, step: step, tag: Journey.copy(index, group.size),
        times: record(.fetch, index, .from(before), bytes: bytes))
    }
    if after != owner {
      peers.wire.send(
        copy, bytes, to: after, following: source, step: step, times: record(.fetch, index, .to(after), bytes: bytes))
    }
  }

  /// The gradients of a shadowed expert along the chain that ends at its owner: each adds its own to what comes.
  private func addReduction(_ peers: WirePeers, _ index: Int, step: Int) {
    let (before, after) = peers.neighbours
    let bytes = inbox.copyFloats * MemoryLayout<Float>.stride
    let owner = store.traffic.owner(of: shadows[index])
    let tag = Journey.reduction(index, shadows.count, group.size)
    let sums = inbox.copySums + index * inbox.copyFloats
    if before == owner {
      peers.wire.send(
        inbox.copyGrads + index * inbox.copyFloats, bytes, to: after, step: step, tag: tag,
        times: record(.reduce, index, .to(after), bytes: bytes))
    } else {
      let source = peers.wire.receive(
        sums, bytes, from: before, step: step, tag: tag, times: record(.reduce, index, .from(before), bytes: bytes))
      if owner != peers.rank {
        peers.wire.send(
          sums, bytes, to: after, following: source, step: step,
          times: record(.reduce, index, .to(after), bytes: bytes))
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
        tag: Journey.arrival(peer), .send, round)
    }
    peers.forEachOther { peer in
      guard targets.contains(peer) else { return }
      send(
        peers, inbox.outgoing + leavingBefore(peer) * shape.model, store.moves.rows(from: peers.rank, to: peer), peer,
        step, tag: -1, .send, round)
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
        peers, store.rows + first * shape.model, store.moves.rows(from: peers.rank, to: peer), peer, step, tag: -1,
        .giveBack, round)
    }
    peers.forEachOther { peer in
      guard sources.contains(peer) else { return }
      send(
        peers, inbox.results + arrivingBefore(peer) * shape.model, store.moves.rows(from: peer, to: peers.rank), peer,
        step, tag: Journey.giveBack(peer, group.size), .giveBack, round)
    }
  }

  private func partners(_ round: Int) -> (sources: ArraySlice<Int>, targets: ArraySlice<Int>) {
    (rounds.sources(of: group.rank, in: round), rounds.targets(of: group.rank, in: round))
  }

  private func receive(
    _ peers: WirePeers, _ to: UnsafeMutablePointer<Float>, _ rows: Int, _ peer: Int, _ step: Int, tag: Int,
    _ kind: Recording.Kind, _ round: Int
  ) {
    guard rows > 0 else { return }
    let bytes = rows * shape.model * MemoryLayout<Float>.stride
    peers.wire.receive(
      to, bytes, from: peer, step: step, tag: tag, times: record(kind, round, .from(peer), rows: rows, bytes: bytes))
  }

  private func send(
    _ peers: WirePeers, _ from: UnsafeMutablePointer<Float>, _ rows: Int, _ peer: Int, _ step: Int, tag: Int,
    _ kind: Recording.Kind, _ round: Int
  ) {
    guard rows > 0 else { return }
    let bytes = rows * shape.model * MemoryLayout<Float>.stride
    peers.wire.send(
      from, bytes, to: peer, step: step, tag: tag, times: record(kind, round, .to(peer), rows: rows, bytes: bytes))
  }

  /// Where a stream's times go; `place` is its round, or the place of its expert among the shadows.
  private func record(_ kind: Recording.Kind, _ place: Int, _ peer: Recording.Peer, rows: Int = 0, bytes: Int)
    -> UnsafeMutablePointer<Movement>?
  {
    let entry = recording.caller.add(
      Recording.Entry(
        kind: kind, peer: peer, place: Int32(place), rows: Int32(rows), bytes: bytes,
        times: Movement(from: wasReady, to: wasReady)))
    return entry.map { withUnsafeMutablePointer(to: &$0.pointee.times) { $0 } }
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
