import CHints
import Glibc

/// The one vector of all kernels: 16 floats, two registers with AVX2, one with AVX-512.
package typealias Vector = SIMD16<Float>

extension UnsafePointer<Float> {
  /// 16 floats from any address.
  @inline(__always) package func vector(at offset: Int = 0) -> Vector {
    UnsafeRawPointer(self + offset).loadUnaligned(as: Vector.self)
  }

  /// The first `count` of 16 floats, the rest 0; reads nothing behind them.
  @inline(__always) package func vector(at offset: Int, first count: Int) -> Vector {
    if count >= 16 { return vector(at: offset) }
    var partial = Vector.zero
    for lane in 0..<count { partial[lane] = self[offset &+ lane] }
    return partial
  }
}

extension UnsafeMutablePointer<Float> {
  @inline(__always) package func vector(at offset: Int = 0) -> Vector { UnsafePointer(self).vector(at: offset) }
  @inline(__always) package func vector(at offset: Int, first count: Int) -> Vector {
    UnsafePointer(self).vector(at: offset, first: count)
  }

  @inline(__always) package func store(_ vector: Vector, at offset: Int = 0) {
    UnsafeMutableRawPointer(self + offset).storeBytes(of: vector, as: Vector.self)
  }

  /// Writes the first `count` of 16 floats and nothing behind them.
  @inline(__always) package func store(_ vector: Vector, at offset: Int, first count: Int) {
    if count >= 16 { return store(vector, at: offset) }
    for lane in 0..<count { self[offset &+ lane] = vector[lane] }
  }
}

extension Vector {
  @inline(__always) func limited(from low: Float, to high: Float) -> Vector {
    // Comparisons with NaN are false, so NaN passes through.
    replacing(with: low, where: self .< low).replacing(with: high, where: self .> high)
  }

  /// The sum of all lanes, by halves.
  @inline(__always) package var total: Float { hint_sum(self) }
  /// The highest lane where none is NaN.
  @inline(__always) package var highest: Float { hint_highest(self) }
  /// And the lowest; never -0.
  @inline(__always) package var lowest: Float { 0 - hint_highest(0 - self) }

  /// a·b + c, rounded once.
  @inline(__always) func times(_ factor: Vector, plus addend: Vector) -> Vector { addend.addingProduct(self, factor) }
  @inline(__always) func times(_ factor: Vector, plus addend: Float) -> Vector {
    times(factor, plus: Vector(repeating: addend))
  }
}

/// e^x to 2 ulp where the result is a normal number; below that 0 to within 1e-37, above that the largest power of two.
@inline(__always) package func exponential(_ x: Vector) -> Vector {
  let bounded = x.limited(from: -87.33, to: 88.37)
  // Adding 1.5·2^23 leaves the nearest integer in the low bits of the sum.
  let magic: Float = 12_582_912
  let shifted = bounded.times(Vector(repeating: 1.442_695_04), plus: magic)
  let n = shifted - magic
  // r = x - n·ln 2, with ln 2 in two parts so that n times the first is exact.
  let r = n.times(Vector(repeating: 2.121_944_4e-4), plus: n.times(Vector(repeating: -0.693_359_375), plus: bounded))
  var p = Vector(repeating: 0.001_381_446_7)
  p = p.times(r, plus: 0.008_368_781)
  p = p.times(r, plus: 0.041_668_393)
  p = p.times(r, plus: 0.166_665_2)
  p = p.times(r, plus: 0.499_999_94)
  p = p.times(r * r, plus: r + 1)
  let power = unsafeBitCast(shifted, to: SIMD16<Int32>.self) &- SIMD16(repeating: Int32(bitPattern: magic.bitPattern))
  return p * unsafeBitCast((power &+ 127) &<< 23, to: Vector.self)
}

/// 1 / (1 + e^-x).
@inline(__always) package func logistic(_ x: Vector) -> Vector { 1 / (1 + exponential(-x)) }

/// Φ(x) and φ(x): the normal distribution's share below x and its density at x, both to 1e-6 relative.
@inline(__always) package func normal(_ x: Vector) -> (below: Vector, density: Vector) {
  let e = exponential(x * x * -0.5)
  let negative = x .< 0
  let size = x.replacing(with: -x, where: negative)
  // Φ(-z) = e^(-z²/2)·t·P(t) with t = 1/(1 + 0.3 z): a least-maximum fit of degree 7, 1.5e-7 relative for z up to 14.
  let t = 1 / size.times(Vector(repeating: 0.3), plus: 1)
  var p = Vector(repeating: 0.035_674_777)
  p = p.times(t, plus: -0.157_203_11)
  p = p.times(t, plus: 0.206_353_53)
  p = p.times(t, plus: -0.053_683_672)
  p = p.times(t, plus: 0.128_561_65)
  p = p.times(t, plus: 0.099_913_485)
  p = p.times(t, plus: 0.120_753_96)
  p = p.times(t, plus: 0.119_629_3)
  let tail = p * t * e
  return ((1 - tail).replacing(with: tail, where: negative), e * 0.398_942_28)
}

/// 2·artanh s = ln((1 + s)/(1 - s)) to 2e-8 relative for |s| ≤ 1/3, where 1/9 is the largest square.
@inline(__always) private func logarithmOfRatio(_ s: Vector) -> Vector {
  let square = s * s
  var p = Vector(repeating: 2 / 15)
  for odd in [Float(13), 11, 9, 7, 5, 3, 1] { p = p.times(square, plus: 2 / odd) }
  return s * p
}

/// ln(1 + e^x) to 1e-6 relative, without overflow and without losing small values.
@inline(__always) package func softplus(_ x: Vector) -> Vector {
  let e = exponential(x.replacing(with: -x, where: x .> 0))
  return logarithmOfRatio(e / (e + 2)) + x.replacing(with: 0, where: x .< 0)
}

/// ln x of normal numbers, to 3e-7 of the larger of itself and 1e-1.
@inline(__always) package func naturalLogarithm(_ x: Vector) -> Vector {
  // x = m·2^n with m in [1/√2, √2).
  let bits = unsafeBitCast(x, to: SIMD16<Int32>.self)
  let power = (bits &- 0x3F35_04F3) &>> 23
  let m = unsafeBitCast(bits &- (power &<< 23), to: Vector.self)
  return Vector(power).times(Vector(repeating: 0.693_147_18), plus: logarithmOfRatio((m - 1) / (m + 1)))
}

/// cos 2πx to 3e-7, for x in -1...1.
@inline(__always) package func cosineOfTurns(_ x: Vector) -> Vector {
  // The cosine is even and mirrors at a half turn, where it changes its sign at a quarter.
  let turn = x.replacing(with: -x, where: x .< 0)
  let half = turn.replacing(with: 1 - turn, where: turn .> 0.5)
  let isBehind = half .> 0.25
  let quarter = half.replacing(with: 0.5 - half, where: isBehind)
  // Σ (-1)^i (2πx)^2i / (2i)!, whose terms from i = 7 on are below 4e-8.
  let square = quarter * quarter
  var p = Vector(repeating: 7.903_536)
  for factor in [Float(-26.426_257), 60.244_64, -85.456_82, 64.939_39, -19.739_209, 1] {
    p = p.times(square, plus: factor)
  }
  return p.replacing(with: -p, where: isBehind)
}

/// ln x.
package func naturalLogarithm(_ x: Float) -> Float { logf(x) }

/// √x, rounded once.
@inline(__always) package func squareRoot(_ x: Vector) -> Vector { hint_square_root(x) }
