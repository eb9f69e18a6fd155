/// The noisy gate of Shazeer et al. (2017, §2.1): in training, normal noise of a width that is learned for each token and
/// expert is added to the scores before they choose.
package struct NoisyGate: Gate {
  package init() {}
  package var weighing: Weighing { .softmaxOfChosen }
  package var isNoisy: Bool { true }
  /// Counts, importance and load.
  package func numbersTold(choices: Int) -> Int { 3 }
}

/// One token's noise and what came of it: [E, padded] each.
package struct Noise {
  package let clean: UnsafeMutablePointer<Float>
  package let width: UnsafeMutablePointer<Float>
  package let draw: UnsafeMutablePointer<Float>
  /// The width's derivative in its score.
  package let slope: UnsafeMutablePointer<Float>
  /// What an expert's score must exceed for it to be chosen.
  package let bar: UnsafeMutablePointer<Float>
  private let experts: Int
  private var padded: Int { Panels.padded(experts) }

  package init(arena: inout Arena, experts: Int) {
    self.experts = experts
    let padded = Panels.padded(experts)
    (clean, width, draw) = (arena.take(padded), arena.take(padded), arena.take(padded))
    (slope, bar) = (arena.take(padded), arena.take(padded))
  }

  /// Adds noise to the first E of `scores` [2·E], whose second half gives its width: softplus + 0.01.
  package func add(to scores: UnsafeMutablePointer<Float>, _ random: RandomStream, token: Int) {
    for block in stride(from: 0, to: padded, by: 16) {
      let width = softplus(scores.vector(at: experts + block, first: experts - block)) + 0.01
      self.width.store(width, at: block)
      slope.store(logistic(scores.vector(at: experts + block, first: experts - block)), at: block)
      draw.store(random.normals(token * padded + block), at: block)
      clean.store(scores.vector(at: block, first: experts - block), at: block)
    }
    for expert in stride(from: 0, to: padded, by: 16) {
      scores.store(
        width.vector(at: expert).times(draw.vector(at: expert), plus: clean.vector(at: expert)), at: expert,
        first: experts - expert)
    }
  }

  /// Finds every expert's bar: the highest score that was not chosen for those that were, the lowest that was for the
  /// others. `rest` are the scores without those that were chosen. Returns whose scores these are.
  package func findBars(
    _ scores: UnsafePointer<Float>, _ picks: UnsafePointer<Int32>, choices k: Int, rest: UnsafePointer<Float>
  ) -> (ofChosen: Int, ofOthers: Int) {
    let last = Int(picks[k - 1])
    var next = 0
    for expert in 1..<max(1, experts) where rest[expert] > rest[next] { next = expert }
    bar.update(repeating: scores[last], count: padded)
    // Where all are chosen, nothing can take their place.
    for choice in 0..<k { bar[Int(picks[choice])] = k < experts ? rest[next] : -.infinity }
    return (next, last)
  }

  /// How far the clean scores are above their bars, in widths; beyond the ends it makes no difference.
  private func excess(_ block: Int) -> Vector {
    ((clean.vector(at: block) - bar.vector(at: block)) / width.vector(at: block)).limited(from: -1e4, to: 1e4)
  }

  /// Adds to `load` [E, padded] how likely each expert would be chosen if its own noise were drawn again (appendix A).
  package func addLoad(to load: UnsafeMutablePointer<Float>) {
    for block in stride(from: 0, to: padded, by: 16) {
      load.store(load.vector(at: block) + normal(excess(block)).below, at: block)
    }
  }

  /// The gradient of Σ slopes ⊙ load: adds to `gradScores`, in the noisy scores, what goes through the bars. That in the
  /// clean scores is left in `clean` and that in the widths in `width`.
  package func backwardLoad(
    _ slopes: UnsafePointer<Float>, _ picks: UnsafePointer<Int32>, choices k: Int,
    bars: (ofChosen: Int, ofOthers: Int), addingTo gradScores: UnsafeMutablePointer<Float>
  ) {
    var all = Vector.zero
    for block in stride(from: 0, to: padded, by: 16) {
      let z = excess(block)
      let g = slopes.vector(at: block) * normal(z).density / width.vector(at: block)
      all += g
      clean.store(g, at: block)
      width.store(-(g * z), at: block)
    }
    var chosen: Float = 0
    for choice in 0..<k { chosen += clean[Int(picks[choice])] }
    gradScores[bars.ofChosen] -= chosen
    gradScores[bars.ofOthers] -= all.total - chosen
  }

  /// Without a loss of loads there is nothing but the noisy scores.
  package func clearGradients() {
    clean.update(repeating: 0, count: padded)
    width.update(repeating: 0, count: padded)
  }

  /// Spreads the gradient in the noisy scores, the first E of `gradScores` [2·E], to the clean scores and those of widths.
  package func backward(_ gradScores: UnsafeMutablePointer<Float>) {
    for expert in 0..<experts {
      let noisy = gradScores[expert]
      gradScores[experts + expert] = (noisy * draw[expert] + width[expert]) * slope[expert]
      gradScores[expert] = noisy + clean[expert]
    }
  }
}

/// The loss of the noisy gate: a·(CV²(importance) + CV²(load)) over the tokens of all workers (Shazeer et al. §4), where
/// importance is Σ of weights and load Σ of likelihoods.
package struct VariationLoss {
  /// Tells own sums [2, E] to the others.
  package static func tell(_ sums: UnsafePointer<Double>, experts: Int, _ told: UnsafeMutablePointer<UInt32>) {
    for place in 0..<2 * experts { told[experts + place] = Float(sums[place]).bitPattern }
  }

  /// The loss, from what all told, and its `slopes` [2, E padded] in a worker's sums. As the loss is everybody's, the mean
  /// over workers of their losses is the loss itself: so that each counts W times.
  package static func hear(
    _ batch: GateBatch, times a: Double, slopes: UnsafeMutablePointer<Float>
  ) -> Double {
    let (experts, padded) = (batch.experts, Panels.padded(batch.experts))
    slopes.update(repeating: 0, count: 2 * padded)
    var loss = 0.0
    for kind in 0..<2 {
      func sum(_ expert: Int) -> Double {
        (0..<batch.workers).reduce(0) {
          $0 + Double(Float(bitPattern: batch.told(by: $1)[(1 + kind) * experts + expert]))
        }
      }
      let variation = Variation(experts, sum)
      loss += a * variation.value
      for expert in 0..<experts {
        slopes[kind * padded + expert] = Float(a * Double(batch.workers) * variation.slope(sum(expert)))
      }
    }
    return loss
  }
}

/// CV² of some values: their unbiased variance over m² + ε.
package struct Variation {
  private let count: Double
  private let mean: Double
  private let variance: Double
  private var scale: Double { mean * mean + 1e-10 }

  package init(_ count: Int, _ x: (Int) -> Double) {
    let mean = (0..<count).reduce(0) { $0 + x($1) } / Double(count)
    self.count = Double(count)
    self.mean = mean
    variance = count > 1 ? (0..<count).reduce(0) { $0 + (x($1) - mean) * (x($1) - mean) } / Double(count - 1) : 0
  }

  package var value: Double { variance / scale }

  /// The derivative in a value, written so that equal ones give 0: not by way of the deviation, which has none there.
  package func slope(_ x: Double) -> Double {
    guard count > 1 else { return 0 }
    return 2 * (x - mean) / ((count - 1) * scale) - 2 * mean * variance / (count * scale * scale)
  }
}
