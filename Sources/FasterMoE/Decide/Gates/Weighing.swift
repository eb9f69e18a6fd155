/// How the scores of a token's choices become the weights of their outputs. A choice of -1 is none and weighs 0.
package enum Weighing: Sendable {
  /// A softmax over the chosen scores, which equals renormalising the softmax over all. For k = 1, where that would be 1
  /// and teach the gate nothing, the probability.
  case softmaxOfChosen
  /// The softmax over all experts (Switch Transformer §2.1).
  case probability
  /// The logistic function of the score (BASE §3.2).
  case logistic

  package func needsProbabilities(choices k: Int) -> Bool {
    switch self {
    case .softmaxOfChosen: k == 1
    case .probability: true
    case .logistic: false
    }
  }

  /// The weights s [k] of one token's `picks`.
  package func weigh(
    _ picks: UnsafePointer<Int32>, choices k: Int, logits: UnsafePointer<Float>, probabilities p: UnsafePointer<Float>,
    into s: UnsafeMutablePointer<Float>
  ) {
    for choice in 0..<k {
      let expert = Int(picks[choice])
      if expert < 0 {
        s[choice] = 0
      } else if needsProbabilities(choices: k) {
        s[choice] = p[expert]
      } else if case .logistic = self {
        s[choice] = FasterMoE.logistic(Vector(repeating: logits[expert]))[0]
      } else {
        s[choice] = logits[expert]
      }
    }
    if case .softmaxOfChosen = self, k > 1 { Weighing.softmaxOfChosen(picks, s, choices: k) }
  }

  /// Softmax over the chosen logits, in place.
  private static func softmaxOfChosen(
    _ picks: UnsafePointer<Int32>, _ s: UnsafeMutablePointer<Float>, choices k: Int
  ) {
    if k == 2 && picks[0] >= 0 && picks[1] >= 0 {
      // Both from the one exponential that is not 1.
      let higher = s[1] > s[0] ? 1 : 0
      let e = exponential(Vector(repeating: s[1 - higher] - s[higher]))[0]
      let share = 1 / (1 + e)
      (s[higher], s[1 - higher]) = (share, e * share)
      return
    }
    guard let first = (0..<k).first(where: { picks[$0] >= 0 }) else { return }
    var highest = s[first]
    for choice in first..<k where picks[choice] >= 0 && s[choice] > highest { highest = s[choice] }
    var sum: Float = 0
    for choice in first..<k where picks[choice] >= 0 {
      s[choice] = exponential(Vector(repeating: s[choice] - highest))[0]
      sum += s[choice]
    }
    for choice in first..<k where picks[choice] >= 0 { s[choice] /= sum }
  }

  /// The loss' gradient in one token's scores, added to `gradLogits` [E, padded], from that in its weights.
  package func backward(
    _ picks: UnsafePointer<Int32>, choices k: Int, weights s: UnsafePointer<Float>,
    gradWeights ds: UnsafePointer<Float>,
    probabilities p: UnsafePointer<Float>, experts: Int, addingTo gradLogits: UnsafeMutablePointer<Float>
  ) {
    if needsProbabilities(choices: k) {
      // s = p_c: dG = p ⊙ (dp - <dp, p>) where dp is ds at the choices, 0 elsewhere.
      var inner: Float = 0
      for choice in 0..<k where picks[choice] >= 0 { inner += ds[choice] * s[choice] }
      for block in stride(from: 0, to: Panels.padded(experts), by: 16) {
        gradLogits.store(gradLogits.vector(at: block) - p.vector(at: block) * inner, at: block)
      }
      for choice in 0..<k where picks[choice] >= 0 { gradLogits[Int(picks[choice])] += ds[choice] * s[choice] }
    } else if case .logistic = self {
      for choice in 0..<k where picks[choice] >= 0 {
        gradLogits[Int(picks[choice])] += ds[choice] * s[choice] * (1 - s[choice])
      }
    } else {
      // s_a·(ds_a - <ds, s>) as s_a·Σ_b s_b·(ds_a - ds_b): no digits are lost where one weight is near 1.
      for a in 0..<k where picks[a] >= 0 {
        var sum: Float = 0
        for b in 0..<k { sum += s[b] * (ds[a] - ds[b]) }
        gradLogits[Int(picks[a])] += s[a] * sum
      }
    }
  }
}
