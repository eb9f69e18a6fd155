/// What carries bytes between ranks: MPI, sockets, anything with these two functions. The roof wraps the host's.
package protocol Transport: AnyObject {
  var rank: Int { get }
  var size: Int { get }
  /// Most bytes of a message in which large volumes go: those that leave at once, not only when the receiver has said that
  /// it is ready. Whole floats, the same on all ranks.
  var longestMessage: Int { get }
  /// Begins to move one message and returns at once. From one rank to another the i-th sent meets the i-th received.
  ///
  /// `bytes` are the transport's until `isDone` has said so.
  func start(_ bytes: UnsafeMutableRawPointer, _ count: Int, peer: Int, receiving: Bool) throws(Failure)
    -> UnsafeMutableRawPointer?
  /// Whether the message has moved, which ends the request; it also drives progress.
  func isDone(_ request: UnsafeMutableRawPointer?, peer: Int) throws(Failure) -> Bool
}
