import Glibc

/// Ranks that are joined by a transport: everything they do together is made of its messages.
package final class WirePeers: Peers {
  package let rank: Int
  package let size: Int
  package var shareMemory: Bool { false }
  package let wire: Wire
  /// Ranks by host and place, so that a chain along them enters each host once.
  package var chain: [Int]
  private var scratch: Region?

  package init(_ transport: any Transport, timeout: Seconds?) {
    rank = transport.rank
    size = transport.size
    wire = Wire(transport, timeout: timeout)
    chain = Array(0..<size)
  }

  deinit {
    if wire.isEntangled { scratch.take()?.abandon() }
  }

  /// The other ranks, beginning at the next one: so no two ranks begin with the same peer.
  @inline(__always)
  package func forEachOther(_ body: (Int) -> Void) {
    for step in 1..<max(1, size) { body((rank + step) % size) }
  }

  /// Everybody to everybody: one latency, and no byte crosses twice.
  package func gather(
    _ own: UnsafeRawPointer, bytes: Int, into all: UnsafeMutableRawPointer, from entrance: Entrance
  ) throws(Failure) {
    let space = try space(size * bytes)
    memcpy(space + rank * bytes, own, bytes)
    if bytes > 0 {
      forEachOther { peer in
        wire.receive(space + peer * bytes, bytes, from: peer)
        wire.send(space + rank * bytes, bytes, to: peer)
      }
    }
    try wire.run()
    memcpy(all, space, size * bytes)
  }

  package func meet() throws(Failure) {
    let space = try space(size)
    forEachOther { peer in
      wire.receive(space + peer, 1, from: peer)
      wire.send(space + rank, 1, to: peer)
    }
    try wire.run()
  }

  /// Small sums in one latency: everybody adds up everything. Large ones with as few bytes as can be: everybody adds
  /// up one slice, 2·(W-1)/W of the volume in all.
  package func sum(_ values: UnsafeMutablePointer<Float>, count: Int) throws(Failure) {
    guard size > 1, count > 0 else { return }
    if count * 4 <= WirePeers.small {
      let all = try space(size * count * 4).assumingMemoryBound(to: Float.self)
      try gatherInPlace(values, count, all)
      values.update(from: all, count: count)
      for peer in 1..<size { add(all + peer * count, to: values, count: count) }
      return
    }
    // [count] the sums, then [W, slice] what the others have of this rank's slice.
    let longest = (count + size - 1) / size
    let sums = try space((count + size * longest) * 4).assumingMemoryBound(to: Float.self)
    let parts = sums + count
    func slice(_ peer: Int) -> Range<Int> { count * peer / size..<count * (peer + 1) / size }
    let mine = slice(rank)
    sums.update(from: values, count: count)
    forEachOther { peer in
      if !mine.isEmpty { wire.receive(parts + peer * longest, mine.count * 4, from: peer) }
      if !slice(peer).isEmpty { wire.send(sums + slice(peer).lowerBound, slice(peer).count * 4, to: peer) }
    }
    try wire.run()
    (parts + rank * longest).update(from: sums + mine.lowerBound, count: mine.count)
    for peer in 1..<size { add(parts + peer * longest, to: parts, count: mine.count) }
    (sums + mine.lowerBound).update(from: parts, count: mine.count)
    forEachOther { peer in
      if !slice(peer).isEmpty { wire.receive(sums + slice(peer).lowerBound, slice(peer).count * 4, from: peer) }
      if !mine.isEmpty { wire.send(sums + mine.lowerBound, mine.count * 4, to: peer) }
    }
    try wire.run()
    values.update(from: sums, count: count)
  }

  /// Gives all ranks `count` values of rank `root`, piece after piece along the chain: each link carries them once.
  package func broadcast(_ values: UnsafeMutablePointer<Float>, count: Int, from root: Int) throws(Failure) {
    guard size > 1, count > 0 else { return }
    let space = try space(count * 4).assumingMemoryBound(to: Float.self)
    let (before, after) = neighbours
    if rank == root { space.update(from: values, count: count) }
    let source = rank == root ? -1 : wire.receive(space, count * 4, from: before)
    if after != root { wire.send(space, count * 4, to: after, following: source) }
    try wire.run()
    if rank != root { values.update(from: space, count: count) }
  }

  /// Adds all ranks' `values` into those of rank `root`, in the order of the chain that begins behind it.
  package func reduce(_ values: UnsafeMutablePointer<Float>, count: Int, to root: Int) throws(Failure) {
    guard size > 1, count > 0 else { return }
    let space = try space(count * 4).assumingMemoryBound(to: Float.self)
    let (before, after) = neighbours
    if before == root {
      space.update(from: values, count: count)
      wire.send(space, count * 4, to: after)
    } else {
      let source = wire.receive(space, count * 4, from: before, tag: 0)
      if rank != root { wire.send(space, count * 4, to: after, following: source) }
    }
    try wire.run(Adding(values, to: space))
    if rank == root { values.update(from: space, count: count) }
  }

  /// Tells all ranks the `bytes` bytes of rank `root`. What is told between them is a sign of life of the root.
  package func tell(_ words: UnsafeMutableRawPointer, bytes: Int, from root: Int) throws(Failure) {
    guard size > 1 else { return }
    let space = try space(bytes)
    if rank == root {
      memcpy(space, words, bytes)
      forEachOther { wire.send(space, bytes, to: $0) }
    } else {
      wire.receive(space, bytes, from: root)
    }
    try wire.run()
    if rank != root { memcpy(words, space, bytes) }
  }

  /// Gives rank `to` the `count` values of rank `from`, which is another one; the rest have no part in it.
  package func carry(_ values: UnsafeMutablePointer<Float>, count: Int, from: Int, to: Int) throws(Failure) {
    guard count > 0, rank == from || rank == to else { return }
    let space = try space(count * 4).assumingMemoryBound(to: Float.self)
    if rank == from {
      space.update(from: values, count: count)
      wire.send(space, count * 4, to: to)
    } else {
      wire.receive(space, count * 4, from: from)
    }
    try wire.run()
    if rank == to { values.update(from: space, count: count) }
  }

  /// Adds a rank's own values to the sums that pass through it.
  private final class Adding: Freight {
    private let values: UnsafePointer<Float>
    private let sums: UnsafeMutablePointer<Float>
    init(_ values: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>) {
      (self.values, self.sums) = (values, sums)
    }
    func ready(_ tag: Int) -> Int { .max }
    func arrived(_ tag: Int, at: Int, bytes: Int) { add(values + at / 4, to: sums + at / 4, count: bytes / 4) }
    var isBusy: Bool { false }
  }

  /// The ranks before and behind this one on the chain, which is a ring here: it is cut where a root says.
  package var neighbours: (before: Int, after: Int) {
    let place = chain.firstIndex(of: rank)!
    return (chain[(place + size - 1) % size], chain[(place + 1) % size])
  }

  package func reserve(bytes: Int, values: Int) throws(Failure) {
    // As `gather` and the two ways of `sum` take it.
    let sums = values * 4 <= WirePeers.small ? size * values : values + size * ((values + size - 1) / size)
    let wanted = max(size * bytes, sums * 4)
    if capacity < wanted { scratch = try Region(bytes: wanted, for: "messages to other ranks") }
  }

  private var capacity: Int {
    switch scratch {
    case .some(let region): region.bytes
    case .none: 0
    }
  }

  /// Up to here a sum is bound by latency on every network: bytes of one rank's values.
  private static let small = 16 << 10

  private func gatherInPlace(_ values: UnsafePointer<Float>, _ count: Int, _ all: UnsafeMutablePointer<Float>)
    throws(Failure)
  {
    (all + rank * count).update(from: values, count: count)
    forEachOther { peer in
      wire.receive(all + peer * count, count * 4, from: peer)
      wire.send(all + rank * count, count * 4, to: peer)
    }
    try wire.run()
  }

  /// Memory of this object, at least `bytes`, for the running call. A transport may use what it was given even after it
  /// has failed: so it gets none of the caller's, and nobody else gets this any more.
  private func space(_ bytes: Int) throws(Failure) -> UnsafeMutableRawPointer {
    if let failure = wire.failure { throw failure }
    if capacity < bytes {
      do throws(Failure) {
        scratch = try Region(bytes: bytes, for: "messages to other ranks")
      } catch {
        // The others are waiting for messages that will not come.
        wire.end(error)
        throw error
      }
    }
    switch scratch {
    case .some(let region): return region.base
    case .none: preconditionFailure("there is a region by now")
    }
  }
}
