/// A matrix of activations in the order in which the tile kernels read it.
///
/// Rows stand in panels of 12 (the last one as high as the rows that are left), columns in blocks of 16. A block is
/// contiguous: panel height × 16 floats, row by row; a panel is its blocks from left to right. So a tile kernel walks
/// one panel front to back, whatever the width, and no power of two in a size can make rows fight for cache sets.
/// Columns behind `width` in the last block are 0 or finite leftovers; nobody may use them.
package struct Panels {
  package static let height = 12
  package static let lanes = 16
  /// How many panels hold `rows` rows.
  package static func count(_ rows: Int) -> Int { (rows + height - 1) / height }
  /// Columns in whole blocks: the floats that one row of `width` takes.
  package static func padded(_ width: Int) -> Int { (width + lanes - 1) / lanes * lanes }

  package let base: UnsafeMutablePointer<Float>
  package let width: Int
  package let blocks: Int

  package init(_ base: UnsafeMutablePointer<Float>, width: Int) {
    self.base = base
    self.width = width
    blocks = (width + Panels.lanes - 1) / Panels.lanes
  }

  /// The panel whose first row is `row`; rows before it must fill their panels.
  @inline(__always) package func panel(_ row: Int) -> UnsafeMutablePointer<Float> {
    base + row &* blocks &* Panels.lanes
  }

  /// The same matrix seen from `row` on, which must begin a panel.
  package func from(_ row: Int) -> Panels { Panels(panel(row), width: width) }

  /// Copies rows in: row i of `rows` is `width` floats at `source(i)`; the last block is filled up with zeros.
  @inline(__always)
  package func fill(rows: Int, from source: (Int) -> UnsafePointer<Float>) {
    let whole = width / Panels.lanes
    let rest = width % Panels.lanes
    for first in stride(from: 0, to: rows, by: Panels.height) {
      let high = min(Panels.height, rows - first)
      let step = high &* Panels.lanes
      for i in 0..<high {
        let row = source(first &+ i)
        var to = panel(first) + i &* Panels.lanes
        for block in 0..<whole {
          to.store(row.vector(at: block &* Panels.lanes))
          to += step
        }
        if rest > 0 { to.store(row.vector(at: whole &* Panels.lanes, first: rest)) }
      }
    }
  }

  /// Calls `body` for each panel among the first `rows`: its first row and its height.
  @inline(__always)
  package static func forEach(rows: Int, _ body: (_ first: Int, _ high: Int) -> Void) {
    var first = 0
    while first < rows {
      body(first, min(height, rows &- first))
      first &+= height
    }
  }
}

/// 32 columns of the right factor of a product, depth × 32 floats, packed just before they are used.
package enum Strip {
  package static let width = 32

  /// Columns `column..<column + 32` of a row-major `matrix` [depth, stride]; what lies behind `limit` becomes 0.
  static func columns(
    of matrix: UnsafePointer<Float>, stride: Int, depth: Int, from column: Int, limit: Int,
    into strip: UnsafeMutablePointer<Float>
  ) {
    let first = min(16, limit - column)
    let second = min(16, limit - column - 16)
    var from = matrix + column
    var to = strip
    if second == 16 {
      for _ in 0..<depth {
        to.store(from.vector())
        to.store(from.vector(at: 16), at: 16)
        from += stride
        to += 32
      }
    } else {
      for _ in 0..<depth {
        to.store(from.vector(at: 0, first: first))
        to.store(second > 0 ? from.vector(at: 16, first: second) : .zero, at: 16)
        from += stride
        to += 32
      }
    }
  }

  /// Rows `row..<row + 32` of a row-major `matrix` [limit, depth], transposed; what lies behind `limit` becomes 0.
  static func rows(
    of matrix: UnsafePointer<Float>, depth: Int, from row: Int, limit: Int, into strip: UnsafeMutablePointer<Float>
  ) {
    for half in 0..<2 {
      let first = row + half * 16
      let present = min(16, limit - first)
      let to = strip + half * 16
      if present == 16 {
        var k = 0
        while k + 16 <= depth {
          transpose(matrix + (first &* depth &+ k), stride: depth, into: to + (k &* 32))
          k &+= 16
        }
        while k < depth {
          for lane in 0..<16 { to[k &* 32 &+ lane] = matrix[(first &+ lane) &* depth &+ k] }
          k &+= 1
        }
      } else {
        for k in 0..<depth {
          for lane in 0..<16 { to[k &* 32 &+ lane] = lane < present ? matrix[(first &+ lane) &* depth &+ k] : 0 }
        }
      }
    }
  }

  /// A 16 × 16 block across its diagonal. Each round splits pairs of vectors into their even and odd lanes, which
  /// turns the 8 bits of (vector, lane) by one; after four rounds vector and lane have changed places.
  @inline(__always)
  private static func transpose(_ from: UnsafePointer<Float>, stride: Int, into to: UnsafeMutablePointer<Float>) {
    var v = InlineArray<16, Vector> { from.vector(at: $0 &* stride) }
    var w = InlineArray<16, Vector>(repeating: .zero)
    for _ in 0..<2 {
      for i in 0..<8 {
        let pair = SIMD32(lowHalf: v[unchecked: 2 &* i], highHalf: v[unchecked: 2 &* i &+ 1])
        w[unchecked: i] = pair.evenHalf
        w[unchecked: i &+ 8] = pair.oddHalf
      }
      for i in 0..<8 {
        let pair = SIMD32(lowHalf: w[unchecked: 2 &* i], highHalf: w[unchecked: 2 &* i &+ 1])
        v[unchecked: i] = pair.evenHalf
        v[unchecked: i &+ 8] = pair.oddHalf
      }
    }
    for i in 0..<16 { to.store(v[unchecked: i], at: i &* 32) }
  }
}
