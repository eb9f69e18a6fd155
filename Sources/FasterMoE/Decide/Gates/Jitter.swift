/// What a gate reads of tokens in training, jittered (Switch Transformer §2.4): each element times a number of its own,
/// uniform in [1 - bound, 1 + bound).
package struct Jitter {
  private let random: RandomStream
  private let bound: Float
  private let padded: Int

  /// For tokens of width d.
  package init(_ random: RandomStream, bound: Float, width: Int) {
    (self.random, self.bound) = (random, bound)
    padded = Panels.padded(width)
  }

  /// The 16 factors of a token's columns from `column` on, which 16 divides; `token` is its place among all workers'.
  /// Each draw gives two.
  @inline(__always) package func factors(_ token: Int, _ column: Int) -> Vector {
    random.uniforms((token * padded + column) / 2, bound: bound) + 1
  }

  /// Jitters `rows` tokens from `token` on, whose columns from `column` on are in `panels`.
  package func apply(to panels: Panels, rows: Int, token: Int, column: Int = 0) {
    for row in 0..<rows {
      for index in 0..<panels.blocks {
        let block = panels.block(index, row: row, of: rows)
        block.store(block.vector() * factors(token + row, column + index * Panels.lanes))
      }
    }
  }
}
