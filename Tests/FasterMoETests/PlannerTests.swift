import Foundation
import Testing

@testable import FasterMoE

/// Counts with the memory they stand in.
private final class Batch {
  let traffic: Traffic
  private let memory: UnsafeMutablePointer<UInt8>

  init(_ counts: [[Int]]) {
    var size = Arena()
    _ = Traffic(arena: &size, workers: counts.count, experts: counts[0].count)
    memory = UnsafeMutablePointer<UInt8>.allocate(capacity: size.bytes)
    var arena = Arena(over: memory)
    traffic = Traffic(arena: &arena, workers: counts.count, experts: counts[0].count)
    for (at, count) in counts.joined().enumerated() { traffic.counts[at] = UInt32(count) }
  }

  deinit { memory.deallocate() }

  /// `rows` of each worker, spread evenly over as many experts.
  static func flat(workers: Int, rows: Int) -> Batch {
    Batch(Array(repeating: Array(repeating: rows / workers, count: workers), count: workers))
  }

  /// As `flat`, but expert 0 gets about `share` of all, the others equal parts of the rest.
  static func hot(workers: Int, rows: Int, share: Double) -> Batch {
    let other = (rows - Int(Double(rows) * share)) / (workers - 1)
    let counts = [rows - other * (workers - 1)] + Array(repeating: other, count: workers - 1)
    return Batch(Array(repeating: counts, count: workers))
  }
}

private func cluster(_ name: String) throws -> Cluster {
  let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  return try Cluster(Documents.read(Cluster.Document.self, from: root.appending(path: name).path))
}
private let johnny = try! cluster("Benchmarks/paper/johnny.json")
private let trevor = try! cluster("Benchmarks/paper/trevor.json")

/// An expert of the paper's: α = 2, two matrices, fp32.
private func paperShape(_ model: Int, on cluster: Cluster) throws -> Shape {
  try Shape(model: model, hidden: 2 * model, experts: cluster.workers, choices: 2, activation: .gelu)
}

/// To the last digit that is printed.
private func isPrinted(_ value: Double, _ printed: Double, digits: Int) -> Bool {
  let scale = pow(10, Double(digits))
  return (value * scale).rounded() == (printed * scale).rounded()
}

@Suite struct PlannerTests {
  // MARK: The paper's clusters

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
      let set = Shadowing.paper(batch.traffic, shape, on: johnny)
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
}
