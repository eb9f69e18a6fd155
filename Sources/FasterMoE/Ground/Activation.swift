/// An expert's nonlinearity, applied to 16 pre-activations at a time.
package enum Activation: Sendable {
  case gelu, geluTanh, relu, silu
  /// SiLU of one product times another, linear one; the expert has a third matrix and no biases.
  case swiglu

  /// Whether hidden units are silu(x·W1ᵀ) ⊙ (x·W3ᵀ).
  package var isGated: Bool { self == .swiglu }
}

/// One activation as value and derivative; the kernels are specialised for each.
protocol Nonlinearity {
  static func value(_ u: Vector) -> Vector
  static func valueAndSlope(_ u: Vector) -> (value: Vector, slope: Vector)
}

/// u·Φ(u).
enum Gelu: Nonlinearity {
  @inline(__always) static func value(_ u: Vector) -> Vector { u * normal(u).below }
  @inline(__always) static func valueAndSlope(_ u: Vector) -> (value: Vector, slope: Vector) {
    let (below, density) = normal(u)
    return (u * below, u.times(density, plus: below))
  }
}

/// u·σ(2c(u + 0.044715 u³)) with c = √(2/π): the same as 0.5 u (1 + tanh(c(u + 0.044715 u³))).
enum GeluTanh: Nonlinearity {
  @inline(__always) private static func share(_ u: Vector) -> Vector {
    logistic(u * (u * u).times(Vector(repeating: 0.071_354_814), plus: 1.595_769_12))
  }
  @inline(__always) static func value(_ u: Vector) -> Vector { u * share(u) }
  @inline(__always) static func valueAndSlope(_ u: Vector) -> (value: Vector, slope: Vector) {
    let s = share(u)
    let inner = (u * u).times(Vector(repeating: 0.214_064_44), plus: 1.595_769_12)
    return (u * s, (u * s * (1 - s)).times(inner, plus: s))
  }
}

/// max(u, 0), with slope 0 at 0; NaN stays NaN.
enum Relu: Nonlinearity {
  @inline(__always) static func value(_ u: Vector) -> Vector { u.replacing(with: 0, where: u .<= 0) }
  @inline(__always) static func valueAndSlope(_ u: Vector) -> (value: Vector, slope: Vector) {
    (value(u), Vector.one.replacing(with: 0, where: u .<= 0))
  }
}

/// u·σ(u).
enum Silu: Nonlinearity {
  @inline(__always) static func value(_ u: Vector) -> Vector { u * logistic(u) }
  @inline(__always) static func valueAndSlope(_ u: Vector) -> (value: Vector, slope: Vector) {
    let s = logistic(u)
    return (u * s, s * u.times(1 - s, plus: 1))
  }
}
