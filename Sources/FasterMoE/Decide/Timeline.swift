/// A list of steps, and where times are kept while later steps wait for them; in the memory that it was made in.
package struct PlayedSteps {
  fileprivate let list: Steps.List
  /// The row of each step's times, or -1 if no later step waits for it; a row serves again once nobody waits any more.
  fileprivate let rows: UnsafeMutableBufferPointer<Int>
  fileprivate let countOfRows: Int

  package init(_ list: [Step], in memory: Scratch) { self.init(memory.copy(list), in: memory) }

  init(_ list: Steps.List, in memory: Scratch) {
    rows = memory.take(list.count, of: -1)
    self.list = list
    let mark = memory.mark
    for index in 0..<list.count where list[index].after >= 0 { rows[list[index].after] = index }
    let lastUse = memory.copy(rows)
    let free: UnsafeMutableBufferPointer<Int> = memory.take(list.count + 1)
    var (left, count) = (0, 0)
    for index in 0..<list.count {
      // Taken before the other is given back: a step reads and writes its times worker by worker.
      if lastUse[index] >= 0 {
        if left == 0 {
          free[0] = count
          (left, count) = (1, count + 1)
        }
        left -= 1
        rows[index] = free[left]
      }
      let after = list[index].after
      if after >= 0, lastUse[after] == index {
        free[left] = rows[after]
        left += 1
      }
    }
    countOfRows = count
    memory.release(to: mark)
  }

  /// All times are kept.
  fileprivate init(keepingAllOf list: Steps.List, in memory: Scratch) {
    rows = memory.take(list.count)
    for index in 0..<list.count { rows[index] = index }
    (self.list, countOfRows) = (list, list.count)
  }
}

/// When every worker begins and ends every step of one trip: a plan played in virtual time.
///
/// A worker sends and receives at once, each in the order of steps. Communication begins when those who send and those who
/// receive have reached the step. Where a plan overlaps, rows come, are computed and go back block by block. No trip is faster
/// than its busiest link, however the steps fall.
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
    let memory = Scratch()
    (starts, ends, sent, received, end) = withExtendedLifetime(memory) {
      let played = PlayedSteps(keepingAllOf: memory.copy(steps), in: memory)
      var player = Player(played, costs, overlaps: overlaps, slowdown: slowdown, keepsMoves: true, in: memory)
      let end = player.play()
      return (Array(player.starts), Array(player.ends), Array(player.sent), Array(player.received), end)
    }
  }

  /// Only when it is over.
  static func end(of steps: PlayedSteps, _ costs: StepCosts, overlaps: Bool, slowdown: Double, in memory: Scratch)
    -> Seconds
  {
    let mark = memory.mark
    defer { memory.release(to: mark) }
    // What slows computing down is looked up later.
    let played = slowdown > 1 ? PlayedSteps(keepingAllOf: steps.list, in: memory) : steps
    var player = Player(played, costs, overlaps: overlaps, slowdown: slowdown, keepsMoves: false, in: memory)
    return player.play()
  }

  private struct Player {
    let steps: Steps.List
    let costs: StepCosts
    let groups: Groups
    let overlaps: Bool
    let stretch: Double
    let slowdown: Double
    let rows: UnsafeMutableBufferPointer<Int>
    /// [rows, W]
    let starts, ends: UnsafeMutableBufferPointer<Double>
    /// [W] when each worker has sent, received and computed all of its steps so far. It sends and receives at once.
    let sending, receiving, computing: UnsafeMutableBufferPointer<Double>
    /// [groups] when all workers of each may send, have all to send and may receive, and what then happens.
    let mayStart, mayEnd, mayReceive: UnsafeMutableBufferPointer<Double>
    let sends, receives: UnsafeMutableBufferPointer<(start: Double, end: Double)>
    /// [steps, W], or nothing.
    let sent, received: UnsafeMutableBufferPointer<Range<Double>>
    /// The communication steps so far; [W] the first of them that may not have ended when the next compute begins. For
    /// what slows computing down.
    let talks, firstTalk: UnsafeMutableBufferPointer<Int>
    var countOfTalks = 0

    init(
      _ steps: PlayedSteps, _ costs: StepCosts, overlaps: Bool, slowdown: Double, keepsMoves: Bool, in memory: Scratch
    ) {
      (self.steps, rows, self.costs, groups) = (steps.list, steps.rows, costs, costs.groups)
      (self.overlaps, self.slowdown, stretch) = (overlaps, slowdown, overlaps ? costs.stretch : 1)
      let (workers, times) = (groups.workers, steps.countOfRows * groups.workers)
      (starts, ends) = (memory.take(times), memory.take(times))
      (sending, receiving) = (memory.take(workers, of: 0), memory.take(workers, of: 0))
      computing = memory.take(workers, of: 0)
      (mayStart, mayEnd, mayReceive) = (memory.take(groups.count), memory.take(groups.count), memory.take(groups.count))
      (sends, receives) = (memory.take(groups.count), memory.take(groups.count))
      let moves = keepsMoves ? steps.list.count * workers : 0
      (sent, received) = (memory.take(moves, of: 0..<0), memory.take(moves, of: 0..<0))
      talks = memory.take(slowdown > 1 ? steps.list.count : 0)
      firstTalk = memory.take(slowdown > 1 ? workers : 0, of: 0)
    }

    mutating func play() -> Seconds {
      for index in 0..<steps.count { play(index) }
      var last = 0.0
      for seat in 0..<groups.workers { last = max(last, max(max(sending[seat], receiving[seat]), computing[seat])) }
      return Seconds(last)
    }

    mutating func play(_ index: Int) {
      let workers = groups.workers
      switch steps[index].action {
      case .send(let round): send(index, round)
      case .giveBack(let round): giveBack(index, round)
      case .fetch(let shadow):
        collect(index, costs.fetches[shadow] * stretch, notInto: costs.owners[shadow])
      case .reduce(let shadow):
        let owner = costs.owners[shadow]
        collect(index, costs.reduces[shadow] * stretch, notInto: owner + 1 == workers ? 0 : owner + 1)
      case .compute(let round): compute(index, costs.computes, costs.blockShares, first: round * workers)
      case .computeShadow(let shadow): compute(index, costs.shadows, nil, first: shadow * workers)
      case .gradShadowWeights(let shadow): compute(index, costs.shadowWeights, nil, first: shadow * workers)
      case .gradWeights: compute(index, costs.gradWeights, nil, first: 0)
      }
    }

    /// A worker that nothing reaches in a step waits for nothing.
    private static var never: Double { -.infinity }

    /// Every group to its target, where anything moves.
    private mutating func send(_ index: Int, _ round: Int) {
      reach(index)
      let cause = causes(index)
      for group in 0..<groups.count {
        var (start, receive) = (0.0, 0.0)
        for seat in groups.seats(of: group) {
          start = max(start, max(sending[seat], cause < 0 ? 0 : ends[cause + seat]))
          receive = max(receive, receiving[seat])
        }
        (mayStart[group], mayReceive[group]) = (start, receive)
        (sends[group], receives[group]) = ((Player.never, Player.never), (Player.never, Player.never))
      }
      for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
        let target = groups.target(of: group, round: round)
        let start = max(mayStart[group], mayReceive[target])
        sends[group] = (start, start + costs.sends[round * groups.count + group] * stretch)
        receives[target] = sends[group]
      }
      finish(index, isSend: true)
    }

    /// Every target to its group: as soon as the first results are there, not before the last.
    private mutating func giveBack(_ index: Int, _ round: Int) {
      reach(index)
      let cause = causes(index)
      let shares = costs.blockShares.baseAddress! + round * groups.workers
      for group in 0..<groups.count {
        var (start, end, receive) = (0.0, 0.0, 0.0)
        for seat in groups.seats(of: group) {
          let last = cause < 0 ? 0 : ends[cause + seat]
          var first = last
          if overlaps, cause >= 0 {
            let begin = starts[cause + seat]
            first = begin + (last - begin) * shares[seat]
          }
          start = max(start, max(sending[seat], first))
          end = max(end, last)
          receive = max(receive, receiving[seat])
        }
        (mayStart[group], mayEnd[group], mayReceive[group]) = (start, end, receive)
        (sends[group], receives[group]) = ((Player.never, Player.never), (Player.never, Player.never))
      }
      for group in 0..<groups.count where costs.isSent[round * groups.count + group] {
        let (target, seconds) = (
          groups.target(of: group, round: round), costs.returns[round * groups.count + group] * stretch
        )
        let start = max(mayStart[target], mayReceive[group])
        var share = 0.0
        for seat in groups.seats(of: target) { share = max(share, shares[seat]) }
        receives[group] = (start, max(start + seconds, mayEnd[target] + seconds * share))
        sends[target] = receives[group]
      }
      finish(index, isSend: false)
    }

    /// Moves all lanes to where `sends` and `receives` end.
    private mutating func finish(_ index: Int, isSend: Bool) {
      let (keepsAll, place) = (!sent.isEmpty, rows[index] * groups.workers)
      for group in 0..<groups.count {
        let (sent, received) = (sends[group], receives[group])
        // What computing waits for is what comes in, if it need not wait for all.
        var whole = received
        if !isSend || !overlaps { whole = (min(sent.start, received.start), max(sent.end, received.end)) }
        for seat in groups.seats(of: group) {
          sending[seat] = max(sending[seat], sent.end)
          receiving[seat] = max(receiving[seat], received.end)
          if keepsAll {
            self.sent[index * groups.workers + seat] = max(0, sent.start)..<max(0, sent.end)
            self.received[index * groups.workers + seat] = max(0, received.start)..<max(0, received.end)
          }
          guard place >= 0 else { continue }
          let least = overlaps ? 0 : max(sending[seat], receiving[seat])
          starts[place + seat] = max(least, whole.start)
          ends[place + seat] = max(least, whole.end)
        }
      }
      noteTalk(index)
    }

    /// Along the ring of all workers, from the one that it does not go into to the one before.
    private mutating func collect(_ index: Int, _ seconds: Double, notInto first: Int) {
      let last = first == 0 ? groups.workers - 1 : first - 1
      reach(index)
      let (cause, count) = (causes(index), groups.workers)
      var start = 0.0
      for seat in 0..<count {
        if seat != last { start = max(start, max(sending[seat], cause < 0 ? 0 : ends[cause + seat])) }
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
      noteTalk(index)
    }

    private mutating func noteTalk(_ index: Int) {
      guard slowdown > 1 else { return }
      talks[countOfTalks] = index
      countOfTalks += 1
    }

    /// Where nothing overlaps, a worker does not get to a step before what the step comes after is over, even if it has no
    /// part in it.
    private mutating func reach(_ index: Int) {
      let cause = causes(index)
      guard !overlaps, cause >= 0 else { return }
      for seat in 0..<groups.workers {
        sending[seat] = max(sending[seat], ends[cause + seat])
        receiving[seat] = max(receiving[seat], ends[cause + seat])
      }
    }

    /// Where the times stand of the step of the other lane that this one waits for; -1: it waits for none.
    @inline(__always)
    private func causes(_ index: Int) -> Int {
      let after = steps[index].after
      return after < 0 ? -1 : rows[after] * groups.workers
    }

    /// `shares` of the blocks in which rows come and are computed; nil: all must be there first.
    private mutating func compute(
      _ index: Int, _ seconds: UnsafeMutableBufferPointer<Double>, _ shares: UnsafeMutableBufferPointer<Double>?,
      first: Int
    ) {
      let (cause, place) = (causes(index), rows[index] * groups.workers)
      for seat in 0..<groups.workers {
        let (work, end) = (seconds[first + seat], cause < 0 ? 0 : ends[cause + seat])
        var (start, least) = (max(computing[seat], end), 0.0)
        if overlaps, let shares, cause >= 0 {
          let begin = starts[cause + seat]
          start = max(computing[seat], begin + (end - begin) * shares[first + seat])
          least = end + work * shares[first + seat]
        }
        let stop = max(least, slowdown > 1 ? slowed(work, from: start, seat) : start + work)
        computing[seat] = stop
        guard place >= 0 else { continue }
        (starts[place + seat], ends[place + seat]) = (start, stop)
      }
    }

    /// When `work` ends that goes slower while the worker's messages move.
    ///
    /// The list has communication as early as it can be, so what moves during this step stands before it.
    private mutating func slowed(_ work: Double, from start: Double, _ seat: Int) -> Double {
      let workers = groups.workers
      while firstTalk[seat] < countOfTalks, ends[talks[firstTalk[seat]] * workers + seat] <= start {
        firstTalk[seat] += 1
      }
      var (time, left) = (start, work)
      for talk in talks[firstTalk[seat]..<countOfTalks] {
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
  }
}
