/// XXH64 of bytes that come in pieces, with seed 0: 64 bits, as `xxhsum` and other tools print them.
///
/// It finds accidents, not intent. Four lanes of multiply and rotate, 8 bytes each, keep up with any memory.
package struct Checksum {
  private var a = prime1 &+ prime2
  private var b = prime2
  private var c: UInt64 = 0
  private var d = 0 &- prime1
  private var bytes: UInt64 = 0
  /// What is left of a piece that was no multiple of 32 bytes: the last one.
  private var rest: UInt64?

  package init() {}

  /// Adds `count` bytes. Every piece but the last is a multiple of 32 bytes.
  package mutating func add(_ piece: UnsafeRawPointer, _ count: Int) {
    precondition(rest == nil, "the last piece is the last")
    bytes &+= UInt64(count)
    var at = 0
    while at + 32 <= count {
      a = Self.round(a, Self.word(piece + at))
      b = Self.round(b, Self.word(piece + at + 8))
      c = Self.round(c, Self.word(piece + at + 16))
      d = Self.round(d, Self.word(piece + at + 24))
      at += 32
    }
    if at < count { rest = finished(piece + at, count - at) }
  }

  package var value: UInt64 { rest ?? finished(UnsafeRawPointer(bitPattern: 1)!, 0) }

  /// The value in 16 digits.
  package var digits: String {
    let text = String(value, radix: 16)
    return String(repeating: "0", count: 16 - text.count) + text
  }

  private func finished(_ tail: UnsafeRawPointer, _ count: Int) -> UInt64 {
    var hash = Self.prime5
    if bytes >= 32 {
      hash = Self.rotate(a, 1) &+ Self.rotate(b, 7) &+ Self.rotate(c, 12) &+ Self.rotate(d, 18)
      for lane in [a, b, c, d] { hash = (hash ^ Self.round(0, lane)) &* Self.prime1 &+ Self.prime4 }
    }
    hash &+= bytes
    var at = 0
    while at + 8 <= count {
      hash = Self.rotate(hash ^ Self.round(0, Self.word(tail + at)), 27) &* Self.prime1 &+ Self.prime4
      at += 8
    }
    if at + 4 <= count {
      let half = UInt64(UInt32(littleEndian: (tail + at).loadUnaligned(as: UInt32.self)))
      hash = Self.rotate(hash ^ half &* Self.prime1, 23) &* Self.prime2 &+ Self.prime3
      at += 4
    }
    while at < count {
      hash = Self.rotate(hash ^ UInt64(tail.load(fromByteOffset: at, as: UInt8.self)) &* Self.prime5, 11) &* Self.prime1
      at += 1
    }
    hash = (hash ^ hash >> 33) &* Self.prime2
    hash = (hash ^ hash >> 29) &* Self.prime3
    return hash ^ hash >> 32
  }

  @inline(__always) private static func word(_ at: UnsafeRawPointer) -> UInt64 {
    UInt64(littleEndian: at.loadUnaligned(as: UInt64.self))
  }

  @inline(__always) private static func round(_ lane: UInt64, _ word: UInt64) -> UInt64 {
    rotate(lane &+ word &* prime2, 31) &* prime1
  }

  @inline(__always) private static func rotate(_ x: UInt64, _ by: UInt64) -> UInt64 { x << by | x >> (64 - by) }

  private static let prime1: UInt64 = 0x9E37_79B1_85EB_CA87
  private static let prime2: UInt64 = 0xC2B2_AE3D_27D4_EB4F
  private static let prime3: UInt64 = 0x1656_67B1_9E37_79F9
  private static let prime4: UInt64 = 0x85EB_CA77_C2B2_AE63
  private static let prime5: UInt64 = 0x27D4_EB2F_1656_67C5
}
