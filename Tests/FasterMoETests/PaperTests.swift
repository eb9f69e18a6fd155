import Foundation
import Testing

@testable import FasterMoE

private func cluster(_ name: String) throws -> Cluster {
  let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  return try Cluster(Documents.read(Cluster.Document.self, from: root.appending(path: name).path))
}
let johnny = try! cluster("Benchmarks/paper/johnny.json")
private let trevor = try! cluster("Benchmarks/paper/trevor.json")

/// An expert of the paper's: α = 2, two matrices, fp32.
func paperShape(_ model: Int, on cluster: Cluster) throws -> Shape {
  try Shape(model: model, hidden: 2 * model, experts: cluster.workers, choices: 2, activation: .gelu)
}

/// To the last digit that is printed.
private func isPrinted(_ value: Double, _ printed: Double, digits: Int) -> Bool {
  let scale = pow(10, Double(digits))
  return (value * scale).rounded() == (printed * scale).rounded()
}

/// The paper's clusters, and its algorithms on them: what the published simulator and formulas give.
@Suite struct PaperTests {
  /// W_net/(M·W_local): 50/(8·88) on johnny; on trevor the slower of the two kinds of workers counts.
  @Test func remoteSharesBalanceAPlaceWithItsWorkers() throws {
    #expect(abs(johnny.remoteShare! - 50.0 / (8 * 88)) < 1e-12)
    #expect(abs(trevor.remoteShare! - 62.0 / (4 * 62)) < 1e-12)
    // Out of a processor of johnny over its own link, 180/(4·88); the other one's has no limit.
    let shares = [0, 4].map { seat in johnny.remoteShare(of: seat, leaving: johnny.nodes[seat].parent)! }
    #expect(shares.max()! == 1 && abs(shares.min()! - 180.0 / (4 * 88)) < 1e-12)
  }

  /// (cluster, model, batch, comm ms, comp ms, R_CC, 3 comp + 4 comm ms, P-bar TFLOP/s or nil)
  @Test func rooflineEqualsThePublishedSimulator() throws {
    let flat = Batch.flat(workers: 16, rows: 2048)
    let hot = Batch.hot(workers: 16, rows: 2048, share: 0.2)
    let wide = Batch.flat(workers: 64, rows: 4096)
    let cases: [(Cluster, Int, Batch, Double, Double, Double, Double, Double?)] = [
      (johnny, 1024, flat, 5.3687, 1.4939, 0.2783, 25.957, 1.9856),
      (johnny, 2048, flat, 10.7374, 5.9756, 0.5565, 60.876, 3.3865),
      (johnny, 4096, flat, 21.4748, 23.9024, 1.1130, 157.607, 5.2322),
      (johnny, 1024, hot, 6.1656, 4.8202, 0.7818, 39.123, 1.3174),
      (johnny, 2048, hot, 12.3313, 19.2807, 1.5636, 107.167, nil),
      (trevor, 1024, wide, 8.1180, 2.9878, 0.3680, 41.435, 2.4877),
    ]
    for (cluster, model, batch, comm, comp, ratio, step, rate) in cases {
      let roofline = Volumes(batch.traffic, try paperShape(model, on: cluster), on: cluster).roofline
      #expect(isPrinted(roofline.communicate.value / 4 * 1e3, comm, digits: 4), "\(roofline.communicate.value / 4e-3)")
      #expect(isPrinted(roofline.compute.value / 3 * 1e3, comp, digits: 4), "\(roofline.compute.value / 3e-3)")
      #expect(isPrinted(roofline.computeOverCommunicate, ratio, digits: 4), "\(roofline.computeOverCommunicate)")
      #expect(abs(roofline.stepRatio - 0.75 * roofline.computeOverCommunicate) < 1e-12)
      #expect(isPrinted(roofline.semiIdeal.value * 1e3, step, digits: 3), "\(roofline.semiIdeal.value * 1e3)")
      if let rate {
        let got = roofline.flopRatePerWorker(in: roofline.semiIdeal).value * 1e-12
        #expect(isPrinted(got, rate, digits: 4), "\(got)")
      }
    }
    // The lines of the roofline, and the bound of overlapping both all-to-alls with their computing.
    let roofline = Volumes(flat.traffic, try paperShape(1024, on: johnny), on: johnny).roofline
    let (ratio, peak) = (roofline.computeOverCommunicate, 11.5)
    #expect(isPrinted(peak * min(1, ratio), 3.2, digits: 4))
    #expect(isPrinted(peak * ratio / (ratio + 1), 2.5034, digits: 4))
    let (comp, comm) = (roofline.compute.value / 3, roofline.communicate.value / 4)
    #expect(isPrinted((comm + comp) / max(comm, comp), 1.2783, digits: 4))
    #expect(isPrinted((4 * comm + 3 * comp) / (max(2 * comm, comp) + max(2 * comm, 2 * comp)), 1.2087, digits: 4))
  }

  /// Broadcast of one expert; ring all-reduce of one and of all (data parallel), 2(n-1)/n of their bytes on every hop.
  @Test func ringsEqualThePublishedSimulator() throws {
    let cases: [(Cluster, Int, Double, Double, Double)] = [
      (johnny, 1024, 2.6844, 5.0332, 80.531), (johnny, 2048, 10.7374, 20.1327, 322.123),
      (johnny, 4096, 42.9497, 80.5306, 1288.490), (trevor, 1024, 2.4403, 4.8044, 307.481),
      (trevor, 2048, 9.7613, 19.2175, 1229.922),
    ]
    for (cluster, model, broadcast, reduce, all) in cases {
      let bytes = try paperShape(model, on: cluster).expertBytes
      let workers = Double(cluster.workers)
      func around(_ times: Double) -> Double { cluster.around(bytes * times, without: 0).value * 1e3 }
      #expect(isPrinted(around(1), broadcast, digits: 4), "\(around(1))")
      #expect(isPrinted(around(2 * (workers - 1) / workers), reduce, digits: 4))
      #expect(isPrinted(around(2 * (workers - 1)), all, digits: 3), "\(around(2 * (workers - 1)))")
    }
  }

  /// (batch, model, Algorithm 1's set, what it promises without and with it, simulated ms without and with it)
  @Test func algorithmOneEqualsTheReplay() throws {
    let flat = Batch.flat(workers: 16, rows: 2048)
    let hot = Batch.hot(workers: 16, rows: 2048, share: 0.2)
    let cases: [(Batch, Int, [Int], Double, Double, Double, Double)] = [
      (flat, 1024, [], 9.8504, 9.8504, 25.957, 25.957), (flat, 2048, [], 28.6642, 28.6642, 60.876, 60.876),
      (flat, 4096, [], 93.1821, 93.1821, 157.607, 157.607), (hot, 1024, [0], 31.7830, 10.0889, 39.123, 28.376),
      (hot, 2048, [0], 92.4870, 40.3558, 107.167, 76.930),
    ]
    for (batch, model, shadows, without, with, plain, shadowed) in cases {
      let shape = try paperShape(model, on: johnny)
      let set = Shadowing.paper(Demand(batch.traffic, shape, on: johnny))
      #expect(set.experts == shadows)
      #expect(isPrinted(set.without.value * 1e3, without, digits: 4))
      #expect(isPrinted(set.with.value * 1e3, with, digits: 4))
      var request = PlanRequest()
      (request.shadowing, request.schedule) = (.paper, .coarse)
      var planner = Planner(batch.traffic, shape, on: johnny)
      let report = try planner.plan(request).report
      #expect(isPrinted(report.plain.value * 1e3, plain, digits: 3), "\(report.plain.value * 1e3)")
      #expect(isPrinted(report.planned.value * 1e3, shadowed, digits: 3), "\(report.planned.value * 1e3)")
      // Of all prefixes none is better in this model.
      request.shadowing = .best
      #expect(try planner.plan(request).report.shadows == shadows.count)
    }
  }

  /// Gathers and sums all parameters three times, each over its link 2 n-1/n times: 120.8 ms on johnny by the formula,
  /// which counts a share of the ring that broadcasts one by one do not save.
  @Test func zeroTakesWhatItsCollectivesTake() throws {
    let batch = Batch.flat(workers: 16, rows: 2048)
    var planner = Planner(batch.traffic, try paperShape(1024, on: johnny), on: johnny)
    var request = PlanRequest()
    request.shadowing = .everyExpert
    let seconds = try planner.plan(request).report.planned.value * 1e3
    #expect(seconds > 120.8 && seconds < 120.8 * 16 / 15 + 4, "\(seconds)")
  }

  /// So many copies that two are played as one: that takes as long but for one bucket on its way.
  @Test func bucketsOfCopiesTakeWhatSingleCopiesTake() throws {
    let cluster = try Cluster(johnny.document.repeated(to: 2104))
    let size = cluster.workers
    let batch = Batch((0..<size).map { worker in (0..<size).map { ($0 * 7 + worker) % 40 == 0 ? 300 + $0 % 9 : 0 } })
    let shape = try paperShape(1024, on: cluster)
    let demand = Demand(batch.traffic, shape, on: cluster)
    let buckets = Volumes(everyExpertOf: demand)
    let single = Volumes(demand, shadows: Array(0..<size))
    single.fetchesAgain = true
    #expect(buckets.copiesAtOnce == 2 && single.copiesAtOnce == 1 && buckets.fetchesAgain)
    let seconds = [buckets, single].map { volumes in
      let memory = Scratch()
      defer { withExtendedLifetime(memory) {} }
      let costs = StepCosts(Groups(workers: size, size: size), volumes, in: memory)
      let plan = Plan.everyExpert(workers: size, experts: (size + volumes.copiesAtOnce - 1) / volumes.copiesAtOnce)
      let (forward, backward) = (PlayedSteps(plan.forward, in: memory), PlayedSteps(plan.backward, in: memory))
      return
        (costs.forward(forward, overlaps: true, slowdown: 1, in: memory)
        + costs.backward(backward, overlaps: true, slowdown: 1, in: memory)).value
    }
    #expect(abs(seconds[0] / seconds[1] - 1) < 3.0 / Double(size) * 2, "\(seconds)")
  }
}
