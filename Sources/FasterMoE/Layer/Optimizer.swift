extension Layer {
  /// What AdamW does beyond its formula.
  package struct Update {
    /// Which parameters decay towards 0.
    package enum Decaying { case matrices, all }
    let how: AdamW
    let decaying: Decaying
    let used: AdamW.Gradients
    /// Whether the next backward writes gradients.
    let beginsGradients: Bool

    package init(_ how: AdamW, decaying: Decaying, used: AdamW.Gradients, beginsGradients: Bool = false) {
      (self.how, self.decaying, self.used, self.beginsGradients) = (how, decaying, used, beginsGradients)
    }
  }

  /// A step of AdamW on this rank's parameters by its gradients; the first one takes memory for what is remembered.
  package func adamw(_ update: Update) throws(Failure) {
    if moments == nil { moments = try fresh() }
    settleGradients()
    moments!.step(update, on: group.team)
    if update.beginsGradients { beginGradients() }
  }

  /// Moments as before the first step.
  func fresh() throws(Failure) -> Moments { try Moments(shape, columns, owned.count, values, gradients, group.team) }
}

/// What AdamW remembers of every parameter, laid out like these, and how many steps it has made.
final class Moments {
  let means: Parameters
  let squares: Parameters
  var steps = 0
  private let sweep: Sweep

  init(
    _ shape: Shape, _ columns: Int, _ owned: Int, _ values: borrowing Parameters, _ gradients: borrowing Parameters,
    _ team: Team
  ) throws(Failure) {
    means = try Parameters(shape, columns: columns, owned: owned)
    squares = try Parameters(shape, columns: columns, owned: owned)
    let segments = Sweep.segments(of: values, shape, columns, owned)
    sweep = Sweep(values.base, gradients.base, means.base, squares.base, segments, team)
  }

  func step(_ update: Layer.Update, on team: Team) {
    steps += 1
    sweep.matrices = update.how.factors(step: steps)
    sweep.biases = update.decaying == .all ? sweep.matrices : update.how.withoutDecay.factors(step: steps)
    sweep.used = update.used
    team.run(sweep)
  }
}

/// One step over all parameters of a layer, all threads at once.
private final class Sweep: TeamWork {
  struct Segment {
    let start: Int
    let count: Int
    let isBias: Bool
  }

  /// Floats of one task: its four arrays fit the second cache, and few tasks are cut short.
  private static let piece = 1 << 15
  private let values, gradients, means, squares: UnsafeMutablePointer<Float>
  private let segments: [Segment]
  private let team: Team
  var matrices = AdamW.Factors.none
  var biases = AdamW.Factors.none
  var used = AdamW.Gradients.kept

  init(
    _ values: UnsafeMutablePointer<Float>, _ gradients: UnsafeMutablePointer<Float>,
    _ means: UnsafeMutablePointer<Float>, _ squares: UnsafeMutablePointer<Float>, _ segments: [Segment], _ team: Team
  ) {
    (self.values, self.gradients, self.means, self.squares) = (values, gradients, means, squares)
    (self.segments, self.team) = (segments, team)
  }

  static func segments(of block: borrowing Parameters, _ shape: Shape, _ columns: Int, _ owned: Int) -> [Segment] {
    let matrix = owned * shape.model * shape.hidden
    let tensors: [(UnsafeMutablePointer<Float>?, Int, Bool)] = [
      (block.gate, columns * shape.model, false), (block.inward, matrix, false), (block.outward, matrix, false),
      (block.inwardLinear, matrix, false), (block.inwardBias, owned * shape.hidden, true),
      (block.outwardBias, owned * shape.model, true),
    ]
    let base = block.base
    return tensors.compactMap { tensor, count, isBias in
      tensor.map { Segment(start: $0 - base, count: count, isBias: isBias) }
    }
  }

  override func work(thread: Int) {
    // Tasks are numbered through all segments; a thread's own only rise, so it never looks back.
    var (segment, before) = (0, 0)
    while segment < segments.count {
      let task = team.take()
      while segment < segments.count, task - before >= tasks(of: segments[segment]) {
        before += tasks(of: segments[segment])
        segment += 1
      }
      guard segment < segments.count else { return }
      let first = (task - before) * Sweep.piece
      let at = segments[segment].start + first
      AdamW.step(
        values + at, gradients + at, means + at, squares + at, count: min(Sweep.piece, segments[segment].count - first),
        segments[segment].isBias ? biases : matrices, used)
    }
  }

  private func tasks(of segment: Segment) -> Int { (segment.count + Sweep.piece - 1) / Sweep.piece }
}
