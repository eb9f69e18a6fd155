/// Balancing by a bias for each expert instead of a loss (Wang et al. 2024; DeepSeek-V3 §2.1.2).
///
/// A token prefers the experts with the highest logistic(score) + bias; the bias takes no part in weights or gradients.
/// After each batch that was trained, the bias of an expert that was chosen less than the mean rises by a step, and that of
/// one that was chosen more falls.
package enum Bias {
  @inline(__always) package static func preference(_ scores: Vector, _ bias: Vector) -> Vector {
    logistic(scores) + bias
  }

  /// Moves the `bias` [E] a step towards balance, by the `loads` [E] of all workers, whole numbers.
  package static func move(
    _ bias: UnsafeMutablePointer<Float>, loads: UnsafePointer<Double>, experts: Int, step: Float
  ) {
    var all = 0.0
    for expert in 0..<experts { all += loads[expert] }
    for expert in 0..<experts {
      let load = loads[expert] * Double(experts)
      if load != all { bias[expert] += load < all ? step : -step }
    }
  }
}
