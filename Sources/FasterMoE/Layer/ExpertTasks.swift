import Synchronization

/// What backward does with some blocks.
enum Turn {
  case rows(Range<Int>)
  case weights(Range<Int>)
  /// Each block's weight gradients `lag` blocks behind its rows', while what they need is in the caches.
  case both(Range<Int>)

  func tasks(_ rowTasks: Int, _ weightTasks: Int, lag: Int) -> Int {
    switch self {
    case .rows(let blocks): blocks.count * rowTasks
    case .weights(let blocks): blocks.count * weightTasks
    case .both(let blocks): blocks.isEmpty ? 0 : (blocks.count + lag) * (rowTasks + weightTasks)
    }
  }
}

/// The experts' work as tasks that threads take, each once what it needs is there.
extension PassContext {
  // MARK: Forward

  /// Every row through its expert, each as soon as it is here.
  func forward(blocks: Int) {
    let cut = Cut(blocks: blocks, threads: team.threads)
    // A task begins where the one before it ended, unless the thread had to wait.
    var ready = Seconds.now
    while case let task = team.take(), task < blocks * cut.forwardTasks {
      let index = task / cut.forwardTasks
      let block = inbox.blocks[index]
      let (stage, part) = (task % cut.forwardTasks).quotientAndRemainder(dividingBy: cut.parts)
      if cut.isByColumns(block) {
        if stage == 1 { wait(for: inbox.rowTasksDone + index, cut.parts, &ready) }
        let rows = 0..<Int(block.rows)
        if stage == 0 {
          makeColumns(index, cut.columns(shape.hidden, part), rows: 0, .experts, &ready) {
            inward(block, rows, $0, writesPast: false)
          }
        } else {
          makeColumns(index, cut.columns(shape.model, part), rows: part == 0 ? rows.count : 0, .experts, &ready) {
            outward(block, rows, $0, again: true)
          }
        }
      } else if stage == 0 {
        makeRows(index, cut.rows(block, part), .experts, &ready) {
          inward(block, $0, 0..<shape.hidden, writesPast: inbox.innerIsFar)
          outward(block, $0, 0..<shape.model, again: false)
        }
      }
      inbox.rowTasksDone[index].wrappingAdd(1, ordering: .releasing)
    }
  }

  // MARK: Backward

  /// Gradients of rows, weights and routing weights, in the order of `turns`.
  ///
  /// Tasks are taken in one order, so whoever waits, waits for a task already under way or for rows that are on their way
  /// here.
  func backward(blocks: Int, _ turns: [Turn]) {
    let cut = Cut(blocks: blocks, threads: team.threads)
    let rowTasks = cut.backwardTasks
    let weightTasks = PassContext.weightTasks(shape)
    var (turn, first) = (0, 0)
    var ready = Seconds.now
    while turn < turns.count {
      let task = team.take()
      while turn < turns.count, task >= first + turns[turn].tasks(rowTasks, weightTasks, lag: workspace.lag) {
        first += turns[turn].tasks(rowTasks, weightTasks, lag: workspace.lag)
        turn += 1
      }
      guard turn < turns.count else { return }
      switch turns[turn] {
      case .rows(let blocks):
        makeRowGradients(blocks.lowerBound + (task - first) / rowTasks, (task - first) % rowTasks, cut, &ready)
      case .weights(let blocks):
        let block = blocks.lowerBound + (task - first) / weightTasks
        makeWeightGradients(block, (task - first) % weightTasks, of: weightTasks, rowTasks, &ready)
      case .both(let blocks):
        let (round, part) = (task - first).quotientAndRemainder(dividingBy: rowTasks + weightTasks)
        if part < rowTasks {
          guard round < blocks.count else { continue }
          // The slot's block before this one must have left it.
          if round > workspace.lag {
            wait(for: inbox.weightTasksDone + (round - workspace.lag - 1), weightTasks, &ready)
          }
          makeRowGradients(round, part, cut, &ready)
        } else if round >= workspace.lag {
          makeWeightGradients(round - workspace.lag, part - rowTasks, of: weightTasks, rowTasks, &ready)
        }
      }
    }
  }

  private func makeRowGradients(_ index: Int, _ task: Int, _ cut: Cut, _ ready: inout Seconds) {
    let block = inbox.blocks[index]
    let all = 0..<Int(block.rows)
    let (stage, part) = task.quotientAndRemainder(dividingBy: cut.parts)
    if cut.isByColumns(block) {
      if stage > 0 { wait(for: inbox.rowTasksDone + index, stage * cut.parts, &ready) }
      switch stage {
      case 0:
        makeColumns(index, cut.columns(shape.hidden, part), rows: 0, .expertGrads, &ready) {
          // One keeps what the block's tasks share, the others read past it.
          let grads = part == 0 ? workspace.slot(index, row: Int(block.row)).grads : desk.tokens
          if part == 0 { keepRows(index, all) } else { grads.fill(rows: all.count) { gradRow(Int(block.row) + $0) } }
          activationGradients(index, all, grads, $0) { place, _ in place.keepTile() }
        }
      case 1: makeRows(index, cut.singleRows(block, part), .expertGrads, &ready) { deactivate(index, $0) }
      default:
        makeColumns(index, cut.columns(shape.model, part), rows: 0, .expertGrads, &ready) {
          inputGradients(index, all, $0)
        }
      }
    } else if stage == 0 {
      makeRows(index, cut.rows(block, part), .expertGrads, &ready) { backward(index, $0) }
    }
    inbox.rowTasksDone[index].wrappingAdd(1, ordering: .releasing)
  }

  private func makeWeightGradients(_ index: Int, _ part: Int, of parts: Int, _ rowTasks: Int, _ ready: inout Seconds) {
    let block = inbox.blocks[index]
    wait(for: inbox.rowTasksDone + index, rowTasks, &ready)
    if block.previous >= 0 { wait(for: inbox.weightTasksDone + Int(block.previous), parts, &ready) }
    if journey.begin() {
      addWeightGradients(index, part)
      journey.isDone()
      ready = lane.addTask(.weightGrads, block: index, rows: Int(block.rows), from: ready)
    }
    inbox.weightTasksDone[index].wrappingAdd(1, ordering: .releasing)
  }

  // MARK: Tasks

  /// A task for some rows of a block, once they are here.
  @inline(__always)
  private func makeRows(
    _ index: Int, _ rows: Range<Int>, _ kind: Recording.Kind, _ ready: inout Seconds, _ work: (Range<Int>) -> Void
  ) {
    guard !rows.isEmpty, journey.wait(team, for: inbox.blocks[index], rows, &ready) else { return }
    work(rows)
    journey.isDone()
    ready = lane.addTask(kind, block: index, rows: rows.count, from: ready)
  }

  /// A task for some columns of all rows of a block, as which `rows` count in what is recorded.
  @inline(__always)
  private func makeColumns(
    _ index: Int, _ columns: Range<Int>, rows: Int, _ kind: Recording.Kind, _ ready: inout Seconds,
    _ work: (Range<Int>) -> Void
  ) {
    let block = inbox.blocks[index]
    guard !columns.isEmpty, journey.wait(team, for: block, 0..<Int(block.rows), &ready) else { return }
    work(columns)
    journey.isDone()
    ready = lane.addTask(kind, block: index, rows: rows, from: ready)
  }

  /// `ready` is set to now if the thread had to wait.
  private func wait(for done: UnsafeMutablePointer<Atomic<Int>>, _ tasks: Int, _ ready: inout Seconds) {
    if team.wait(until: { done.pointee.load(ordering: .acquiring) >= tasks }) { ready = .now }
  }
}
