import Foundation
import Testing

@testable import FasterMoE

/// Functions of single numbers against Double: activations and their slopes, exponentials, normal tails, steps of AdamW.
@Suite struct FunctionTests {
  private static func normalShare(_ x: Double) -> Double { erfc(-x / 2.0.squareRoot()) / 2 }
  private static let exact:
    [(name: String, kernel: @Sendable (Vector) -> (value: Vector, slope: Vector), value: @Sendable (Double) -> Double)] =
      [
        ("gelu", Gelu.valueAndSlope, { $0 * normalShare($0) }),
        (
          "gelu tanh", GeluTanh.valueAndSlope,
          { u in
            u / (1 + exp(-2 * (2 / Double.pi).squareRoot() * (u + 0.044715 * u * u * u)))
          }
        ),
        ("relu", Relu.valueAndSlope, { max($0, 0) }),
        ("silu", Silu.valueAndSlope, { $0 / (1 + exp(-$0)) }),
      ]

  /// Values within 2e-6 of the larger of 1 and the argument, slopes of central differences within 1e-5.
  @Test func activationsEqualDoubleFunctions() {
    for (name, kernel, function) in Self.exact {
      for step in -2000...2000 where step != 0 {
        let u = Double(step) / 100
        let (value, slope) = kernel(Vector(repeating: Float(u)))
        let x = Double(Float(u))
        #expect(abs(Double(value[3]) - function(x)) <= 2e-6 * max(1, abs(x)), "\(name) at \(x)")
        let difference = (function(x + 1e-5) - function(x - 1e-5)) / 2e-5
        #expect(abs(Double(slope[3]) - difference) <= 1e-5, "slope of \(name) at \(x)")
      }
    }
  }

  @Test func valueAloneEqualsValueBesideSlope() {
    var numbers = Numbers(4)
    for _ in 0..<100 {
      var u = Vector.zero
      for lane in 0..<16 { u[lane] = numbers.next() * 8 }
      #expect(Gelu.value(u) == Gelu.valueAndSlope(u).value)
      #expect(GeluTanh.value(u) == GeluTanh.valueAndSlope(u).value)
      #expect(Silu.value(u) == Silu.valueAndSlope(u).value)
      #expect(Relu.value(u) == Relu.valueAndSlope(u).value)
    }
  }

  @Test func exponentialIsWithinThreeUlp() {
    for step in -8700...8800 {
      let x = Float(step) / 100
      let exact = exp(Double(x))
      #expect(abs(Double(exponential(Vector(repeating: x))[0]) - exact) <= 3 * Double(Float(exact).ulp), "e^\(x)")
    }
    #expect(exponential(Vector(repeating: .nan))[0].isNaN)
    #expect(exponential(Vector(repeating: -.infinity))[0] < 2e-38)
  }

  /// Small probabilities keep their relative precision: logits of -10 still get gradients.
  @Test func normalTailIsRelative() {
    for step in 0...1200 {
      let x = -Double(step) / 100
      let exact = Self.normalShare(Double(Float(x)))
      #expect(abs(Double(normal(Vector(repeating: Float(x))).below[0]) - exact) <= 4e-6 * exact, "Φ(\(x))")
    }
  }

  /// The numbers of a step, against PyTorch's formula.
  @Test func adamWFactors() {
    let how = AdamW(rate: 0.1, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, decay: 0.5, scale: 2)
    var values: [Float] = [1, -2], gradients: [Float] = [0.5, 0.25], means: [Float] = [0, 0], squares: [Float] = [0, 0]
    AdamW.step(&values, &gradients, &means, &squares, count: 2, how.factors(step: 1), .zeroed)
    // The first step goes a rate along the sign, whatever the gradient's size.
    #expect(abs(values[0] - (1 - 0.05 - 0.1)) < 1e-6 && abs(values[1] - (-2 + 0.1 - 0.1)) < 1e-6)
    #expect(abs(means[0] - 0.1) < 1e-7 && abs(squares[0] - 0.01) < 1e-8 && gradients == [0, 0])
    let still = how.withoutDecay.factors(step: 1)
    var others: [Float] = [1, -2]
    (gradients, means, squares) = ([0, 0], [0, 0], [0, 0])
    AdamW.step(&others, &gradients, &means, &squares, count: 2, still, .kept)
    #expect(others == [1, -2], "without a gradient and decay nothing moves")
  }
}
