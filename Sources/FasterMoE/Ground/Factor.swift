import CHints

/// The right factor of a product, read from a row-major weight matrix as it is or transposed.
///
/// It is used strip by strip: 32 of its columns, packed as depth × 32 floats just before they meet all rows.
package struct Factor {
  /// Rows of the factor, which are summed over, and its columns.
  package let depth: Int
  package let columns: Int
  package var weights: Int { depth * columns }
  private let matrix: UnsafePointer<Float>
  private let isTransposed: Bool

  /// `matrix` [depth, columns] itself.
  package init(_ matrix: UnsafePointer<Float>, depth: Int, columns: Int) {
    (self.matrix, self.depth, self.columns, isTransposed) = (matrix, depth, columns, false)
  }

  /// `matrix` [columns, depth] transposed.
  package init(transposing matrix: UnsafePointer<Float>, depth: Int, columns: Int) {
    (self.matrix, self.depth, self.columns, isTransposed) = (matrix, depth, columns, true)
  }

  /// Packs `rows` of the 32 columns from `column` on; zeros stand for columns behind the last.
  package func pack(_ column: Int, _ rows: Range<Int>, into strip: UnsafeMutablePointer<Float>) {
    if isTransposed {
      Strip.rows(
        of: matrix + rows.lowerBound, stride: depth, depth: rows.count, from: column, limit: columns, into: strip)
    } else {
      Strip.columns(
        of: matrix + rows.lowerBound * columns, stride: columns, depth: rows.count, from: column, limit: columns,
        into: strip)
    }
  }

  /// Its first 16 columns from `column` on as rows of memory, where it is transposed and has that many.
  package func rowsInPlace(_ column: Int) -> UnsafePointer<Float>? {
    isTransposed && column + FewRows.columns <= columns ? matrix + column * depth : nil
  }

  /// The matrix itself, where it is not transposed and its columns fill whole vectors.
  package var matrixInPlace: UnsafePointer<Float>? { isTransposed || columns % 16 != 0 ? nil : matrix }

  /// Adds to `asks` share `share` of `shares` of the lines that packing `rows` of `column` will read.
  @inline(__always)
  package func list(_ column: Int, _ rows: Range<Int>, share: Int, of shares: Int, in asks: inout Asks) {
    let width = min(Strip.width, columns - column)
    guard width > 0 else { return }
    // Pieces of rows of the matrix, each of so many lines.
    let (pieces, length, stride) = isTransposed ? (width, rows.count, depth) : (rows.count, width, columns)
    let lines = (length &+ 15) / 16
    let first = isTransposed ? column &* depth &+ rows.lowerBound : rows.lowerBound &* columns &+ column
    let all = pieces &* lines
    var (piece, line) = (all &* share / shares).quotientAndRemainder(dividingBy: lines)
    for _ in all &* share / shares..<all &* (share &+ 1) / shares {
      asks.read(matrix + (first &+ piece &* stride &+ line &* 16))
      line &+= 1
      if line == lines { (piece, line) = (piece &+ 1, 0) }
    }
  }
}

/// How a strip is packed.
package enum Strip {
  package static let width = 32
  /// Most rows of a matrix that are packed at a time. With AVX2 a tile passes 128 bytes of a strip in 12 cycles, too fast for
  /// the second cache: half of the first holds as many.
  #if WIDE_VECTORS
    package static let depth = 1 << 40
  #else
    package static let depth = 128
  #endif

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

  /// Rows `row..<row + 32` of a row-major `matrix` [limit, stride], its first `depth` columns, transposed; what lies behind
  /// `limit` becomes 0.
  static func rows(
    of matrix: UnsafePointer<Float>, stride: Int, depth: Int, from row: Int, limit: Int,
    into strip: UnsafeMutablePointer<Float>
  ) {
    for half in 0..<2 {
      let first = row + half * 16
      let present = min(16, limit - first)
      let to = strip + half * 16
      if present == 16 {
        var k = 0
        while k + 16 <= depth {
          #if WIDE_VECTORS
            let block = transposed(matrix + (first &* stride &+ k), stride: stride)
            for i in 0..<16 { to.store(block[unchecked: i], at: (k &+ i) &* 32) }
          #else
            for lane in Swift.stride(from: 0, to: 16, by: 8) {
              let rows = matrix + ((first &+ lane) &* stride &+ k)
              hint_turn(rows, stride, to + (k &* 32 &+ lane), 32)
              hint_turn(rows + 8, stride, to + ((k &+ 8) &* 32 &+ lane), 32)
            }
          #endif
          k &+= 16
        }
        while k < depth {
          for lane in 0..<16 { to[k &* 32 &+ lane] = matrix[(first &+ lane) &* stride &+ k] }
          k &+= 1
        }
      } else {
        for k in 0..<depth {
          for lane in 0..<16 { to[k &* 32 &+ lane] = lane < present ? matrix[(first &+ lane) &* stride &+ k] : 0 }
        }
      }
    }
  }
}

/// A 16 × 16 block across its diagonal. Each round splits pairs of vectors into their even and odd lanes, which
/// turns the 8 bits of (vector, lane) by one; after four rounds vector and lane have changed places.
@inline(__always)
func transposed(_ from: UnsafePointer<Float>, stride: Int) -> InlineArray<16, Vector> {
  var v = InlineArray<16, Vector> { from.vector(at: $0 &* stride) }
  var w = v
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
  return v
}
