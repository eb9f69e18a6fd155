/// How the caller wants a pass to be scheduled.
package struct PlanRequest {
  package enum Shadowing: Int { case best, never, given, paper, everyExpert }
  package enum Schedule: Int { case best, coarse, pairwise }
  package var shadowing = Shadowing.best
  package var schedule = Schedule.best
  /// Workers per exchange step; 0: as predicted best.
  package var groupSize = 0
  /// Experts to shadow, for `given`.
  package var shadows: [Int] = []

  package init() {}

  package func check() throws(Failure) {
    guard groupSize >= 0 else { throw Failure(.argument, "group_size must not be negative, not \(groupSize)") }
  }

  /// Whether workers can play what is asked for; the paper's choice needs a `cluster` with their links.
  package func checkPlayable(workers: Int, on cluster: Cluster?) throws(Failure) {
    try check()
    guard workers == 1 || shadowing != .paper || cluster != nil else {
      throw Failure(
        .unsupported,
        "the paper's choice of shadows needs links that were measured: a transport, and fmoe_group_calibrate before")
    }
  }

  /// Whether shadows are left to be chosen by prediction.
  package var isChoosing: Bool { shadowing == .best || shadowing == .paper }

  /// Whether anything is left to be chosen by prediction.
  package var isOpen: Bool {
    switch shadowing {
    case .best, .paper: true
    case .never, .given, .everyExpert: schedule == .best || (schedule == .pairwise && groupSize == 0)
    }
  }

  /// What must be equal on all ranks.
  package var same: (UInt64, UInt64, UInt64) {
    let kinds = UInt64(shadowing.rawValue) << 8 | UInt64(schedule.rawValue)
    return (kinds, UInt64(bitPattern: Int64(groupSize)), PlanRequest.hash(of: shadows))
  }

  /// FNV-1a: sets that differ must not look the same, but for a chance in 2^64.
  package static func hash(of shadows: [Int]) -> UInt64 {
    shadows.reduce(0xcbf2_9ce4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
  }

  /// The same request of a pass whose gate counted the experts `awaited` as local: where shadows are left open it is for
  /// exactly these. Fails if it leaves one of them out.
  package func keeping(_ awaited: [Int]) throws(Failure) -> PlanRequest {
    var kept = self
    switch shadowing {
    case .best, .paper:
      kept.shadowing = awaited.isEmpty ? .never : .given
      kept.shadows = awaited
    case .never, .given:
      if let left = awaited.first(where: { !shadows.contains($0) }) {
        throw Failure(
          .argument,
          "expert \(left) must be shadowed: the gate counted it as local, by fmoe_layer_expect_shadows or a prediction")
      }
    case .everyExpert: break
    }
    return kept
  }
}

extension Plan {
  /// What is asked for where nobody knows how fast links are: what is left open is no shadow, and rows that travel while
  /// experts compute, so many workers at a time that an expert has rows enough in each round to be worth its weights' way
  /// to the core. `known` was made here, too, and serves again if it is what is asked for.
  package static func unmeasured(_ request: PlanRequest, _ traffic: Traffic, again known: Plan?) -> Plan {
    let workers = traffic.workers
    let isEvery = request.shadowing == .everyExpert
    let shadows = request.shadows
    var groups = Groups(workers: workers, size: workers)
    if request.schedule != .coarse, !isEvery {
      var size = request.groupSize
      if size == 0 {
        let all = (0..<workers).reduce(0) { $0 + traffic.rows(at: $1) }
        let usual = max(1, all / (workers * traffic.experts))
        size = (rowsWorthTheirWeights + usual - 1) / usual
      }
      groups = Groups(workers: workers, size: size)
    }
    if let known, known.groups == groups, known.overlaps == (request.schedule != .coarse),
      known.fetchesAgain == isEvery,
      isEvery || known.shadows == shadows
    {
      return known
    }
    if isEvery { return everyExpert(request, workers: workers, experts: traffic.experts) }
    guard request.schedule != .coarse else { return coarse(workers: workers, shadows: shadows) }
    return pairwise(groups, shadows: shadows, forward: Order(), backward: Order())
  }
  private static var rowsWorthTheirWeights: Int { 4 * Panels.height }

  static func everyExpert(_ request: PlanRequest, workers: Int, experts: Int) -> Plan {
    request.schedule == .coarse
      ? coarse(workers: workers, shadows: Array(0..<experts), fetchesAgain: true)
      : everyExpert(workers: workers, experts: experts)
  }
}

/// What a plan is expected to cost, forward and backward of one batch.
package struct PlanReport {
  package var shadows = 0
  package var groupSize = 1
  package var steps = 1
  package var plain = Seconds(0)
  package var planned = Seconds(0)
  /// Of the plan's own computing and communicating: the larger, and one after the other.
  package var ideal = Seconds(0)
  package var semiIdeal = Seconds(0)
  /// R_CC of the roofline; infinite where nothing is sent.
  package var computeOverCommunicate = Double.infinity
  package var stepRatio = Double.infinity
  /// P-bar of the roofline.
  package var flopRatePerWorker = FlopRate(0)
  /// Of the plan's volumes, where it was made for a cluster.
  package var roofline: Roofline?

  /// Workers that share memory, or one alone: rows are read where they stand, so that nothing is sent and no copy can
  /// pay. All that counts is how fast the worker computes that has most to do; `rates` [W].
  package static func inPlace(_ traffic: Traffic, shape: Shape, rates: [WorkerRates]) -> PlanReport {
    var report = PlanReport()
    var work = Flops(0)
    var (forward, backward) = (Seconds(0), Seconds(0))
    for worker in 0..<traffic.workers {
      var (rowsTake, weightsTake) = (Seconds(0), Seconds(0))
      for expert in traffic.owned(by: worker) {
        let rows = traffic.rows(for: expert)
        work = work + shape.flops(rows: rows)
        let seconds = shape.seconds(rows: rows, at: rates[worker])
        (rowsTake, weightsTake) = (rowsTake + seconds.rows, weightsTake + seconds.weights)
      }
      forward = max(forward, rowsTake)
      backward = max(backward, rowsTake + weightsTake)
    }
    // All meet in between.
    report.planned = forward + backward
    (report.plain, report.ideal, report.semiIdeal) = (report.planned, report.planned, report.planned)
    if work.value > 0 { report.flopRatePerWorker = Flops(work.value / Double(traffic.workers)) / report.planned }
    return report
  }
}
