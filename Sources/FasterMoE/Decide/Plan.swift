/// How the caller wants a pass to be scheduled.
package struct PlanRequest {
  package enum Shadowing: Int { case best, never, given, paper, everyExpert }
  package enum Schedule: Int { case best, coarse, pairwise }
  package var shadowing = Shadowing.best
  package var schedule = Schedule.best
  /// Workers per exchange step; 0: as predicted best.
  package var groupSize = 0

  package init() {}

  package func check(workers: Int) throws(Failure) {
    guard groupSize >= 0 else { throw Failure(.argument, "group_size must not be negative, not \(groupSize)") }
    guard workers == 1 else { throw Failure(.unsupported, "plans for several workers are not in this version yet") }
  }
}

/// What a plan is expected to cost, forward and backward of one batch.
package struct PlanReport {
  package var shadows = 0
  package var groupSize = 1
  package var steps = 1
  package var plain = Seconds(0)
  package var planned = Seconds(0)
  package var ideal = Seconds(0)
  /// R_CC of the roofline; infinite where nothing is sent.
  package var computeOverCommunicate = Double.infinity
  /// P-bar of the roofline.
  package var flopRatePerWorker = FlopRate(0)

  /// A worker alone owns every expert: nothing moves, no copy can pay, and all that counts is how fast rows are computed.
  package static func alone(counts: UnsafePointer<Int64>, shape: Shape, rates: ComputeRates) -> PlanReport {
    var report = PlanReport()
    var work = Flops(0)
    for expert in 0..<shape.experts where counts[expert] > 0 {
      let flops = shape.flops(rows: Int(counts[expert]))
      work = work + flops
      report.planned = report.planned + flops / rates.rate(rows: Int(counts[expert]))
    }
    report.plain = report.planned
    report.ideal = report.planned
    if work.value > 0 { report.flopRatePerWorker = work / report.planned }
    return report
  }
}
