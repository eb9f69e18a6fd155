/// The sizes of a layer, in the letters of all comments: d, h, E, k.
package struct Shape: Equatable {
  package let model: Int
  package let hidden: Int
  package let experts: Int
  package let choices: Int
  package let activation: Activation

  package init(model: Int, hidden: Int, experts: Int, choices: Int, activation: Activation) throws(Failure) {
    guard model > 0 else { throw Failure(.argument, "d_model must be positive, not \(model)") }
    guard hidden > 0 else { throw Failure(.argument, "d_hidden must be positive, not \(hidden)") }
    guard experts > 0 else { throw Failure(.argument, "experts must be positive, not \(experts)") }
    for (size, name) in [(model, "d_model"), (hidden, "d_hidden"), (experts, "experts")] where size > Int(Int32.max) {
      throw Failure(.argument, "\(name) must fit 31 bits, not \(size)")
    }
    guard choices > 0 else { throw Failure(.argument, "top_k must be positive, not \(choices)") }
    guard choices <= experts else {
      throw Failure(.argument, "top_k is \(choices), but there are only \(experts) experts")
    }
    _ = try checkedProduct("experts x d_model x d_hidden", experts, model, hidden)
    self.model = model
    self.hidden = hidden
    self.experts = experts
    self.choices = choices
    self.activation = activation
  }

  /// Matrices of [d, h] or [h, d] in an expert.
  package var matrices: Int { activation.isGated ? 3 : 2 }

  /// Useful floating-point operations that `rows` rows cost an expert, forward and backward: three products a matrix.
  package func flops(rows: Int) -> Flops { Flops(Double(rows) * Double(6 * matrices) * Double(model) * Double(hidden)) }

  /// How long a worker takes for rows of one expert, forward or back, and for the gradients of the expert's weights.
  package func seconds(rows: Int, at rates: WorkerRates) -> (rows: Seconds, weights: Seconds) {
    seconds(rows: rows, at: rates, handling(at: rates))
  }

  /// The same with `handling(at: rates)`.
  @inline(__always)
  func seconds(rows: Int, at rates: WorkerRates, _ handling: Seconds) -> (rows: Seconds, weights: Seconds) {
    guard rows > 0 else { return (Seconds(0), Seconds(0)) }
    let (flops, each) = (Double(rows) * flopsEach, rates.secondsOfFlop(rows: rows))
    return (Seconds(flops * each.products) + handling * Double(rows), Seconds(flops * each.weightGrads))
  }

  /// Of a row, once forward and once back.
  func handling(at rates: WorkerRates) -> Seconds { rowBytes / rates.rowHandling }

  /// Of a row in each of its three products, forward, back and for gradients of weights.
  private var flopsEach: Double { Double(2 * matrices) * Double(model) * Double(hidden) }

  /// What a row is on its way to an expert and back.
  package var rowBytes: Bytes { Bytes(Double(model * MemoryLayout<Float>.stride)) }

  /// The matrices of an expert; its biases, a thousandth of them, are left out as in the paper.
  package var expertBytes: Bytes {
    Bytes(Double(matrices * MemoryLayout<Float>.stride) * Double(model) * Double(hidden))
  }
}
