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
      store.gradWeights[slot] = sum.total
    }
  }

  /// Shares the rows for other workers' experts among the threads: each with its place in `outgoing`.
  @inline(__always)
  private func forEachLeavingRow(_ body: (_ row: Int, _ to: UnsafeMutablePointer<Float>) -> Void) {
    let piece = 64
    // Sorted rows are those that move or stay, by expert, then those of shadowed experts.
    var (all, before) = (0, 0)
    for expert in 0..<shape.experts where !store.moves.shadowed[expert] {
      all += Int(store.routing.counts[expert])
      if expert < layer.owned.lowerBound { before += Int(store.routing.counts[expert]) }
    }
    let staying = layer.owned.reduce(0) { $0 + (store.moves.shadowed[$1] ? 0 : Int(store.routing.counts[$1])) }
    let own = before..<before + staying
    while case let first = team.take() * piece, first < all - own.count {
      for place in first..<min(first + piece, all - own.count) {
        body(place < own.lowerBound ? place : place + own.count, inbox.outgoing + place * shape.model)
      }
    }
  }

  // MARK: Copies of experts

  /// Puts the parameters of this worker's shadowed experts side by side, as they travel.
  func packCopies(_ shadows: [Int]) {
    while case let index = team.take(), index < shadows.count {
      let expert = shadows[index] - layer.owned.lowerBound
      guard layer.owned.contains(shadows[index]) else { continue }
      let copy = ExpertTensors(copy: inbox.copyValues + index * inbox.copyFloats, shape)
      copy.forEach(with: ExpertTensors(layer.values, expert, shape), shape) { to, from, count in
        to.update(from: from, count: count)
      }
    }
  }

  /// Zeroes the gradients that this worker will add to copies and, where gradients are written, those of its experts that
  /// have no rows.
  func clearGrads(_ shadows: [Int]) {
    while case let task = team.take(), task < shadows.count + layer.owned.count {
      let expert = task - shadows.count
      if expert < 0 {
        (inbox.copyGrads + task * inbox.copyFloats).update(repeating: 0, count: inbox.copyFloats)
      } else if writesGradients, inbox.latest[expert] < 0 {
        let tensors = ExpertTensors(layer.gradients, expert, shape)
        tensors.forEach(with: tensors, shape) { tensor, _, count in tensor.update(repeating: 0, count: count) }
      }
    }
  }

  /// Adds to the gradients of this worker's shadowed experts what the others made: `sums` of all of them, or each one's in
  /// the order of ranks.
  func addCopyGrads(_ shadows: [Int], from others: [UnsafeMutablePointer<Float>]) {
    while case let index = team.take(), index < shadows.count {
      guard layer.owned.contains(shadows[index]) else { continue }
      let own = ExpertTensors(layer.gradients, shadows[index] - layer.owned.lowerBound, shape)
      for other in others {
        own.forEach(with: ExpertTensors(copy: other + index * inbox.copyFloats, shape), shape) { to, from, count in
          add(from, to: to, count: count)
        }
      }
    }
  }
}
