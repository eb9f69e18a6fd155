import Glibc

/// How fast one worker trains, as it was measured, by the rows that an expert has to compute.
///
/// Few rows are slow: each weight that is read serves only so many multiplications.
package struct ComputeRates: Sendable, BitwiseCopyable, Equatable {
  package static let sampledRows = [1, 4, 12, 24, 48, 96, 192, 576]
  /// Flops per second at each of `sampledRows` in products with rows, forward and back, and in the gradients of weights.
  package var products: SIMD8<Double>
  package var weightGrads: SIMD8<Double>
  /// At which rows are gathered and summed up besides.
  package var rowHandling: ByteRate

  package init(products: SIMD8<Double>, weightGrads: SIMD8<Double>, rowHandling: ByteRate) {
    (self.products, self.weightGrads, self.rowHandling) = (products, weightGrads, rowHandling)
  }

  static func samples(_ rates: SIMD8<Double>) -> [RateCurve.Sample] {
    sampledRows.enumerated().map { RateCurve.Sample(rows: $1, rate: FlopRate(rates[$0])) }
  }
}

/// How fast one worker trains, for predictions.
package final class WorkerRates: @unchecked Sendable {
  package let products: RateCurve
  package let weightGrads: RateCurve
  package let rowHandling: ByteRate
  /// Seconds of a flop by rows, of the first few; planning asks for them by the thousand.
  private let slowness: UnsafeMutableBufferPointer<(products: Double, weightGrads: Double)>

  package init(products: RateCurve, weightGrads: RateCurve, rowHandling: ByteRate) {
    (self.products, self.weightGrads, self.rowHandling) = (products, weightGrads, rowHandling)
    slowness = .allocate(capacity: 257)
    for rows in 0..<slowness.count {
      slowness.initializeElement(
        at: rows, to: (1 / products.rate(rows: rows).value, 1 / weightGrads.rate(rows: rows).value))
    }
  }

  deinit { slowness.deallocate() }

  /// Seconds that one flop takes where an expert has so many rows.
  @inline(__always)
  func secondsOfFlop(rows: Int) -> (products: Double, weightGrads: Double) {
    rows < slowness.count
      ? slowness[rows] : (1 / products.rate(rows: rows).value, 1 / weightGrads.rate(rows: rows).value)
  }

  package convenience init(_ measured: ComputeRates) {
    self.init(
      products: RateCurve(ComputeRates.samples(measured.products)),
      weightGrads: RateCurve(ComputeRates.samples(measured.weightGrads)), rowHandling: measured.rowHandling)
  }
}

/// How fast one worker multiplies, by the rows of one expert's call: any samples, with rising rows.
package struct RateCurve: Equatable, Sendable {
  /// In files a pair: `[rows, flops per second]`.
  package struct Sample: Codable, Equatable, Sendable {
    package let rows: Int
    package let rate: FlopRate
    package init(rows: Int, rate: FlopRate) { (self.rows, self.rate) = (rows, rate) }

    package init(from decoder: any Decoder) throws {
      var pair = try decoder.unkeyedContainer()
      let whole = Int(exactly: try pair.decode(Double.self))
      rate = FlopRate(try pair.decode(Double.self))
      guard let whole, pair.isAtEnd else {
        throw DecodingError.dataCorruptedError(
          in: pair, debugDescription: "must be a pair: [whole number of rows, flops per second]")
      }
      rows = whole
    }

    package func encode(to encoder: any Encoder) throws {
      var pair = encoder.unkeyedContainer()
      try pair.encode(rows)
      try pair.encode(rate.value)
    }
  }
  package let samples: [Sample]
  /// From each sample to the next, by the logarithm of the rows.
  private let stretches: [Stretch]
  /// The highest rate at any number of rows.
  package let peak: FlopRate

  private struct Stretch: Equatable {
    let from, to: Sample
    /// The logarithm of the rows that it begins with, and one over what it grows by.
    let log, slope: Double
  }

  /// `samples` are not empty.
  package init(_ samples: [Sample]) {
    self.samples = samples
    stretches = zip(samples, samples.dropFirst()).map {
      let log = Logarithm.of($0.rows)
      return Stretch(from: $0, to: $1, log: log, slope: 1 / (Logarithm.of($1.rows) - log))
    }
    peak = samples.reduce(FlopRate(0)) { max($0, $1.rate) }
  }

  /// The rate at `rows`, between two samples by the logarithm of the rows, outside them the nearest.
  package func rate(rows: Int) -> FlopRate {
    if rows <= samples[0].rows { return samples[0].rate }
    for stretch in stretches where rows <= stretch.to.rows {
      let share = rows == stretch.to.rows ? 1 : (Logarithm.of(rows) - stretch.log) * stretch.slope
      return FlopRate(stretch.from.rate.value * (1 - share) + stretch.to.rate.value * share)
    }
    return samples[samples.count - 1].rate
  }
}

/// Natural logarithms, which planning asks for by the thousand.
private enum Logarithm {
  private static let known = (0..<4096).map { log(Double($0)) }

  static func of(_ rows: Int) -> Double { rows < known.count ? known[rows] : log(Double(rows)) }
}

/// The value in the middle, which no single disturbance moves far; of at least one.
func middle<T: Comparable>(_ values: [T]) -> T { values.sorted()[values.count / 2] }
