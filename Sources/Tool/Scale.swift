import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe scale`: the same layer and cluster with more and more workers.
struct Scale: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Predict how strategies scale with the number of workers, and what planning costs.",
    discussion: """
      The cluster's places are repeated as plan --workers does it; every worker has one expert, if the layer does not \
      say how many there are.

        fastermoe scale --cluster johnny.json --layer d=1024,h=2048 --zipf 1.2
      """)

  @Option(help: ArgumentHelp("The cluster that is repeated, a JSON file.", valueName: "file"))
  var cluster: String

  @Option(help: ArgumentHelp("Sizes as for plan, or a JSON file.", valueName: "layer"))
  var layer: String

  @Option(help: ArgumentHelp("Popularity of experts by the law of Zipf; 0: all alike.", valueName: "s"))
  var zipf = 0.0

  @Option(help: ArgumentHelp("Deals the ranks of popularity out to experts; 0: in their order.", valueName: "number"))
  var seed: UInt64 = 1

  @Option(help: ArgumentHelp("How many workers.", valueName: "list"))
  var workers = "16,64,256,1024,4096,16384"

  @Option(help: ArgumentHelp("Draws P-bar over workers, a line for each strategy, as SVG.", valueName: "file"))
  var plot: String?

  @OptionGroup var output: OutputOptions

  private struct Report: Encodable {
    struct Row: Encodable {
      let workers: Int
      let planning: Double
      let strategies: [Prediction]
      enum CodingKeys: String, CodingKey {
        case workers, strategies
        case planning = "planning_seconds"
      }
    }
    let layer: LayerDescription
    let zipf: Double
    var rows: [Row] = []
  }

  func run() throws {
    guard zipf >= 0, zipf <= 100 else { throw Failure(.argument, "--zipf is from 0 to 100, not \(zipf)") }
    let numbers = workers.split(separator: ",", omittingEmptySubsequences: false)
    let sizes = numbers.compactMap { Int($0) }
    guard sizes.count == numbers.count, sizes.allSatisfy({ $0 > 0 }) else {
      throw Failure(.argument, "--workers is a list of numbers such as 16,64, not \"\(workers)\"")
    }
    let description = try LayerDescription(layer)
    let document = try ClusterOptions.read(cluster)
    _ = try Cluster(document)
    var report = Report(layer: description, zipf: zipf)
    for size in sizes.sorted() {
      let cluster = try Cluster(document.repeated(to: size))
      let shape = try description.shape(workers: size)
      let shares = Batch.zipf(zipf, experts: shape.experts, seed: zipf == 0 ? 0 : seed)
      let batch = try Batch(workers: size, rows: description.rows(shape), shares: shares)
      let start = Scale.computed
      let all = try Prediction.all(batch, shape, on: cluster)
      let planning = Scale.computed - start
      report.rows.append(
        Report.Row(workers: size, planning: planning, strategies: all.map(\.prediction)))
    }
    if let plot { try chart(report).write(to: plot) }
    try output.show(report) {
      let names = Strategy.allCases.map(\.rawValue)
      return "milliseconds of a step, GFLOP/s of each worker, and seconds of one core that planning all four takes\n\n"
        + table(
          ["workers"] + names.map { "\($0) ms" } + names.map { "\($0) GF/s" } + ["shadows", "group", "planning s"],
          report.rows.map { row in
            ["\(row.workers)"] + row.strategies.map { brief($0.seconds * 1e3) }
              + row.strategies.map { brief($0.flopsPerWorker * 1e-9) }
              + ["\(row.strategies.last!.shadows.count)", "\(row.strategies.last!.groupSize)", fixed(row.planning, 3)]
          }, left: [])
    }
  }

  /// Seconds that this process has computed, whoever else is at work.
  private static var computed: Double {
    var time = timespec()
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }

  private func chart(_ report: Report) -> Chart {
    var chart = Chart(
      title: "Predicted P-bar over workers, \(zipf > 0 ? "Zipf \(brief(zipf))" : "even rows")", xName: "workers",
      yName: "P-bar: GFLOP/s of each worker")
    chart.xMarks = report.rows.map { Double($0.workers) }
    chart.lines = Strategy.allCases.enumerated().map { index, strategy in
      Chart.Line(
        name: strategy.rawValue, colour: Chart.colours[index], hasPoints: true,
        points: report.rows.map { (Double($0.workers), $0.strategies[index].flopsPerWorker * 1e-9) })
    }
    return chart
  }
}
