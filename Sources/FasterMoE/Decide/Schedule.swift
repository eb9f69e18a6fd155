/// Who exchanges with whom in which round: groups of neighbouring seats that pair up in a ring (FasterMoE §4.2).
///
/// With n groups, round j = 0..<n has group a send to group (a - j) mod n and receive from group (a + j) mod n; results
/// go back the same way. Round 0 stays within the group. Where the size does not divide W, the last group is smaller.
package struct Groups: Equatable, Sendable {
  package let workers: Int
  /// Workers of each group but perhaps the last.
  package let size: Int
  /// n
  package let count: Int

  package init(workers: Int, size: Int) {
    self.workers = workers
    self.size = min(max(size, 1), workers)
    count = (workers + self.size - 1) / self.size
  }

  package func group(of seat: Int) -> Int { seat / size }
  @inline(__always) package func seats(of group: Int) -> Range<Int> {
    Range(uncheckedBounds: (group &* size, min((group &+ 1) &* size, workers)))
  }

  /// Where `group` sends in `round`.
  package func target(of group: Int, round: Int) -> Int { group >= round ? group - round : group - round + count }
  /// What it receives from in `round`.
  package func source(of group: Int, round: Int) -> Int {
    group + round < count ? group + round : group + round - count
  }
  /// The round in which one group sends to another.
  package func round(from group: Int, to other: Int) -> Int { group >= other ? group - other : group - other + count }
}

/// One thing that every worker does, in its own part of it.
package enum Action: Equatable, Sendable {
  // On the communication lane.
  /// S_j: rows of tokens, or of output gradients, to the experts of the round's target; those of its source arrive.
  case send(round: Int)
  /// The parameters of `shadows[index]` come from their owner to everyone.
  case fetch(shadow: Int)
  /// R_j: what the experts made of the round's rows goes back to its source; the own rows come back from its target.
  case giveBack(round: Int)
  /// The weight gradients of `shadows[index]` are summed over all workers at its owner.
  case reduce(shadow: Int)
  // On the computation lane.
  /// C_j: the round's rows, which stand at their experts, go through them; in backward, their gradients do.
  case compute(round: Int)
  /// The own rows of `shadows[index]` go through the fetched parameters; in backward, their gradients do.
  case computeShadow(Int)
  /// In backward: the weight gradients of all owned experts that have no shadows, from the rows of all rounds.
  case gradWeights
  /// In backward: the own part of the weight gradients of `shadows[index]`.
  case gradShadowWeights(Int)

  /// A number below kinds · `width`, its own for each action whose index is below `width`.
  fileprivate func number(_ width: Int) -> Int {
    switch self {
    case .send(let round): round
    case .fetch(let shadow): width + shadow
    case .giveBack(let round): 2 * width + round
    case .reduce(let shadow): 3 * width + shadow
    case .compute(let round): 4 * width + round
    case .computeShadow(let shadow): 5 * width + shadow
    case .gradWeights: 6 * width
    case .gradShadowWeights(let shadow): 7 * width + shadow
    }
  }
  fileprivate static let kinds = 8

  package var communicates: Bool {
    switch self {
    case .send, .fetch, .giveBack, .reduce: true
    case .compute, .computeShadow, .gradWeights, .gradShadowWeights: false
    }
  }
}

/// An action and when it may begin: after the step before it on its lane and after one step of the other lane.
package struct Step: Equatable, Sendable {
  package let action: Action
  /// The step of the other lane that this worker must have done, which stands earlier in the list; -1: none.
  package let after: Int
}

/// What all workers of a group do with one batch, decided before it moves; it is equal on all of them.
///
/// **How to play it.** A worker finds its group as `groups.group(of: seat)` and plays `forward`, later `backward`, on two
/// lanes, each in the order of the list: a step begins once the one before it on the same lane and the step `after` are
/// done here. Since both stand earlier in the list, and everyone has the same list, no worker waits for a step that its
/// peer cannot reach. A round in which nothing moves between two workers costs them nothing; both know it from the counts.
///
/// **Rows.** Those of shadowed experts never move. All others move in the round of their two workers' groups. Rows
/// between workers of one group move in round 0, a worker's own rows stay and are part of its compute(round: 0).
///
/// **Shadows.** Where backward fetches again (ZeRO stage 3), it does not use what forward has fetched. The owner uses its
/// own parameters, and adds what `reduce` brings to its gradients in the order of `shadows`.
package struct Plan: Equatable, Sendable {
  package let groups: Groups
  /// Shadowed experts in the order in which they are fetched.
  package let shadows: [Int]
  package let forward: [Step]
  package let backward: [Step]
  /// Whether one lane works while the other does; else all that comes before computing is done, then all computing.
  package let overlaps: Bool

  package var steps: Int { forward.count + backward.count }

  /// Equal for equal plans, and different for others but for a chance in 2^64 (FNV-1a): workers that came to different
  /// plans must hear of it before they wait for each other.
  package var fingerprint: UInt64 {
    var hash = 0xcbf2_9ce4_8422_2325 as UInt64
    func mix(_ number: Int) { hash = (hash ^ UInt64(bitPattern: Int64(number))) &* 0x100_0000_01b3 }
    mix(groups.size * 2 + (overlaps ? 1 : 0))
    for expert in shadows { mix(expert) }
    for step in forward { mix(step.action.number(1 << 32)) }
    for step in backward { mix(step.action.number(1 << 32)) }
    return hash
  }

  /// Whether backward does not use the copies that forward has fetched (ZeRO stage 3).
  package var fetchesAgain: Bool { Plan.fetches(backward) }

  package static func fetches(_ steps: [Step]) -> Bool {
    steps.contains { if case .fetch = $0.action { true } else { false } }
  }
}

/// In which order a schedule does what it may do in any order.
package struct Order: Equatable, Sendable {
  package enum Shadows: CaseIterable, Sendable {
    /// Forward: fetched before rows move, computed after those that are here. Backward: computed first, reduced before
    /// rows come back.
    case early
    /// Forward: fetched once all rows have been sent, computed last (the paper's). Backward: computed after the rows of
    /// all rounds, reduced last.
    case late
  }
  package enum Rows: CaseIterable, Sendable {
    /// A group's own rows first: computing need not wait for the first message (the paper's).
    case ownFirst
    /// Its own rows last: the last results have no way to go.
    case ownLast
  }
  package enum Returns: CaseIterable, Sendable {
    /// All rounds are sent before the first goes back (the paper's).
    case afterSends
    /// A round goes back once the one after the next is sent.
    case between
  }
  /// All there are; without shadows, when these move makes no difference.
  static func all(withoutShadows: Bool) -> [Order] { withoutShadows ? plain : whole }
  private static let plain = orders(of: [.late])
  private static let whole = orders(of: Shadows.allCases)
  private static func orders(of shadows: [Shadows]) -> [Order] {
    shadows.flatMap { shadows in
      Rows.allCases.flatMap { rows in Returns.allCases.map { Order(shadows: shadows, rows: rows, returns: $0) } }
    }
  }

  package var shadows = Shadows.late
  package var rows = Rows.ownFirst
  package var returns = Returns.afterSends

}

extension Plan {
  /// FastMoE's: everything after everything else, nothing overlaps.
  package static func coarse(workers: Int, shadows: [Int], fetchesAgain: Bool = false) -> Plan {
    let (groups, memory) = (Groups(workers: workers, size: workers), Scratch())
    return withExtendedLifetime(memory) {
      let lists = Steps.coarse(groups, shadows: shadows.count, fetchesAgain: fetchesAgain, in: memory)
      return Plan(
        groups: groups, shadows: shadows, forward: Array(lists.forward), backward: Array(lists.backward),
        overlaps: false)
    }
  }

  /// The paper's smart schedule, its order of choice for each direction; in backward the gradients of weights come last,
  /// while rows are on their way back.
  package static func pairwise(_ groups: Groups, shadows: [Int], forward: Order, backward: Order) -> Plan {
    let memory = Scratch()
    return withExtendedLifetime(memory) {
      Plan(
        groups: groups, shadows: shadows,
        forward: Array(Steps.forward(groups, shadows: shadows.count, forward, in: memory)),
        backward: Array(Steps.backward(groups, shadows: shadows.count, backward, in: memory)), overlaps: true)
    }
  }

  /// ZeRO stage 3: every expert is shadowed, the next ones fetched while one computes, and fetched again for backward.
  package static func everyExpert(workers: Int, experts: Int) -> Plan {
    let memory = Scratch()
    return withExtendedLifetime(memory) {
      let lists = Steps.everyExpert(experts, in: memory)
      return Plan(
        groups: Groups(workers: workers, size: workers), shadows: Array(0..<experts), forward: Array(lists.forward),
        backward: Array(lists.backward), overlaps: true)
    }
  }
}

/// Makes lists of steps, in memory that whoever asks for them lends: they are made and played by the hundred.
enum Steps {
  typealias List = UnsafeMutableBufferPointer<Step>

  static func coarse(_ groups: Groups, shadows: Int, fetchesAgain: Bool, in memory: Scratch)
    -> (forward: List, backward: List)
  {
    let moves = groups.workers > 1
    var forward = Lane(3 + 2 * shadows, in: memory)
    for shadow in 0..<shadows { forward.add(.fetch(shadow: shadow)) }
    if moves { forward.add(.send(round: 0)) }
    forward.add(.compute(round: 0))
    for shadow in 0..<shadows { forward.add(.computeShadow(shadow)) }
    if moves { forward.add(.giveBack(round: 0)) }

    var backward = Lane(4 + 4 * shadows, in: memory)
    if fetchesAgain { for shadow in 0..<shadows { backward.add(.fetch(shadow: shadow)) } }
    if moves { backward.add(.send(round: 0)) }
    backward.addCopiesWithGradients(shadows)
    backward.add(.compute(round: 0))
    backward.add(.gradWeights)
    if moves { backward.add(.giveBack(round: 0)) }
    for shadow in 0..<shadows { backward.add(.reduce(shadow: shadow)) }
    return (inSeries(forward, in: memory), inSeries(backward, in: memory))
  }

  static func forward(_ groups: Groups, shadows: Int, _ order: Order, in memory: Scratch) -> List {
    var communication = Lane(2 * groups.count + shadows, in: memory)
    var computation = Lane(groups.count + shadows, in: memory)
    func fetch(_ lane: inout Lane) { for shadow in 0..<shadows { lane.add(.fetch(shadow: shadow)) } }
    func compute(_ lane: inout Lane) { for shadow in 0..<shadows { lane.add(.computeShadow(shadow)) } }
    let isEarly = order.shadows == .early
    if isEarly { fetch(&communication) }
    communication.addExchange(groups, order) { if !isEarly { fetch(&$0) } }
    for index in 0..<groups.count {
      computation.add(.compute(round: round(index, groups, order)))
      if isEarly, index == 0 { compute(&computation) }
    }
    if !isEarly { compute(&computation) }
    return merged(communication, computation, in: memory)
  }

  static func backward(_ groups: Groups, shadows: Int, _ order: Order, in memory: Scratch) -> List {
    var communication = Lane(2 * groups.count + shadows, in: memory)
    var computation = Lane(groups.count + 2 * shadows + 1, in: memory)
    func reduce(_ lane: inout Lane) { for shadow in 0..<shadows { lane.add(.reduce(shadow: shadow)) } }
    let isEarly = order.shadows == .early
    communication.addExchange(groups, order) { if isEarly { reduce(&$0) } }
    if !isEarly { reduce(&communication) }
    if isEarly { computation.addCopiesWithGradients(shadows) }
    for index in 0..<groups.count { computation.add(.compute(round: round(index, groups, order))) }
    if !isEarly { computation.addCopiesWithGradients(shadows) }
    computation.add(.gradWeights)
    return merged(communication, computation, in: memory)
  }

  static func everyExpert(_ experts: Int, in memory: Scratch) -> (forward: List, backward: List) {
    var (fetches, computes) = (Lane(experts, in: memory), Lane(experts, in: memory))
    for expert in 0..<experts {
      fetches.add(.fetch(shadow: expert))
      computes.add(.computeShadow(expert))
    }
    var (moves, gradients) = (Lane(2 * experts, in: memory), Lane(2 * experts, in: memory))
    for expert in 0..<experts {
      moves.add(.fetch(shadow: expert))
      if expert > 0 { moves.add(.reduce(shadow: expert - 1)) }
    }
    moves.add(.reduce(shadow: experts - 1))
    gradients.addCopiesWithGradients(experts)
    return (merged(fetches, computes, in: memory), merged(moves, gradients, in: memory))
  }

  /// The rounds in their order.
  private static func round(_ index: Int, _ groups: Groups, _ order: Order) -> Int {
    switch order.rows {
    case .ownFirst: index
    case .ownLast: index + 1 < groups.count ? index + 1 : 0
    }
  }

  /// Actions one after the other.
  private struct Lane {
    let actions: UnsafeMutableBufferPointer<Action>
    private(set) var count = 0

    /// Has room for `most`.
    init(_ most: Int, in memory: Scratch) { actions = memory.take(most) }

    mutating func add(_ action: Action) {
      actions[count] = action
      count += 1
    }

    mutating func addCopiesWithGradients(_ shadows: Int) {
      for shadow in 0..<shadows {
        add(.computeShadow(shadow))
        add(.gradShadowWeights(shadow))
      }
    }

    /// Sends and returns; what `between` adds stands after the last send and before what has not come back by then.
    mutating func addExchange(_ groups: Groups, _ order: Order, between: (inout Lane) -> Void) {
      // Groups of one have nothing to exchange within.
      let moving = groups.size > 1 ? groups.count : groups.count - 1
      let skipped = groups.size == 1 && order.rows == .ownFirst ? 1 : 0
      func moved(_ index: Int) -> Int { round(skipped + index, groups, order) }
      let lag = order.returns == .between ? 2 : moving
      for index in 0..<moving {
        add(.send(round: moved(index)))
        if index >= lag { add(.giveBack(round: moved(index - lag))) }
      }
      between(&self)
      for index in max(0, moving - lag)..<moving { add(.giveBack(round: moved(index))) }
    }
  }

  /// The step of the other lane that must come first.
  private static func cause(of action: Action) -> Action? {
    switch action {
    case .send, .fetch, .gradWeights, .gradShadowWeights: nil
    case .giveBack(let round): .compute(round: round)
    case .reduce(let shadow): .gradShadowWeights(shadow)
    case .compute(let round): .send(round: round)
    case .computeShadow(let shadow): .fetch(shadow: shadow)
    }
  }

  /// One list of two lanes, every step after what it waits for and communication as early as that allows.
  ///
  /// An action waits only for a cause that is in the lanes: own rows need no send, backward no second fetch.
  private static func merged(_ communication: Lane, _ computation: Lane, in memory: Scratch) -> List {
    let width = communication.count + computation.count
    let list: List = memory.take(width)
    // By action: -2 not in the lanes, -1 not yet in the list, else its place there.
    let places = memory.take(Action.kinds * width, of: -2 as Int32)
    for index in 0..<communication.count { places[communication.actions[index].number(width)] = -1 }
    for index in 0..<computation.count { places[computation.actions[index].number(width)] = -1 }
    /// Where the cause stands, -2 if there is none; nil while it is missing.
    func after(_ action: Action) -> Int? {
      guard let cause = cause(of: action), case let place = places[cause.number(width)], place > -2 else { return -2 }
      return place < 0 ? nil : Int(place)
    }
    var (sent, computed) = (0, 0)
    for next in 0..<width {
      let (action, cause): (Action, Int)
      if sent < communication.count, let place = after(communication.actions[sent]) {
        (action, cause) = (communication.actions[sent], place)
        sent += 1
      } else {
        precondition(computed < computation.count, "two lanes wait for each other")
        (action, cause) = (computation.actions[computed], after(computation.actions[computed])!)
        computed += 1
      }
      places[action.number(width)] = Int32(next)
      // On the same lane it is before this one anyway.
      let isOther = cause >= 0 && list[cause].action.communicates != action.communicates
      list[next] = Step(action: action, after: isOther ? cause : -1)
    }
    return list
  }

  /// Each after the one before it.
  private static func inSeries(_ lane: Lane, in memory: Scratch) -> List {
    let list: List = memory.take(lane.count)
    for next in 0..<lane.count {
      let isOther = next > 0 && lane.actions[next - 1].communicates != lane.actions[next].communicates
      list[next] = Step(action: lane.actions[next], after: isOther ? next - 1 : -1)
    }
    return list
  }
}
