import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe paper`: predictions for the clusters and models of a paper beside its figures.
struct Paper: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Predict for a list of models and print a paper's figures beside.",
    discussion: """
      Times are of the MoE layers of one iteration, forward and backward; Benchmarks/paper/README.md says how routing is \
      made up, and why the figures differ.

        fastermoe paper Benchmarks/paper/models.json
      """)

  @Argument(help: ArgumentHelp("The models, a JSON file; clusters stand beside it.", valueName: "file"))
  var models: String

  @OptionGroup var output: OutputOptions

  /// How the file looks.
  struct Document: Codable {
    var version: Int
    var routing: SkewedRouting
    var models: [Model]
    enum CodingKeys: String, CodingKey {
      case version = "fastermoe_models"
      case routing, models
    }

    struct Model: Codable {
      var name, cluster: String
      var layers, experts: Int
      var model, hidden, choices: Int
      /// Of each worker.
      var tokens: Int
      enum CodingKeys: String, CodingKey {
        case name, cluster, layers, experts, tokens
        case model = "d_model"
        case hidden = "d_hidden"
        case choices = "top_k"
      }
    }
  }

  /// The ways that are compared.
  private enum Way: String, CaseIterable {
    case fastmoe = "FastMoE"
    case zero = "ZeRO-3"
    case capacity
    case shadowing = "shadows"
    case schedule
    case both
    case topology = "both + gate"
  }

  struct Row: Encodable {
    let name, cluster: String
    /// Of an iteration, the mean over all, by way.
    var seconds: [String: Double] = [:]
    /// Of the iterations, the one in which it gains most over FastMoE.
    var best: [String: Double] = [:]
    /// Highest bound of the schedule over layers, by the formula of the paper's artifact and by the busiest direction of
    /// links; and what the schedule reached at most.
    var scheduleBound = 0.0
    var scheduleBoundBothWays = 0.0
    var scheduleReached = 0.0
    /// Of experts, and of rows that a capacity drops.
    var shadowedShare = 0.0
    var algorithm1Share = 0.0
    var droppedShare = 0.0
    var parameters = 0.0
    enum CodingKeys: String, CodingKey {
      case name, cluster, seconds, best, parameters
      case scheduleBound = "schedule_bound"
      case scheduleBoundBothWays = "schedule_bound_both_ways"
      case scheduleReached = "schedule_reached"
      case shadowedShare = "shadowed_share"
      case algorithm1Share = "algorithm1_shadowed_share"
      case droppedShare = "dropped_share"
    }
  }

  private struct Report: Encodable {
    let models: [Row]
    let figures: [Figure]
  }

  struct Figure: Encodable {
    let what, paper, ours: String
  }

  func run() throws {
    let document = try Documents.read(Document.self, from: models)
    guard document.version == 1 else {
      throw Failure(.file, "\(models): fastermoe_models is \(document.version); this version reads 1")
    }
    try document.routing.check(models)
    guard !document.models.isEmpty else { throw Failure(.file, "\(models): there are no models") }
    let folder = models.lastIndex(of: "/").map { String(models[...$0]) } ?? ""
    let rows = try document.models.enumerated().map { index, model in
      try Paper.predict(
        model, UInt64(index), document.routing, try Cluster(ClusterOptions.read(folder + model.cluster)))
    }
    let figures = Paper.figures(rows)
    try output.show(Report(models: rows, figures: figures)) {
      "milliseconds of the MoE layers of an iteration, means; (times faster than FastMoE)\n\n"
        + table(
          ["model", "params"] + Way.allCases.map(\.rawValue),
          rows.map { row in
            [row.name, "\(fixed(row.parameters * 1e-9, 2)) B"]
              + Way.allCases.map { way in
                let seconds = row.seconds[way.rawValue]!
                let times = row.seconds[Way.fastmoe.rawValue]! / seconds
                return way == .fastmoe ? fixed(seconds * 1e3, 0) : "\(fixed(seconds * 1e3, 0)) (\(fixed(times, 2)))"
              }
          })
        + "\n"
        + table(
          ["model", "schedule reached", "of", "both ways", "shadowed %", "best iteration", "capacity drops %"],
          rows.map {
            [
              $0.name, fixed($0.scheduleReached, 2), fixed($0.scheduleBound, 2), fixed($0.scheduleBoundBothWays, 2),
              fixed($0.shadowedShare * 100, 1), fixed($0.best[Way.shadowing.rawValue]!, 2),
              fixed($0.droppedShare * 100, 1),
            ]
          })
        + "\n" + table(["figure", "paper", "ours"], figures.map { [$0.what, $0.paper, $0.ours] })
    }
  }

  private static func predict(_ model: Document.Model, _ number: UInt64, _ routing: SkewedRouting, _ cluster: Cluster)
    throws -> Row
  {
    guard model.layers > 0, model.tokens > 0, model.tokens <= 1 << 24 else {
      throw Failure(.file, "model \(model.name) has \(model.layers) layers and \(model.tokens) tokens of each worker")
    }
    let shape = try Shape(
      model: model.model, hidden: model.hidden, experts: model.experts, choices: model.choices, activation: .gelu)
    var row = Row(name: model.name, cluster: model.cluster)
    // Attention has four matrices.
    let attention = 4 * Double(model.model) * Double(model.model)
    row.parameters = Double(model.layers) * (Double(model.experts) * shape.expertBytes.value / 4 + attention)
    let rows = model.tokens * model.choices
    var zero: Double?
    var batches = 0.0
    for iteration in 0..<routing.iterations {
      var seconds = Dictionary(uniqueKeysWithValues: Way.allCases.map { ($0, 0.0) })
      for layer in 0..<model.layers {
        let shares = routing.shares(experts: model.experts, model: number, layer: layer, iteration: iteration)
        let batch = try Batch(workers: cluster.workers, rows: rows, shares: shares)
        var planner = Planner(batch.traffic, shape, on: cluster)
        func plan(_ shadowing: PlanRequest.Shadowing, _ schedule: PlanRequest.Schedule, with planner: inout Planner)
          throws -> PlanReport
        {
          var request = PlanRequest()
          (request.shadowing, request.schedule) = (shadowing, schedule)
          return try planner.plan(request).report
        }
        let plain = try plan(.never, .coarse, with: &planner)
        let scheduled = try plan(.never, .best, with: &planner)
        let both = try plan(.best, .best, with: &planner)
        seconds[.fastmoe]! += plain.planned.value
        seconds[.schedule]! += scheduled.planned.value
        seconds[.shadowing]! += try plan(.best, .coarse, with: &planner).planned.value
        seconds[.both]! += both.planned.value
        // The same for any routing but for rounding: every worker computes its own rows.
        if zero == nil { zero = try plan(.everyExpert, .best, with: &planner).planned.value }
        seconds[.zero]! += zero!

        let limited = try batch.withCapacity((rows + model.experts - 1) / model.experts)
        row.droppedShare += 1 - Double(limited.rows) / Double(rows * cluster.workers)
        var other = Planner(limited.batch.traffic, shape, on: cluster)
        seconds[.capacity]! += try plan(.never, .coarse, with: &other).planned.value

        let near = try batch.keptNear(on: cluster)
        other = Planner(near.traffic, shape, on: cluster)
        seconds[.topology]! += try plan(.best, .best, with: &other).planned.value

        let roofline = plain.roofline!
        let (c, p) = (roofline.communicate.value / 4, roofline.compute.value / 3)
        row.scheduleBound = max(row.scheduleBound, (4 * c + 3 * p) / (max(2 * c, p) + max(2 * c, 2 * p)))
        row.scheduleBoundBothWays = max(row.scheduleBoundBothWays, roofline.semiIdeal / roofline.ideal)
        row.scheduleReached = max(row.scheduleReached, plain.planned / scheduled.planned)
        row.shadowedShare += Double(both.shadows) / Double(model.experts)
        let paper = Shadowing.paper(Demand(batch.traffic, shape, on: cluster)).experts.count
        row.algorithm1Share += Double(paper) / Double(model.experts)
        batches += 1
      }
      for way in Way.allCases {
        row.seconds[way.rawValue, default: 0] += seconds[way]! / Double(routing.iterations)
        row.best[way.rawValue] = max(row.best[way.rawValue] ?? 0, seconds[.fastmoe]! / seconds[way]!)
      }
    }
    row.shadowedShare /= batches
    row.algorithm1Share /= batches
    row.droppedShare /= batches
    return row
  }

  /// The paper's and the talk's figures (PPoPP 2022) and what is predicted.
  private static func figures(_ rows: [Row]) -> [Figure] {
    func most(_ cluster: String, _ value: (Row) -> Double) -> Double {
      rows.filter { $0.cluster.hasPrefix(cluster) }.map(value).max() ?? .nan
    }
    func over(_ way: Way, _ other: Way) -> (Row) -> Double {
      { $0.seconds[other.rawValue]! / $0.seconds[way.rawValue]! }
    }
    func times(_ value: Double) -> String { "\(fixed(value, 2)) x" }
    func mean(_ share: (Row) -> Double) -> String {
      "\(fixed(rows.reduce(0) { $0 + share($1) } / Double(rows.count) * 100, 1)) %"
    }
    let gate = rows.map(over(.topology, .both)).map { (1 - 1 / $0) * 100 }
    let byCluster: [(String, String, (Row) -> Double, String)] = [
      ("both over ZeRO-3, most", "johnny", over(.both, .zero), "6.63 x"),
      ("both over ZeRO-3, most", "trevor", over(.both, .zero), "17.87 x"),
      ("both over FastMoE, most", "johnny", over(.both, .fastmoe), "2.20 x"),
      ("both over FastMoE, most", "trevor", over(.both, .fastmoe), "5.72 x"),
      ("shadows over FastMoE, most", "johnny", over(.shadowing, .fastmoe), "1.95 x"),
      ("shadows over FastMoE, most", "trevor", over(.shadowing, .fastmoe), "4.74 x"),
      ("shadows in one iteration, most", "johnny", { $0.best[Way.shadowing.rawValue]! }, "1.97 x"),
      ("capacity over FastMoE, most", "johnny", over(.capacity, .fastmoe), "2.12 x"),
      ("schedule over FastMoE, most", "", over(.schedule, .fastmoe), "1.40 x"),
      ("schedule in one layer, most", "", { $0.scheduleReached }, "1.42 x"),
      ("bound of the schedule, most", "", { $0.scheduleBound }, "1.71 x"),
    ]
    return byCluster.map { what, cluster, value, paper in
      Figure(what: cluster.isEmpty ? what : "\(what), \(cluster)", paper: paper, ours: times(most(cluster, value)))
    } + [
      Figure(what: "shadowed by Algorithm 1, mean", paper: "19 %", ours: mean { $0.algorithm1Share }),
      Figure(what: "shadowed by what is predicted best", paper: "-", ours: mean { $0.shadowedShare }),
      Figure(
        what: "topology gate shortens an iteration by", paper: "9.4 %",
        ours: "\(fixed(gate.min() ?? .nan, 1)) to \(fixed(gate.max() ?? .nan, 1)) %"),
    ]
  }
}

/// Routing that is skewed as the paper says it was: of 16 experts, 4 get some 20 % of all rows each, 3.2 times the mean,
/// and that changes from layer to layer and in the course of training.
///
/// In every layer and iteration a part of the experts is hot, others each time, chosen by the seed. Each of them gets a load
/// of its own, drawn evenly between the mean and `most` times it; the others share the rest equally. All workers' tokens
/// are alike.
struct SkewedRouting: Codable {
  /// Of all experts.
  var hot: Double
  /// Times the mean.
  var most: Double
  var iterations: Int
  var seed: UInt64
  enum CodingKeys: String, CodingKey {
    case hot = "hot_share_of_experts"
    case most = "most_over_mean"
    case iterations, seed
  }

  func check(_ path: String) throws(Failure) {
    guard hot > 0, hot < 1, most >= 1, hot * most <= 1, iterations > 0, iterations <= 10_000 else {
      throw Failure(
        .file,
        "\(path): routing has hot_share_of_experts between 0 and 1, most_over_mean from 1 to 1 over that, and iterations"
      )
    }
  }

  /// [E] of all rows.
  func shares(experts: Int, model: UInt64, layer: Int, iteration: Int) -> [Double] {
    let stream = (model << 32 | UInt64(layer) << 16 | UInt64(iteration)) + 1
    let order = Batch.shuffled(experts, seed: seed, stream: stream)
    let count = max(1, Int((hot * Double(experts)).rounded()))
    guard count < experts else { return Array(repeating: 1 / Double(experts), count: experts) }
    let random = RandomStream(seed: seed, stream: stream)
    let loads = (0..<count).map { (1 + (most - 1) * Double(random.share(experts + $0))) / Double(experts) }
    let rest = (1 - loads.reduce(0, +)) / Double(experts - count)
    var shares = Array(repeating: rest, count: experts)
    for (expert, load) in zip(order, loads) { shares[expert] = load }
    return shares
  }
}

extension Batch {
  /// What is left if no worker may send an expert more than so many rows; the rest is dropped.
  func withCapacity(_ most: Int) throws(Failure) -> (batch: Batch, rows: Int) {
    let limited = try Batch(workers: traffic.workers, experts: traffic.experts)
    var rows = 0
    for at in 0..<traffic.workers * traffic.experts {
      limited.traffic.counts[at] = min(traffic.counts[at], UInt32(most))
      rows += Int(limited.traffic.counts[at])
    }
    return (limited, rows)
  }

  /// What a topology-aware gate makes of it (FasterMoE §4.3), by counts: of each worker's rows no more than the cluster's
  /// share leave its widest place, each expert in proportion; the others go to the experts of that place, in proportion
  /// to what these have already.
  func keptNear(on cluster: Cluster) throws(Failure) -> Batch {
    let near = try Batch(workers: traffic.workers, experts: traffic.experts)
    let count = traffic.workers * traffic.experts
    near.traffic.counts.update(from: traffic.counts, count: count)
    guard let share = cluster.remoteShare else { return near }
    for rank in 0..<traffic.workers {
      let seat = cluster.seats[rank]
      let place = cluster.widestPlace(of: seat)
      let counts = near.traffic.counts + rank * traffic.experts
      func isNear(_ expert: Int) -> Bool {
        cluster.nodes[place].seats.contains(cluster.seats[traffic.owner(of: expert)])
      }
      let local = (0..<traffic.experts).filter(isNear)
      let all = (0..<traffic.experts).reduce(0.0) { $0 + Double(counts[$1]) }
      let inside = local.reduce(0.0) { $0 + Double(counts[$1]) }
      guard all - inside > share * all else { continue }
      let keep = share * all / (all - inside)
      var moved = 0
      for expert in 0..<traffic.experts where !isNear(expert) {
        let kept = UInt32(Double(counts[expert]) * keep)
        moved += Int(counts[expert] - kept)
        counts[expert] = kept
      }
      var (sum, given) = (0.0, 0)
      for expert in local {
        sum += inside > 0 ? Double(counts[expert]) / inside : 1 / Double(local.count)
        let next = Int(sum * Double(moved) + 0.5)
        counts[expert] += UInt32(next - given)
        given = next
      }
    }
    return near
  }
}
