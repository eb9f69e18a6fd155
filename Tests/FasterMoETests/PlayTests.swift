import Testing

@testable import FasterMoE

/// Workers play whatever plan they are given: every order of steps, not only those that a planner likes.
@Suite struct PlayTests {
  private struct Outcome {
    var output: [Float] = []
    var gradTokens: [Float] = []
    var gradients: [Float] = []
  }

  private static let (model, hidden, each, choices) = (20, 36, 2, 2)

  /// One step of every rank, each with `rows[rank]` tokens, by `plan`.
  private static func step(_ layer: Layer, tokens n: Int, by plan: Plan, seed: Int) throws -> Outcome {
    var numbers = Numbers(UInt64(seed))
    let (d, experts) = (layer.shape.model, layer.shape.experts)
    let (tokens, gradOutput) = (numbers.array(max(1, n * d)), numbers.array(max(1, n * d)))
    var choices: [Int32] = []
    for _ in 0..<n {
      // Expert 0 is popular.
      let first = numbers.below(3) == 0 ? 0 : numbers.below(experts)
      choices += [Int32(first), Int32((first + 1 + numbers.below(experts - 1)) % experts)]
    }
    let weights = [Float](repeating: 0.5, count: max(1, n * Self.choices))
    var made = Outcome(output: Array(repeating: 0, count: n * d), gradTokens: Array(repeating: 0, count: n * d))
    layer.zeroGradients()
    try tokens.withUnsafeBufferPointer { tokens in
      let pass = try layer.route(tokens: tokens.baseAddress, count: n, choices: choices, weights: weights)
      _ = try pass.plan(wantsReport: false) { PlanRequest() }
      pass.plan = plan
      try made.output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) }
      try made.gradTokens.withUnsafeMutableBufferPointer {
        try pass.backward(gradOutput, gradTokens: $0.baseAddress, gradWeights: nil)
      }
      pass.end()
    }
    let tensors = layer.gradientTensors
    made.gradients = Array(UnsafeBufferPointer(start: tensors.inward, count: each * model * hidden))
    made.gradients += Array(UnsafeBufferPointer(start: tensors.outward, count: each * model * hidden))
    return made
  }

  /// Sums of some hundred rows in another order.
  private static let rounding: Float = 1e-4

  @Test(arguments: [2, 3, 4]) func anyPlanGivesTheCoarseResult(workers: Int) throws {
    let box = Mailbox()
    onThreads(workers) { rank in
      var options = Group.Options()
      (options.threads, options.pins, options.timeout) = (1 + rank % 2, false, Seconds(60))
      let group = try Group.over(Mailbox.Seat(rank, workers, box), options, failure: nil)
      let experts = workers * Self.each
      let shape = try Shape(
        model: Self.model, hidden: Self.hidden, experts: experts, choices: Self.choices, activation: .gelu)
      let layer = try Layer.together(group) { Layer.Options(shape, seed: 3) }
      let n = [120, 7, 0, 61][rank]
      let wanted = try Self.step(layer, tokens: n, by: .coarse(workers: workers, shadows: []), seed: rank)
      // The same on all ranks.
      var numbers = Numbers(UInt64(40 + workers))
      for _ in 0..<40 {
        let plan = RandomPlans.randomPlan(&numbers, workers: workers, experts: experts)
        let got = try Self.step(layer, tokens: n, by: plan, seed: rank)
        #expect(got.output == wanted.output, "\(plan)")
        for (a, b) in [(got.gradTokens, wanted.gradTokens), (got.gradients, wanted.gradients)] {
          let largest = b.reduce(1) { max($0, abs($1)) }
          #expect(zip(a, b).allSatisfy { abs($0 - $1) <= Self.rounding * largest }, "\(plan)")
        }
      }
    }
  }
}
