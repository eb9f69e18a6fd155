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
  package func seats(of group: Int) -> Range<Int> { group * size..<min((group + 1) * size, workers) }

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
  package var shadows = Shadows.late
  package var rows = Rows.ownFirst
  package var returns = Returns.afterSends

  /// Its own number for each order, below `count`.
  var number: Int { (shadows == .early ? 1 : 0) + (rows == .ownLast ? 2 : 0) + (returns == .between ? 4 : 0) }
  static let count = 8
}

extension Plan {
  /// FastMoE's: everything after everything else, nothing overlaps.
  package static func coarse(workers: Int, shadows: [Int], fetchesAgain: Bool = false) -> Plan {
    let rounds = workers > 1 ? [Action.send(round: 0)] : []
    let fetches = shadows.indices.map { Action.fetch(shadow: $0) }
    let returns = workers > 1 ? [Action.giveBack(round: 0)] : []
    var (forward, backward) = (Steps(), Steps())
    forward.inSeries(fetches + rounds + [.compute(round: 0)] + shadows.indices.map { .computeShadow($0) } + returns)
    backward.inSeries(
      (fetchesAgain ? fetches : []) + rounds + shadows.indices.flatMap { [.computeShadow($0), .gradShadowWeights($0)] }
        + [.compute(round: 0), .gradWeights] + returns + shadows.indices.map { .reduce(shadow: $0) })
    return Plan(
      groups: Groups(workers: workers, size: workers), shadows: shadows, forward: forward.list,
      backward: backward.list, overlaps: false)
  }

  /// The paper's smart schedule, its order of choice for each direction; in backward the gradients of weights come last,
  /// while rows are on their way back.
  package static func pairwise(_ groups: Groups, shadows: [Int], forward: Order, backward: Order) -> Plan {
    Plan(
      groups: groups, shadows: shadows, forward: Steps.forward(groups, shadows: shadows.count, forward).list,
      backward: Steps.backward(groups, shadows: shadows.count, backward).list, overlaps: true)
  }

  /// ZeRO stage 3: every expert is shadowed, the next ones fetched while one computes, and fetched again for backward.
  package static func everyExpert(workers: Int, experts: Int) -> Plan {
    let all = 0..<experts
    var (forward, backward) = (Steps(), Steps())
    forward.merge(all.map { .fetch(shadow: $0) }, all.map { .computeShadow($0) }, Steps.cause)
    backward.merge(
      all.flatMap { $0 == 0 ? [.fetch(shadow: 0)] : [.fetch(shadow: $0), .reduce(shadow: $0 - 1)] }
        + [.reduce(shadow: experts - 1)],
      all.flatMap { [.computeShadow($0), .gradShadowWeights($0)] }, Steps.cause)
    return Plan(
      groups: Groups(workers: workers, size: workers), shadows: Array(all), forward: forward.list,
      backward: backward.list, overlaps: true)
  }
}

/// Makes lists of steps.
struct Steps {
  private(set) var list: [Step] = []

  static func forward(_ groups: Groups, shadows: Int, _ order: Order) -> Steps {
    let copies = (0..<shadows).map { Action.computeShadow($0) }
    let fetches = (0..<shadows).map { Action.fetch(shadow: $0) }
    let rounds = computes(groups, order)
    var steps = Steps()
    switch order.shadows {
    case .early:
      steps.merge(
        fetches + exchange(groups, order, between: []), rounds.prefix(1) + copies + rounds.dropFirst(), cause)
    case .late: steps.merge(exchange(groups, order, between: fetches), rounds + copies, cause)
    }
    return steps
  }

  static func backward(_ groups: Groups, shadows: Int, _ order: Order) -> Steps {
    let copies = (0..<shadows).flatMap { [Action.computeShadow($0), .gradShadowWeights($0)] }
    let reduces = (0..<shadows).map { Action.reduce(shadow: $0) }
    let rounds = computes(groups, order)
    var steps = Steps()
    switch order.shadows {
    case .early:
      steps.merge(exchange(groups, order, between: reduces), copies + rounds + [.gradWeights], cause)
    case .late:
      steps.merge(exchange(groups, order, between: []) + reduces, rounds + copies + [.gradWeights], cause)
    }
    return steps
  }

  /// The rounds in their order.
  private static func rounds(_ groups: Groups, _ order: Order) -> [Int] {
    switch order.rows {
    case .ownFirst: Array(0..<groups.count)
    case .ownLast: Array(1..<groups.count) + [0]
    }
  }

  private static func computes(_ groups: Groups, _ order: Order) -> [Action] {
    rounds(groups, order).map { .compute(round: $0) }
  }

  /// Sends and returns; `between` stands after the last send and before what has not come back by then.
  private static func exchange(_ groups: Groups, _ order: Order, between: [Action]) -> [Action] {
    // Groups of one have nothing to exchange within.
    let moving = rounds(groups, order).filter { $0 > 0 || groups.size > 1 }
    let lag = order.returns == .between ? 2 : moving.count
    var actions: [Action] = []
    for (index, round) in moving.enumerated() {
      actions.append(.send(round: round))
      if index >= lag { actions.append(.giveBack(round: moving[index - lag])) }
    }
    return actions + between + moving.suffix(lag).map { .giveBack(round: $0) }
  }

  /// The step of the other lane that must come first.
  static func cause(of action: Action) -> Action? {
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
  /// An action waits only for a cause that is in the lists: own rows need no send, backward no second fetch.
  mutating func merge(_ communication: [Action], _ computation: [Action], _ cause: (Action) -> Action?) {
    let width = communication.count + computation.count
    list.reserveCapacity(width)
    // By action: -2 not in the lists, -1 not yet in this one, else its place.
    var places = [Int](repeating: -2, count: Action.kinds * width)
    for action in communication { places[action.number(width)] = -1 }
    for action in computation { places[action.number(width)] = -1 }
    /// Where the cause stands; nil while it is missing.
    func after(_ action: Action) -> Int? {
      guard let cause = cause(action), case let place = places[cause.number(width)], place > -2 else { return -1 }
      return place < 0 ? nil : place
    }
    func add(_ action: Action, after place: Int) {
      places[action.number(width)] = list.count
      // On the same lane it is before this one anyway.
      let isOther = place >= 0 && list[place].action.communicates != action.communicates
      list.append(Step(action: action, after: isOther ? place : -1))
    }
    var (sent, computed) = (0, 0)
    while sent < communication.count || computed < computation.count {
      if sent < communication.count, let place = after(communication[sent]) {
        add(communication[sent], after: place)
        sent += 1
      } else {
        precondition(computed < computation.count, "two lanes wait for each other")
        add(computation[computed], after: after(computation[computed])!)
        computed += 1
      }
    }
  }

  /// Each after the one before it.
  mutating func inSeries(_ actions: [Action]) {
    for action in actions {
      let isOther = list.last.map { $0.action.communicates != action.communicates } ?? false
      list.append(Step(action: action, after: isOther ? list.count - 1 : -1))
    }
  }
}
