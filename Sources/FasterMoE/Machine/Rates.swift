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
package final class WorkerRates: Sendable {
  package let products: RateCurve
  package let weightGrads: RateCurve
  package let rowHandling: ByteRate

  package init(products: RateCurve, weightGrads: RateCurve, rowHandling: ByteRate) {
    (self.products, self.weightGrads, self.rowHandling) = (products, weightGrads, rowHandling)
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
  private let logs: [Double]
  /// The highest rate at any number of rows.
  package let peak: FlopRate

  /// `samples` are not empty.
  package init(_ samples: [Sample]) {
    self.samples = samples
    logs = samples.map { log(Double($0.rows)) }
    peak = samples.reduce(FlopRate(0)) { max($0, $1.rate) }
  }

  /// The rate at `rows`, between two samples by the logarithm of the rows, outside them the nearest.
  package func rate(rows: Int) -> FlopRate {
    if rows <= samples[0].rows { return samples[0].rate }
    for above in 1..<samples.count where rows <= samples[above].rows {
      let share = (log(Double(rows)) - logs[above - 1]) / (logs[above] - logs[above - 1])
      return FlopRate(samples[above - 1].rate.value * (1 - share) + samples[above].rate.value * share)
    }
    return samples[samples.count - 1].rate
  }
}

/// The value in the middle, which no single disturbance moves far; of at least one.
func middle<T: Comparable>(_ values: [T]) -> T { values.sorted()[values.count / 2] }
