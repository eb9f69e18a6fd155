import Glibc

/// What ran when in a pass, beside what was expected, in Chrome's trace form: Perfetto and chrome://tracing open it.
///
/// A rank is two processes, measured and predicted; a process has a thread for each lane. Pieces of one lane do not overlap.
/// Times are microseconds of the host's monotonic clock, so those of all ranks on one host compare.
package struct Trace: Encodable {
  struct Event: Encodable {
    let name: String
    /// "X": a piece of time, "i": a moment, "M": the name of a process or a lane.
    let ph: String
    let pid: Int
    var tid: Int?
    var cat: Category?
    /// Microseconds.
    var ts: Double?
    var dur: Double?
    /// How far a moment is drawn; "t": over its lane.
    var s: String?
    var args: Arguments?
  }
  enum Category: String, Encodable { case call, communication, computation }

  /// What is known of a piece.
  struct Arguments: Encodable, Equatable {
    var trip: Direction?
    var expert: Int?
    /// Whether the expert is another worker's, of which this one has a copy.
    var shadow: Bool?
    var round: Int?
    /// At the other end.
    var rank: Int?
    var rows: Int?
    var bytes: Int?
    /// How long this rank would have gone on already and the other end was not yet there.
    var waited: Double?
    var leftOut: Int?
    var name: String?
    var sortIndex: Int?
    enum CodingKeys: String, CodingKey {
      case trip, expert, shadow, round, rank, rows, bytes, name
      case waited = "waited_us"
      case leftOut = "left_out"
      case sortIndex = "sort_index"
    }
  }
  enum Direction: String, Encodable { case gate, forward, backward }

  let displayTimeUnit = "ms"
  private(set) var otherData = [
    "clock": "CLOCK_MONOTONIC of the host in microseconds; ranks on one host compare, those of several do not"
  ]
  private(set) var traceEvents: [Event] = []
  enum CodingKeys: CodingKey { case displayTimeUnit, otherData, traceEvents }
  /// Pieces that found their lane full.
  private(set) var leftOut = 0

  // Processes and lanes, 1 or more: viewers keep 0 for themselves.
  static func measured(_ rank: Int) -> Int { 2 * rank + 1 }
  static func predicted(_ rank: Int) -> Int { 2 * rank + 2 }
  private static let calls = 1
  /// What all ranks do together.
  private static let communication = 2
  private static let (predictedOut, predictedIn, predictedComputation) = (2, 3, 4)
  private static func stream(_ peer: Recording.Peer) -> Int {
    switch peer {
    case .none: communication
    case .to(let rank): 2 * rank + 3
    case .from(let rank): 2 * rank + 4
    }
  }

  // MARK: Measured

  /// Of a pass that has gone forward at least.
  init(_ pass: Pass) {
    let process = Trace.measured(pass.group.rank)
    name(process: process, "rank \(pass.group.rank), measured")
    var named: Set<Int> = []
    func lane(_ number: Int, _ words: @autoclosure () -> String) -> Int {
      if named.insert(number).inserted { name(lane: number, of: process, words()) }
      return number
    }
    let entries = pass.recording.caller.entries
    let forward = entries.last { $0.kind == .forwardCall }!.times
    let backward = entries.last { $0.kind == .backwardCall }?.times
    func trip(_ entry: Recording.Entry) -> Direction {
      if let backward, entry.times.end > backward.begin { return .backward }
      return entry.times.end > forward.begin ? .forward : .gate
    }

    /// When the last stream of each lane has come through: those behind it had to wait for it.
    var ends: [Int: Seconds] = [:]
    for entry in entries {
      let (words, category) = Trace.words(entry, pass)
      var arguments = Arguments(trip: trip(entry))
      if category == .call {
        add(words, .call, lane(Trace.calls, "calls"), process, entry.times.begin, entry.times.end, arguments)
        continue
      }
      let peer =
        switch entry.peer {
        case .none: "all ranks"
        case .to(let rank): "to rank \(rank)"
        case .from(let rank): "from rank \(rank)"
        }
      let number = lane(Trace.stream(entry.peer), "communication, \(peer)")
      switch entry.peer {
      case .none: break
      case .to(let rank), .from(let rank):
        arguments.rank = rank
        arguments.bytes = entry.bytes
        arguments.waited = max(0, Trace.microseconds(Seconds(entry.times.begin.value - entry.times.asked.value)))
      }
      switch entry.kind {
      case .send, .giveBack: (arguments.round, arguments.rows) = (Int(entry.place), Int(entry.rows))
      case .fetch, .reduce: arguments.expert = pass.shadows[Int(entry.place)]
      default: break
      }
      let begin = max(entry.times.begin, ends[number] ?? entry.times.begin)
      let end = max(begin, entry.times.end)
      ends[number] = end
      add(words, .communication, number, process, begin, end, arguments)
    }
    addLeftOut(pass.recording.caller, lane(Trace.calls, "calls"), process)

    let threads = pass.team.threads
    for thread in 0..<threads {
      let own = pass.recording.lane(thread)
      guard !own.entries.isEmpty else { continue }
      let number = lane(
        2 * pass.group.size + 3 + thread, threads == 1 ? "computation" : "computation, thread \(thread)")
      for entry in own.entries {
        var arguments = Arguments(trip: trip(entry))
        if let (expert, isShadow, round) = pass.task(entry) {
          (arguments.expert, arguments.shadow, arguments.round) = (expert, isShadow ? true : nil, round)
          arguments.rows = entry.rows > 0 ? Int(entry.rows) : nil
        }
        add(
          Trace.words(entry, pass).words, .computation, number, process, entry.times.begin, entry.times.end, arguments)
      }
      addLeftOut(own, number, process)
    }
    if leftOut > 0 { otherData["left_out"] = "\(leftOut) pieces, as lanes were full; each lane says where" }

    guard let (plan, cluster) = pass.prediction else { return }
    let forecast = Forecast(plan, pass.store.traffic, pass.shape, on: cluster, of: pass.group.rank)
    // Ranks have met when work begins; a rank alone has nobody to meet.
    let started = entries.last { $0.kind == .meetForward }?.times.end ?? forward.begin
    let turned = entries.last { $0.kind == .meetBackward }?.times.end ?? backward?.begin
    add(
      forecast, plan, rowBytes: pass.shape.rowBytes, of: pass.group.rank, forward: started, backward: turned)
  }

  /// Of a plan that nobody has played, as some ranks would; both trips begin with all ranks together.
  package static func write(
    _ plan: Plan, _ traffic: Traffic, _ shape: Shape, on cluster: Cluster, of ranks: Range<Int>,
    to path: UnsafePointer<CChar>
  ) throws(Failure) {
    var trace = Trace()
    trace.otherData = ["clock": "microseconds from the beginning of the step"]
    for rank in ranks {
      let forecast = Forecast(plan, traffic, shape, on: cluster, of: rank)
      trace.add(
        forecast, plan, rowBytes: shape.rowBytes, of: rank, forward: Seconds(0), backward: forecast.forward.seconds)
    }
    try Documents.write(trace, to: path)
  }

  private init() {}

  /// What each entry of a recording may take on its way into a file, the plan's steps beside it; half of that was counted.
  fileprivate static let roomBytes = 12 << 10

  private static func words(_ entry: Recording.Entry, _ pass: Pass) -> (words: String, category: Category) {
    let way =
      switch entry.peer {
      case .none: ""
      case .to(let rank): "→ rank \(rank)"
      case .from(let rank): "← rank \(rank)"
      }
    func expert(_ words: String = "expert") -> String {
      guard let (expert, isShadow, _) = pass.task(entry) else { return words }
      return "\(isShadow ? "shadow of expert" : "expert") \(expert)"
    }
    func rows() -> String { entry.rows > 0 ? "\(entry.rows) rows" : "some columns of its rows" }
    return switch entry.kind {
    case .gateCall: ("gate", .call)
    case .routeCall: ("route", .call)
    case .planCall: ("plan", .call)
    case .forwardCall: ("forward", .call)
    case .backwardCall: ("backward", .call)
    case .meetTokens: ("all ranks meet for gate or route", .communication)
    case .meetCounts: ("all ranks exchange counts", .communication)
    case .meetForward: ("all ranks meet for forward", .communication)
    case .meetBackward: ("all ranks meet for backward", .communication)
    case .meetExperts: ("all ranks' experts finish", .communication)
    case .meetCopies: ("all ranks' gradients of shadows finish", .communication)
    case .send: ("S round \(entry.place) \(way), \(entry.rows) rows", .communication)
    case .giveBack: ("R round \(entry.place) \(way), \(entry.rows) rows", .communication)
    case .fetch: ("fetch expert \(pass.shadows[Int(entry.place)]) \(way)", .communication)
    case .reduce: ("reduce gradients of expert \(pass.shadows[Int(entry.place)]) \(way)", .communication)
    case .gate: ("gate", .computation)
    case .packRows: ("pack rows", .computation)
    case .packCopies: ("pack shadowed experts", .computation)
    case .clearGrads: ("clear gradients", .computation)
    case .addCopyGrads: ("add gradients of shadows", .computation)
    case .combine: ("combine", .computation)
    case .combineGrads: (pass.isGated ? "combine and back through the gate" : "combine", .computation)
    case .gateGrads: ("gate's gradients", .computation)
    case .experts: ("C \(expert()), \(rows())", .computation)
    case .expertGrads: ("C \(expert()), gradients of \(rows())", .computation)
    case .weightGrads: ("W \(expert()), weight gradients of \(entry.rows) rows", .computation)
    }
  }

  private mutating func addLeftOut(_ lane: Recording.Lane, _ number: Int, _ process: Int) {
    guard lane.leftOut > 0 else { return }
    leftOut += lane.leftOut
    traceEvents.append(
      Event(
        name: "lane full: \(lane.leftOut) pieces left out from here on", ph: "i", pid: process, tid: number,
        ts: Trace.microseconds(lane.entries.last?.times.end ?? Seconds(0)), s: "t",
        args: Arguments(leftOut: lane.leftOut)))
  }

  // MARK: Predicted

  private mutating func add(
    _ forecast: Forecast, _ plan: Plan, rowBytes: Bytes, of rank: Int, forward: Seconds, backward: Seconds?
  ) {
    let process = Trace.predicted(rank)
    name(process: process, "rank \(rank), predicted")
    name(lane: Trace.calls, of: process, "calls")
    name(lane: Trace.predictedOut, of: process, "communication, to others")
    name(lane: Trace.predictedIn, of: process, "communication, from others")
    name(lane: Trace.predictedComputation, of: process, "computation")
    var free = Seconds(0)
    for (trip, direction, start) in [(forecast.forward, .forward, forward), (forecast.backward, .backward, backward)]
      as [(Forecast.Trip, Direction, Seconds?)]
    {
      // Not before what was predicted before it is over.
      guard let start = start.map({ max($0, free) }) else { continue }
      free = start + trip.seconds
      add(
        direction.rawValue, .call, Trace.calls, process, start, start + trip.seconds, Arguments(trip: direction))
      for step in trip.steps {
        var arguments = Arguments(trip: direction)
        func add(_ words: String, _ lane: Int, _ span: Range<Seconds>) {
          // A step in which this worker has no part takes no time.
          guard !span.isEmpty else { return }
          let category = step.action.communicates ? Category.communication : .computation
          self.add(words, category, lane, process, start + span.lowerBound, start + span.upperBound, arguments)
        }
        /// Both directions, with the rows that each moves, or as many bytes as there are.
        func add(_ words: String, out: Int? = nil, in: Int? = nil) {
          for (lane, span, rows, way) in [
            (Trace.predictedOut, step.sends, out, "→"), (Trace.predictedIn, step.receives, `in`, "←"),
          ] {
            arguments.rows = rows
            arguments.bytes = Int(rows.map { rowBytes * Double($0) }?.value ?? step.bytes.value)
            add("\(words) \(way)\(rows.map { " \($0) rows" } ?? "")", lane, span)
          }
        }
        let grads = direction == .backward ? "gradients of " : ""
        switch step.action {
        case .send(let round):
          arguments.round = round
          add("S round \(round)", out: step.leaving, in: step.arriving)
        case .giveBack(let round):
          arguments.round = round
          add("R round \(round)", out: step.leaving, in: step.arriving)
        case .fetch(let shadow):
          arguments.expert = plan.shadows[shadow]
          add("fetch expert \(plan.shadows[shadow])")
        case .reduce(let shadow):
          arguments.expert = plan.shadows[shadow]
          add("reduce gradients of expert \(plan.shadows[shadow])")
        case .compute(let round):
          (arguments.round, arguments.rows) = (round, step.computed)
          add("C round \(round), \(grads)\(step.computed) rows", Trace.predictedComputation, step.computes)
        case .computeShadow(let shadow):
          (arguments.expert, arguments.shadow, arguments.rows) = (plan.shadows[shadow], true, step.computed)
          add(
            "C shadow of expert \(plan.shadows[shadow]), \(grads)\(step.computed) rows", Trace.predictedComputation,
            step.computes)
        case .gradWeights:
          arguments.rows = step.computed
          add("W weight gradients of \(step.computed) rows", Trace.predictedComputation, step.computes)
        case .gradShadowWeights(let shadow):
          (arguments.expert, arguments.shadow, arguments.rows) = (plan.shadows[shadow], true, step.computed)
          add(
            "W shadow of expert \(plan.shadows[shadow]), weight gradients of \(step.computed) rows",
            Trace.predictedComputation, step.computes)
        }
      }
    }
  }

  // MARK: Events

  private mutating func add(
    _ words: String, _ category: Category, _ lane: Int, _ process: Int, _ begin: Seconds, _ end: Seconds,
    _ arguments: Arguments
  ) {
    let (first, last) = (Trace.microseconds(begin), Trace.microseconds(end))
    traceEvents.append(
      Event(
        name: words, ph: "X", pid: process, tid: lane, cat: category, ts: first,
        dur: ((last - first) * 1e3).rounded() / 1e3, args: arguments))
  }

  private mutating func name(process: Int, _ words: String) {
    traceEvents.append(Event(name: "process_name", ph: "M", pid: process, args: Arguments(name: words)))
    traceEvents.append(Event(name: "process_sort_index", ph: "M", pid: process, args: Arguments(sortIndex: process)))
  }

  private mutating func name(lane: Int, of process: Int, _ words: String) {
    traceEvents.append(Event(name: "thread_name", ph: "M", pid: process, tid: lane, args: Arguments(name: words)))
    traceEvents.append(
      Event(name: "thread_sort_index", ph: "M", pid: process, tid: lane, args: Arguments(sortIndex: lane)))
  }

  /// To the nanosecond.
  private static func microseconds(_ time: Seconds) -> Double { (time.value * 1e9).rounded() / 1e3 }
}

extension Pass {
  /// Writes what ran when on this rank to a file.
  package func writeTimeline(to path: UnsafePointer<CChar>) throws(Failure) {
    guard stage == .forwarded || stage == .finished else {
      throw Failure(.stage, "there is no timeline yet: the pass has not gone forward")
    }
    let entries = (0..<team.threads).reduce(recording.caller.entries.count) { $0 + recording.lane($1).entries.count }
    let room = try Reserve.room(entries * Trace.roomBytes, for: "a timeline")
    defer { free(room) }
    try Documents.write(Trace(self), to: path)
  }

  /// The plan and the cluster with which this pass was planned, if it was planned with a prediction.
  var prediction: (plan: Plan, cluster: Cluster)? {
    guard isPredicted, let cluster = (try? layer!.cluster) ?? group.rates.flatMap({ Cluster.inPlace($0) }) else {
      return nil
    }
    return (plan, cluster)
  }

  /// Of a block's task: the expert, whether it is a copy, and the round that brought the rows where there are several.
  func task(_ entry: Recording.Entry) -> (expert: Int, isShadow: Bool, round: Int?)? {
    switch entry.kind {
    case .experts, .expertGrads, .weightGrads: break
    default: return nil
    }
    let index = Int(entry.place)
    let (expert, owned) = (Int(inbox.blocks[index].expert), layer!.owned)
    if expert >= owned.count { return (shadows[expert - owned.count], true, nil) }
    let round = (0..<rounds.count).first { inbox.roundBlocks[$0].contains(index) }
    return (owned.lowerBound + expert, false, rounds.count > 1 ? round : nil)
  }
}
