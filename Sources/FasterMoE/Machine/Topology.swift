import CHints
import CHwloc
import Glibc

/// A machine as hwloc sees it, reduced to what this process may use.
package final class Topology {
  /// Where one core sits; indexes count what this process may use, in hwloc's logical order.
  package struct Core: Equatable {
    package let package: Int, numaNode: Int, sharedCache: Int
    /// The system's number of its first processor, which all processes of a machine know it by.
    package let processor: Int
  }

  private let handle: hwloc_topology_t
  /// Whether this describes the machine we run on, so that threads can be pinned by it.
  package let isThisMachine: Bool
  /// The model of the first package, if anybody knows it.
  package let processor: String
  /// The usable cores, neighbours in cache and memory next to each other.
  package let cores: [Core]
  /// The core of each processor, by the system's numbers.
  private let coreOfProcessor: [Int: Int]

  /// Discovers this machine, or reads `description`: an hwloc synthetic string ("pack:2 core:4 pu:1") or an XML file.
  package init(description: UnsafePointer<CChar>? = nil) throws(Failure) {
    // hwloc does not end well where it gets no memory.
    let processors = max(1, sysconf(Int32(_SC_NPROCESSORS_CONF)))
    let room = try Reserve.room(2 << 20 + 16 << 10 * processors, for: "hwloc")
    defer { free(room) }
    hwloc_share_variables()
    var made: hwloc_topology_t?
    guard hwloc_topology_init(&made) == 0, let made else { throw Failure(.memory, "hwloc cannot make a topology") }
    do throws(Failure) {
      try Topology.load(made, description)
    } catch {
      hwloc_topology_destroy(made)
      throw error
    }
    handle = made
    isThisMachine = hwloc_topology_is_thissystem(made) != 0
    if isThisMachine { Topology.restrictToCaller(made) }
    cores = Topology.places(in: made)
    coreOfProcessor = Topology.cores(byProcessorIn: made)
    let package = hwloc_get_obj_by_type(made, HWLOC_OBJ_PACKAGE, 0)
    processor = package.flatMap { hwloc_obj_get_info_by_name($0, "CPUModel") }.map { String(cString: $0) } ?? ""
  }

  deinit { hwloc_topology_destroy(handle) }

  /// The cores for worker `index` of `count` that share this machine: neighbours, of one NUMA node or of whole ones where
  /// the numbers allow. Empty if there are fewer cores than workers.
  package func share(of index: Int, among count: Int) -> Range<Int> {
    guard cores.count >= count else { return 0..<0 }
    var starts: [Int] = []  // of each NUMA node
    for core in cores.indices where core == 0 || cores[core].numaNode != cores[core - 1].numaNode {
      starts.append(core)
    }
    let nodes = starts.count
    starts.append(cores.count)
    if nodes % count == 0 { return starts[index * nodes / count]..<starts[(index + 1) * nodes / count] }
    let (node, place, each) = (index * nodes / count, index % max(1, count / nodes), max(1, count / nodes))
    let width = starts[node + 1] - starts[node]
    if count % nodes == 0, (0..<nodes).allSatisfy({ starts[$0 + 1] - starts[$0] >= each }) {
      return starts[node] + width * place / each..<starts[node] + width * (place + 1) / each
    }
    return cores.count * index / count..<cores.count * (index + 1) / count
  }

  /// Ties the calling thread to core `index`; false where the system refuses.
  package func bindCallingThread(toCore index: Int) -> Bool {
    guard isThisMachine, let core = hwloc_get_obj_by_type(handle, Topology.coreType(handle), UInt32(index)) else {
      return false
    }
    return hwloc_set_cpubind(handle, core.pointee.cpuset, Int32(HWLOC_CPUBIND_THREAD.rawValue)) == 0
  }

  /// Where the calling thread is, if that is one of the cores.
  package var coreOfCallingThread: Int? { coreOfProcessor[Int(sched_getcpu())] }

  private static func load(_ handle: hwloc_topology_t, _ description: UnsafePointer<CChar>?) throws(Failure) {
    if let description {
      // A path has a file behind it; every other text can only be a synthetic description.
      if access(description, F_OK) == 0 {
        guard hwloc_topology_set_xml(handle, description) == 0, hwloc_topology_load(handle) == 0 else {
          throw Failure(.topology, "topology file '\(String(cString: description))' is not hwloc XML")
        }
        return
      }
      guard hwloc_topology_set_synthetic(handle, description) == 0 else {
        throw Failure(
          .topology,
          "topology '\(String(cString: description))' is neither a readable file nor a synthetic description such as 'pack:2 core:4 pu:1'"
        )
      }
      try checkSize(String(cString: description))
    }
    guard hwloc_topology_load(handle) == 0 else { throw Failure(.topology, "hwloc cannot discover this machine") }
  }

  /// Most things of one kind in one of another, and most in all, in a synthetic description: hwloc takes seconds for these,
  /// and days for some that fit in a line.
  private static let (mostEach, mostInAll) = (4096, 65536)

  private static func checkSize(_ description: String) throws(Failure) {
    // Counts stand alone or behind a colon; what is in brackets or parentheses says something else.
    var (depth, all, count, isCount) = (0, 1, 0, true)
    for letter in description.utf8 + [UInt8(ascii: " ")] {
      switch letter {
      case UInt8(ascii: "0")...UInt8(ascii: "9") where isCount && depth == 0:
        count = min(count * 10 + Int(letter - UInt8(ascii: "0")), mostInAll + 1)
        continue
      case UInt8(ascii: "("), UInt8(ascii: "["): depth += 1
      case UInt8(ascii: ")"), UInt8(ascii: "]"): depth -= 1
      default: break
      }
      guard count <= mostEach, all * max(1, count) <= mostInAll else {
        throw Failure(
          .topology, "topology '\(description)' has more than \(mostEach) of a kind in one place or \(mostInAll) in all"
        )
      }
      all *= max(1, count)
      (count, isCount) = (0, letter == UInt8(ascii: " ") || letter == UInt8(ascii: ":"))
    }
  }

  /// Leaves only the processors that the calling thread may run on: mpirun and taskset say so by its mask.
  private static func restrictToCaller(_ handle: hwloc_topology_t) {
    guard let mine = hwloc_bitmap_alloc() else { return }
    defer { hwloc_bitmap_free(mine) }
    if hwloc_get_cpubind(handle, mine, Int32(HWLOC_CPUBIND_THREAD.rawValue)) == 0, hwloc_bitmap_iszero(mine) == 0 {
      hwloc_topology_restrict(handle, mine, 0)
    }
  }

  /// Cores, or hardware threads where the system tells of no cores.
  private static func coreType(_ handle: hwloc_topology_t) -> hwloc_obj_type_t {
    hwloc_get_nbobjs_by_type(handle, HWLOC_OBJ_CORE) > 0 ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU
  }

  private static func all(_ type: hwloc_obj_type_t, in handle: hwloc_topology_t) -> [hwloc_obj_t?] {
    (0..<max(0, Int(hwloc_get_nbobjs_by_type(handle, type)))).map { hwloc_get_obj_by_type(handle, type, UInt32($0)) }
  }

  private static func cores(byProcessorIn handle: hwloc_topology_t) -> [Int: Int] {
    var cores: [Int: Int] = [:]
    for processor in all(HWLOC_OBJ_PU, in: handle) {
      let core = hwloc_get_ancestor_obj_by_type(handle, coreType(handle), processor) ?? processor
      cores[Int(processor!.pointee.os_index)] = Int(core!.pointee.logical_index)
    }
    return cores
  }

  private static func places(in handle: hwloc_topology_t) -> [Core] {
    let caches = hwloc_get_nbobjs_by_type(handle, HWLOC_OBJ_L3CACHE) > 0 ? HWLOC_OBJ_L3CACHE : HWLOC_OBJ_L2CACHE
    return all(coreType(handle), in: handle).map { core in
      func above(_ kind: hwloc_obj_type_t) -> Int {
        hwloc_get_ancestor_obj_by_type(handle, kind, core).map { Int($0.pointee.logical_index) } ?? 0
      }
      // NUMA nodes hang beside the tree of processors, so they are found by the processors they share.
      var node = 0
      while let candidate = hwloc_get_obj_by_type(handle, HWLOC_OBJ_NUMANODE, UInt32(node)),
        hwloc_bitmap_intersects(candidate.pointee.cpuset, core!.pointee.cpuset) == 0
      { node += 1 }
      return Core(
        package: above(HWLOC_OBJ_PACKAGE), numaNode: node, sharedCache: above(caches),
        processor: Int(hwloc_bitmap_first(core!.pointee.cpuset)))
    }
  }
}
