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
  /// Draws every weight and bias from U(-1/√in, 1/√in), as linear layers commonly start; equal for any number of workers.
  func draw(_ shape: Shape, seed: UInt64) {
    let (d, h, experts) = (shape.model, shape.hidden, shape.experts)
    func fill(_ tensor: UnsafeMutablePointer<Float>?, stream: UInt64, count: Int, inputs: Int) {
      guard let tensor else { return }
      let random = RandomStream(seed: seed, stream: stream)
      let bound = 1 / Float(inputs).squareRoot()
      for index in 0..<count { tensor[index] = random.uniform(index, bound: bound) }
    }
    fill(gate, stream: 0, count: experts * d, inputs: d)
    fill(inward, stream: 1, count: experts * h * d, inputs: d)
    fill(inwardBias, stream: 2, count: experts * h, inputs: d)
    fill(outward, stream: 3, count: experts * d * h, inputs: h)
    fill(outwardBias, stream: 4, count: experts * d, inputs: h)
    fill(inwardLinear, stream: 5, count: experts * h * d, inputs: d)
  }
}
