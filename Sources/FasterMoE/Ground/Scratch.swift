/// Memory for tables that are made and dropped by the thousand, of types that need no cleaning up: one after the other,
/// and all that was taken since a mark is given back at once. It goes with the last who holds it.
package final class Scratch {
  /// How much is taken.
  package struct Mark {
    fileprivate let chunk, room: Int
  }

  private var chunks: [UnsafeMutableRawBufferPointer] = []
  /// The chunk in use, and where it goes on; what it still has room for.
  @exclusivity(unchecked) private var chunk = -1
  @exclusivity(unchecked) private var next = UnsafeMutableRawPointer(bitPattern: alignment)!
  @exclusivity(unchecked) private var room = 0
  private static let alignment = 64
  /// Small ones that the reserve has, too; they double up to its largest.
  private static let (leastChunk, doublings) = (8 << 10, 5)

  package init() {}

  deinit { chunks.forEach { $0.deallocate() } }

  package var mark: Mark { Mark(chunk: chunk, room: room) }

  /// What was taken after `mark` is free again; nobody may use it any more.
  package func release(to mark: Mark) {
    if chunk >= 0 { open(max(mark.chunk, 0), room: mark.chunk < 0 ? nil : mark.room) }
  }

  /// Room for `count` values, on cache lines of its own.
  @inline(__always)
  package func take<T>(_ count: Int) -> UnsafeMutableBufferPointer<T> {
    assert(_isPOD(T.self) && count >= 0)
    let bytes = (count * MemoryLayout<T>.stride + Scratch.alignment - 1) & ~(Scratch.alignment - 1)
    if bytes > room { makeRoom(bytes) }
    let memory = next.bindMemory(to: T.self, capacity: count)
    next += bytes
    room -= bytes
    return UnsafeMutableBufferPointer(start: memory, count: count)
  }

  /// The same, filled with `value`.
  @inline(__always)
  package func take<T>(_ count: Int, of value: T) -> UnsafeMutableBufferPointer<T> {
    let values: UnsafeMutableBufferPointer<T> = take(count)
    for index in 0..<count { values[index] = value }
    return values
  }

  /// A copy of `values`.
  package func copy<T>(_ values: some Collection<T>) -> UnsafeMutableBufferPointer<T> {
    let copy: UnsafeMutableBufferPointer<T> = take(values.count)
    _ = copy.initialize(from: values)
    return copy
  }

  /// Goes on in another chunk, a new one if none of those that are left is large enough.
  private func makeRoom(_ bytes: Int) {
    for other in chunk + 1..<max(chunk + 1, chunks.count) where chunks[other].count >= bytes { return open(other) }
    let size = max(bytes, Scratch.leastChunk << min(chunks.count, Scratch.doublings))
    chunks.append(.allocate(byteCount: size, alignment: Scratch.alignment))
    open(chunks.count - 1)
  }

  private func open(_ chunk: Int, room: Int? = nil) {
    self.chunk = chunk
    self.room = room ?? chunks[chunk].count
    next = chunks[chunk].baseAddress! + (chunks[chunk].count - self.room)
  }
}
