import Glibc

/// Where one rank runs, as it tells the others.
package struct Place: BitwiseCopyable {
  /// The machine's name, ended by zeros.
  var host = InlineArray<64, UInt8>(repeating: 0)
  /// Of the running system: equal for all who share its processors, whatever names their containers give the machine.
  var system = InlineArray<40, UInt8>(repeating: 0)
  /// Of the first core that the rank may use, later of its own, by the system's own numbers.
  var package: Int32 = 0
  var numaNode: Int32 = 0
  var cores: Int32 = 0
  /// The processor's model, ended by zeros.
  var processor = InlineArray<64, UInt8>(repeating: 0)
  /// Floats of the vectors that this build of the library computes with.
  var vectorWidth: Int32 = 8
  /// A bit for each core that the rank may use, at its first processor's number.
  var processors = InlineArray<64, UInt64>(repeating: 0)

  init(_ topology: Topology) {
    gethostnameBytes()
    if let file = fopen("/proc/sys/kernel/random/boot_id", "r") {
      withUnsafeMutableBytes(of: &system) { _ = fread($0.baseAddress!, 1, 36, file) }
      fclose(file)
    }
    withUnsafeMutableBytes(of: &processor) {
      $0.dropLast().copyBytes(from: topology.processor.utf8.prefix($0.count - 1))
    }
    #if WIDE_VECTORS
      vectorWidth = 16
    #endif
    cores = Int32(clamping: topology.cores.count)
    guard let first = topology.cores.first else { return }
    (package, numaNode) = (Int32(clamping: first.package), Int32(clamping: first.numaNode))
    for core in topology.cores where core.processor >= 0 && core.processor < 64 * 64 {
      processors[core.processor / 64] |= 1 << UInt64(core.processor % 64)
    }
  }

  /// Settles on a share of the cores that the rank may use.
  mutating func settle(on cores: ArraySlice<Topology.Core>) {
    guard let first = cores.first else { return }
    (package, numaNode) = (Int32(clamping: first.package), Int32(clamping: first.numaNode))
  }

  private mutating func gethostnameBytes() {
    withUnsafeMutableBytes(of: &host) { bytes in
      _ = gethostname(bytes.baseAddress!.assumingMemoryBound(to: CChar.self), bytes.count - 1)
    }
  }

  var hostName: String { Place.text(host) }
  var processorName: String { Place.text(processor) }
  var instructionSet: String {
    #if arch(x86_64)
      vectorWidth > 8 ? "x86-64-v4" : "x86-64-v3"
    #else
      "arm64"
    #endif
  }

  private static func text<T: BitwiseCopyable>(_ bytes: T) -> String {
    withUnsafeBytes(of: bytes) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
  }

  /// One name on one system: containers are hosts of their own, and so are machines that have the same name.
  func isOnHost(of other: Place) -> Bool { Place.equal(host, other.host) && isOnSystem(of: other) }
  /// By what the system says of itself, or by the host's name where it says nothing.
  func isOnSystem(of other: Place) -> Bool {
    knowsSystem && other.knowsSystem ? Place.equal(system, other.system) : Place.equal(host, other.host)
  }
  private var knowsSystem: Bool { system[0] != 0 }
  func mayUseSameCores(as other: Place) -> Bool { isOnSystem(of: other) && Place.equal(processors, other.processors) }
  func mayMeet(_ other: Place) -> Bool {
    isOnSystem(of: other) && processors.indices.contains { processors[$0] & other.processors[$0] != 0 }
  }

  private static func equal<T: BitwiseCopyable>(_ a: T, _ b: T) -> Bool {
    withUnsafeBytes(of: a) { a in withUnsafeBytes(of: b) { b in a.elementsEqual(b) } }
  }
}

/// The places of all ranks, the same on each of them: a tree of hosts, packages, NUMA nodes and ranks.
package struct Places {
  package let all: [Place]

  /// The host of each rank, numbered by first appearance.
  package let host: [Int]

  package init(_ all: [Place]) {
    self.all = all
    var host: [Int] = []
    for (rank, place) in all.enumerated() {
      let before = all[..<rank].firstIndex { $0.isOnHost(of: place) }
      host.append(before.map { host[$0] } ?? (host.max() ?? -1) + 1)
    }
    self.host = host
  }

  package var hosts: Int { host.max()! + 1 }
  /// Whether any host has two ranks.
  package var haveNeighbours: Bool { hosts < all.count }

  /// Pairs of ranks for which messages of one leave the host that sends most, if all send to all on other hosts.
  package var busiestWayOut: Int {
    (0..<hosts).map { host in self.host.count { $0 == host } }.reduce(0) { max($0, $1 * (all.count - $1)) }
  }

  /// Ranks in the order of the tree's leaves: neighbours are near each other, and places stand in the order of their
  /// lowest ranks.
  package var leaves: [Int] {
    func lowest(_ isNear: (Int, Int) -> Bool) -> [Int] {
      all.indices.map { rank in all.indices.first { isNear($0, rank) }! }
    }
    let host = self.host
    func isOnPackage(_ a: Int, _ b: Int) -> Bool { host[a] == host[b] && all[a].package == all[b].package }
    let packages = lowest(isOnPackage)
    let nodes = lowest { isOnPackage($0, $1) && all[$0].numaNode == all[$1].numaNode }
    func key(_ rank: Int) -> (Int, Int, Int, Int) { (host[rank], packages[rank], nodes[rank], rank) }
    return all.indices.sorted { key($0) < key($1) }
  }

  /// The levels of the tree from its top, hosts, packages, NUMA nodes, that divide the ranks further than those above: for
  /// each rank the lowest one that is in the same part.
  package var levels: [[Int]] {
    var levels: [[Int]] = []
    for depth in 1...3 {
      func key(_ rank: Int) -> [Int] {
        Array([host[rank], Int(all[rank].package), Int(all[rank].numaNode)].prefix(depth))
      }
      let parts = all.indices.map { rank in all.indices.first { key($0) == key(rank) }! }
      if parts != levels.last ?? Array(repeating: 0, count: all.count) { levels.append(parts) }
    }
    return levels
  }

  /// Which of the ranks that may use the same cores `rank` is, how many there are, and whether they may use all the same
  /// ones; where only some are, nobody can tell who should have which.
  package func sharing(of rank: Int) -> (index: Int, count: Int, isAlike: Bool) {
    let sharers = all.indices.filter { $0 == rank || all[$0].mayMeet(all[rank]) }
    let isAlike = sharers.allSatisfy { $0 == rank || all[$0].mayUseSameCores(as: all[rank]) }
    return (sharers.firstIndex(of: rank)!, sharers.count, isAlike)
  }

  /// Names a rank so that people find it.
  package func name(_ rank: Int) -> String { "rank \(rank) on \(all[rank].hostName)" }
}
