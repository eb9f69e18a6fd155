/// The plain gate: the k highest logits of a token choose its experts.
///
/// k ≥ 2: a softmax over the chosen logits weighs them (which equals renormalising the softmax over all). k = 1: the
/// weight is the softmax probability over all experts, else the gate would get no gradient (Switch Transformer §2.1).
/// Ties go to the lower expert; NaN ranks lowest.
package enum TopK {
  /// Chooses from one token's `logits` [E, padded to 16 with -∞], which are destroyed; the highest comes first.
  package static func choose(
    _ logits: UnsafeMutablePointer<Float>, experts: Int, choices k: Int, into choices: UnsafeMutablePointer<Int32>
  ) {
    let padded = Panels.padded(experts)
    for block in stride(from: 0, to: padded, by: 16) {
      let x = logits.vector(at: block)
      logits.store(x.replacing(with: -.infinity, where: x .!= x), at: block)
    }
    for choice in 0..<k {
      var high = logits.vector()
      for block in stride(from: 16, to: padded, by: 16) {
        let x = logits.vector(at: block)
        high.replace(with: x, where: x .> high)
      }
      let best = high.max()
      // When all that is left is -∞ (or was NaN), the marks of earlier choices look the same: take the lowest ones free.
      guard best > -.infinity else {
        var next = choice
        for expert in 0..<experts where next < k && !(0..<choice).contains(where: { choices[$0] == Int32(expert) }) {
          choices[next] = Int32(expert)
          next += 1
        }
        return
      }
      var expert = 0
      while logits[expert] != best { expert += 1 }
      choices[choice] = Int32(expert)
      logits[expert] = -.infinity
    }
  }

  /// p [E, padded] = softmax of `logits` [E, padded with -∞]; returns log Σ e^logit.
  package static func softmax(
    _ logits: UnsafePointer<Float>, experts: Int, into p: UnsafeMutablePointer<Float>
  ) -> Float {
    let padded = Panels.padded(experts)
    var high = logits.vector()
    for block in stride(from: 16, to: padded, by: 16) {
      let x = logits.vector(at: block)
      high.replace(with: x, where: x .> high)
    }
    let highest = high.max()
    var sum = Vector.zero
    for block in stride(from: 0, to: padded, by: 16) {
      let x = logits.vector(at: block)
      // -∞ - highest would come out as e^-87, not 0.
      let e = exponential(x - highest).replacing(with: 0, where: x .== -.infinity)
      p.store(e, at: block)
      sum += e
    }
    let total = sum.sum()
    let scale = 1 / total
    for block in stride(from: 0, to: padded, by: 16) { p.store(p.vector(at: block) * scale, at: block) }
    return highest + naturalLogarithm(total)
  }

  /// Softmax over the chosen logits, in place.
  package static func softmaxOfChosen(_ weights: UnsafeMutablePointer<Float>, choices k: Int) {
    var highest = weights[0]
    for choice in 1..<k where weights[choice] > highest { highest = weights[choice] }
    var sum: Float = 0
    for choice in 0..<k {
      weights[choice] = exponential(Vector(repeating: weights[choice] - highest))[0]
      sum += weights[choice]
    }
    for choice in 0..<k { weights[choice] /= sum }
  }

  /// The loss' gradient in one token's logits, added to `gradLogits`, from that in its weights; p only for k = 1.
  package static func backward(
    choices: UnsafePointer<Int32>, weights s: UnsafePointer<Float>, gradWeights: UnsafePointer<Float>, choices k: Int,
    probabilities p: UnsafePointer<Float>, experts: Int, addingTo gradLogits: UnsafeMutablePointer<Float>
  ) {
    if k == 1 {
      // s = p_c: dG = p ⊙ (dp - <dp, p>) where dp is gradWeights at the choice, 0 elsewhere.
      let inner = gradWeights[0] * s[0]
      for block in stride(from: 0, to: Panels.padded(experts), by: 16) {
        gradLogits.store(gradLogits.vector(at: block) - p.vector(at: block) * inner, at: block)
      }
      gradLogits[Int(choices[0])] += inner
    } else {
      // s_a·(ds_a - <ds, s>) as s_a·Σ_b s_b·(ds_a - ds_b): no digits are lost where one weight is near 1.
      for a in 0..<k {
        var sum: Float = 0
        for b in 0..<k { sum += s[b] * (gradWeights[a] - gradWeights[b]) }
        gradLogits[Int(choices[a])] += s[a] * sum
      }
    }
  }
}

/// The auxiliary losses of a gate, which keep experts equally busy and logits small.
package struct RouterLosses: Sendable {
  /// Coefficient a of a·E·Σ_e f_e P_e: f_e the share of all workers' choices that went to e, P_e the mean probability of e.
  /// Its value is a when both are uniform (Switch Transformer eq. 4, Megatron for k > 1).
  package var balance = 0.0
  /// Coefficient of the mean over tokens of (log Σ_e e^logit)² (ST-MoE eq. 5).
  package var z = 0.0

  package init(balance: Double = 0, z: Double = 0) {
    self.balance = balance
    self.z = z
  }
  package var needProbabilities: Bool { balance != 0 || z != 0 }

  /// The balance loss of n tokens, given each expert's share f of the choices and its Σ over tokens of probabilities.
  package func balanceLoss(
    shares f: UnsafePointer<Float>, sums: UnsafePointer<Double>, experts: Int, tokens: Int
  ) -> Double {
    guard balance != 0, tokens > 0 else { return 0 }
    var inner = 0.0
    for expert in 0..<experts { inner += Double(f[expert]) * sums[expert] }
    return balance * Double(experts) * inner / Double(tokens)
  }

  /// Both losses' gradient in one token's logits, added to `gradLogits` [E, padded].
  ///
  /// Balance: a·(E/n)·p ⊙ (f - <p, f>), with `shares` f [E, padded with 0]; z: a·(2/n)·lse·p.
  package func backward(
    probabilities p: UnsafePointer<Float>, logSum: Float, shares f: UnsafePointer<Float>, experts: Int, tokens: Int,
    addingTo gradLogits: UnsafeMutablePointer<Float>
  ) {
    let padded = Panels.padded(experts)
    var inner = Vector.zero
    for block in stride(from: 0, to: padded, by: 16) { inner.addProduct(p.vector(at: block), f.vector(at: block)) }
    let balanceScale = Float(balance * Double(experts) / Double(tokens))
    let constant = Float(z * 2 / Double(tokens)) * logSum - balanceScale * inner.sum()
    for block in stride(from: 0, to: padded, by: 16) {
      let slope = f.vector(at: block).times(Vector(repeating: balanceScale), plus: constant)
      gradLogits.store(p.vector(at: block).times(slope, plus: gradLogits.vector(at: block)), at: block)
    }
  }
}
