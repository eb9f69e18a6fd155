/// A matrix of activations in the order in which the tile kernels read it.
///
/// Rows stand in panels of 12, an even number (the last one as high as the rows that are left), columns in blocks of
/// 16. A block is contiguous: panel height × 16 floats, row by row; a panel is its blocks from left to right. So a tile
/// kernel walks one panel front to back, whatever the width, and no power of two in a size can make rows fight for
/// cache sets. Columns behind `width` in the last block are 0 or finite leftovers; nobody may use them.
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

  /// 16 columns of one of `rows` rows: block `index`.
  @inline(__always) package func block(_ index: Int, row: Int, of rows: Int) -> UnsafeMutablePointer<Float> {
    let first = row / Panels.height &* Panels.height
    return panel(first) + (index &* min(Panels.height, rows &- first) &+ row &- first) &* Panels.lanes
  }

  /// The same matrix seen from `row` on, which must begin a panel.
  package func from(_ row: Int) -> Panels { Panels(panel(row), width: width) }

  /// Copies rows in: row i of `rows` is `width` floats at `source(i)`; the last block is filled up with zeros.
  @inline(__always)
  package func fill(rows: Int, from source: (Int) -> UnsafePointer<Float>) {
    let whole = width / Panels.lanes
    let rest = width % Panels.lanes
    // Rows may come from anywhere, where no processor foresees them: asked for 96 lines before they are needed, or two rows.
    let ahead = max(2, 96 / blocks)
    for first in stride(from: 0, to: rows, by: Panels.height) {
      let high = min(Panels.height, rows - first)
      let step = high &* Panels.lanes
      for i in 0..<high {
        let row = source(first &+ i)
        let later = source(min(first &+ i &+ ahead, rows &- 1))
        var to = panel(first) + i &* Panels.lanes
        for block in 0..<whole {
          Prefetch.read(later + (block &* Panels.lanes))
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
