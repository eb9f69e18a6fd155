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

  /// 16 independent numbers of the normal distribution, from `index` on, which 16 divides: by the method of Box and Muller,
  /// each two from a radius and an angle.
  @inline(__always) package func normals(_ index: Int) -> Vector {
    var (radii, angles) = (Vector.zero, Vector.zero)
    for pair in stride(from: 0, to: 16, by: 2) {
      let radius = 1 - share(index + pair)
      let angle = share(index + pair + 1)
      (radii[pair], radii[pair + 1]) = (radius, radius)
      (angles[pair], angles[pair + 1]) = (angle, angle - 0.25)  // the sine is a cosine a quarter of a turn before
    }
    return (naturalLogarithm(radii) * -2).squareRoot() * cosineOfTurns(angles)
  }

  /// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): each input bit changes half of the output bits.
  @inline(__always) private static func mix(_ value: UInt64) -> UInt64 {
    var z = value
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
