import FasterMoE

/// A way to run a layer, by what is asked of the planner.
package enum Strategy: String, CaseIterable {
  case fastmoe = "FastMoE"
  case zero = "ZeRO-3"
  case algorithm1 = "Algorithm 1"
  case ours = "ours"

  var request: PlanRequest {
    var request = PlanRequest()
    switch self {
    case .fastmoe: (request.shadowing, request.schedule) = (.never, .coarse)
    case .zero: request.shadowing = .everyExpert
    case .algorithm1: request.shadowing = .paper
    case .ours: break
    }
    return request
  }
}

/// What one strategy is expected to do with one batch, as it is shown.
package struct Prediction: Encodable {
  let strategy: String
  let seconds: Double
  /// FastMoE's time over this one's.
  let speedup: Double
  let flopsPerWorker: Double
  let shadows: [Int]
  let groupSize: Int
  let overlaps: Bool
  let steps: Int
  let ideal, semiIdeal: Double
  /// nil where nothing is sent.
  let ratio, stepRatio: Double?
  let busiestWorker: String
  let busiestWorkerSeconds: Double
  let busiestLink: String?
  let busiestLinkSeconds: Double
  let bound: String
  enum CodingKeys: String, CodingKey {
    case strategy, seconds, speedup, shadows, overlaps, steps, bound
    case flopsPerWorker = "flops_per_worker"
    case groupSize = "group_size"
    case ideal = "seconds_ideal"
    case semiIdeal = "seconds_semi_ideal"
    case ratio = "compute_over_communicate"
    case stepRatio = "compute_over_communicate_step"
    case busiestWorker = "busiest_worker"
    case busiestWorkerSeconds = "busiest_worker_seconds"
    case busiestLink = "busiest_link"
    case busiestLinkSeconds = "busiest_link_seconds"
  }

  init(_ strategy: String, _ plan: FasterMoE.Plan, _ report: PlanReport, on cluster: Cluster, plain: Seconds) {
    let roofline = report.roofline!
    self.strategy = strategy
    (seconds, speedup) = (report.planned.value, plain / report.planned)
    flopsPerWorker = report.flopRatePerWorker.value
    (shadows, groupSize, overlaps, steps) = (plan.shadows, report.groupSize, plan.overlaps, report.steps)
    (ideal, semiIdeal) = (report.ideal.value, report.semiIdeal.value)
    ratio = report.computeOverCommunicate.isFinite ? report.computeOverCommunicate : nil
    stepRatio = report.stepRatio.isFinite ? report.stepRatio : nil
    busiestWorker = cluster.names[roofline.busiestSeat]
    busiestWorkerSeconds = roofline.compute.value
    busiestLink = roofline.link.map { cluster.words(for: $0) }
    busiestLinkSeconds = roofline.busiestLink.value
    bound =
      roofline.busiestLink > roofline.compute
      ? "link \(busiestLink!)" : "computing of \(busiestWorker)"
  }

  /// All strategies for one batch. The planner goes over the counts once, not for each.
  static func all(_ batch: Batch, _ shape: Shape, on cluster: Cluster) throws(Failure) -> [(
    prediction: Prediction, plan: FasterMoE.Plan
  )] {
    var planner = Planner(batch.traffic, shape, on: cluster)
    var all: [(Prediction, FasterMoE.Plan)] = []
    for strategy in Strategy.allCases {
      let (plan, report) = try planner.plan(strategy.request)
      all.append((Prediction(strategy.rawValue, plan, report, on: cluster, plain: report.plain), plan))
    }
    return all
  }
}
