import CFasterMoE
import FasterMoE

/// The host's transport: its two functions, called from the thread that is in a collective call.
final class HostTransport: Transport {
  let rank: Int
  let size: Int
  let longestMessage: Int
  private let functions: fmoe_transport
  /// Whether the context is ours to release: only once a group has been made.
  private var isKept = false

  init(_ given: UnsafePointer<fmoe_transport>?) throws(Failure) {
    let required = MemoryLayout<fmoe_transport>.offset(of: \.release)!
    let c = try readOptions(
      try require(given, "transport"), "fmoe_transport", smallest: required, zero: fmoe_transport())
    guard c.size >= 1 else { throw Failure(.argument, "transport.size must be positive, not \(c.size)") }
    guard c.size <= HostTransport.mostRanks else {
      throw Failure(.argument, "transport.size \(c.size) is more than the \(HostTransport.mostRanks) a group may have")
    }
    guard c.rank >= 0 && c.rank < c.size else {
      throw Failure(.argument, "transport.rank must be in 0..\(c.size - 1), not \(c.rank)")
    }
    guard c.reserved == 0 else { throw Failure(.options, "fmoe_transport.reserved must be 0") }
    guard c.start != nil, c.test != nil else { throw Failure(.argument, "transport.start or transport.test is NULL") }
    // Sums are made of whole floats of each message.
    let (least, most) = (Int64(1) << 10, Int64(1) << 20)
    guard c.message_bytes == 0 || (least...most).contains(c.message_bytes) && c.message_bytes % 64 == 0 else {
      throw Failure(
        .argument,
        "transport.message_bytes must be 0 or a multiple of 64 in \(least)..\(most), not \(c.message_bytes)")
    }
    functions = c
    longestMessage = c.message_bytes == 0 ? Wire.usualPiece : Int(c.message_bytes)
    (rank, size) = (Int(c.rank), Int(c.size))
  }

  deinit {
    if isKept { functions.release?(functions.context) }
  }

  private static let mostRanks: Int32 = 1 << 16

  func keep() { isKept = true }

  func start(_ bytes: UnsafeMutableRawPointer, _ count: Int, peer: Int, receiving: Bool) throws(Failure)
    -> UnsafeMutableRawPointer?
  {
    var message = fmoe_message(peer: Int32(peer), receiving: receiving ? 1 : 0, bytes: bytes, size: Int64(count))
    var request: UnsafeMutableRawPointer?
    try check(functions.start(functions.context, &message, 1, &request), "start", peer)
    return request
  }

  func isDone(_ request: UnsafeMutableRawPointer?, peer: Int) throws(Failure) -> Bool {
    var done: Int32 = 0
    try check(functions.test(functions.context, request, &done), "test", peer)
    return done != 0
  }

  private func check(_ result: Int32, _ function: StaticString, _ peer: Int) throws(Failure) {
    guard result == 0 else {
      throw Failure(.peer, "the transport's \(function) gave \(result) for a message with rank \(peer)")
    }
  }
}
