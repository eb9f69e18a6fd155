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
    let constant = Float(z * 2 / Double(tokens)) * logSum - balanceScale * inner.total
    for block in stride(from: 0, to: padded, by: 16) {
      let slope = f.vector(at: block).times(Vector(repeating: balanceScale), plus: constant)
      gradLogits.store(p.vector(at: block).times(slope, plus: gradLogits.vector(at: block)), at: block)
    }
  }
}
