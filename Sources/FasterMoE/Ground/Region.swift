import Glibc

/// One aligned stretch of memory, all zeros when new, given back when its owner goes.
///
/// Large regions ask for huge pages: touching fresh memory 4 KiB at a time costs more than most kernels that use it.
package struct Region: ~Copyable {
  package let base: UnsafeMutableRawPointer
  package let bytes: Int
  private let mapping: (start: UnsafeMutableRawPointer, bytes: Int)?

  /// Fails with `.memory`, naming `what` it was for, when the system has no more.
  package init(bytes wanted: Int, for what: StaticString) throws(Failure) {
    bytes = max(wanted, 1)
    if bytes < hugePage {
      var fresh: UnsafeMutableRawPointer?
      guard posix_memalign(&fresh, cacheLine, bytes) == 0, let fresh else { throw Region.exhausted(bytes, what) }
      memset(fresh, 0, bytes)
      base = fresh
      mapping = nil
    } else {
      let mapped = bytes + hugePage
      guard let start = mmap(nil, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
        start != MAP_FAILED
      else { throw Region.exhausted(bytes, what) }
      let aligned = UnsafeMutableRawPointer(
        bitPattern: (UInt(bitPattern: start) + UInt(hugePage) - 1) & ~(UInt(hugePage) - 1))!
      madvise(aligned, bytes, MADV_HUGEPAGE)
      base = aligned
      mapping = (start, mapped)
    }
  }

  /// Never gives the memory back: something that cannot be stopped may still write to it.
  package consuming func abandon() { discard self }

  deinit {
    if let mapping { munmap(mapping.start, mapping.bytes) } else { free(base) }
  }

  private static func exhausted(_ bytes: Int, _ what: StaticString) -> Failure {
    Failure(.memory, "cannot allocate \(bytes) bytes for \(what)")
  }
}

/// Hands out aligned arrays one after another: first to count the bytes, then, over a region, for real.
package struct Arena {
  private let base: UnsafeMutableRawPointer?
  package private(set) var bytes = 0

  /// Without a base it only counts.
  package init(over base: UnsafeMutableRawPointer? = nil) { self.base = base }

  /// Room for `count` elements on a cache line of their own; not to be touched while only counting.
  package mutating func take<T: ~Copyable>(_ count: Int) -> UnsafeMutablePointer<T> {
    let start = bytes
    bytes += (count * MemoryLayout<T>.stride + cacheLine - 1) & ~(cacheLine - 1)
    return (base ?? UnsafeMutableRawPointer(bitPattern: cacheLine)!).advanced(by: base == nil ? 0 : start)
      .assumingMemoryBound(to: T.self)
  }
}

private let cacheLine = 64
private let hugePage = 2 << 20
