import Glibc

/// One rank's seat in a group of workers: its peers, its place on the machine, its threads and the memory they use.
package final class Group {
  package struct Options {
    /// Compute threads; 0: one per core of this rank's share.
    package var threads = 0
    /// Whether each thread is tied to its core.
    package var pins = true
    /// Longest wait for a peer that says nothing; nil: forever.
    package var timeout: Seconds?
    /// An hwloc XML file or synthetic string instead of this machine; read by init alone. A path is bytes, not text.
    package var topology: UnsafePointer<CChar>?
    /// The file of a calibration, read by init if it is there.
    package var profile: UnsafePointer<CChar>?
    package init() {}
  }

  package let peers: any Peers
  package let topology: Topology
  package let team: Team
  private var workspace: Region?
  /// Where all ranks are, and how many threads each has [W].
  package let places: Places
  private var threads: [Int] = []
  /// How fast the group is, once that was measured or read; equal on all ranks.
  package private(set) var calibration: Calibration?
  /// The file that rank 0 keeps it in; ends with a zero.
  private let profile: [CChar]?
  /// [W] how fast each worker trains, once that was measured; equal on all ranks.
  package var rates: [WorkerRates]?
  private let notices: UnsafeMutablePointer<Notice>
  private let lock: UnsafeMutablePointer<pthread_mutex_t>
  /// Ranks by place, where neighbours are near each other, and each rank's seat there.
  package let leaves: [Int]
  package let seats: [Int]
  /// The tree of places, from its top: at each level, the part in which each rank is. Levels that divide no part further
  /// are left out.
  package let levels: [[Int]]
  /// Ranks by number.
  package let ranks: [Int]
  /// Layers made so far, the same number on all ranks.
  package var layers = 0

  package var rank: Int { peers.rank }
  package var size: Int { peers.size }

  /// How many levels of the tree something crosses from this rank to another.
  package func crossings(to other: Int) -> Int32 {
    Int32(levels.count { $0[rank] != $0[other] })
  }

  /// `size` ranks that are threads of this process; their shares of the cores are neighbours.
  package static func local(_ size: Int, _ options: Options) throws(Failure) -> [Group] {
    let topology = try Topology(description: options.topology)
    let places = Places(
      (0..<size).map { rank in
        var place = Place(topology)
        place.settle(on: topology.cores[topology.share(of: rank, among: size)])
        return place
      })
    var groups: [Group] = []
    for seat in SharedPeers.seats(size, timeout: options.timeout) {
      groups.append(try Group(seat, options, topology, places))
    }
    let threads = groups.map(\.team.threads)
    let known = try options.profile.flatMap { path throws(Failure) in
      try Profile.read(path, places, threads: threads, shareMemory: true)
    }
    for group in groups {
      group.threads = threads
      if let known { group.take(known) }
    }
    return groups
  }

  /// This rank's seat among ranks that a transport joins; all of them make theirs together.
  ///
  /// A `failure` found before, in the options, is told to the others, who then fail too.
  package static func over(_ transport: any Transport, _ options: Options, failure before: Failure?) throws(Failure)
    -> Group
  {
    let peers = WirePeers(transport, timeout: options.timeout)
    var topology: Topology?
    var own = before
    if own == nil {
      own = FasterMoE.failure { () throws(Failure) in
        topology = try Topology(description: options.topology)
        try peers.reserve(bytes: max(MemoryLayout<Place>.stride, MemoryLayout<ComputeRates>.stride), values: 0)
      }
    }
    let scratch = UnsafeMutablePointer<Notice>.allocate(capacity: peers.size)
    defer { scratch.deallocate() }
    let same = [options.profile == nil ? 0 : 1, UInt64(peers.wire.piece), 0, 0, 0, 0, 0, 0] as Notice.Same
    try Notice.agree(.createGroup, own, same: same, with: peers, into: scratch)
    var here = Place(topology!)
    var places = Places(try peers.gathered(here))
    // Ranks that may all use the same cores share them: only now each knows its own.
    let sharing = places.sharing(of: peers.rank)
    if sharing.isAlike {
      here.settle(on: topology!.cores[topology!.share(of: sharing.index, among: sharing.count)])
    }
    places = Places(try peers.gathered(here))
    peers.chain = places.leaves
    peers.wire.name = places.name
    var made: Group?
    own = FasterMoE.failure { () throws(Failure) in made = try Group(peers, options, topology!, places) }
    try Notice.agree(
      .createGroup, own, words: Notice.Words(number: made?.team.threads ?? 0), from: .call, with: peers, into: scratch)
    made!.threads = (0..<peers.size).map { Int(scratch[$0].words.number) }
    if let path = options.profile { try made!.readProfile(path, peers, scratch) }
    return made!
  }

  /// Rank 0 reads, and tells the others.
  private func readProfile(_ path: UnsafePointer<CChar>, _ peers: WirePeers, _ scratch: UnsafeMutablePointer<Notice>)
    throws(Failure)
  {
    var known: Calibration?
    let own = FasterMoE.failure { () throws(Failure) in
      if rank == 0 { known = try Profile.read(path, places, threads: threads, shareMemory: false) }
    }
    try Notice.agree(
      .createGroup, own, words: Notice.Words(number: known == nil ? 0 : 1), from: .call, with: peers, into: scratch)
    if scratch[0].words.number != 0 { take(try peers.share(known)) }
  }

  private init(_ peers: any Peers, _ options: Options, _ topology: Topology, _ places: Places) throws(Failure) {
    self.peers = peers
    self.topology = topology
    self.places = places
    profile = options.profile.map { Array(UnsafeBufferPointer(start: $0, count: strlen($0) + 1)) }
    let leaves = places.leaves
    self.leaves = leaves
    seats = leaves.indices.map { leaves.firstIndex(of: $0)! }
    levels = places.levels
    ranks = Array(0..<peers.size)
    let sharing = places.sharing(of: peers.rank)
    let share = sharing.isAlike ? topology.share(of: sharing.index, among: sharing.count) : 0..<0
    let fair = share.isEmpty ? topology.cores.count / sharing.count : share.count
    let threads = options.threads == 0 ? max(1, fair) : options.threads
    guard threads <= Group.mostThreads else {
      throw Failure(.argument, "\(threads) threads are more than the \(Group.mostThreads) one worker may have")
    }
    // Where the system refuses to tie a thread, as some containers do, its scheduler places it.
    let pins = options.pins && topology.isThisMachine && threads <= share.count
    let first = share.lowerBound
    // A caller works if it is on a core of this rank's, and of no other's since all that the rank may use are its own.
    func callersSeat() -> Int? {
      guard pins else { return 0 }
      guard share.count == topology.cores.count, let core = topology.coreOfCallingThread else { return nil }
      return (first..<first + threads).contains(core) ? core - first : 0
    }
    team = try Team(threads: threads, callersSeat: callersSeat) {
      if pins { _ = topology.bindCallingThread(toCore: first + $0) }
    }
    // Last, since nothing would give these back if the others failed.
    notices = .allocate(capacity: peers.size)
    lock = .allocate(capacity: 1)
    lock.initialize(to: pthread_mutex_t())
    pthread_mutex_init(lock, nil)
  }

  deinit {
    pthread_mutex_destroy(lock)
    lock.deallocate()
    notices.deallocate()
  }

  /// A group of one that computes on the threads of another, while that one does nothing else.
  package init(alone other: Group) {
    (peers, topology, team) = (SharedPeers.seats(1, timeout: nil)[0], other.topology, other.team)
    places = Places([other.places.all[other.rank]])
    (leaves, seats, levels, ranks, profile) = ([0], [0], [], [0], nil)
    notices = .allocate(capacity: 1)
    lock = .allocate(capacity: 1)
    lock.initialize(to: pthread_mutex_t())
    pthread_mutex_init(lock, nil)
  }

  package static let mostThreads = 4096

  /// One call at a time on a group and all that hangs from it, whichever host threads they come from.
  @inline(__always)
  package func exclusively<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
    pthread_mutex_lock(lock)
    defer { pthread_mutex_unlock(lock) }
    return try body()
  }

  /// Enters a call that all ranks make together: it goes on on all of them or fails on all.
  ///
  /// `own` is why this rank cannot go on, `same` what must be equal on all ranks, `words` what each tells the others.
  /// Returns all ranks' words, valid until the next call.
  @discardableResult
  package func agree(
    _ call: Notice.Call, _ own: Failure?, same: Notice.Same = .init(repeating: 0),
    words: Notice.Words = .init(), from entrance: Entrance = .host
  ) throws(Failure) -> UnsafeMutablePointer<Notice> {
    try Notice.agree(call, own, same: same, words: words, from: entrance, with: peers, into: notices)
    return notices
  }

  /// Whether a transport that failed may still touch memory that this group gave it.
  package var isEntangled: Bool { (peers as? WirePeers)?.wire.isEntangled ?? false }

  /// Memory for the running call, at least `bytes`, and `room` more where it must grow; its contents do not outlive the
  /// call.
  package func workspace(bytes: Int, room: Int = 0) throws(Failure) -> UnsafeMutableRawPointer {
    if let base = workspaceBase(bytes) { return base }
    workspace = nil
    workspace = try Region(bytes: bytes + room, for: "the workspace of a layer")
    return workspaceBase(bytes)!
  }

  /// From now on the group knows how fast it is.
  package func take(_ calibration: Calibration) {
    self.calibration = calibration
    rates = calibration.rates.map { WorkerRates($0) }
  }

  /// Has rank 0 write what was measured to the profile, if the group has one.
  package func keep(_ calibration: Calibration) throws(Failure) {
    if rank == 0, let profile { try write(calibration, to: profile) }
  }

  /// Writes a profile of this group's ranks.
  package func write(_ calibration: Calibration, to profile: UnsafePointer<CChar>) throws(Failure) {
    try Documents.write(Profile(calibration, places, threads: threads), to: profile)
  }

  private func workspaceBase(_ bytes: Int) -> UnsafeMutableRawPointer? {
    switch workspace {
    case .some(let region): region.bytes >= bytes ? region.base : nil
    case .none: nil
    }
  }
}
