/// The memory in which a layer's calls compute: a desk for each thread and slots for the blocks under way.
///
/// Nothing in it outlives a call, so all layers of a group share one. Pages that no batch ever needs are never touched.
struct Workspace {
  /// One thread's own scratch.
  struct Desk {
    /// For products; the second for what stands beside the first in gated experts.
    let first: Product.Desk
    let second: Product.Desk
    /// Token rows on their way through the gate [gateRows, d]; in backward also dy of a block whose columns are cut.
    let tokens: Panels
    /// Some columns of token rows [gateRows, gateColumns].
    let columns: Panels
    /// One token's scores as they choose, a copy to mark in, probabilities and gradients, each [columns, padded].
    let scores: UnsafeMutablePointer<Float>
    let logits: UnsafeMutablePointer<Float>
    let probabilities: UnsafeMutablePointer<Float>
    let gradScores: UnsafeMutablePointer<Float>
    let noise: Noise
    /// One token's choices and their weights [k].
    let picks: UnsafeMutablePointer<Int32>
    let weights: UnsafeMutablePointer<Float>
    /// 16 partial sums for each row of a block.
    let rowSums: UnsafeMutablePointer<Float>
    /// Where each row of a block has its result, and its weight.
    let results: UnsafeMutablePointer<UnsafeMutablePointer<Float>>
    let resultScales: UnsafeMutablePointer<Float>
  }

  /// What the tasks of one block share.
  struct Slot {
    /// x and dy of the block's rows [rows, d].
    let tokens: Panels
    let grads: Panels
    /// The hidden activations [rows, h]; in backward first their gradients, then each row times its routing weight.
    let hidden: Panels
    /// The routing weight of each row.
    let scales: UnsafeMutablePointer<Float>
    /// What the outer bias has in the gradient of each row's routing weight.
    let biasGrads: UnsafeMutablePointer<Float>
  }

  /// Rows and columns of tokens that a gate task takes at a time; sums over tokens go by these rows, for any threads.
  static let gateRows = 20 * Panels.height
  static let gateColumns = 48

  /// How the blocks under way share memory: one slot a block in a ring of them, or, if all blocks are under way at once,
  /// so many rows, each block at its own.
  enum Slots { case ring, rows(Int) }

  private let shape: Shape
  /// Of the gate's matrix: E, or 2·E where it also learns noise.
  private let columns: Int
  private let base: UnsafeMutableRawPointer?
  private let deskBytes: Int
  private let slotBytes: Int
  private let threads: Int
  let slots: Slots

  init(_ shape: Shape, columns: Int, threads: Int, _ slots: Slots = .ring, over base: UnsafeMutableRawPointer? = nil) {
    self.shape = shape
    self.columns = columns
    self.threads = threads
    self.base = base
    self.slots = slots
    var arena = Arena()
    _ = Workspace.desk(shape, columns, &arena)
    deskBytes = arena.bytes
    arena = Arena()
    switch slots {
    case .ring: _ = Workspace.slot(shape, rows: Block.mostRows, &arena)
    case .rows(let rows): _ = Workspace.slot(shape, rows: rows, &arena)
    }
    slotBytes = arena.bytes
  }

  var bytes: Int {
    switch slots {
    case .ring: threads * (deskBytes + slotBytes)
    case .rows: threads * deskBytes + slotBytes
    }
  }

  /// How many blocks a block's weight tasks stay behind its row tasks where they share a ring of slots.
  var lag: Int { threads - 1 }

  func desk(_ thread: Int) -> Desk {
    var arena = Arena(over: base! + thread * deskBytes)
    return Workspace.desk(shape, columns, &arena)
  }

  /// The slot of block `index`, whose first row is `row`.
  func slot(_ index: Int, row: Int) -> Slot {
    let slots = base! + threads * deskBytes
    switch self.slots {
    case .ring:
      var arena = Arena(over: slots + index % threads * slotBytes)
      return Workspace.slot(shape, rows: Block.mostRows, &arena)
    case .rows(let rows):
      var arena = Arena(over: slots)
      let all = Workspace.slot(shape, rows: rows, &arena)
      return Slot(
        tokens: all.tokens.from(row), grads: all.grads.from(row), hidden: all.hidden.from(row),
        scales: all.scales + row, biasGrads: all.biasGrads + row)
    }
  }

  private static func desk(_ shape: Shape, _ columns: Int, _ arena: inout Arena) -> Desk {
    let scores = Panels.padded(columns)
    let longest = max(shape.model, shape.hidden, columns)
    return Desk(
      first: Product.Desk(arena: &arena, rows: Block.mostRows, longest: longest),
      second: Product.Desk(arena: &arena, rows: Block.mostRows, longest: longest),
      tokens: Panels(arena.take(gateRows * Panels.padded(shape.model)), width: shape.model),
      columns: Panels(arena.take(gateRows * gateColumns), width: gateColumns), scores: arena.take(scores),
      logits: arena.take(scores), probabilities: arena.take(scores), gradScores: arena.take(scores),
      noise: Noise(arena: &arena, experts: shape.experts), picks: arena.take(shape.choices),
      weights: arena.take(shape.choices), rowSums: arena.take(Block.mostRows * 16),
      results: arena.take(Block.mostRows), resultScales: arena.take(Block.mostRows))
  }

  private static func slot(_ shape: Shape, rows: Int, _ arena: inout Arena) -> Slot {
    let model = rows * Panels.padded(shape.model)
    return Slot(
      tokens: Panels(arena.take(model), width: shape.model), grads: Panels(arena.take(model), width: shape.model),
      hidden: Panels(arena.take(rows * Panels.padded(shape.hidden)), width: shape.hidden), scales: arena.take(rows),
      biasGrads: arena.take(rows))
  }
}
