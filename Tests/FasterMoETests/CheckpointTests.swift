import Foundation
import Testing

@testable import FasterMoE

@Suite struct CheckpointTests {
  private static func sum(_ bytes: [UInt8], pieces: Int = .max) -> String {
    var sum = Checksum()
    bytes.withUnsafeBytes {
      for start in stride(from: 0, to: $0.count, by: min(pieces, max(1, $0.count))) {
        sum.add($0.baseAddress! + start, min(pieces, $0.count - start))
      }
    }
    return sum.digits
  }

  /// The values of the algorithm's other implementations.
  @Test func theChecksumIsXXH64() {
    #expect(Self.sum([]) == "ef46db3751d8e999")
    #expect(Self.sum(Array("a".utf8)) == "d24ec4f1a98c6e5b")
    #expect(Self.sum(Array("abc".utf8)) == "44bc2cf5ad770999")
    #expect(Self.sum(Array("The quick brown fox jumps over the lazy dog".utf8)) == "0b242d361fda71bc")
  }

  @Test func piecesChangeNothingAndEveryBitCounts() {
    var numbers = Numbers(40)
    for count in [1, 31, 32, 33, 63, 64, 100, 127, 1000] {
      var bytes = (0..<count).map { _ in UInt8(numbers.below(256)) }
      let whole = Self.sum(bytes)
      for pieces in [32, 64, 96] { #expect(Self.sum(bytes, pieces: pieces) == whole, "\(count) by \(pieces)") }
      for bit in 0..<count * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8)
        #expect(Self.sum(bytes) != whole, "bit \(bit) of \(count) bytes")
        bytes[bit / 8] ^= 1 << (bit % 8)
      }
    }
  }

  private static func shape(_ activation: Activation) throws -> Shape {
    try Shape(model: 3, hidden: 5, experts: 2, choices: 1, activation: activation)
  }

  @Test func namesAreThoseOfTheField() throws {
    let plain = Contents(try Self.shape(.gelu), isNoisy: false, hasMoments: false)
    #expect(
      plain.tensors.map { "\($0.name) \($0.shape)" } == [
        "gate.weight [2, 3]", "experts.0.w1.weight [5, 3]", "experts.0.w1.bias [5]", "experts.0.w2.weight [3, 5]",
        "experts.0.w2.bias [3]", "experts.1.w1.weight [5, 3]", "experts.1.w1.bias [5]", "experts.1.w2.weight [3, 5]",
        "experts.1.w2.bias [3]",
      ])
    let gated = Contents(try Self.shape(.swiglu), isNoisy: false, hasMoments: true)
    #expect(gated.tensors.count == 3 * (1 + 2 * 3))
    #expect(gated.tensors[7].name == "optimizer.exp_avg.gate.weight")
    #expect(gated.tensors.last!.name == "optimizer.exp_avg_sq.experts.1.w3.weight")
    let noisy = Contents(try Self.shape(.swiglu), isNoisy: true, hasMoments: true)
    #expect(noisy.tensors.count == 3 * (2 + 2 * 3) && noisy.tensors[1].name == "gate.noise.weight")
    #expect(noisy.tensors[9].name == "optimizer.exp_avg.gate.noise.weight" && noisy.tensors[9].shape == [2, 3])
    #expect(gated.stored.first! == Safetensors.Tensor("optimizer.step", "I64", [], 0..<8))
  }

  @Test(arguments: [(Activation.relu, false), (.relu, true), (.swiglu, false)], [false, true])
  func aFileIsWithoutGapsAndMatchesItsOwnLayer(of layer: (Activation, isNoisy: Bool), hasMoments: Bool) throws {
    let shape = try Self.shape(layer.0)
    let contents = Contents(shape, isNoisy: layer.isNoisy, hasMoments: hasMoments, hasPasses: layer.isNoisy)
    var end = 0
    for tensor in contents.stored {
      #expect(tensor.bytes.lowerBound == end && tensor.bytes.lowerBound % 4 == 0)
      end = tensor.bytes.upperBound
    }
    // In any order, each is found again.
    let order = contents.stored.sorted { $0.name < $1.name }
    let (same, numbers) = try Contents.match(order, shape, isNoisy: layer.isNoisy)
    #expect(same == contents)
    for (place, number) in numbers.enumerated() {
      let name = number.map { contents.tensors[$0].name }
      #expect(name.map { $0 == order[place].name } ?? (Contents.Counter(rawValue: order[place].name) != nil))
    }
  }

  /// A bias is a value that nobody learns by gradients: it is there once, whatever AdamW remembers.
  @Test(arguments: [false, true]) func aBiasIsAValueAlone(hasMoments: Bool) throws {
    let shape = try Self.shape(.gelu)
    let plain = Contents(shape, isNoisy: false, hasMoments: hasMoments)
    let biased = Contents(shape, isNoisy: false, hasBias: true, hasMoments: hasMoments)
    let more = biased.tensors.filter { !plain.tensors.contains($0) }
    #expect(more.map(\.name) == ["gate.bias"] && more[0].shape == [shape.experts] && more[0].part.isOfAll)
    #expect(biased.tensors.count == plain.tensors.count + 1)
    #expect(try Contents.match(biased.stored, shape, isNoisy: false, hasBias: true).0 == biased)
    for (found, hasBias) in [(plain, true), (biased, false)] {
      let failure = #expect(throws: Failure.self) {
        _ = try Contents.match(found.stored, shape, isNoisy: false, hasBias: hasBias)
      }
      #expect(failure!.message.contains("\"gate.bias\""))
    }
  }

  @Test func whatDiffersIsNamed() throws {
    let shape = try Self.shape(.gelu)
    let stored = Contents(shape, isNoisy: false, hasMoments: true, hasPasses: true).stored
    for place in stored.indices {
      let tensor = stored[place]
      // Without passes, a file is a whole one.
      let isNeeded = tensor.name != Contents.Counter.passes.rawValue
      let left = isNeeded ? [nil, Safetensors.Tensor("stranger", tensor.type, tensor.shape, tensor.bytes)] : []
      for changed in left + [
        Safetensors.Tensor(tensor.name, "F16", tensor.shape, tensor.bytes),
        Safetensors.Tensor(tensor.name, tensor.type, tensor.shape + [1], tensor.bytes),
        Safetensors.Tensor(
          tensor.name, tensor.type, tensor.shape, tensor.bytes.lowerBound..<tensor.bytes.upperBound + 4),
      ] {
        var found = stored
        found[place...place] = changed.map { [$0] } ?? []
        let failure = #expect(throws: Failure.self) { _ = try Contents.match(found, shape, isNoisy: false) }
        #expect(failure?.kind == .file && failure!.message.contains("\"\(tensor.name)\""), "\(failure!.message)")
      }
    }
    let more = Contents(
      try Shape(model: 3, hidden: 5, experts: 3, choices: 1, activation: .gelu), isNoisy: false, hasMoments: false)
    var found = more.stored
    found[0] = Contents(shape, isNoisy: false, hasMoments: false).stored[0]
    let failure = #expect(throws: Failure.self) { _ = try Contents.match(found, shape, isNoisy: false) }
    #expect(failure!.message.contains("\"experts.2.w1.weight\""), "\(failure!.message)")
  }
}
