import Glibc

/// One worker's seat in a group of workers: its place on the machine, its threads and the memory they compute in.
package final class Group {
  package struct Options {
    /// Compute threads; 0: one per usable core.
    package var threads = 0
    /// Whether each thread is tied to its core.
    package var pins = true
    /// An hwloc XML file or synthetic string instead of this machine; read by init alone. A path is bytes, not text.
    package var topology: UnsafePointer<CChar>?
    package init() {}
  }

  package let topology: Topology
  package let team: Team
  private var workspace: Region?
  private var measuredRates: ComputeRates?
  private let lock: UnsafeMutablePointer<pthread_mutex_t>

  package init(_ options: Options) throws(Failure) {
    let topology = try Topology(description: options.topology)
    self.topology = topology
    let threads = options.threads == 0 ? max(1, topology.cores.count) : options.threads
    guard threads <= Group.mostThreads else {
      throw Failure(.argument, "\(threads) threads are more than the \(Group.mostThreads) one worker may have")
    }
    // Where the system refuses to tie a thread, as some containers do, its scheduler places it.
    let pins = options.pins && topology.isThisMachine && threads <= topology.cores.count
    team = try Team(threads: threads) { if pins { _ = topology.bindCallingThread(toCore: $0) } }
    // Last, since nothing would give it back if the others failed.
    lock = .allocate(capacity: 1)
    lock.initialize(to: pthread_mutex_t())
    pthread_mutex_init(lock, nil)
  }

  deinit {
    pthread_mutex_destroy(lock)
    lock.deallocate()
  }

  package static let mostThreads = 4096

  /// One call at a time on a group and all that hangs from it, whichever host threads they come from.
  @inline(__always)
  package func exclusively<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
    pthread_mutex_lock(lock)
    defer { pthread_mutex_unlock(lock) }
    return try body()
  }

  /// Memory for the running call, at least `bytes`; its contents do not outlive the call.
  package func workspace(bytes: Int) throws(Failure) -> UnsafeMutableRawPointer {
    if let base = workspaceBase(bytes) { return base }
    workspace = nil
    workspace = try Region(bytes: bytes, for: "the workspace of a layer")
    return workspaceBase(bytes)!
  }

  /// How fast this worker computes, measured when first asked for.
  package func rates() throws(Failure) -> ComputeRates {
    if let measuredRates { return measuredRates }
    let rates = try ComputeRates.measured(by: team)
    measuredRates = rates
    return rates
  }

  private func workspaceBase(_ bytes: Int) -> UnsafeMutableRawPointer? {
    switch workspace {
    case .some(let region): region.bytes >= bytes ? region.base : nil
    case .none: nil
    }
  }
}
