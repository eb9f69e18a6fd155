@testable import FasterMoE

/// Counts with the memory they stand in.
final class Batch {
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

/// Any cluster, batch and plan.
enum RandomPlans {
  /// Hosts of some workers each, ranks dealt out in any order, links of any speed, now and then a peer link.
  static func randomCluster(
    _ numbers: inout Numbers, workers: Int, latency: Double = 1e-5, slower: Double = 1
  ) throws -> Cluster {
    func number(_ low: Double, _ high: Double) -> Double { low + (high - low) * Double(numbers.next() + 1) / 2 }
    func link() -> Cluster.Document.Link {
      Cluster.Document.Link(
        bandwidth: numbers.below(5) == 0 ? nil : number(1e8, 2e9) / slower, latency: slower * latency * number(0, 1))
    }
    var document = Cluster.Document()
    document.places = [.init(name: "root")]
    let hosts = 1 + numbers.below(4)
    for host in 0..<hosts { document.places.append(.init(name: "h\(host)", in: "root", up: link(), down: link())) }
    for worker in 0..<workers {
      document.workers.append(
        .init(
          name: "w\(worker)", in: "h\(numbers.below(hosts))", up: link(), down: link(),
          flops: [
            .init(rows: 1, rate: FlopRate(1e9 / slower)), .init(rows: 50, rate: FlopRate(number(2e10, 5e10) / slower)),
          ],
          weightFlops: numbers.below(2) == 0 ? nil : [.init(rows: 9, rate: FlopRate(number(1e10, 4e10) / slower))],
          rowHandling: numbers.below(2) == 0 ? nil : number(1e8, 1e10) / slower))
    }
    if workers > 2 && numbers.below(2) == 0 {
      document.peers = [.init(from: "w0", to: "w\(1 + numbers.below(workers - 1))", there: link(), back: link())]
    }
    return try Cluster(document)
  }

  static func randomBatch(_ numbers: inout Numbers, workers: Int, experts: Int) -> Batch {
    let skew = numbers.below(4)
    return Batch(
      (0..<workers).map { _ in
        (0..<experts).map { $0 < skew ? numbers.below(900) : max(0, numbers.below(60) - 10) }
      })
  }

  /// `body` for many clusters, batches and shapes. On clusters so many times `slower` a plan may take as much longer.
  static func withRandom(
    _ stream: UInt64, times: Int = 40, latency: Double = 1e-5, slower: Double = 1,
    _ body: (inout Numbers, Cluster, Batch, Shape) throws -> Void
  ) throws {
    var numbers = Numbers(stream)
    for _ in 0..<times {
      let workers = 1 + numbers.below(9)
      let experts = workers * (1 + numbers.below(3))
      let cluster = try randomCluster(&numbers, workers: workers, latency: latency, slower: slower)
      let batch = randomBatch(&numbers, workers: workers, experts: experts)
      let shape = try Shape(model: 64, hidden: 128, experts: experts, choices: 1, activation: .gelu)
      try body(&numbers, cluster, batch, shape)
    }
  }

  static func randomPlan(_ numbers: inout Numbers, workers: Int, experts: Int) -> Plan {
    let shadows = (0..<experts).filter { _ in numbers.below(4) == 0 }
    func order() -> Order {
      Order(
        shadows: Order.Shadows.allCases[numbers.below(2)], rows: Order.Rows.allCases[numbers.below(2)],
        returns: Order.Returns.allCases[numbers.below(2)])
    }
    switch numbers.below(6) {
    case 0: return .coarse(workers: workers, shadows: shadows)
    case 1: return .everyExpert(workers: workers, experts: experts)
    case 2: return Plan.coarse(workers: workers, shadows: Array(0..<experts), fetchesAgain: true)
    default:
      let groups = Groups(workers: workers, size: 1 + numbers.below(workers))
      return .pairwise(groups, shadows: shadows, forward: order(), backward: order())
    }
  }
}
