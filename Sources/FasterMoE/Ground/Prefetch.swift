import CHints

/// Asks for memory that a later step will touch, so that it is near by then; the processor may ignore it.
package enum Prefetch {
  /// The cache line of one address.
  @inline(__always) static func read(_ address: UnsafePointer<Float>) { hint_read_later(address) }

  /// A piece of `columns` floats in each of some `rows` of a row-major matrix.
  @inline(__always)
  static func read(_ matrix: UnsafePointer<Float>, stride: Int, rows: Range<Int>, columns: Int) {
    for row in rows {
      var at = UnsafeRawPointer(matrix + row &* stride)
      let end = at + (columns &* 4)
      while at < end {
        hint_read_later(at)
        at += 64
      }
    }
  }

  @inline(__always)
  static func write(_ matrix: UnsafeMutablePointer<Float>, stride: Int, rows: Int, columns: Int) {
    for row in 0..<rows {
      var at = UnsafeRawPointer(matrix + row &* stride)
      let end = at + (columns &* 4)
      while at < end {
        hint_write_soon(at)
        at += 64
      }
    }
  }
}

/// Lines of memory that a tile asks for while it computes, a few at a time: a core that asks for more than it has buffers for,
/// 16 on Intel's, waits until the first ones have come.
package struct Asks {
  /// A tile's own places, 12 rows of two lines in three matrices at most, and what is usually its share of a strip.
  static let most = 384, mostWrites = 72
  private let lines: UnsafeMutablePointer<UnsafeRawPointer>
  private var count = 0
  /// Of the lines, those to be read, which are the first ones: they are needed last, but come from farther.
  private var reads = 0

  /// None yet; `memory` has room for `most`.
  init(in memory: UnsafeMutablePointer<UnsafeRawPointer>) { lines = memory }

  /// The line at `address` will be read, some time later; said before any that will be written. More than there is room for
  /// are asked for at once.
  @inline(__always)
  package mutating func read(_ address: UnsafeRawPointer) {
    assert(count == reads)
    guard count < Asks.most &- Asks.mostWrites else { return hint_read_later(address) }
    lines[count] = address
    count &+= 1
    reads = count
  }

  /// The line at `address` will be written.
  @inline(__always)
  package mutating func write(_ address: UnsafeRawPointer) {
    assert(count - reads < Asks.mostWrites)
    lines[count] = address
    count &+= 1
  }

  /// Asks for all of them.
  @inline(__always)
  func askAtOnce() {
    var pending = inSteps(1)
    pending.ask()
  }

  /// Share `share` of `shares` of them, to be asked for in so many steps, of which the last quarter asks for none: that is
  /// when the last ones come.
  @inline(__always)
  func inSteps(_ steps: Int, share: Int = 0, of shares: Int = 1) -> Pending {
    let (first, end) = (count &* share / shares, count &* (share &+ 1) / shares)
    let asking = steps &- steps / 4
    return Pending(
      next: lines + first, end: lines + end, writes: lines + reads, atOnce: (end &- first &+ asking &- 1) / asking)
  }

  /// Lines that a tile has still to ask for.
  struct Pending {
    fileprivate var next: UnsafeMutablePointer<UnsafeRawPointer>
    fileprivate let end, writes: UnsafeMutablePointer<UnsafeRawPointer>
    fileprivate let atOnce: Int

    /// In one step.
    @inline(__always)
    mutating func ask() {
      let until = min(next + atOnce, end)
      while next < until {
        if next < writes { hint_read_later(next.pointee) } else { hint_write_soon(next.pointee) }
        next += 1
      }
    }
  }
}
