/// When every worker begins and ends every step of one trip.
package struct Timeline {
  package enum Keeping { case everything, needed }
  package let workers: Int
  /// [steps, W] by seat, in seconds from the beginning of the trip; only while they are needed if that is all to keep.
  package private(set) var starts: [Double]
  package private(set) var ends: [Double]
  /// [steps, W] when messages of each step leave a worker and reach it, if everything is kept; empty where none do.
  package private(set) var sent: [Range<Double>] = []
  package private(set) var received: [Range<Double>] = []
  /// When the last worker has done its last step.
  package private(set) var end = Seconds(0)

  /// O(steps·W).
  package init(_ steps: [Step], _ costs: StepCosts, overlaps: Bool, slowdown: Double, keeping: Keeping) {
    workers = costs.groups.workers
    // What slows computing down is looked up later.
    let rows = slowdown > 1 || keeping == .everything ? Array(steps.indices) : Timeline.rowsNeeded(steps)
    starts = Array(repeating: 0, count: ((rows.max() ?? -1) + 1) * workers)
    ends = starts
    var last = 0.0
    starts.withUnsafeMutableBufferPointer { starts in
      ends.withUnsafeMutableBufferPointer { ends in
        var player = Player(steps, costs, overlaps: overlaps, slowdown: slowdown, keeping, rows, starts, ends)
        for index in steps.indices { player.play(index) }
        (sent, received) = (player.sent, player.received)
        last = max(player.sending.reduce(0, max), player.receiving.reduce(0, max), player.computing.reduce(0, max))
      }
    }
    end = Seconds(last)
  }

  /// The row of each step's times, or -1 if no later step waits for it; a row serves again once nobody waits any more.
  private static func rowsNeeded(_ steps: [Step]) -> [Int] {
    var lastUse = Array(repeating: -1, count: steps.count)
    for (index, step) in steps.enumerated() where step.after >= 0 { lastUse[step.after] = index }
    var (rows, free, count) = (lastUse, [Int](), 0)
    for (index, step) in steps.enumerated() {
      // Taken before the other is given back: a step reads and writes its times worker by worker.
      if lastUse[index] >= 0 {
        if free.isEmpty {
          free.append(count)
          count += 1
        }
        rows[index] = free.removeLast()
      }
      if step.after >= 0, lastUse[step.after] == index { free.append(rows[step.after]) }
    }
    return rows
  }

  private struct Player {
    let steps: [Step]
    let costs: StepCosts
    let overlaps: Bool
    let stretch: Double
    let slowdown: Double
    let rows: [Int]
    let starts, ends: UnsafeMutableBufferPointer<Double>
    /// [W] when each worker has sent, received and computed all of its steps so far. It sends and receives at once.
    var sending, receiving, computing: [Double]
    /// [groups] when all workers of each may send, have all to send and may receive, and what then happens.
    var mayStart, mayEnd, mayReceive: [Double]
    var sends, receives: [(start: Double, end: Double)]
    var sent, received: [Range<Double>]
    /// The communication steps so far; [W] the first of them that may not have ended when the next compute begins.
    var talks: [Int] = []
    var firstTalk: [Int]

    init(
      _ steps: [Step], _ costs: StepCosts, overlaps: Bool, slowdown: Double, _ keeping: Keeping, _ rows: [Int],
      _ starts: UnsafeMutableBufferPointer<Double>, _ ends: UnsafeMutableBufferPointer<Double>
    ) {
      (self.steps, self.costs, self.overlaps, self.slowdown, self.rows) = (steps, costs, overlaps, slowdown, rows)
      (self.starts, self.ends) = (starts, ends)
      stretch = overlaps ? costs.stretch : 1
      sending = Array(repeating: 0, count: costs.groups.workers)
      receiving = sending
      computing = sending
      mayStart = Array(repeating: 0, count: costs.groups.count)
      mayEnd = mayStart
      mayReceive = mayStart
      sends = Array(repeating: (0, 0), count: costs.groups.count)
      receives = sends
      sent = Array(repeating: 0..<0, count: keeping == .everything ? steps.count * costs.groups.workers : 0)
      received = sent
      firstTalk = Array(repeating: 0, count: costs.groups.workers)
    }

    mutating func play(_ index: Int) {
      let workers = costs.groups.workers
      switch steps[index].action {
      case .send(let round): send(index, round)
      case .giveBack(let round): giveBack(index, round)
      case .fetch(let shadow): collect(index, costs.fetches[shadow] * stretch, notInto: costs.owners[shadow])
      case .reduce(let shadow):
        let owner = costs.owners[shadow]
        collect(index, costs.reduces[shadow] * stretch, notInto: owner + 1 == workers ? 0 : owner + 1)
      case .compute(let round): compute(index, costs.computes, costs.blocks, first: round * workers)
      case .computeShadow(let shadow): compute(index, costs.shadows, nil, first: shadow * workers)
      case .gradShadowWeights(let shadow): compute(index, costs.shadowWeights, nil, first: shadow * workers)
      case .gradWeights: compute(index, costs.gradWeights, nil, first: 0)
      }
    }

    /// A worker that nothing reaches in a step waits for nothing.
    private static let never = (start: -Double.infinity, end: -Double.infinity)

    /// Every group to its target, where anything moves.
    private mutating func send(_ index: Int, _ round: Int) {
      let groups = costs.groups
      reach(index)
      for group in 0..<groups.count {
        (mayStart[group], mayReceive[group]) = (0, 0)
        for seat in groups.seats(of: group) {
          mayStart[group] = max(mayStart[group], sending[seat], done(index, seat))
          mayReceive[group] = max(mayReceive[group], receiving[seat])
        }
        (sends[group], receives[group]) = (Player.never, Player.never)
      }
      for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
        let target = groups.target(of: group, round: round)
        let start = max(mayStart[group], mayReceive[target])
        sends[group] = (start, start + costs.sends[round * groups.count + group] * stretch)
        receives[target] = sends[group]
      }
      finish(index)
    }

    /// Every target to its group: as soon as the first results are there, not before the last.
    private mutating func giveBack(_ index: Int, _ round: Int) {
      let groups = costs.groups
      let after = steps[index].after
      reach(index)
      for group in 0..<groups.count {
        (mayStart[group], mayEnd[group], mayReceive[group]) = (0, 0, 0)
        for seat in groups.seats(of: group) {
          let end = done(index, seat)
          var first = end
          if overlaps, after >= 0 {
            let start = starts[rows[after] * computing.count + seat]
            first = start + (end - start) / costs.blocks[round * computing.count + seat]
          }
          mayStart[group] = max(mayStart[group], sending[seat], first)
          mayEnd[group] = max(mayEnd[group], end)
          mayReceive[group] = max(mayReceive[group], receiving[seat])
        }
        (sends[group], receives[group]) = (Player.never, Player.never)
      }
      for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
        let (target, seconds) = (
          groups.target(of: group, round: round), costs.returns[round * groups.count + group] * stretch
        )
        let start = max(mayStart[target], mayReceive[group])
        var blocks = Double.infinity
        for seat in groups.seats(of: target) { blocks = min(blocks, costs.blocks[round * computing.count + seat]) }
        receives[group] = (start, max(start + seconds, mayEnd[target] + seconds / blocks))
        sends[target] = receives[group]
      }
      finish(index)
    }

    /// Moves all lanes to where `sends` and `receives` end.
    private mutating func finish(_ index: Int) {
      let groups = costs.groups
      var isSend = false
      if case .send = steps[index].action { isSend = true }
      for group in 0..<groups.count {
        let (sent, received) = (sends[group], receives[group])
        // What computing waits for is what comes in, if it need not wait for all.
        let whole = isSend && overlaps ? received : (min(sent.start, received.start), max(sent.end, received.end))
        for seat in groups.seats(of: group) {
          sending[seat] = max(sending[seat], sent.end)
          receiving[seat] = max(receiving[seat], received.end)
          keep(index, seat, sent, received)
          let least = overlaps ? 0 : max(sending[seat], receiving[seat])
          finish(index, seat, max(least, whole.0), max(least, whole.1))
        }
      }
      talks.append(index)
    }

    /// Along the ring of all workers, from the one that it does not go into to the one before.
    private mutating func collect(_ index: Int, _ seconds: Double, notInto first: Int) {
      let last = first == 0 ? computing.count - 1 : first - 1
      reach(index)
      let (after, count) = (steps[index].after, computing.count)
      let cause = after < 0 ? -1 : rows[after] * count
      var start = 0.0
      for seat in 0..<count {
        if seat != last { start = max(start, sending[seat], cause < 0 ? 0 : ends[cause + seat]) }
        if seat != first { start = max(start, receiving[seat]) }
      }
      let end = start + seconds
      let (keepsAll, place) = (!sent.isEmpty, rows[index] * count)
      for seat in 0..<count {
        if seat != last { sending[seat] = end }
        if seat != first { receiving[seat] = end }
        if keepsAll {
          sent[index * count + seat] = seat == last ? 0..<0 : start..<end
          received[index * count + seat] = seat == first ? 0..<0 : start..<end
        }
        guard place >= 0 else { continue }
        let isHere = overlaps && seat == first
        starts[place + seat] = isHere ? 0 : start
        ends[place + seat] = isHere ? 0 : overlaps ? end : max(sending[seat], receiving[seat])
      }
      talks.append(index)
    }

    /// Where nothing overlaps, a worker does not get to a step before what the step comes after is over, even if it has no
    /// part in it.
    private mutating func reach(_ index: Int) {
      guard !overlaps, steps[index].after >= 0 else { return }
      for seat in computing.indices {
        sending[seat] = max(sending[seat], done(index, seat))
        receiving[seat] = max(receiving[seat], done(index, seat))
      }
    }

    @inline(__always)
    private mutating func keep(
      _ index: Int, _ seat: Int, _ sent: (start: Double, end: Double), _ received: (start: Double, end: Double)
    ) {
      guard !self.sent.isEmpty else { return }
      self.sent[index * computing.count + seat] = max(0, sent.start)..<max(0, sent.end)
      self.received[index * computing.count + seat] = max(0, received.start)..<max(0, received.end)
    }

    /// When the step of the other lane that this one waits for is over.
    @inline(__always)
    private func done(_ index: Int, _ seat: Int) -> Double {
      let after = steps[index].after
      return after < 0 ? 0 : ends[rows[after] * computing.count + seat]
    }

    /// `blocks`: rows come and are computed in so many; nil: all must be there first.
    private mutating func compute(_ index: Int, _ seconds: [Double], _ blocks: [Double]?, first: Int) {
      let after = steps[index].after
      for seat in computing.indices {
        let (work, end) = (seconds[first + seat], done(index, seat))
        var (start, least) = (max(computing[seat], end), 0.0)
        if overlaps, let blocks, after >= 0 {
          let begin = starts[rows[after] * computing.count + seat]
          start = max(computing[seat], begin + (end - begin) / blocks[first + seat])
          least = end + work / blocks[first + seat]
        }
        let stop = max(least, slowdown > 1 ? slowed(work, from: start, seat) : start + work)
        finish(index, seat, start, stop)
        computing[seat] = stop
      }
    }

    /// When `work` ends that goes slower while the worker's messages move.
    ///
    /// The list has communication as early as it can be, so what moves during this step stands before it.
    private mutating func slowed(_ work: Double, from start: Double, _ seat: Int) -> Double {
      let workers = computing.count
      while firstTalk[seat] < talks.count, ends[talks[firstTalk[seat]] * workers + seat] <= start {
        firstTalk[seat] += 1
      }
      var (time, left) = (start, work)
      for talk in talks[firstTalk[seat]...] {
        let (begins, stops) = (starts[talk * workers + seat], ends[talk * workers + seat])
        guard stops > time else { continue }
        if begins > time {
          if left <= begins - time { return time + left }
          left -= begins - time
          time = begins
        }
        if left * slowdown <= stops - time { return time + left * slowdown }
        left -= (stops - time) / slowdown
        time = stops
      }
      return time + left
    }

    @inline(__always)
    private func finish(_ index: Int, _ seat: Int, _ start: Double, _ end: Double) {
      guard rows[index] >= 0 else { return }
      starts[rows[index] * computing.count + seat] = start
      ends[rows[index] * computing.count + seat] = end
    }
  }
}
