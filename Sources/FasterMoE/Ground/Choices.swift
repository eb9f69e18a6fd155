import CHints

/// Which kernels are fastest, by rows, sizes and threads, as measured: `make choices` writes the tables.
///
/// All that stand here make the same bits, so a choice may look at anything. `Dots` is not among them.
package enum Choices {
  /// Most rows that a table speaks of; for more, the matrix is packed.
  package static let mostRows = 128
  /// Intel's processors and AMD's have tables of their own. Kernels ask in their loops, and this is one load; a stored
  /// constant would be looked after by the runtime.
  package static var isIntel: Bool { hint_is_intel() != 0 }

  /// What was found with matrices of `weights` floats on some threads. Bit r - 1 is for r rows.
  struct Entry: BitwiseCopyable {
    let weights: Int
    let threads: Int
    /// Whether to read a matrix where it stands, one that is read row by row and one whose rows are added up.
    let transposed: UInt128
    let straight: UInt128
    /// Whether sums over rows walk a gradient along its rows.
    let outer: UInt128
  }

  /// How to multiply rows with a transposed matrix.
  package static func transposed(rows: Int, _ factor: Factor, threads: Int) -> Product.Kernel {
    rows <= mostRows && has(nearest(factor.weights, threads).transposed, rows) ? .inPlace : .strips
  }

  /// How to multiply rows with a matrix as it stands.
  package static func straight(rows: Int, _ factor: Factor, threads: Int) -> Product.Kernel {
    rows <= mostRows && has(nearest(factor.weights, threads).straight, rows) ? .inPlace : .strips
  }

  /// Whether sums over rows walk a gradient of `weights` floats along its rows, not down its columns.
  package static func outerByRows(rows: Int, weights: Int, threads: Int) -> Bool {
    rows <= mostRows && has(nearest(weights, threads).outer, rows)
  }

  private static func has(_ mask: UInt128, _ rows: Int) -> Bool { mask >> UInt128(rows - 1) & 1 == 1 }

  /// The nearest size by ratio, among those on one thread or those on several.
  private static func nearest(_ weights: Int, _ threads: Int) -> Entry {
    func distance(_ entry: Entry) -> Double {
      let ratio = Double(max(weights, entry.weights)) / Double(min(weights, entry.weights))
      // A machine of one core has measured no others.
      return (entry.threads > 1) == (threads > 1) ? ratio : ratio * 1e12
    }
    func entry(_ index: Int) -> Entry { isIntel ? intel[index] : amd[index] }
    var best = entry(0)
    for index in amd.indices where distance(entry(index)) < distance(best) { best = entry(index) }
    return best
  }
}
