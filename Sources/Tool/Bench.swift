import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe bench`: the library on this machine, measured by itself.
struct Bench: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measure training steps of one layer on this machine.",
    discussion: """
      Times gate, forward and backward of the shapes of make bench, the best of some repeats. Shares are useful flops of \
      the experts, 4ndhk forward and 12ndhk in gate, forward and backward together, over what the same threads reach with nothing but \
      fused multiply-adds in registers, measured between the shapes.
      """)

  @Option(
    help: ArgumentHelp(
      "Which shapes: A and B many rows, C few rows of many experts, D a few tokens, E small experts.",
      valueName: "letters"))
  var shapes = "ABE"

  @Option(help: ArgumentHelp("Threads; 0: one for each core.", valueName: "number"))
  var threads = 0

  @Option(help: ArgumentHelp("Popularity of experts by the law of Zipf; 0: all alike.", valueName: "s"))
  var zipf = 0.0

  @Option(help: ArgumentHelp("Steps of each shape.", valueName: "number"))
  var repeats = 5

  @OptionGroup var output: OutputOptions

  struct Size {
    let name: Character
    let tokens, model, hidden, experts, choices: Int
  }
  static let sizes = [
    Size(name: "A", tokens: 2048, model: 512, hidden: 2048, experts: 8, choices: 2),
    Size(name: "B", tokens: 4096, model: 1024, hidden: 2048, experts: 16, choices: 2),
    Size(name: "C", tokens: 512, model: 1024, hidden: 4096, experts: 64, choices: 2),
    Size(name: "D", tokens: 8, model: 1024, hidden: 4096, experts: 8, choices: 2),
    Size(name: "E", tokens: 8192, model: 256, hidden: 512, experts: 32, choices: 1),
  ]

  private struct Report: Encodable {
    struct Shape: Encodable {
      let name: String
      let tokens, model, hidden, experts, choices: Int
      var gate = Double.infinity
      var forward = Double.infinity
      var backward = Double.infinity
      /// Flops per second of the experts.
      var forwardRate = 0.0
      var stepRate = 0.0
      var peak = 0.0
      enum CodingKeys: String, CodingKey {
        case name, tokens, experts
        case model = "d_model"
        case hidden = "d_hidden"
        case choices = "top_k"
        case gate = "gate_seconds"
        case forward = "forward_seconds"
        case backward = "backward_seconds"
        case forwardRate = "forward_flops_per_second"
        case stepRate = "flops_per_second"
        case peak = "peak_flops_per_second"
      }
    }
    let processor: String
    let threads: Int
    let zipf: Double
    var shapes: [Shape] = []
  }

  func run() throws {
    guard !shapes.isEmpty, shapes.allSatisfy({ name in Bench.sizes.contains { $0.name == name } }) else {
      throw Failure(.argument, "--shapes are letters from A to E, not \"\(shapes)\"")
    }
    guard repeats >= 1 else { throw Failure(.argument, "--repeats is 1 or more, not \(repeats)") }
    guard threads >= 0 else { throw Failure(.argument, "--threads is not negative") }
    guard zipf >= 0, zipf <= 100 else { throw Failure(.argument, "--zipf is from 0 to 100, not \(zipf)") }
    var options = Group.Options()
    options.threads = threads
    let group = try Group.local(1, options)[0]
    var report = Report(processor: group.topology.processor, threads: group.team.threads, zipf: zipf)
    for size in Bench.sizes where shapes.contains(size.name) { report.shapes.append(try measure(size, group)) }
    try output.show(report) {
      "\(report.processor), \(report.threads) thread\(report.threads == 1 ? "" : "s")"
        + (zipf > 0 ? ", Zipf \(brief(zipf))\n\n" : ", even rows\n\n")
        + table(
          ["", "n, d, h, E, k", "gate ms", "forward ms", "backward ms", "GFLOP/s", "share forward", "share step"],
          report.shapes.map {
            [
              $0.name, "\($0.tokens), \($0.model), \($0.hidden), \($0.experts), \($0.choices)", fixed($0.gate * 1e3, 2),
              fixed($0.forward * 1e3, 2), fixed($0.backward * 1e3, 2), fixed($0.stepRate * 1e-9, 1),
              fixed($0.forwardRate / $0.peak, 2), fixed($0.stepRate / $0.peak, 2),
            ]
          }, left: [0, 1])
    }
  }

  private func measure(_ size: Size, _ group: Group) throws(Failure) -> Report.Shape {
    let shape = try Shape(
      model: size.model, hidden: size.hidden, experts: size.experts, choices: size.choices, activation: .geluTanh)
    let layer = try Layer.together(group) { Layer.Options(shape, seed: 1) }
    let (n, slots) = (size.tokens, size.tokens * size.choices)
    let values = n * size.model
    let memory = try Region(bytes: (3 * values + 2 * slots) * 4 + 5 * 64, for: "the tokens of a benchmark")
    var arena = Arena(over: memory.base)
    let (tokens, output, grads) =
      (arena.take(values), arena.take(values), arena.take(values))
      as (UnsafeMutablePointer<Float>, UnsafeMutablePointer<Float>, UnsafeMutablePointer<Float>)
    let weights: UnsafeMutablePointer<Float> = arena.take(slots)
    let choices: UnsafeMutablePointer<Int32> = arena.take(slots)
    let random = RandomStream(seed: 1, stream: 1)
    for at in 0..<values { tokens[at] = random.uniform(at, bound: 1) }
    weights.update(repeating: 1 / Float(size.choices), count: slots)
    // All rows of one expert, then of the next; a token takes one from each of k equal parts of that list.
    let counts = try Batch(
      workers: 1, rows: slots, shares: Batch.zipf(zipf, experts: size.experts, seed: 0)
    )
    var slot = 0
    for expert in 0..<size.experts {
      for _ in 0..<counts.traffic.counts[expert] {
        choices[slot % n * size.choices + slot / n] = Int32(expert)
        slot += 1
      }
    }

    var found = Report.Shape(
      name: String(size.name), tokens: n, model: size.model, hidden: size.hidden, experts: size.experts,
      choices: size.choices)
    found.peak = Peak.rate(of: group.team).value
    // The first one meets memory that nobody has touched.
    for round in 0...repeats {
      layer.beginGradients()
      let start = Seconds.now.value
      try layer.gate(tokens: tokens, count: n).end()
      let gated = Seconds.now.value
      let pass = try layer.route(tokens: tokens, count: n, choices: choices, weights: weights)
      let routed = Seconds.now.value
      try pass.forward(output)
      let between = Seconds.now.value
      try pass.backward(tokens, gradTokens: grads, gradWeights: nil)
      let end = Seconds.now.value
      pass.end()
      guard round > 0 else { continue }
      found.gate = min(found.gate, gated - start)
      found.forward = min(found.forward, between - routed)
      found.backward = min(found.backward, end - between)
    }
    found.peak = max(found.peak, Peak.rate(of: group.team).value)
    let work = shape.flops(rows: slots).value
    found.forwardRate = work / 3 / found.forward
    found.stepRate = work / (found.gate + found.forward + found.backward)
    return found
  }
}
