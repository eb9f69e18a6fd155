import CHints

/// The k highest logits of a token, with which every gate begins. Ties go to the lower expert; NaN ranks lowest.
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
      let best = high.highest
      // When all that is left is -∞ (or was NaN), the marks of earlier choices look the same: take the lowest ones free.
      guard best > -.infinity else {
        var next = choice
        for expert in 0..<experts where next < k && !(0..<choice).contains(where: { choices[$0] == Int32(expert) }) {
          choices[next] = Int32(expert)
          next += 1
        }
        return
      }
      var (block, marks) = (0, hint_equal(logits.vector(), Vector(repeating: best)))
      while marks == 0 {
        block += 16
        marks = hint_equal(logits.vector(at: block), Vector(repeating: best))
      }
      let expert = block + marks.trailingZeroBitCount
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
    let highest = high.highest
    var sum = Vector.zero
    for block in stride(from: 0, to: padded, by: 16) {
      let x = logits.vector(at: block)
      // -∞ - highest would come out as e^-87, not 0.
      let e = exponential(x - highest).replacing(with: 0, where: x .== -.infinity)
      p.store(e, at: block)
      sum += e
    }
    let total = sum.total
    let scale = 1 / total
    for block in stride(from: 0, to: padded, by: 16) { p.store(p.vector(at: block) * scale, at: block) }
    return highest + naturalLogarithm(total)
  }
}
