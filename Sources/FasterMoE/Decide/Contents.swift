/// What a file of a layer holds: each tensor's name, and which part of whose parameters it is.
///
/// Experts go by their number among all experts, so a file does not know how many workers wrote it.
package struct Contents: Equatable {
  /// A tensor block of every worker: its values, and what AdamW remembers, running means of gradients and of squares.
  package enum Block: Int, CaseIterable, Sendable {
    case values, means, squares

    fileprivate var prefix: String {
      switch self {
      case .values: ""
      case .means: "optimizer.exp_avg."
      case .squares: "optimizer.exp_avg_sq."
      }
    }
  }
  /// A tensor of such a block; those of the gate are every worker's, of the others each worker has its experts' part.
  package enum Part: CaseIterable, Sendable {
    case gate, noise, bias, inward, inwardBias, outward, outwardBias, inwardLinear
    package var isOfAll: Bool { self == .gate || self == .noise || self == .bias }
  }

  package struct Tensor: Equatable, Sendable {
    package let name: String
    package let shape: [Int]
    package let block: Block
    package let part: Part
    /// Of all experts; 0 for those of the gate.
    package let expert: Int
    package var count: Int { shape.reduce(1, *) }
  }

  /// A number of the layer's, an I64 without dimensions: AdamW's steps, if there were any; passes in training, by which a
  /// gate draws.
  package enum Counter: String, Sendable {
    case steps = "optimizer.step"
    case passes = "gate.passes"
  }

  package let counters: [Counter]
  package let tensors: [Tensor]

  /// `isNoisy`: whether the gate also learns the width of its noise; `hasBias`: whether it balances by a bias; `hasPasses`:
  /// whether passes are counted.
  package init(_ shape: Shape, isNoisy: Bool, hasBias: Bool = false, hasMoments: Bool, hasPasses: Bool = false) {
    counters = (hasMoments ? [.steps] : []) + (hasPasses ? [.passes] : [])
    let (d, h) = (shape.model, shape.hidden)
    let parts: [(Part, String, [Int])] =
      shape.activation.isGated
      ? [(.inward, "w1.weight", [h, d]), (.outward, "w2.weight", [d, h]), (.inwardLinear, "w3.weight", [h, d])]
      : [
        (.inward, "w1.weight", [h, d]), (.inwardBias, "w1.bias", [h]), (.outward, "w2.weight", [d, h]),
        (.outwardBias, "w2.bias", [d]),
      ]
    let gates: [(Part, String)] =
      isNoisy ? [(.gate, "gate.weight"), (.noise, "gate.noise.weight")] : [(.gate, "gate.weight")]
    // Nobody takes steps on the bias by gradients.
    let biases =
      hasBias
      ? [Tensor(name: "gate.bias", shape: [shape.experts], block: .values, part: .bias, expert: 0)] : []
    let learned = (hasMoments ? Block.allCases : [.values]).flatMap { block in
      gates.map { part, name in
        Tensor(name: "\(block.prefix)\(name)", shape: [shape.experts, d], block: block, part: part, expert: 0)
      }
        + (0..<shape.experts).flatMap { expert in
          parts.map { part, name, shape in
            Tensor(
              name: "\(block.prefix)experts.\(expert).\(name)", shape: shape, block: block, part: part, expert: expert)
          }
        }
    }
    tensors = biases + learned
  }

  /// As they are laid out in a file: the counters first, which are 8 bytes and stand on a multiple of them.
  package var stored: [Safetensors.Tensor] {
    var end = 0
    func next(_ name: String, _ type: String, _ shape: [Int], _ bytes: Int) -> Safetensors.Tensor {
      defer { end += bytes }
      return Safetensors.Tensor(name, type, shape, end..<end + bytes)
    }
    return counters.map { next($0.rawValue, "I64", [], 8) }
      + tensors.map { next($0.name, "F32", $0.shape, 4 * $0.count) }
  }

  /// The contents of a file that holds `found`, and for each found tensor its number among these, nil for a counter.
  ///
  /// Fails, naming the tensor, unless a layer of this shape has all of them, just like that, and no others. Passes need not
  /// be counted, and may be.
  package static func match(
    _ found: [Safetensors.Tensor], _ shape: Shape, isNoisy: Bool, hasBias: Bool = false
  ) throws(Failure) -> (Contents, [Int?]) {
    let contents = Contents(
      shape, isNoisy: isNoisy, hasBias: hasBias, hasMoments: found.contains { $0.name.hasPrefix("optimizer.") },
      hasPasses: found.contains { $0.name == Counter.passes.rawValue })
    var places: [String: Int] = [:]
    for (place, tensor) in found.enumerated() { places[tensor.name] = place }
    var numbers = [Int?](repeating: nil, count: found.count)
    var isKnown = [Bool](repeating: false, count: found.count)
    for (number, wanted) in contents.stored.enumerated() {
      guard let place = places[wanted.name] else { throw Failure(.file, "lacks the tensor \"\(wanted.name)\"") }
      let tensor = found[place]
      guard tensor.type == wanted.type else {
        throw Failure(.file, "tensor \"\(tensor.name)\" is \(tensor.type), not \(wanted.type)")
      }
      guard tensor.shape == wanted.shape else {
        throw Failure(.file, "tensor \"\(tensor.name)\" is \(tensor.shape), not \(wanted.shape) as in this layer")
      }
      guard tensor.bytes.count == wanted.bytes.count else {
        throw Failure(
          .file, "tensor \"\(tensor.name)\" has \(tensor.bytes.count) bytes, not \(wanted.bytes.count) for its shape")
      }
      isKnown[place] = true
      numbers[place] = number < contents.counters.count ? nil : number - contents.counters.count
    }
    if let stranger = isKnown.firstIndex(of: false) {
      throw Failure(.file, "has the tensor \"\(found[stranger].name)\", which this layer does not have")
    }
    return (contents, numbers)
  }
}
