import CHints

/// Uniform numbers that depend only on a seed, a stream and an index, so that any worker can make any part of a tensor.
package struct RandomStream {
  private let key: UInt64

  package init(seed: UInt64, stream: UInt64) {
    key = RandomStream.mix(RandomStream.mix(seed &+ 0x9E37_79B9_7F4A_7C15) ^ stream &* 0xD1B5_4A32_D192_ED03)
  }

  /// The number at `index`, uniform in [-bound, bound).
  @inline(__always) package func uniform(_ index: Int, bound: Float) -> Float {
    let bits = RandomStream.mix(key &+ UInt64(truncatingIfNeeded: index) &* 0x9E37_79B9_7F4A_7C15)
    return (Float(bits >> 40) * 0x1p-23 - 1) * bound
  }

  /// The number at `index`, uniform in [0, 1).
  @inline(__always) package func share(_ index: Int) -> Float {
    let bits = RandomStream.mix(key &+ UInt64(truncatingIfNeeded: index) &* 0x9E37_79B9_7F4A_7C15)
    return Float(bits >> 40) * 0x1p-24
  }

  /// 16 numbers uniform in [-bound, bound), two from each of the 8 draws at `index` and behind: from its lower half, then
  /// from its upper one.
  @inline(__always) package func uniforms(_ index: Int, bound: Float) -> Vector {
    (hint_upper_bits_of_halves(words(index)) * 0x1p-23 - 1) * bound
  }

  /// The numbers of `share` at `index` and the 15 behind.
  @inline(__always) package func shares(_ index: Int) -> Vector {
    hint_upper_bits(words(index), words(index + 8)) * 0x1p-24
  }

  /// 16 independent numbers of the normal distribution, from `index` on, which 16 divides: by the method of Box and Muller,
  /// each two from a radius and an angle.
  @inline(__always) package func normals(_ index: Int) -> Vector {
    let shares = shares(index)
    // The sine is a cosine a quarter of a turn before.
    let angles = hint_odds(shares) - RandomStream.quarterOfOdds
    return squareRoot(naturalLogarithm(1 - hint_evens(shares)) * -2) * cosineOfTurns(angles)
  }

  private static var quarterOfOdds: Vector {
    Vector(0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25)
  }

  /// The draws at `index` and the 7 behind.
  @inline(__always) private func words(_ index: Int) -> SIMD8<UInt64> {
    let places = SIMD8<UInt64>(0, 1, 2, 3, 4, 5, 6, 7) &* 0x9E37_79B9_7F4A_7C15
    return hint_mix(places &+ (key &+ UInt64(truncatingIfNeeded: index) &* 0x9E37_79B9_7F4A_7C15))
  }

  /// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): each input bit changes half of the output bits.
  @inline(__always) private static func mix(_ value: UInt64) -> UInt64 {
    var z = value
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
