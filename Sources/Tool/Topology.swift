import ArgumentParser
import FasterMoE

/// `fastermoe topology`: the machine and the workers that would be placed on it.
struct Topology: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show what hwloc found on a machine and where workers would run.",
    discussion: """
      Cores are those that this process may use. Link rates are shown where a profile has them.

        fastermoe topology --workers 4
        fastermoe topology --topology "pack:2 numa:2 core:8 pu:1" --workers 4
      """)

  @Option(
    help: ArgumentHelp(
      "An hwloc XML file or synthetic description instead of this machine.", valueName: "file or text"))
  var topology: String?

  @Option(help: ArgumentHelp("How many workers share the machine.", valueName: "number"))
  var workers = 1

  @Option(help: ArgumentHelp("A profile, for the rates that were measured.", valueName: "file"))
  var profile: String?

  @OptionGroup var output: OutputOptions

  private struct Report: Encodable {
    struct Worker: Encodable {
      let rank: Int
      /// Empty where there are more workers than cores.
      let cores: [Int]
    }
    struct Core: Encodable {
      let package, numaNode, cache, processor: Int
      enum CodingKeys: String, CodingKey {
        case package, cache, processor
        case numaNode = "numa_node"
      }
    }
    let processor: String
    let isThisMachine: Bool
    let cores: [Core]
    let workers: [Worker]
    var links: Links?
    enum CodingKeys: String, CodingKey {
      case processor, cores, workers, links
      case isThisMachine = "this_machine"
    }
  }

  func run() throws {
    guard workers >= 1, workers <= Group.mostThreads else {
      throw Failure(.argument, "--workers is from 1 to \(Group.mostThreads), not \(workers)")
    }
    let found = try topology.map { try FasterMoE.Topology(description: $0) } ?? FasterMoE.Topology()
    let facts = try profile.map { try Profile.facts(at: $0) }
    let placed = (0..<workers).map { rank in
      Report.Worker(rank: rank, cores: Array(found.share(of: rank, among: workers)))
    }
    let report = Report(
      processor: found.processor, isThisMachine: found.isThisMachine,
      cores: found.cores.map {
        Report.Core(package: $0.package, numaNode: $0.numaNode, cache: $0.sharedCache, processor: $0.processor)
      }, workers: placed, links: facts.map { Links($0.calibration) })
    try output.show(report) { tree(found, placed) + (facts.map { Links($0.calibration).words } ?? "") }
  }

  private func tree(_ found: FasterMoE.Topology, _ placed: [Report.Worker]) -> String {
    var text = "\(found.isThisMachine ? "this machine" : "machine"): \(found.cores.count) cores"
    text += found.processor.isEmpty ? "\n" : ", \(found.processor)\n"
    func parts(_ cores: [Int], _ key: (FasterMoE.Topology.Core) -> Int) -> [[Int]] {
      var parts: [[Int]] = []
      for core in cores {
        if let last = parts.last?.last, key(found.cores[last]) == key(found.cores[core]) {
          parts[parts.count - 1].append(core)
        } else {
          parts.append([core])
        }
      }
      return parts
    }
    func branch(_ words: String, _ before: String, _ isLast: Bool) -> String {
      text += "\(before)\(isLast ? "└─ " : "├─ ")\(words)\n"
      return before + (isLast ? "   " : "│  ")
    }
    func range(_ cores: [Int]) -> String {
      cores.count == 1 ? "core \(cores[0])" : "cores \(cores[0])-\(cores.last!)"
    }
    let levels: [(String, (FasterMoE.Topology.Core) -> Int)] = [
      ("package", \.package), ("NUMA node", \.numaNode), ("shared cache", \.sharedCache),
    ]
    func draw(_ cores: [Int], _ depth: Int, _ before: String) {
      guard depth < levels.count else {
        let owners = cores.map { core in placed.first { $0.cores.contains(core) }?.rank ?? -1 }
        let runs = cores.indices.filter { $0 == 0 || owners[$0] != owners[$0 - 1] }
        for (index, start) in runs.enumerated() {
          let end = index + 1 < runs.count ? runs[index + 1] : cores.count
          let owner = owners[start] < 0 ? "" : ": worker \(owners[start])"
          _ = branch(range(Array(cores[start..<end])) + owner, before, end == cores.count)
        }
        return
      }
      let all = parts(cores, levels[depth].1)
      for (index, part) in all.enumerated() {
        let name = "\(levels[depth].0) \(levels[depth].1(found.cores[part[0]]))"
        draw(part, depth + 1, branch(name, before, index == all.count - 1))
      }
    }
    draw(Array(found.cores.indices), 0, "")
    if placed.allSatisfy(\.cores.isEmpty) {
      text += "\(workers) workers have no cores of their own: \(found.cores.count) cores are shared by all\n"
    }
    return text
  }
}

/// What was measured of links, as it is shown.
struct Links: Encodable {
  struct Link: Encodable {
    let bandwidth, latency: Double
    enum CodingKeys: String, CodingKey {
      case bandwidth = "bytes_per_second"
      case latency = "latency_seconds"
    }
    init(_ link: Calibration.Link) { (bandwidth, latency) = (link.rate.value, link.latency.value) }
  }
  let withinHosts, betweenHosts: Link?
  let messageSlowdown: Double
  enum CodingKeys: String, CodingKey {
    case withinHosts = "within_hosts"
    case betweenHosts = "between_hosts"
    case messageSlowdown = "message_slowdown"
  }

  init(_ calibration: Calibration) {
    (withinHosts, betweenHosts) = (calibration.withinHosts.map(Link.init), calibration.betweenHosts.map(Link.init))
    messageSlowdown = calibration.messageSlowdown
  }

  var words: String {
    var text = ""
    for (name, link) in [("within a host", withinHosts), ("between hosts", betweenHosts)] {
      if let link { text += "links \(name): \(rate(link.bandwidth, "B/s")), latency \(time(link.latency))\n" }
    }
    return text.isEmpty ? "no links: workers share memory\n" : text
  }
}
