import Glibc
import Synchronization

/// Small blocks kept for the moment when the system has no more.
///
/// Swift's runtime ends a process that gets no memory for a few bytes. So what it asks for in vain comes from here, the call
/// that needed it goes on, and the next one that cannot fill the reserve again is refused in words. Every block is one of the
/// system's, which anybody may free. It asks by `aligned_alloc`, which the library is not linked to call through the reserve.
package enum Reserve {
  private struct Shelf: ~Copyable {
    let size: Int
    let most: Int
    /// A chain: each block begins with the address of the next.
    let held = Mutex<(first: UInt, count: Int)>((0, 0))

    func take() -> UnsafeMutableRawPointer? {
      let block = held.withLock { held in
        let first = held.first
        if let block = UnsafeMutableRawPointer(bitPattern: first) { held = (block.load(as: UInt.self), held.count - 1) }
        return first
      }
      return UnsafeMutableRawPointer(bitPattern: block)
    }

    func fill() -> Bool {
      held.withLock { held in
        while held.count < most {
          guard let block = aligned_alloc(Reserve.alignment, size) else { return false }
          block.storeBytes(of: held.first, as: UInt.self)
          held = (UInt(bitPattern: block), held.count + 1)
        }
        return true
      }
    }
  }

  /// What all blocks are aligned to.
  package static let alignment = 64
  private static let small = Shelf(size: 256, most: 2048)
  private static let middle = Shelf(size: 8 << 10, most: 64)
  private static let large = Shelf(size: 256 << 10, most: 8)
  /// Whether some block may be missing.
  private static let isOpen = Atomic(true)

  /// At least `size` bytes in place of a block that the system refused.
  package static func take(_ size: Int) -> UnsafeMutableRawPointer? {
    isOpen.store(true, ordering: .relaxed)
    return (size <= small.size ? small.take() : nil) ?? (size <= middle.size ? middle.take() : nil)
      ?? (size <= large.size ? large.take() : nil)
  }

  /// Asks the system for what is missing; fails with `.memory` if it has no more.
  package static func fill() throws(Failure) {
    guard isOpen.load(ordering: .relaxed) else { return }
    isOpen.store(false, ordering: .relaxed)
    guard small.fill(), middle.fill(), large.fill() else {
      isOpen.store(true, ordering: .relaxed)
      throw Failure(.memory, "the system has no memory left, not even for small blocks")
    }
  }

  /// Lets the allocator hold `bytes` for what takes no refusal, `job`: the system is asked for them now. Returns a block to
  /// free after the job is done: it keeps the allocator from giving the rest back to the system.
  package static func room(_ bytes: Int, for job: String) throws(Failure) -> UnsafeMutableRawPointer {
    let blockBytes = 96 << 10  // less than the system maps one by one
    var blocks: [UnsafeMutableRawPointer] = []
    defer { blocks.forEach { free($0) } }
    for _ in 0...bytes / blockBytes {
      guard let block = aligned_alloc(alignment, blockBytes) else {
        throw Failure(.memory, "cannot allocate \(bytes) bytes for \(job)")
      }
      blocks.append(block)
    }
    return blocks.removeLast()
  }
}
