import Glibc

/// A span of time.
package struct Seconds: Comparable, Sendable, BitwiseCopyable {
  package var value: Double
  package init(_ value: Double) { self.value = value }
  package static func < (a: Seconds, b: Seconds) -> Bool { a.value < b.value }
  package static func + (a: Seconds, b: Seconds) -> Seconds { Seconds(a.value + b.value) }
  package static func * (time: Seconds, count: Double) -> Seconds { Seconds(time.value * count) }
  package static func / (a: Seconds, b: Seconds) -> Double { a.value / b.value }

  /// A clock that never goes back, from an arbitrary beginning.
  package static var now: Seconds {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Seconds(Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9)
  }
}

/// An amount of floating-point work.
package struct Flops: Comparable, Sendable {
  package var value: Double
  package init(_ value: Double) { self.value = value }
  package static func < (a: Flops, b: Flops) -> Bool { a.value < b.value }
  package static func + (a: Flops, b: Flops) -> Flops { Flops(a.value + b.value) }
  package static func / (work: Flops, time: Seconds) -> FlopRate { FlopRate(work.value / time.value) }
  package static func / (work: Flops, rate: FlopRate) -> Seconds { Seconds(work.value / rate.value) }
}

/// Floating-point work per second.
package struct FlopRate: Comparable, Sendable, BitwiseCopyable {
  package var value: Double
  package init(_ value: Double) { self.value = value }
  package static func < (a: FlopRate, b: FlopRate) -> Bool { a.value < b.value }
}

/// A volume of data.
package struct Bytes: Comparable, Sendable {
  package var value: Double
  package init(_ value: Double) { self.value = value }
  package static func < (a: Bytes, b: Bytes) -> Bool { a.value < b.value }
  package static func * (bytes: Bytes, count: Double) -> Bytes { Bytes(bytes.value * count) }
  package static func / (a: Bytes, b: Bytes) -> Double { a.value / b.value }
  package static func / (bytes: Bytes, time: Seconds) -> ByteRate { ByteRate(bytes.value / time.value) }
  package static func / (bytes: Bytes, rate: ByteRate) -> Seconds { Seconds(bytes.value / rate.value) }
}

/// Data per second; infinite where nothing limits it.
package struct ByteRate: Comparable, Sendable, BitwiseCopyable {
  package var value: Double
  package init(_ value: Double) { self.value = value }
  package static func < (a: ByteRate, b: ByteRate) -> Bool { a.value < b.value }
}
