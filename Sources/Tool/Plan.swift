import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe plan`: what a step would take on a cluster.
struct Plan: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Predict what a step of a layer takes on a cluster, without running it.",
    discussion: """
      Compares FastMoE (no shadow, nothing overlaps), ZeRO stage 3 (every expert fetched by everyone), Algorithm 1 of the \
      FasterMoE paper with its schedule, and what the library would choose.

        fastermoe plan --cluster johnny.json --layer d=1024,h=2048 --zipf 1.2
      """)

  @OptionGroup var cluster: ClusterOptions
  @OptionGroup var workload: WorkloadOptions
  @OptionGroup var output: OutputOptions

  @Option(
    help: ArgumentHelp(
      "Writes what is expected to happen when, of at most 64 ranks, as Chrome trace JSON for Perfetto.",
      valueName: "file"))
  var timeline: String?

  @Option(
    help: ArgumentHelp("The strategy of the timeline: fastmoe, zero, algorithm1 or ours.", valueName: "strategy"))
  var timelineOf = "ours"

  @Option(help: ArgumentHelp("Draws the DDL-Roofline with a point for each strategy, as SVG.", valueName: "file"))
  var roofline: String?

  private struct Report: Encodable {
    let workers, experts, rows: Int
    let layer: LayerDescription
    let batches: Int
    /// Of the only batch, or means and sums over all.
    let strategies: [Prediction]
    let trace: [Means]?
  }

  /// Over the batches of a trace.
  private struct Means: Encodable {
    let strategy: String
    var seconds = 0.0
    /// Of all batches together, of the one that gains most and of the one that gains least.
    var speedup = 0.0
    var best = 0.0
    var worst = Double.infinity
    var shadows = 0.0
    enum CodingKeys: String, CodingKey {
      case strategy, speedup
      case seconds = "mean_seconds"
      case best = "best_speedup"
      case worst = "worst_speedup"
      case shadows = "mean_shadows"
    }
  }

  func run() throws {
    try workload.check()
    guard let shownTimeline = Plan.strategy(timelineOf) else {
      throw Failure(.argument, "--timeline-of is fastmoe, zero, algorithm1 or ours, not \(timelineOf)")
    }
    let description = try LayerDescription(workload.layer)
    let cluster = try cluster.make()
    let shape = try description.shape(workers: cluster.workers)
    let rows = try description.rows(shape)
    var first: [Prediction] = []
    var means = Strategy.allCases.map { Means(strategy: $0.rawValue) }
    var batches = 0
    try workload.forEachBatch(shape, workers: cluster.workers, rows: rows) { batch in
      let all = try Prediction.all(batch, shape, on: cluster)
      if batches == 0 {
        first = all.map(\.prediction)
        if let timeline {
          try Trace.write(
            all[shownTimeline].plan, batch.traffic, shape, on: cluster, of: 0..<min(64, cluster.workers), to: timeline)
        }
      }
      for (index, one) in all.enumerated() {
        means[index].seconds += one.prediction.seconds
        means[index].shadows += Double(one.prediction.shadows.count)
        means[index].best = max(means[index].best, one.prediction.speedup)
        means[index].worst = min(means[index].worst, one.prediction.speedup)
      }
      batches += 1
    }
    for index in means.indices.reversed() {
      means[index].speedup = means[0].seconds / means[index].seconds
      means[index].seconds /= Double(batches)
      means[index].shadows /= Double(batches)
    }
    if let roofline { try RooflineChart.make(first, on: cluster).write(to: roofline) }
    let report = Report(
      workers: cluster.workers, experts: shape.experts, rows: rows, layer: description, batches: batches,
      strategies: first, trace: workload.trace == nil ? nil : means)
    try output.show(report) {
      var text = "\(cluster.workers) workers, \(shape.experts) experts, d \(shape.model), h \(shape.hidden)"
      text += workload.counts == nil && workload.trace == nil ? ", \(rows) rows of each worker\n\n" : "\n\n"
      guard workload.trace == nil else {
        return text + "\(batches) batches, forward and backward\n\n"
          + table(
            ["", "mean ms", "times", "best", "worst", "shadows"],
            means.map {
              [
                $0.strategy, fixed($0.seconds * 1e3, 3), fixed($0.speedup, 2), fixed($0.best, 2), fixed($0.worst, 2),
                fixed($0.shadows, 1),
              ]
            })
      }
      return text + Plan.words(first)
    }
  }

  private static func strategy(_ name: String) -> Int? {
    ["fastmoe", "zero", "algorithm1", "ours"].firstIndex(of: name)
  }

  private static func words(_ predictions: [Prediction]) -> String {
    var text = table(
      ["", "ms", "times", "TFLOP/s", "shadows", "group", "R_CC", "of step", "ideal ms", "semi-ideal ms"],
      predictions.map {
        [
          $0.strategy, fixed($0.seconds * 1e3, 3), fixed($0.speedup, 2), brief($0.flopsPerWorker * 1e-12),
          "\($0.shadows.count)", "\($0.groupSize)", fixed($0.ratio ?? .infinity, 3),
          fixed($0.stepRatio ?? .infinity, 3), fixed($0.ideal * 1e3, 3), fixed($0.semiIdeal * 1e3, 3),
        ]
      })
    text +=
      "\n"
      + table(
        ["", "bound by", "busiest worker ms", "busiest link ms", "of"],
        predictions.map {
          [
            $0.strategy, $0.bound, fixed($0.busiestWorkerSeconds * 1e3, 3), fixed($0.busiestLinkSeconds * 1e3, 3),
            $0.busiestLink ?? "-",
          ]
        }, left: [0, 1, 4])
    for prediction in predictions where !prediction.shadows.isEmpty && prediction.strategy != Strategy.zero.rawValue {
      let shown = prediction.shadows.prefix(16).map(String.init).joined(separator: " ")
      text += "\nshadows of \(prediction.strategy): \(shown)\(prediction.shadows.count > 16 ? " ..." : "")\n"
    }
    return text
  }
}
