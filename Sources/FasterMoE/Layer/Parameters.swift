/// One tensor block: the layer's values or their gradients, each tensor dense and row-major.
struct Parameters: ~Copyable {
  let gate: UnsafeMutablePointer<Float>
  /// [E, h, d] each; the second of the two only for gated experts.
  let inward: UnsafeMutablePointer<Float>
  let inwardLinear: UnsafeMutablePointer<Float>?
  /// [E, d, h]
  let outward: UnsafeMutablePointer<Float>
  /// [E, h] and [E, d]; nil for gated experts.
  let inwardBias: UnsafeMutablePointer<Float>?
  let outwardBias: UnsafeMutablePointer<Float>?
  let floats: Int
  private let region: Region

  init(_ shape: Shape) throws(Failure) {
    func lay(_ arena: inout Arena) -> [UnsafeMutablePointer<Float>?] {
      let matrix = shape.experts * shape.model * shape.hidden
      let gated = shape.activation.isGated
      return [
        arena.take(shape.experts * shape.model), arena.take(matrix),
        gated ? nil : arena.take(shape.experts * shape.hidden),
        arena.take(matrix), gated ? nil : arena.take(shape.experts * shape.model), gated ? arena.take(matrix) : nil,
      ]
    }
    var count = Arena()
    _ = lay(&count)
    region = try Region(bytes: count.bytes, for: "the parameters of a layer")
    var arena = Arena(over: region.base)
    let tensors = lay(&arena)
    gate = tensors[0]!
    inward = tensors[1]!
    inwardBias = tensors[2]
    outward = tensors[3]!
    outwardBias = tensors[4]
    inwardLinear = tensors[5]
    floats = count.bytes / MemoryLayout<Float>.stride
  }

  var base: UnsafeMutablePointer<Float> { region.base.assumingMemoryBound(to: Float.self) }
}

extension Parameters {
  /// How one tensor's first values are drawn: uniform within `bound`.
  struct Drawn {
    let values: UnsafeMutablePointer<Float>
    let count: Int
    let random: RandomStream
    let bound: Float
  }

  /// Every weight and bias starts in ±1/√in, as linear layers commonly do; equal for any number of workers.
  func drawn(_ shape: Shape, seed: UInt64) -> [Drawn] {
    let (d, h, experts) = (shape.model, shape.hidden, shape.experts)
    let tensors = [
      (gate, experts * d, d), (inward, experts * h * d, d), (inwardBias, experts * h, d),
      (outward, experts * d * h, h), (outwardBias, experts * d, h), (inwardLinear, experts * h * d, d),
    ]
    return tensors.enumerated().compactMap { stream, tensor in
      tensor.0.map {
        Drawn(
          values: $0, count: tensor.1, random: RandomStream(seed: seed, stream: UInt64(stream)),
          bound: 1 / Float(tensor.2).squareRoot())
      }
    }
  }
}
