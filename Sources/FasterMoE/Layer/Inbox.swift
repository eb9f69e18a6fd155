import Synchronization

/// What belongs to the rows that one worker computes in a pass, R of them: their list, what backward needs of them, and
/// what came with them from other workers.
struct Inbox {
  let arrivals: Arrivals
  /// [R, h] in panels, each expert's rows beginning a panel: pre-activations, then their gradients.
  let inner: Panels
  /// The linear half of gated experts.
  let innerLinear: Panels
  /// Whether pre-activations are more than 2 MiB, which the second cache of an Emerald Rapids would hold until backward. On
  /// Intel's processors they need not pass through the caches then; AMD's, not measured, are nearer to their third one.
  let innerIsFar: Bool
  let blocks: UnsafeMutablePointer<Block>
  /// [rounds], [shadows] the blocks of each.
  let roundBlocks, shadowBlocks: UnsafeMutablePointer<Range<Int>>
  /// [e + shadows] the latest block of each expert, or -1.
  let latest: UnsafeMutablePointer<Int32>
  /// [e + shadows] rows of all workers for each expert.
  let rowsInStep: UnsafeMutablePointer<Int>
  /// Tasks done of each block: those that make its rows' outputs or gradients, those that make its weights' gradients.
  let rowTasksDone: UnsafeMutablePointer<Atomic<Int>>
  let weightTasksDone: UnsafeMutablePointer<Atomic<Int>>
  /// [W] where the rows of each worker stand.
  let sources: UnsafeMutablePointer<Source>
  /// Only over a transport. What came from other workers, R' rows [R', d] in their order: tokens, gradients of outputs,
  /// and what goes back to them. And what goes out of this worker's rows.
  let tokens, grads, results, outgoing: UnsafeMutablePointer<Float>
  /// [shadows, copy] gradients that this worker adds to; and only over a transport parameters, and sums on their way.
  let copyGrads, copyValues, copySums: UnsafeMutablePointer<Float>
  /// [shadows] where parameters and gradients of each are.
  let copies: UnsafeMutablePointer<(values: ExpertTensors, grads: ExpertTensors)>
  /// Floats of a copy.
  let copyFloats: Int

  init(
    _ shape: Shape, _ moves: Moves, _ shadows: Int, _ rounds: Rounds, at worker: Int, overWire: Bool,
    _ arena: inout Arena
  ) {
    let rows = moves.rows(at: worker)
    let workers = moves.traffic.workers
    let segments = rounds.count * moves.traffic.owned(by: worker).count + shadows
    let most = Block.mostBlocks(slots: rows, experts: segments)
    arrivals = Arrivals(arena: &arena, rows: rows, segments: segments)
    inner = Panels(arena.take(rows * Panels.padded(shape.hidden)), width: shape.hidden)
    innerLinear = Panels(
      arena.take(shape.activation.isGated ? rows * Panels.padded(shape.hidden) : 0), width: shape.hidden)
    innerIsFar =
      Choices.isIntel && rows * (inner.blocks + (shape.activation.isGated ? inner.blocks : 0)) * 16 > 2 << 20 / 4
    blocks = arena.take(most)
    roundBlocks = arena.take(rounds.count)
    shadowBlocks = arena.take(shadows)
    latest = arena.take(moves.traffic.owned(by: worker).count + shadows)
    rowsInStep = arena.take(moves.traffic.owned(by: worker).count + shadows)
    rowTasksDone = arena.take(most)
    weightTasksDone = arena.take(most)
    sources = arena.take(workers)
    func foreign(_ rows: (Int) -> Int) -> Int {
      overWire ? (0..<workers).reduce(0) { $0 + ($1 == worker ? 0 : rows($1)) } * shape.model : 0
    }
    let arriving = foreign { moves.rows(from: $0, to: worker) }
    tokens = arena.take(arriving)
    grads = arena.take(arriving)
    results = arena.take(arriving)
    outgoing = arena.take(foreign { moves.rows(from: worker, to: $0) })
    copyFloats = ExpertTensors.floats(shape)
    copyGrads = arena.take(shadows * copyFloats)
    copyValues = arena.take(overWire ? shadows * copyFloats : 0)
    copySums = arena.take(overWire ? shadows * copyFloats : 0)
    copies = arena.take(shadows)
  }
}

/// Where one worker's rows stand.
struct Source {
  /// [n, d] tokens and gradients of their outputs if `slots` are there; else the rows themselves.
  private let tokens: UnsafePointer<Float>
  private let grads: UnsafePointer<Float>
  private let slots: UnsafePointer<Int32>?
  /// [rows, d] what the experts make of them, or [n, d] where that goes directly to its tokens.
  private let rows: UnsafeMutablePointer<Float>
  private let isDirect: Bool
  /// [n, k]; nil where gradients come weighted already and their owner makes those of the weights.
  private let weights: UnsafePointer<Float>?
  private let gradWeights: UnsafeMutablePointer<Float>?
  private let model: Int
  private let choices: Int

  /// In the memory of another pass, or of this one; a worker without tokens has no memory for some of them, and nothing
  /// of it is touched.
  init(
    tokens: UnsafePointer<Float>?, grads: UnsafePointer<Float>?, slots: UnsafePointer<Int32>?,
    rows: UnsafeMutablePointer<Float>?, weights: UnsafePointer<Float>?, gradWeights: UnsafeMutablePointer<Float>?,
    isDirect: Bool, _ shape: Shape
  ) {
    let nothing = UnsafeMutablePointer<Float>(bitPattern: 64)!
    self.tokens = tokens ?? UnsafePointer(nothing)
    self.grads = grads ?? UnsafePointer(nothing)
    self.rows = rows ?? nothing
    (self.slots, self.weights, self.gradWeights, self.isDirect) = (slots, weights, gradWeights, isDirect)
    (model, choices) = (shape.model, shape.choices)
  }

  /// In rows that came over a transport.
  init(
    tokens: UnsafePointer<Float>, grads: UnsafePointer<Float>, rows: UnsafeMutablePointer<Float>, _ shape: Shape
  ) {
    (self.tokens, self.grads, self.rows) = (tokens, grads, rows)
    (slots, weights, gradWeights, isDirect) = (nil, nil, nil, false)
    (model, choices) = (shape.model, shape.choices)
  }

  @inline(__always) private func line(_ row: Int) -> Int { slots.map { Int($0[row]) / choices } ?? row }
  @inline(__always) func token(_ row: Int) -> UnsafePointer<Float> { tokens + line(row) &* model }
  @inline(__always) func grad(_ row: Int) -> UnsafePointer<Float> { grads + line(row) &* model }
  @inline(__always) func result(_ row: Int) -> UnsafeMutablePointer<Float> {
    rows + (isDirect ? line(row) : row) &* model
  }
  /// What the row's gradient is still to be multiplied by, and a direct result.
  @inline(__always) func weight(_ row: Int) -> Float { weights.map { $0[Int(slots![row])] } ?? 1 }
  @inline(__always) func setGradWeight(_ row: Int, _ value: Float) { gradWeights?[Int(slots![row])] = value }
}

/// One expert's tensors.
struct ExpertTensors {
  let inward, outward: UnsafeMutablePointer<Float>
  let inwardLinear, inwardBias, outwardBias: UnsafeMutablePointer<Float>?

  /// Those of expert `expert` of the ones that a block of parameters holds; `shift` floats from there in memory, where
  /// another worker's block of the same form is meant.
  init(_ block: borrowing Parameters, _ expert: Int, _ shape: Shape, shift: Int = 0) {
    let matrix = expert * shape.model * shape.hidden + shift
    inward = block.inward + matrix
    outward = block.outward + matrix
    inwardLinear = block.inwardLinear.map { $0 + matrix }
    inwardBias = block.inwardBias.map { $0 + (expert * shape.hidden + shift) }
    outwardBias = block.outwardBias.map { $0 + (expert * shape.model + shift) }
  }

  /// Side by side from `base` on.
  init(copy base: UnsafeMutablePointer<Float>, _ shape: Shape) {
    let matrix = shape.model * shape.hidden
    inward = base
    outward = base + matrix
    let rest = base + 2 * matrix
    inwardLinear = shape.activation.isGated ? rest : nil
    inwardBias = shape.activation.isGated ? nil : rest
    outwardBias = shape.activation.isGated ? nil : rest + shape.hidden
  }

  /// Floats of a copy, whole cache lines.
  static func floats(_ shape: Shape) -> Int {
    let matrix = shape.model * shape.hidden
    return Panels.padded(shape.activation.isGated ? 3 * matrix : 2 * matrix + shape.hidden + shape.model)
  }

  /// Calls `body` with each tensor that is there, that of `other` and its floats.
  func forEach(
    with other: ExpertTensors, _ shape: Shape,
    _ body: (UnsafeMutablePointer<Float>, UnsafeMutablePointer<Float>, Int) -> Void
  ) {
    let matrix = shape.model * shape.hidden
    body(inward, other.inward, matrix)
    body(outward, other.outward, matrix)
    if let a = inwardLinear, let b = other.inwardLinear { body(a, b, matrix) }
    if let a = inwardBias, let b = other.inwardBias { body(a, b, shape.hidden) }
    if let a = outwardBias, let b = other.outwardBias { body(a, b, shape.model) }
  }
}
