import CHints
import Foundation
import Testing

@testable import FasterMoE

@Suite struct NoiseTests {
  @Test func variationIsZeroWhereAllAreEqualAndItsSlopeIsADifference() {
    #expect(Variation(4) { _ in 3 }.value == 0)
    #expect(Variation(4) { _ in 3 }.slope(3) == 0)
    #expect(Variation(1) { _ in 3 }.value == 0 && Variation(4) { _ in 0 }.value == 0)
    let x = [1.0, 3, 2, 7]
    #expect(abs(Variation(4) { x[$0] }.value - 83.0 / 12 / 3.25 / 3.25) < 1e-9)
    for place in 0..<4 {
      var (up, down) = (x, x)
      up[place] += 1e-5
      down[place] -= 1e-5
      let difference =
        (Variation(4) { up[$0] }.value - Variation(4) { down[$0] }.value) / 2e-5
      #expect(abs(Variation(4) { x[$0] }.slope(x[place]) - difference) < 1e-8)
    }
  }

  /// 16 at a time as one by one; two from the halves of each draw.
  @Test func drawsAreTheSameOneByOne() {
    let random = RandomStream(seed: 8, stream: 9)
    for first in [0, 16, 1 << 40] {
      for lane in 0..<16 { #expect(random.shares(first)[lane] == random.share(first + lane)) }
    }
    // The upper half of a draw has the bits of `uniform`.
    let halves = random.uniforms(24, bound: 0.5)
    for pair in 0..<8 { #expect(halves[2 * pair + 1] == random.uniform(24 + pair, bound: 0.5)) }
    let lower = (0..<5_000).flatMap { block in (0..<8).map { Double(random.uniforms(8 * block, bound: 1)[2 * $0]) } }
    #expect(Set(lower).count > 39_000 && lower.allSatisfy { $0 >= -1 && $0 < 1 })
    #expect(abs(lower.reduce(0, +) / 40_000) < 0.015)
    #expect(abs(lower.reduce(0) { $0 + $1 * $1 } / 40_000 - 1.0 / 3) < 0.01)
  }

  @Test func lanesAreSummedComparedAndTurned() {
    var numbers = Numbers(53)
    for _ in 0..<50 {
      let x = numbers.array(16).map { ($0 * 8).rounded() / 4 }
      let lanes = x.withUnsafeBufferPointer { $0.baseAddress!.vector() }
      #expect(lanes.total == x.reduce(0, +), "of quarters, exactly")
      #expect(lanes.highest == x.max()! && lanes.lowest == x.min()!)
      for lane in 0..<16 {
        let other = Vector(repeating: x[lane])
        #expect((0..<16).allSatisfy { (hint_at_least(lanes, other) >> $0 & 1 == 1) == (x[$0] >= x[lane]) })
        #expect((0..<16).allSatisfy { (hint_equal(lanes, other) >> $0 & 1 == 1) == (x[$0] == x[lane]) })
        #expect(hint_evens(lanes)[lane] == x[lane / 2 * 2] && hint_odds(lanes)[lane] == x[lane / 2 * 2 + 1])
      }
    }
    #expect(Vector(repeating: 0).lowest.sign == .plus)
  }

  @Test func drawsAreNormal() {
    let random = RandomStream(seed: 5, stream: 6)
    let draws = (0..<2_500).flatMap { block in (0..<16).map { Double(random.normals(16 * block)[$0]) } }
    for place in 0..<1000 {
      let pair = place / 2 * 2
      let (radius, angle) = (Double(1 - random.share(pair)), 2 * Double.pi * Double(random.share(pair + 1)))
      let wanted = (-2 * log(radius)).squareRoot() * (place % 2 == 0 ? cos(angle) : sin(angle))
      #expect(abs(draws[place] - wanted) < 3e-6)
    }
    let mean = draws.reduce(0, +) / 40_000
    let square = draws.reduce(0) { $0 + $1 * $1 } / 40_000
    #expect(abs(mean) < 0.02 && abs(square - 1) < 0.03)
    #expect(abs(Double(draws.count { $0 < 1 }) / 40_000 - 0.8413) < 0.01)
  }

  @Test func softplusEqualsDouble() {
    for x: Float in [-200, -80, -5, -1e-3, 0, 1e-3, 1, 20, 80, 1e30] {
      let wanted = max(0, Double(x)) + log1p(exp(-abs(Double(x))))
      #expect(abs(Double(softplus(Vector(repeating: x))[3]) - wanted) <= 1e-6 * wanted + 1e-37)
    }
  }

  @Test func logarithmAndCosineEqualDouble() {
    for x in stride(from: Float(1e-3), to: 4, by: 1e-3) {
      let got = Double(naturalLogarithm(Vector(repeating: x))[0])
      #expect(abs(got - log(Double(x))) <= 3e-7 * max(abs(log(Double(x))), 0.1))
    }
    #expect(abs(naturalLogarithm(Vector(repeating: 0x1p-24))[1] + 16.635532) < 2e-6)
    #expect(naturalLogarithm(Vector(repeating: 1))[0] == 0)
    for x in stride(from: Float(-1), through: 1, by: 1e-3) {
      #expect(abs(Double(cosineOfTurns(Vector(repeating: x))[0]) - cos(2 * .pi * Double(x))) < 3e-7)
    }
  }

  /// The bar of a chosen expert is the best score that was not chosen, that of another the worst that was.
  @Test func barsAreWhatMustBeExceeded() throws {
    var size = Arena()
    _ = Noise(arena: &size, experts: 5)
    let region = try Region(bytes: size.bytes, for: "a test")
    var arena = Arena(over: region.base)
    let noise = Noise(arena: &arena, experts: 5)
    let scores: [Float] = [3, 9, 1, 7, 5]
    let (ofChosen, ofOthers) = noise.findBars(
      scores, [1, 3], choices: 2, rest: [3, -.infinity, 1, -.infinity, 5])
    #expect(ofChosen == 4 && ofOthers == 3)
    #expect((0..<5).map { noise.bar[$0] } == [7, 5, 7, 5, 7])
  }
}
