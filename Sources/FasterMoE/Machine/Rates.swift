import Glibc
import Synchronization

/// How fast one worker multiplies, by the rows that one weight matrix is used for.
///
/// Few rows are slow: each weight that is read serves only so many multiplications.
package struct ComputeRates: Sendable, BitwiseCopyable {
  package static let sampledRows: InlineArray<6, Int> = [1, 4, 12, 48, 192, 576]
  package var rates: InlineArray<6, FlopRate>

  package init(_ rates: InlineArray<6, FlopRate>) { self.rates = rates }

  /// The rate at `rows`, between the samples by the logarithm of the rows, outside them the nearest.
  package func rate(rows: Int) -> FlopRate {
    let samples = ComputeRates.sampledRows
    return interpolate(rows, samples: samples.count, rowsAt: { samples[$0] }, logAt: { log(Double(samples[$0])) }) {
      rates[$0]
    }
  }
}

extension ComputeRates {
  package var samples: [RateCurve.Sample] {
    rates.indices.map { RateCurve.Sample(rows: ComputeRates.sampledRows[$0], rate: rates[$0]) }
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

  package func rate(rows: Int) -> FlopRate {
    interpolate(rows, samples: samples.count, rowsAt: { samples[$0].rows }, logAt: { logs[$0] }) { samples[$0].rate }
  }
}

/// Between two samples by the logarithm of the rows, outside all of them the nearest.
@inline(__always)
private func interpolate(
  _ rows: Int, samples count: Int, rowsAt: (Int) -> Int, logAt: (Int) -> Double, rateAt: (Int) -> FlopRate
) -> FlopRate {
  if rows <= rowsAt(0) { return rateAt(0) }
  for above in 1..<count where rows <= rowsAt(above) {
    let low = logAt(above - 1)
    let share = (log(Double(rows)) - low) / (logAt(above) - low)
    return FlopRate(rateAt(above - 1).value * (1 - share) + rateAt(above).value * share)
  }
  return rateAt(count - 1)
}

extension ComputeRates {
  /// Times products on all threads of the probe's team together, for about `budget`, but some 20 milliseconds at least.
  static func measured(by probe: RateProbe, for budget: Seconds = Seconds(0)) -> ComputeRates {
    var rates = InlineArray<6, FlopRate>(repeating: FlopRate(0))
    for sample in rates.indices {
      let end = Seconds.now + budget * (1 / Double(rates.count))
      var laps: [FlopRate] = []
      while laps.count < 3 || Seconds.now < end { laps.append(probe.rate(rows: sampledRows[sample])) }
      rates[sample] = middle(laps)
    }
    return ComputeRates(rates)
  }
}

/// The value in the middle, which no single disturbance moves far; of at least one.
func middle<T: Comparable>(_ values: [T]) -> T { values.sorted()[values.count / 2] }

/// Multiplies rows by weight matrices that are too many for the caches, as a step of training finds them.
final class RateProbe: TeamWork {
  private static let size = 512
  private static let matrices = 16
  private let team: Team
  private let memory: Region
  private var rows = 1
  private var tasks = 0
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

  /// The rate at `rows`, for a moment that is long enough to outlast its start.
  func rate(rows: Int) -> FlopRate {
    begin(rows, tasks: team.threads * max(1, 96 / rows))
    return end(since: .now)
  }

  /// The rate at `rows` while the calling thread does something else.
  func rate(rows: Int, during body: () throws(Failure) -> Void) throws(Failure) -> FlopRate {
    begin(rows, tasks: .max)
    let start = Seconds.now
    let failed = failure(of: body)
    isOver.store(true, ordering: .relaxed)
    let rate = end(since: start)
    if let failed { throw failed }
    return rate
  }

  private func begin(_ rows: Int, tasks: Int) {
    (self.rows, self.tasks) = (rows, tasks)
    isOver.store(false, ordering: .relaxed)
    tasksDone.store(0, ordering: .relaxed)
    team.begin(self)
  }

  private func end(since start: Seconds) -> FlopRate {
    team.finish()
    let flops = 2 * Double(rows) * Double(RateProbe.size * RateProbe.size)
    return Flops(Double(tasksDone.load(ordering: .relaxed)) * flops) / Seconds(Seconds.now.value - start.value)
  }

  private static var deskFloats: Int { ComputeRates.sampledRows[5] * size + size * Strip.width + Tiles.floats }

  override func work(thread: Int) {
    let size = RateProbe.size
    let weights = memory.base.assumingMemoryBound(to: Float.self)
    let desk = weights + RateProbe.matrices * size * size + thread * RateProbe.deskFloats
    let panels = Panels(desk, width: size)
    let strip = desk + ComputeRates.sampledRows[5] * size
    let tile = strip + size * Strip.width
    while !isOver.load(ordering: .relaxed), case let task = team.take(), task < tasks {
      let matrix = weights + task % RateProbe.matrices * size * size
      for column in stride(from: 0, to: size, by: Strip.width) {
        Strip.rows(of: matrix, depth: size, from: column, limit: size, into: strip)
        Panels.forEach(rows: rows) { first, high in
          Tiles.product(panel: panels.panel(first), high: high, strip: strip, depth: size, into: tile)
        }
      }
      tasksDone.add(1, ordering: .relaxed)
    }
  }
}
