/// What leaves this worker over a transport, packed in the order in which it is sent.
extension PassContext {
  /// outgoing [leaving, d] = the tokens of all rows that other workers compute.
  func packTokens() {
    let d = shape.model
    forEachLeavingRow { row, to in
      to.update(from: tokens + Int(store.routing.slots[row]) / shape.choices * d, count: d)
    }
  }

  /// outgoing [leaving, d] = s·dy of all rows that other workers compute, and ds = <dy, y> from the outputs they gave.
  func packGrads(_ gradOutput: UnsafePointer<Float>) {
    let d = shape.model
    forEachLeavingRow { row, to in
      let slot = Int(store.routing.slots[row])
      let grad = gradOutput + slot / shape.choices * d
      let result = store.rows + row * d
      let weight = Vector(repeating: store.routing.weights[slot])
      var sum = Vector.zero
      for column in stride(from: 0, to: d, by: 16) {
        let width = min(16, d - column)
        let dy = grad.vector(at: column, first: width)
        sum.addProduct(dy, result.vector(at: column, first: width))
        to.store(dy * weight, at: column, first: width)
      }
      store.gradWeights[slot] = sum.sum()
    }
  }

  /// Shares the rows for other workers' experts among the threads: each with its place in `outgoing`.
  @inline(__always)
  private func forEachLeavingRow(_ body: (_ row: Int, _ to: UnsafeMutablePointer<Float>) -> Void) {
    let piece = 64
    let all = store.routing.firstRow[shape.experts]
    let own = store.routing.firstRow[layer.owned.lowerBound]..<store.routing.firstRow[layer.owned.upperBound]
    while case let first = team.take() * piece, first < all - own.count {
      for place in first..<min(first + piece, all - own.count) {
        body(place < own.lowerBound ? place : place + own.count, inbox.outgoing + place * shape.model)
      }
    }
  }
}
