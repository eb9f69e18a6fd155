import CHints

/// Products of few rows with a transposed weight matrix, which is read where it stands.
///
/// Packing pays when many rows share a strip. Below that it costs as much as the product, so here each weight goes from
/// memory straight into its multiplications. Sums are the same chains as those of `Tiles`, so the bits are too.
package enum FewRows {
  /// Weight rows that it takes at a time.
  package static let columns = 16
  /// Up to here weights are turned in registers; above, rows stand side by side and weights are broadcast.
  private static let mostTurnedInRegisters = 4

  /// The memory that is asked for while some rows of weights are read: what will be needed some time later.
  ///
  /// AMD's prefetchers go on with the order of memory, so it is asked for in that order, what is read next. Intel's go
  /// on in each row, but not into another page: there it is `linesAhead` in each of the rows under way, then in the next ones.
  struct Ahead {
    private static let linesAhead = 16
    private var next: UnsafePointer<Float>
    private let between: Int
    private let onward: Int
    private var left: Int
    private let jump: Int

    /// `rows` rows of `depth` weights are under way at `weights`; in the order of memory, what stands `later` is asked for.
    @inline(__always)
    init(_ weights: UnsafePointer<Float>, rows: Int, depth: Int, later: Int) {
      if Choices.isIntel {
        let ahead = min(Ahead.linesAhead, depth / 16)
        (next, between, onward) = (weights + ahead &* 16, depth, 16)
        (left, jump) = (depth / 16 &- ahead, (rows &- 1) &* depth &+ depth % 16)
      } else {
        (next, between, onward) = (weights + later, 16, rows &* 16)
        (left, jump) = (.max, 0)
      }
    }

    /// Asks for a line of each of the rows; said once more, since the loop unrolls only where their number is a constant.
    @inline(__always)
    mutating func ask(_ rows: Int) {
      if left == 0 { next += jump }
      left &-= 1
      for i in 0..<rows { hint_read_later(next + i &* between) }
      next += onward
    }
  }

  /// How many of `rows` rows, the last ones, meet turned weights: too few for registers of 16. Where half a register takes
  /// as long as a whole one, a second one that is mostly empty is faster than those are.
  private static func turned(_ rows: Int) -> Int {
    let last = rows % 16
    return last <= mostTurnedInRegisters && (rows < 16 || !Choices.isIntel) ? last : 0
  }

  /// Scratch floats for rows of `depth`.
  package static func scratch(depth: Int) -> Int { depth * Choices.mostRows + columns * 32 }

  /// From so many rows on, two registers of 16 are faster than one and a half.
  private static let fewestInTwo = Choices.isIntel ? 17 : 25

  /// How many rows stand side by side: whole registers of 16.
  private static func lanes(_ rows: Int) -> Int { (rows + 15) / 16 * 16 }

  /// Puts `rows` rows of `left` side by side in `scratch` for the products to come.
  package static func prepare(_ left: Panels, rows: Int, scratch: UnsafeMutablePointer<Float>) {
    let beside = rows - turned(rows)
    guard beside > 0 else { return }
    let lanes = lanes(beside)
    let sixteen = scratch + left.width * lanes
    for first in stride(from: 0, to: beside, by: 16) {
      let count = min(16, beside - first)
      sixteen.update(repeating: 0, count: 256)
      for block in 0..<left.blocks {
        for i in 0..<count { sixteen.store(left.block(block, row: first + i, of: rows).vector(), at: i * 16) }
        let turned = transposed(sixteen, stride: 16)
        for k in 0..<min(16, left.width - block * 16) {
          scratch.store(turned[k], at: (block * 16 + k) * lanes + first)
        }
      }
    }
  }

  /// tile [rows, 32 apart] = left [rows, depth] · weights [16, depth]ᵀ; `scratch` as `prepare` left it.
  ///
  /// Asks for weights that come later meanwhile.
  package static func product(
    _ left: Panels, rows: Int, weights: UnsafePointer<Float>, depth: Int, scratch: UnsafeMutablePointer<Float>,
    into tile: UnsafeMutablePointer<Float>
  ) {
    let turned = turned(rows)
    let first = rows - turned
    if first > 0 { broadcast(rows: first, weights, depth, scratch, tile) }
    // The last rows stand in one panel, `high` rows high, some rows down.
    let panel = first / Panels.height * Panels.height
    let high = min(Panels.height, rows - panel)
    let last = left.panel(panel) + (first - panel) * 16
    let to = tile + first * 32
    switch turned {
    case 0: break
    // The compiler makes single floats of a tile of one row: that row twice is faster.
    case 1: TurningTile<2>.run(last, 0, high * 16, weights, depth, to, 0)
    case 2: TurningTile<2>.run(last, 16, high * 16, weights, depth, to, 32)
    case 3: TurningTile<3>.run(last, 16, high * 16, weights, depth, to, 32)
    default: TurningTile<4>.run(last, 16, high * 16, weights, depth, to, 32)
    }
  }

  private static func broadcast(
    rows: Int, _ weights: UnsafePointer<Float>, _ depth: Int, _ side: UnsafeMutablePointer<Float>,
    _ tile: UnsafeMutablePointer<Float>
  ) {
    let lanes = lanes(rows)
    let sums = side + depth * Choices.mostRows
    var first = 0
    while first < rows {
      let taken: Int
      #if WIDE_VECTORS
        switch rows - first {
        case fewestInTwo...:
          taken = turn(BroadcastTile<Vector, 2, 8>.self, side + first, lanes, weights, depth, first == 0, sums)
        case 9...: taken = turn(BroadcastTile<Vector, 1, 8>.self, side + first, lanes, weights, depth, first == 0, sums)
        default: taken = turn(BroadcastTile<Eight, 1, 8>.self, side + first, lanes, weights, depth, first == 0, sums)
        }
      #else
        switch rows - first {
        case 17...: taken = turn(BroadcastTile<Eight, 3, 4>.self, side + first, lanes, weights, depth, first == 0, sums)
        case 9...: taken = turn(BroadcastTile<Eight, 2, 4>.self, side + first, lanes, weights, depth, first == 0, sums)
        default: taken = turn(BroadcastTile<Eight, 1, 8>.self, side + first, lanes, weights, depth, first == 0, sums)
        }
      #endif
      for part in stride(from: 0, to: min(taken, rows - first), by: 16) {
        let turned = transposed(sums + part, stride: 32)
        for i in 0..<min(16, rows - first - part, taken - part) {
          tile.store(turned[i], at: (first + part + i) * 32)
        }
      }
      first += taken
    }
  }

  /// All 16 weight rows, M at a time; how many rows that was.
  @inline(__always)
  private static func turn<V, let N: Int, let M: Int>(
    _: BroadcastTile<V, N, M>.Type, _ side: UnsafePointer<Float>, _ lanes: Int, _ weights: UnsafePointer<Float>,
    _ depth: Int, _ isFirst: Bool, _ sums: UnsafeMutablePointer<Float>
  ) -> Int {
    for column in stride(from: 0, to: columns, by: M) {
      BroadcastTile<V, N, M>.run(side, lanes, weights + column * depth, depth, isFirst, sums + column * 32)
    }
    return N * V.scalarCount
  }
}

// MARK: The other way round

extension FewRows {
  /// So many rows of the matrix at a time are walked from end to end: as many lines as the second cache holds of rows that
  /// are a power of two apart, twice, since the next ones are on their way. That of processors without AVX-512 is half as
  /// large. Intel's, which ask for three lines ahead, were as fast or faster with 64 as with 16 and 32.
  #if WIDE_VECTORS
    package static let depthAtOnce = 64
  #else
    package static let depthAtOnce = 32
  #endif

  /// tile [rows, `apart`] = sums [rows, 16] + left [rows, depth from..<from + count] · weights [count, 16], whose rows are
  /// `stride` apart. `tile` may be `sums`.
  @inline(__always)
  package static func add(
    _ left: Panels, rows: Int, from: Int, count: Int, weights: UnsafePointer<Float>, stride: Int,
    to sums: UnsafeMutablePointer<Float>, into tile: UnsafeMutablePointer<Float>, apart: Int
  ) {
    var first = 0
    while first < rows {
      let high = min(Panels.height, rows &- first)
      let one = left.panel(first) + from &* high
      #if WIDE_VECTORS
        let low = min(Panels.height, rows &- first &- high)
        let two = left.panel(first &+ high) + from &* low
        let sums = sums + first &* 16
        let tile = tile + first &* apart
        switch high &+ low {
        case 1: AddingTile<1, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 2: AddingTile<2, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 3: AddingTile<3, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 4: AddingTile<4, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 5: AddingTile<5, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 6: AddingTile<6, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 7: AddingTile<7, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 8: AddingTile<8, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 9: AddingTile<9, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 10: AddingTile<10, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 11: AddingTile<11, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 12: AddingTile<12, 0>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 13: AddingTile<12, 1>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 14: AddingTile<12, 2>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 15: AddingTile<12, 3>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 16: AddingTile<12, 4>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 17: AddingTile<12, 5>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 18: AddingTile<12, 6>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 19: AddingTile<12, 7>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 20: AddingTile<12, 8>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 21: AddingTile<12, 9>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 22: AddingTile<12, 10>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        case 23: AddingTile<12, 11>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        default: AddingTile<12, 12>.run(one, high, two, low, weights, stride, count, sums, tile, apart)
        }
        first &+= high &+ low
      #else
        for row in Swift.stride(from: 0, to: high, by: 6) {
          let a = one + row &* 16
          let from = sums + (first &+ row) &* 16
          let to = tile + (first &+ row) &* apart
          switch high &- row {
          case 1: AddingTile<1, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          case 2: AddingTile<2, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          case 3: AddingTile<3, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          case 4: AddingTile<4, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          case 5: AddingTile<5, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          default: AddingTile<6, 0>.run(a, high, a, 0, weights, stride, count, from, to, apart)
          }
        }
        first &+= high
      #endif
    }
  }
}

/// A rows of one panel and B of the next × 16 columns, added to from the rows of a matrix where they stand.
private enum AddingTile<let A: Int, let B: Int> {
  @inline(never)
  static func run(
    _ one: UnsafePointer<Float>, _ high: Int, _ two: UnsafePointer<Float>, _ low: Int, _ weights: UnsafePointer<Float>,
    _ stride: Int, _ count: Int, _ sums: UnsafePointer<Float>, _ tile: UnsafeMutablePointer<Float>, _ apart: Int
  ) {
    var sums0 = InlineArray<A, Vector> { sums.vector(at: $0 &* 16) }
    var sums1 = InlineArray<B, Vector> { sums.vector(at: (A &+ $0) &* 16) }
    var (a, b, w) = (one, two, weights)
    var left = count
    while left > 0 {
      for k in Swift.stride(from: 0, to: min(16, left) &- 3, by: 4) {
        for next in 0..<4 { add(a + (k &+ next), b + (k &+ next), w + next &* stride, &sums0, &sums1) }
        w += 4 &* stride
      }
      for k in min(16, left) / 4 &* 4..<min(16, left) {
        add(a + k, b + k, w, &sums0, &sums1)
        w += stride
      }
      a += high &* 16
      b += low &* 16
      left &-= 16
    }
    for i in 0..<A { tile.store(sums0[unchecked: i], at: i &* apart) }
    for i in 0..<B { tile.store(sums1[unchecked: i], at: (A &+ i) &* apart) }
  }

  /// One term of all sums: one of each row, times the matrix row at `weights`, whose next lines are asked for.
  @inline(__always)
  private static func add(
    _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ weights: UnsafePointer<Float>,
    _ sums0: inout InlineArray<A, Vector>, _ sums1: inout InlineArray<B, Vector>
  ) {
    let column = weights.vector()
    hint_read_later(weights + (Choices.isIntel ? 48 : 16))
    for i in 0..<A { sums0[unchecked: i].addProduct(Vector(repeating: a[i &* 16]), column) }
    for i in 0..<B { sums1[unchecked: i].addProduct(Vector(repeating: b[i &* 16]), column) }
  }
}

private typealias Eight = SIMD8<Float>

/// M weight rows × as many rows as N vectors have lanes; `sums` [M, 32].
///
/// Rows of weights are often a power of two apart and fight for one cache set, which holds 8 lines: so M is at most 8.
private enum BroadcastTile<V: SIMD & BitwiseCopyable, let N: Int, let M: Int> where V.Scalar == Float {
  @inline(never)
  static func run(
    _ side: UnsafePointer<Float>, _ lanes: Int, _ weights: UnsafePointer<Float>, _ depth: Int, _ isFirst: Bool,
    _ sums: UnsafeMutablePointer<Float>
  ) {
    var sums0 = InlineArray<M, V>(repeating: .zero)
    var sums1 = InlineArray<M, V>(repeating: .zero)
    var sums2 = InlineArray<M, V>(repeating: .zero)
    let width = V.scalarCount
    var x = side
    var w = weights
    // The next 16 rows, unless they have been asked for.
    var ahead = FewRows.Ahead(weights, rows: M, depth: depth, later: isFirst ? FewRows.columns &* depth : 0)
    var left = depth
    while left > 0 {
      ahead.ask(M)
      // Four at a time: addresses would take as many instructions as the products.
      for _ in 0..<min(16, left) / 4 {
        for k in 0..<4 { add(k, x + k &* lanes, w, depth, &sums0, &sums1, &sums2) }
        x += 4 &* lanes
        w += 4
      }
      for _ in 0..<min(16, left) % 4 {
        add(0, x, w, depth, &sums0, &sums1, &sums2)
        x += lanes
        w += 1
      }
      left &-= 16
    }
    for i in 0..<M {
      let to = UnsafeMutableRawPointer(sums + i &* 32)
      to.storeBytes(of: sums0[unchecked: i], as: V.self)
      if N > 1 { (to + width &* 4).storeBytes(of: sums1[unchecked: i], as: V.self) }
      if N > 2 { (to + width &* 8).storeBytes(of: sums2[unchecked: i], as: V.self) }
    }
  }

  /// One term of all sums: weight `k` from `weights` on of each row, times one of each of the rows side by side.
  @inline(__always)
  private static func add(
    _ k: Int, _ side: UnsafePointer<Float>, _ weights: UnsafePointer<Float>, _ depth: Int,
    _ sums0: inout InlineArray<M, V>, _ sums1: inout InlineArray<M, V>, _ sums2: inout InlineArray<M, V>
  ) {
    let width = V.scalarCount
    let x0 = UnsafeRawPointer(side).loadUnaligned(as: V.self)
    let x1 = N > 1 ? UnsafeRawPointer(side + width).loadUnaligned(as: V.self) : .zero
    let x2 = N > 2 ? UnsafeRawPointer(side + 2 &* width).loadUnaligned(as: V.self) : .zero
    for i in 0..<M {
      let weight = V(repeating: weights[i &* depth &+ k])
      sums0[unchecked: i].addProduct(weight, x0)
      if N > 1 { sums1[unchecked: i].addProduct(weight, x1) }
      if N > 2 { sums2[unchecked: i].addProduct(weight, x2) }
    }
  }
}

/// M rows × 16 weight rows, whose 16 × 16 blocks are turned on their way into the multiplications.
private enum TurningTile<let M: Int> {
  /// Rows are `apart` floats apart, their blocks of 16 columns `step`.
  @inline(never)
  static func run(
    _ rows: UnsafePointer<Float>, _ apart: Int, _ step: Int, _ weights: UnsafePointer<Float>, _ depth: Int,
    _ tile: UnsafeMutablePointer<Float>, _ tilesApart: Int
  ) {
    var chains = InlineArray<M, Vector>(repeating: .zero)
    var a = rows
    var k = 0
    var ahead = FewRows.Ahead(weights, rows: 16, depth: depth, later: 16 &* depth)
    while k &+ 16 <= depth {
      ahead.ask(16)
      let turned = transposed(weights + k, stride: depth)
      for column in 0..<16 {
        for i in 0..<M {
          chains[unchecked: i].addProduct(Vector(repeating: a[i &* apart &+ column]), turned[unchecked: column])
        }
      }
      a += step
      k &+= 16
    }
    for column in 0..<depth &- k {
      var weight = Vector.zero
      for lane in 0..<16 { weight[lane] = weights[lane &* depth &+ k &+ column] }
      for i in 0..<M { chains[unchecked: i].addProduct(Vector(repeating: a[i &* apart &+ column]), weight) }
    }
    for i in 0..<M { tile.store(chains[unchecked: i], at: i &* tilesApart) }
  }
}
