/// Why a call could not be done: who must act, and what is wrong in words.
package struct Failure: Error, Equatable {
  /// Whose move it is; the roof translates each to one `fmoe_status`.
  package enum Kind: Equatable, Sendable {
    case argument, options, stage, file, unsupported, memory, topology, peer, disagree, timeout, internalDefect
  }
  package let kind: Kind
  package let message: String

  package init(_ kind: Kind, _ message: String) {
    self.kind = kind
    self.message = message
  }
}

/// What `body` fails with, for a call that must tell its peers before it may fail.
package func failure(of body: () throws(Failure) -> Void) -> Failure? {
  do throws(Failure) {
    try body()
    return nil
  } catch {
    return error
  }
}

/// The product of sizes that came from outside, or a failure that names what is too large.
package func checkedProduct(_ what: StaticString, _ a: Int, _ b: Int, _ c: Int = 1) throws(Failure) -> Int {
  let (first, isTooLarge) = a.multipliedReportingOverflow(by: b)
  let (product, isStillTooLarge) = first.multipliedReportingOverflow(by: c)
  guard !isTooLarge, !isStillTooLarge, first <= maximumElements, product <= maximumElements else {
    throw Failure(.argument, "\(what) is too large for this machine")
  }
  return product
}

/// More elements than any address space here holds; sums of a few such counts still fit an Int.
private let maximumElements = 1 << 45
