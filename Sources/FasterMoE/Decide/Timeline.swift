/// A list of steps that is played again and again, and where times are kept while later steps wait for them.
package struct PlayedSteps {
  package let list: [Step]
  /// The row of each step's times, or -1 if no later step waits for it; a row serves again once nobody waits any more.
  fileprivate let rows: [Int]
  fileprivate let countOfRows: Int

  package init(_ list: [Step]) {
    self.list = list
    var lastUse = Array(repeating: -1, count: list.count)
    for (index, step) in list.enumerated() where step.after >= 0 { lastUse[step.after] = index }
    var (rows, free, count) = (lastUse, [Int](), 0)
    for (index, step) in list.enumerated() {
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
    (self.rows, countOfRows) = (rows, count)
  }

  /// All times are kept.
  fileprivate init(keepingAllOf list: [Step]) {
    (self.list, rows, countOfRows) = (list, Array(list.indices), list.count)
  }
}

/// When every worker begins and ends every step of one trip.
package struct Timeline {
  package let workers: Int
  /// [steps, W] by seat, in seconds from the beginning of the trip.
  package let starts: [Double]
  package let ends: [Double]
  /// [steps, W] when messages of each step leave a worker and reach it; empty where none do.
  package let sent: [Range<Double>]
  package let received: [Range<Double>]
  /// When the last worker has done its last step.
  package let end: Seconds

  /// O(steps·W).
  package init(_ steps: [Step], _ costs: StepCosts, overlaps: Bool, slowdown: Double) {
    workers = costs.groups.workers
    let count = steps.count * workers
    (starts, ends, sent, received, end) = withUnsafePointer(to: costs) {
      let steps = PlayedSteps(keepingAllOf: steps)
      var player = Player(steps, $0, overlaps: overlaps, slowdown: slowdown, keepsMoves: true)
      defer { player.free() }
      let end = player.play()
      return (
        Array(UnsafeBufferPointer(start: player.starts, count: count)),
        Array(UnsafeBufferPointer(start: player.ends, count: count)), player.sent, player.received, end
      )
    }
  }

  /// Only when it is over.
  static func end(of steps: PlayedSteps, _ costs: StepCosts, overlaps: Bool, slowdown: Double) -> Seconds {
    withUnsafePointer(to: costs) {
      // What slows computing down is looked up later.
      let steps = slowdown > 1 ? PlayedSteps(keepingAllOf: steps.list) : steps
      var player = Player(steps, $0, overlaps: overlaps, slowdown: slowdown, keepsMoves: false)
      defer { player.free() }
      return player.play()
    }
  }

  /// All its lanes are in two pieces of memory, as plans are played by the hundred.
  private struct Player {
    let steps: [Step]
    let costs: UnsafePointer<StepCosts>
    let groups: Groups
    let overlaps: Bool
    let stretch: Double
    let slowdown: Double
    let rows: [Int]
    /// [rows, W]
    let starts, ends: UnsafeMutablePointer<Double>
    /// [W] when each worker has sent, received and computed all of its steps so far. It sends and receives at once.
    let sending, receiving, computing: UnsafeMutablePointer<Double>
    /// [groups] when all workers of each may send, have all to send and may receive, and what then happens.
    let mayStart, mayEnd, mayReceive: UnsafeMutablePointer<Double>
    let sends, receives: UnsafeMutablePointer<(start: Double, end: Double)>
    /// [steps, W], or nothing.
    var sent, received: [Range<Double>]
    /// The communication steps so far; [W] the first of them that may not have ended when the next compute begins. For
    /// what slows computing down.
    var talks: [Int] = []
    var firstTalk: [Int]

    init(
      _ steps: PlayedSteps, _ costs: UnsafePointer<StepCosts>, overlaps: Bool, slowdown: Double, keepsMoves: Bool
    ) {
      (self.steps, rows, self.costs, groups) = (steps.list, steps.rows, costs, costs.pointee.groups)
      (self.overlaps, self.slowdown, stretch) = (overlaps, slowdown, overlaps ? costs.pointee.stretch : 1)
      let (workers, times) = (groups.workers, steps.countOfRows * groups.workers)
      let doubles = 2 * times + 3 * workers + 3 * groups.count
      starts = .allocate(capacity: doubles)
      starts.update(repeating: 0, count: doubles)
      ends = starts + times
      sending = ends + times
      receiving = sending + workers
      computing = receiving + workers
      mayStart = computing + workers
      mayEnd = mayStart + groups.count
      mayReceive = mayEnd + groups.count
      sends = .allocate(capacity: 2 * groups.count)
      receives = sends + groups.count
      sent = Array(repeating: 0..<0, count: keepsMoves ? steps.list.count * workers : 0)
      received = sent
      firstTalk = Array(repeating: 0, count: slowdown > 1 ? workers : 0)
    }

    func free() {
      starts.deallocate()
      sends.deallocate()
    }

    mutating func play() -> Seconds {
      for index in steps.indices { play(index) }
      var last = 0.0
      for seat in 0..<groups.workers { last = max(last, sending[seat], receiving[seat], computing[seat]) }
      return Seconds(last)
    }

    mutating func play(_ index: Int) {
      let workers = groups.workers
      switch steps[index].action {
      case .send(let round): send(index, round)
      case .giveBack(let round): giveBack(index, round)
      case .fetch(let shadow):
        collect(index, costs.pointee.fetches[shadow] * stretch, notInto: costs.pointee.owners[shadow])
      case .reduce(let shadow):
        let owner = costs.pointee.owners[shadow]
        collect(index, costs.pointee.reduces[shadow] * stretch, notInto: owner + 1 == workers ? 0 : owner + 1)
      case .compute(let round): compute(index, costs.pointee.computes, costs.pointee.blocks, first: round * workers)
      case .computeShadow(let shadow): compute(index, costs.pointee.shadows, nil, first: shadow * workers)
      case .gradShadowWeights(let shadow): compute(index, costs.pointee.shadowWeights, nil, first: shadow * workers)
      case .gradWeights: compute(index, costs.pointee.gradWeights, nil, first: 0)
      }
    }

    /// A worker that nothing reaches in a step waits for nothing.
    private static let never = (start: -Double.infinity, end: -Double.infinity)

    /// Every group to its target, where anything moves.
    private mutating func send(_ index: Int, _ round: Int) {
      reach(index)
      for group in 0..<groups.count {
        (mayStart[group], mayReceive[group]) = (0, 0)
        for seat in groups.seats(of: group) {
          mayStart[group] = max(mayStart[group], sending[seat], done(index, seat))
          mayReceive[group] = max(mayReceive[group], receiving[seat])
        }
        (sends[group], receives[group]) = (Player.never, Player.never)
      }
      for group in 0..<groups.count where costs.pointee.isSent[round * groups.count + group] {
        let target = groups.target(of: group, round: round)
        let start = max(mayStart[group], mayReceive[target])
        sends[group] = (start, start + costs.pointee.sends[round * groups.count + group] * stretch)
        receives[target] = sends[group]
      }
      finish(index)
    }

    /// Every target to its group: as soon as the first results are there, not before the last.
    private mutating func giveBack(_ index: Int, _ round: Int) {
      let after = steps[index].after
      reach(index)
      for group in 0..<groups.count {
        (mayStart[group], mayEnd[group], mayReceive[group]) = (0, 0, 0)
        for seat in groups.seats(of: group) {
          let end = done(index, seat)
          var first = end
          if overlaps, after >= 0 {
            let start = starts[rows[after] * groups.workers + seat]
            first = start + (end - start) / costs.pointee.blocks[round * groups.workers + seat]
          }
          mayStart[group] = max(mayStart[group], sending[seat], first)
          mayEnd[group] = max(mayEnd[group], end)
          mayReceive[group] = max(mayReceive[group], receiving[seat])
        }
        (sends[group], receives[group]) = (Player.never, Player.never)
      }
      for group in 0..<groups.count where costs.pointee.isSent[round * groups.count + group] {
        let (target, seconds) = (
          groups.target(of: group, round: round), costs.pointee.returns[round * groups.count + group] * stretch
        )
        let start = max(mayStart[target], mayReceive[group])
        var blocks = Double.infinity
        for seat in groups.seats(of: target) {
          blocks = min(blocks, costs.pointee.blocks[round * groups.workers + seat])
        }
        receives[group] = (start, max(start + seconds, mayEnd[target] + seconds / blocks))
        sends[target] = receives[group]
      }
      finish(index)
    }

    /// Moves all lanes to where `sends` and `receives` end.
    private mutating func finish(_ index: Int) {
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
      if slowdown > 1 { talks.append(index) }
    }

    /// Along the ring of all workers, from the one that it does not go into to the one before.
    private mutating func collect(_ index: Int, _ seconds: Double, notInto first: Int) {
      let last = first == 0 ? groups.workers - 1 : first - 1
      reach(index)
      let (after, count) = (steps[index].after, groups.workers)
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
      if slowdown > 1 { talks.append(index) }
    }

    /// Where nothing overlaps, a worker does not get to a step before what the step comes after is over, even if it has no
    /// part in it.
    private mutating func reach(_ index: Int) {
      guard !overlaps, steps[index].after >= 0 else { return }
      for seat in 0..<groups.workers {
        sending[seat] = max(sending[seat], done(index, seat))
        receiving[seat] = max(receiving[seat], done(index, seat))
      }
    }

    @inline(__always)
    private mutating func keep(
      _ index: Int, _ seat: Int, _ sent: (start: Double, end: Double), _ received: (start: Double, end: Double)
    ) {
      guard !self.sent.isEmpty else { return }
      self.sent[index * groups.workers + seat] = max(0, sent.start)..<max(0, sent.end)
      self.received[index * groups.workers + seat] = max(0, received.start)..<max(0, received.end)
    }

    /// When the step of the other lane that this one waits for is over.
    @inline(__always)
    private func done(_ index: Int, _ seat: Int) -> Double {
      let after = steps[index].after
      return after < 0 ? 0 : ends[rows[after] * groups.workers + seat]
    }

    /// `blocks`: rows come and are computed in so many; nil: all must be there first.
    private mutating func compute(_ index: Int, _ seconds: [Double], _ blocks: [Double]?, first: Int) {
      let after = steps[index].after
      for seat in 0..<groups.workers {
        let (work, end) = (seconds[first + seat], done(index, seat))
        var (start, least) = (max(computing[seat], end), 0.0)
        if overlaps, let blocks, after >= 0 {
          let begin = starts[rows[after] * groups.workers + seat]
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
      let workers = groups.workers
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
      starts[rows[index] * groups.workers + seat] = start
      ends[rows[index] * groups.workers + seat] = end
    }
  }
}
