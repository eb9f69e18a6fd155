import Glibc

/// A step of AdamW (Loshchilov and Hutter, 2019), as PyTorch defines it:
///
///     m ← β1·m + (1-β1)·g,  v ← β2·v + (1-β2)·g²,  p ← p - η·λ·p - η·(m / (1-β1^t)) / (√(v / (1-β2^t)) + ε)
package struct AdamW: Equatable {
  package let rate, beta1, beta2, epsilon, decay: Double
  /// What every gradient is multiplied by first.
  package let scale: Double

  package init(rate: Double, beta1: Double, beta2: Double, epsilon: Double, decay: Double, scale: Double) {
    (self.rate, self.beta1, self.beta2) = (rate, beta1, beta2)
    (self.epsilon, self.decay, self.scale) = (epsilon, decay, scale)
  }

  /// The numbers of one step, worked out in Double and rounded once.
  package struct Factors {
    /// 1-β1 and 1-β2.
    let mean, square: Float
    /// η / (1-β1^t) and 1 / √(1-β2^t).
    let rate, unbias: Float
    /// η·λ
    let decay: Float
    let epsilon, scale: Float

    package static let none = Factors(mean: 0, square: 0, rate: 0, unbias: 1, decay: 0, epsilon: 1, scale: 1)
  }

  package var withoutDecay: AdamW {
    AdamW(rate: rate, beta1: beta1, beta2: beta2, epsilon: epsilon, decay: 0, scale: scale)
  }

  /// Of step `t`, counted from 1.
  package func factors(step t: Int) -> Factors {
    Factors(
      mean: Float(1 - beta1), square: Float(1 - beta2), rate: Float(rate / (1 - pow(beta1, Double(t)))),
      unbias: Float(1 / (1 - pow(beta2, Double(t))).squareRoot()), decay: Float(rate * decay), epsilon: Float(epsilon),
      scale: Float(scale))
  }

  /// What becomes of the gradients that were used.
  package enum Gradients { case kept, zeroed }

  /// Updates `count` parameters and their moments; each depends on its own numbers alone, so any cut gives the same bits.
  ///
  /// Memory is the limit: 28 bytes a parameter cross its bus, 32 if gradients are zeroed.
  package static func step(
    _ values: UnsafeMutablePointer<Float>, _ gradients: UnsafeMutablePointer<Float>,
    _ means: UnsafeMutablePointer<Float>, _ squares: UnsafeMutablePointer<Float>, count: Int, _ factors: Factors,
    _ used: Gradients
  ) {
    switch used {
    case .kept: sweep(values, gradients, means, squares, count, factors, zeroes: false)
    case .zeroed: sweep(values, gradients, means, squares, count, factors, zeroes: true)
    }
  }

  @inline(__always)
  private static func sweep(
    _ values: UnsafeMutablePointer<Float>, _ gradients: UnsafeMutablePointer<Float>,
    _ means: UnsafeMutablePointer<Float>, _ squares: UnsafeMutablePointer<Float>, _ count: Int, _ f: Factors,
    zeroes: Bool
  ) {
    let (mean, square) = (Vector(repeating: f.mean), Vector(repeating: f.square))
    let (rate, decay) = (Vector(repeating: -f.rate), Vector(repeating: -f.decay))
    let (unbias, epsilon, scale) = (
      Vector(repeating: f.unbias), Vector(repeating: f.epsilon), Vector(repeating: f.scale)
    )
    var at = 0
    while at < count {
      let width = min(16, count - at)
      let p = values.vector(at: at, first: width)
      let g = gradients.vector(at: at, first: width) * scale
      let m = means.vector(at: at, first: width)
      let v = squares.vector(at: at, first: width)
      let newMean = (g - m).times(mean, plus: m)
      let newSquare = g.times(g, plus: -v).times(square, plus: v)
      let size = squareRoot(newSquare).times(unbias, plus: epsilon)
      let moved = (newMean / size).times(rate, plus: p.times(decay, plus: p))
      values.store(moved, at: at, first: width)
      means.store(newMean, at: at, first: width)
      squares.store(newSquare, at: at, first: width)
      if zeroes { gradients.store(.zero, at: at, first: width) }
      at += 16
    }
  }
}
