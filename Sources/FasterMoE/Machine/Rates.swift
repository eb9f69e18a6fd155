import Glibc

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

/// How fast one worker multiplies, by the rows of one expert's call: any samples, with rising rows.
package struct RateCurve: Equatable, Sendable {
  package struct Sample: Equatable, Sendable {
    package let rows: Int
    package let rate: FlopRate
    package init(rows: Int, rate: FlopRate) { (self.rows, self.rate) = (rows, rate) }
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
  /// Times products on all threads of `team` together, for some 20 milliseconds.
  package static func measured(by team: Team) throws(Failure) -> ComputeRates {
    let probe = try RateProbe(team)
    var rates = InlineArray<6, FlopRate>(repeating: FlopRate(0))
    for sample in rates.indices {
      probe.rows = sampledRows[sample]
      var best = FlopRate(0)
      for _ in 0..<3 {
        let start = Seconds.now
        team.run(probe)
        best = max(best, probe.work / Seconds(Seconds.now.value - start.value))
      }
      rates[sample] = best
    }
    return ComputeRates(rates)
  }
}

/// Multiplies rows by weight matrices that are too many for the caches, as a step of training finds them.
private final class RateProbe: TeamWork {
  private static let size = 512
  private static let matrices = 16
  private let team: Team
  private let memory: Region
  var rows = 1

  init(_ team: Team) throws(Failure) {
    self.team = team
    let deskFloats = RateProbe.deskFloats
    memory = try Region(
      bytes: (RateProbe.matrices * RateProbe.size * RateProbe.size + team.threads * deskFloats)
        * MemoryLayout<Float>.stride,
      for: "measuring the speed of products")
  }

  /// Of one `run`: enough tasks to outlast its start.
  var work: Flops { Flops(Double(tasks) * 2 * Double(rows) * Double(RateProbe.size * RateProbe.size)) }
  private var tasks: Int { team.threads * max(1, 96 / rows) }
  private static var deskFloats: Int { ComputeRates.sampledRows[5] * size + size * Strip.width + Tiles.floats }

  override func work(thread: Int) {
    let size = RateProbe.size
    let weights = memory.base.assumingMemoryBound(to: Float.self)
    let desk = weights + RateProbe.matrices * size * size + thread * RateProbe.deskFloats
    let panels = Panels(desk, width: size)
    let strip = desk + ComputeRates.sampledRows[5] * size
    let tile = strip + size * Strip.width
    while case let task = team.take(), task < tasks {
      let matrix = weights + task % RateProbe.matrices * size * size
      for column in stride(from: 0, to: size, by: Strip.width) {
        Strip.rows(of: matrix, depth: size, from: column, limit: size, into: strip)
        Panels.forEach(rows: rows) { first, high in
          Tiles.product(panel: panels.panel(first), high: high, strip: strip, depth: size, into: tile)
        }
      }
    }
  }
}
