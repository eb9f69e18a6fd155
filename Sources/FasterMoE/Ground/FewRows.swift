import CHints

/// Products of few rows with a transposed weight matrix, which is read where it stands.
///
/// Packing pays when many rows share a strip. Below that it costs as much as the product, so here each weight goes from
/// memory straight into its multiplications. Sums are the same chains as those of `Tiles`, so the bits are too.
package enum FewRows {
  /// Most rows that `product` takes.
  package static let most = 16
  /// Weight rows that it takes at a time.
  package static let columns = 16
  /// Up to here weights are turned in registers; above, rows stand side by side and weights are broadcast.
  private static let mostTurnedInRegisters = 4

  /// Scratch floats for rows of `depth`.
  package static func scratch(depth: Int) -> Int { depth * 16 + 2 * 256 }

  /// Puts `rows` rows of `left` side by side in `scratch` for the products to come.
  package static func prepare(_ left: Panels, rows: Int, scratch: UnsafeMutablePointer<Float>) {
    guard rows > mostTurnedInRegisters else { return }
    for block in 0..<left.blocks {
      let depth = min(16, left.width - block * 16)
      Panels.forEach(rows: rows) { first, high in
        let from = left.panel(first) + block * high * 16
        for i in 0..<high {
          for k in 0..<depth { scratch[(block * 16 + k) * 16 + first + i] = from[i * 16 + k] }
        }
      }
      for row in rows..<16 {
        for k in 0..<depth { scratch[(block * 16 + k) * 16 + row] = 0 }
      }
    }
  }

  /// tile [rows, 32 apart] = left [rows, depth] · weights [16, depth]ᵀ; `scratch` as `prepare` left it.
  ///
  /// Asks for the next 16 rows of weights meanwhile.
  package static func product(
    _ left: Panels, rows: Int, weights: UnsafePointer<Float>, depth: Int, scratch: UnsafeMutablePointer<Float>,
    into tile: UnsafeMutablePointer<Float>
  ) {
    switch rows {
    case 1: TurningTile<1>.run(left, weights, depth, tile)
    case 2: TurningTile<2>.run(left, weights, depth, tile)
    case 3: TurningTile<3>.run(left, weights, depth, tile)
    case 4: TurningTile<4>.run(left, weights, depth, tile)
    default: broadcast(rows: rows, weights, depth, scratch, tile)
    }
  }

  private static func broadcast(
    rows: Int, _ weights: UnsafePointer<Float>, _ depth: Int, _ side: UnsafeMutablePointer<Float>,
    _ tile: UnsafeMutablePointer<Float>
  ) {
    let block = side + depth * 16
    let sums = block + 256
    #if WIDE_VECTORS
      if rows > 8 {
        BroadcastTile<Vector, 16>.run(side, weights, depth, block, sums)
      } else {
        BroadcastTile<SIMD8<Float>, 16>.run(side, weights, depth, block, sums)
      }
    #else
      for lanes in stride(from: 0, to: rows, by: 8) {
        BroadcastTile<SIMD8<Float>, 8>.run(side + lanes, weights, depth, block, sums + lanes)
        BroadcastTile<SIMD8<Float>, 8>.run(side + lanes, weights + 8 * depth, depth, block, sums + (lanes + 8 * 16))
      }
    #endif
    for row in 0..<rows {
      for column in 0..<16 { tile[row * 32 + column] = sums[column * 16 + row] }
    }
  }
}

/// M weight rows × as many rows as V has lanes; `sums` [M, 16], `block` [M, 16] is scratch.
private enum BroadcastTile<V: SIMD & BitwiseCopyable, let M: Int> where V.Scalar == Float {
  @inline(never)
  static func run(
    _ side: UnsafePointer<Float>, _ weights: UnsafePointer<Float>, _ depth: Int, _ block: UnsafeMutablePointer<Float>,
    _ sums: UnsafeMutablePointer<Float>
  ) {
    var chains = InlineArray<M, V>(repeating: .zero)
    var first = 0
    while first < depth {
      // Rows of weights are often a power of two apart and would fight for one cache set: 16 columns move together.
      let count = min(16, depth &- first)
      for i in 0..<M {
        let row = weights + (i &* depth &+ first)
        hint_read_later(row + (16 &* depth))
        block.store(row.vector(at: 0, first: count), at: i &* 16)
      }
      var x = UnsafeRawPointer(side + (first &* 16))
      for k in 0..<count {
        let column = x.loadUnaligned(as: V.self)
        for i in 0..<M { chains[unchecked: i].addProduct(V(repeating: block[i &* 16 &+ k]), column) }
        x += 64
      }
      first &+= 16
    }
    for i in 0..<M {
      UnsafeMutableRawPointer(sums + (i &* 16)).storeBytes(of: chains[unchecked: i], as: V.self)
    }
  }
}

/// M rows × 16 weight rows, whose 16 × 16 blocks are turned on their way into the multiplications.
private enum TurningTile<let M: Int> {
  @inline(never)
  static func run(
    _ left: Panels, _ weights: UnsafePointer<Float>, _ depth: Int, _ tile: UnsafeMutablePointer<Float>
  ) {
    var chains = InlineArray<M, Vector>(repeating: .zero)
    let rows = left.panel(0)
    var k = 0
    while k &+ 16 <= depth {
      for i in 0..<16 { hint_read_later(weights + ((i &+ 16) &* depth &+ k)) }
      let turned = transposed(weights + k, stride: depth)
      let a = rows + k &* M
      for step in 0..<16 {
        for i in 0..<M {
          chains[unchecked: i].addProduct(Vector(repeating: a[i &* 16 &+ step]), turned[unchecked: step])
        }
      }
      k &+= 16
    }
    let a = rows + k &* M
    for step in 0..<depth &- k {
      var column = Vector.zero
      for lane in 0..<16 { column[lane] = weights[lane &* depth &+ k &+ step] }
      for i in 0..<M { chains[unchecked: i].addProduct(Vector(repeating: a[i &* 16 &+ step]), column) }
    }
    for i in 0..<M { tile.store(chains[unchecked: i], at: i &* 32) }
  }
}
