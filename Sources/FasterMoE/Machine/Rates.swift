import Glibc
import Synchronization

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

/// Multiplies rows by weight matrices that are too many for the caches, for as long as something else goes on.
final class RateProbe: TeamWork {
  private static let size = 512
  private static let matrices = 16
  private static let rows = 4 * Panels.height
  private let team: Team
  private let memory: Region
  private let isOver = Atomic<Bool>(false)
  private let tasksDone = Atomic<Int>(0)

  init(_ team: Team) throws(Failure) {
    self.team = team
    let deskFloats = RateProbe.deskFloats
    let floats = RateProbe.matrices * RateProbe.size * RateProbe.size + team.threads * deskFloats
    memory = try Region(bytes: floats * MemoryLayout<Float>.stride, for: "measuring the speed of products")
    // Pages that nobody has written to are one and the same page, which caches know better or worse than real ones.
    memory.base.assumingMemoryBound(to: Float.self).update(repeating: 1, count: floats)
  }

  /// The rate while the calling thread does something else.
  func rate(during body: () throws(Failure) -> Void) throws(Failure) -> FlopRate {
    isOver.store(false, ordering: .relaxed)
    tasksDone.store(0, ordering: .relaxed)
    team.begin(self)
    let start = Seconds.now
    let failed = failure(of: body)
    isOver.store(true, ordering: .relaxed)
    team.finish()
    if let failed { throw failed }
    let flops = 2 * Double(RateProbe.rows * RateProbe.size * RateProbe.size)
    return Flops(Double(tasksDone.load(ordering: .relaxed)) * flops) / Seconds(Seconds.now.value - start.value)
  }

  private static var deskFloats: Int { RateProbe.rows * size + size * Strip.width + Tiles.floats }

  override func work(thread: Int) {
    let size = RateProbe.size
    let weights = memory.base.assumingMemoryBound(to: Float.self)
    let desk = weights + RateProbe.matrices * size * size + thread * RateProbe.deskFloats
    let panels = Panels(desk, width: size)
    let strip = desk + RateProbe.rows * size
    let tile = strip + size * Strip.width
    while !isOver.load(ordering: .relaxed), case let task = team.take() {
      let matrix = weights + task % RateProbe.matrices * size * size
      for column in stride(from: 0, to: size, by: Strip.width) {
        Strip.rows(of: matrix, depth: size, from: column, limit: size, into: strip)
        Panels.forEach(rows: RateProbe.rows) { first, high in
          Tiles.product(panel: panels.panel(first), high: high, strip: strip, depth: size, into: tile)
        }
      }
      tasksDone.add(1, ordering: .relaxed)
    }
  }
}
