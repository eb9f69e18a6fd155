/// One tensor block: the layer's values or their gradients, each tensor dense and row-major, of the experts that this
/// worker owns; e = E/W of them.
struct Parameters: ~Copyable {
  /// [E, d]; where the gate is noisy, its widths' [E, d] follow.
  let gate: UnsafeMutablePointer<Float>
  /// [e, h, d] each; the second of the two only for gated experts.
  let inward: UnsafeMutablePointer<Float>
  let inwardLinear: UnsafeMutablePointer<Float>?
  /// [e, d, h]
  let outward: UnsafeMutablePointer<Float>
  /// [e, h] and [e, d]; nil for gated experts.
  let inwardBias: UnsafeMutablePointer<Float>?
  let outwardBias: UnsafeMutablePointer<Float>?
  /// [E, d], of noisy gates.
  let noise: UnsafeMutablePointer<Float>?
  /// [E] of gates that balance by it; behind all else, so that blocks with it and without are laid out alike.
  let bias: UnsafeMutablePointer<Float>?
  let floats: Int
  private let region: Region

  /// The gate's matrix has so many `columns`: E, or twice that.
  init(_ shape: Shape, columns: Int, owned: Int, hasBias: Bool = false) throws(Failure) {
    func lay(_ arena: inout Arena) -> [UnsafeMutablePointer<Float>?] {
      let matrix = owned * shape.model * shape.hidden
      let gated = shape.activation.isGated
      return [
        arena.take(columns * shape.model), arena.take(matrix),
        gated ? nil : arena.take(owned * shape.hidden),
        arena.take(matrix), gated ? nil : arena.take(owned * shape.model), gated ? arena.take(matrix) : nil,
        hasBias ? arena.take(shape.experts) : nil,
      ]
    }
    var count = Arena()
    _ = lay(&count)
    region = try Region(bytes: count.bytes, for: "the parameters of a layer")
    var arena = Arena(over: region.base)
    let tensors = lay(&arena)
    gate = tensors[0]!
    noise = columns > shape.experts ? gate + shape.experts * shape.model : nil
    inward = tensors[1]!
    inwardBias = tensors[2]
    outward = tensors[3]!
    outwardBias = tensors[4]
    inwardLinear = tensors[5]
    bias = tensors[6]
    bias?.update(repeating: 0, count: shape.experts)
    floats = count.bytes / MemoryLayout<Float>.stride
  }

  /// A tensor that this layer has.
  func tensor(_ part: Contents.Part) -> UnsafeMutablePointer<Float> {
    switch part {
    case .gate: gate
    case .noise: noise!
    case .bias: bias!
    case .inward: inward
    case .inwardBias: inwardBias!
    case .outward: outward
    case .outwardBias: outwardBias!
    case .inwardLinear: inwardLinear!
    }
  }

  var base: UnsafeMutablePointer<Float> { region.base.assumingMemoryBound(to: Float.self) }
}

extension Parameters {
  /// How one tensor's first values are drawn: uniform within `bound`.
  struct Drawn {
    let values: UnsafeMutablePointer<Float>
    let count: Int
    let random: RandomStream
    /// The number of its first value among those of all workers' experts.
    let first: Int
    let bound: Float
  }

  /// Every weight and bias starts in ±1/√in, as linear layers commonly do; equal for any number of workers.
  func drawn(_ shape: Shape, owned: Range<Int>, seed: UInt64) -> [Drawn] {
    let (d, h) = (shape.model, shape.hidden)
    // Each tensor's experts, floats of one of them, and inputs.
    let tensors = [
      (gate, 0..<shape.experts, d, d), (inward, owned, h * d, d), (inwardBias, owned, h, d),
      (outward, owned, d * h, h), (outwardBias, owned, d, h), (inwardLinear, owned, h * d, d),
      (noise, 0..<shape.experts, d, d),
    ]
    return tensors.enumerated().compactMap { stream, tensor in
      tensor.0.map {
        Drawn(
          values: $0, count: tensor.1.count * tensor.2, random: RandomStream(seed: seed, stream: UInt64(stream)),
          first: tensor.1.lowerBound * tensor.2, bound: 1 / Float(tensor.3).squareRoot())
      }
    }
  }
}
