/// The gate of BASE layers (Lewis et al. 2021): in training, a worker's tokens are shared out among all experts so that
/// each gets as many, ⌈n/E⌉ at most, and the sum of scores is about as high as can be. In evaluation each token has its
/// highest score. Weights are logistic.
package struct BaseGate: Gate {
  package init() {}
  package var weighing: Weighing { .logistic }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int {
    var size = Arena()
    _ = Auction(arena: &size, jobs: tokens, experts: experts)
    return size.bytes / MemoryLayout<UInt64>.stride
  }

  package func settle(_ batch: GateBatch) -> Int {
    var moved = 0
    if batch.isTraining, batch.tokens > 0 {
      var arena = Arena(over: UnsafeMutableRawPointer(batch.scratch))
      let auction = Auction(arena: &arena, jobs: batch.tokens, experts: batch.experts)
      for token in stride(from: 0, to: batch.tokens, by: Auction.lanes) {
        for block in 0..<batch.scores.blocks {
          for row in 0..<min(Auction.lanes, batch.tokens - token) {
            auction.square.store(
              batch.scores.block(block, row: token + row, of: batch.tokens).vector(), at: row * Auction.lanes)
          }
          auction.setSquare(of: token, to: block * Auction.lanes)
        }
      }
      auction.run()
      for token in 0..<batch.tokens where batch.picks[token] != auction.holders[token] {
        batch.picks[token] = auction.holders[token]
        batch.weigh(token, by: weighing)
        moved += 1
      }
    }
    batch.count(into: batch.told(by: batch.rank))
    return moved
  }
}
