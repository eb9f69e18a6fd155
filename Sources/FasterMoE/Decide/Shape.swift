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

  /// How long a worker takes for rows of one expert, forward or back.
  package func seconds(rows: Int, at rates: WorkerRates) -> Seconds {
    guard rows > 0 else { return Seconds(0) }
    return Flops(flops(rows: rows).value / 3) / rates.products.rate(rows: rows) + rowBytes * Double(rows)
      / rates.rowHandling
  }

  /// How long it takes for the gradients of the expert's weights.
  package func weightSeconds(rows: Int, at rates: WorkerRates) -> Seconds {
    rows > 0 ? Flops(flops(rows: rows).value / 3) / rates.weightGrads.rate(rows: rows) : Seconds(0)
  }

  /// What a row is on its way to an expert and back.
  package var rowBytes: Bytes { Bytes(Double(model * MemoryLayout<Float>.stride)) }

  /// The matrices of an expert; its biases, a thousandth of them, are left out as in the paper.
  package var expertBytes: Bytes {
    Bytes(Double(matrices * MemoryLayout<Float>.stride) * Double(model) * Double(hidden))
  }
}
