import Glibc

/// The parameters and gradients of one MoE layer, and the passes that batches make through it.
package final class Layer {
  package let group: Group
  package let shape: Shape
  package let losses: RouterLosses
  let values: Parameters
  let gradients: Parameters
  private let zeroing: Zeroing
  /// Passes whose batch is done; their memory serves the next ones.
  private var idle: [Pass] = []

  package init(_ group: Group, _ shape: Shape, losses: RouterLosses, seed: UInt64) throws(Failure) {
    self.group = group
    self.shape = shape
    self.losses = losses
    values = try Parameters(shape)
    gradients = try Parameters(shape)
    zeroing = Zeroing(gradients.base, gradients.floats, group.team)
    _ = try workspace()
    for tensor in values.drawn(shape, seed: seed) { group.team.run(Drawing(tensor, group.team)) }
  }

  /// Tensors by name, borrowed for the layer's life.
  package struct Tensors {
    package let gate: UnsafeMutablePointer<Float>
    package let inward, outward: UnsafeMutablePointer<Float>
    package let inwardLinear, inwardBias, outwardBias: UnsafeMutablePointer<Float>?
  }

  package var valueTensors: Tensors { Layer.tensors(values) }
  package var gradientTensors: Tensors { Layer.tensors(gradients) }

  package func zeroGradients() { group.team.run(zeroing) }

  /// A pass for `tokens` [n, d] by the layer's gate.
  package func gate(tokens: UnsafePointer<Float>?, count n: Int) throws(Failure) -> Pass {
    let pass = try begin(tokens, n)
    pass.gate()
    return pass
  }

  /// A pass for `tokens` [n, d] by the caller's own choices and weights, both [n, k].
  package func route(
    tokens: UnsafePointer<Float>?, count n: Int, choices: UnsafePointer<Int32>?, weights: UnsafePointer<Float>?
  ) throws(Failure) -> Pass {
    if n > 0 {
      guard let choices else { throw Failure(.argument, "choices is NULL, but there are \(n) tokens") }
      guard weights != nil else { throw Failure(.argument, "weights is NULL, but there are \(n) tokens") }
      guard n <= Int(Int32.max) / shape.choices else { throw Pass.tooMany(n) }
      for slot in 0..<n * shape.choices where choices[slot] < -1 || choices[slot] >= shape.experts {
        throw Failure(
          .argument,
          "choice \(slot % shape.choices) of token \(slot / shape.choices) is expert \(choices[slot]), not -1 or one of 0..\(shape.experts - 1)"
        )
      }
    }
    let pass = try begin(tokens, n)
    pass.route(choices, weights)
    return pass
  }

  private func begin(_ tokens: UnsafePointer<Float>?, _ n: Int) throws(Failure) -> Pass {
    guard n >= 0 else { throw Failure(.argument, "n must not be negative, not \(n)") }
    guard n == 0 || tokens != nil else { throw Failure(.argument, "tokens is NULL, but n is \(n)") }
    let pass = idle.popLast() ?? Pass(team: group.team)
    do throws(Failure) {
      try pass.begin(in: self, tokens, n)
    } catch {
      idle.append(pass)
      throw error
    }
    return pass
  }

  /// Takes back a pass that is over.
  func recycle(_ pass: Pass) { idle.append(pass) }

  func workspace() throws(Failure) -> Workspace {
    let threads = group.team.threads
    return Workspace(
      shape, threads: threads, over: try group.workspace(bytes: Workspace(shape, threads: threads).bytes))
  }

  private static func tensors(_ block: borrowing Parameters) -> Tensors {
    Tensors(
      gate: block.gate, inward: block.inward, outward: block.outward, inwardLinear: block.inwardLinear,
      inwardBias: block.inwardBias, outwardBias: block.outwardBias)
  }
}

/// Draws a tensor's values, all threads at once; each value depends on its index alone.
private final class Drawing: TeamWork {
  private let tensor: Parameters.Drawn
  private let team: Team

  init(_ tensor: Parameters.Drawn, _ team: Team) {
    self.tensor = tensor
    self.team = team
  }

  override func work(thread: Int) {
    while case let start = team.take() * Zeroing.piece, start < tensor.count {
      for index in start..<min(start + Zeroing.piece, tensor.count) {
        tensor.values[index] = tensor.random.uniform(index, bound: tensor.bound)
      }
    }
  }
}

/// Fills a tensor block with zeros, all threads at once.
private final class Zeroing: TeamWork {
  /// Floats of one task.
  static let piece = 1 << 20
  private let base: UnsafeMutablePointer<Float>
  private let count: Int
  private let team: Team

  init(_ base: UnsafeMutablePointer<Float>, _ count: Int, _ team: Team) {
    self.base = base
    self.count = count
    self.team = team
  }

  override func work(thread: Int) {
    while case let start = team.take() * Zeroing.piece, start < count {
      memset(base + start, 0, min(Zeroing.piece, count - start) * MemoryLayout<Float>.stride)
    }
  }
}
