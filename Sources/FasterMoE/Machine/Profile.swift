import Glibc

/// The file form of a calibration, with what it was measured on, so that no other machine takes it for its own.
package struct Profile: Codable, Equatable, Sendable {
  /// 1, the version of this form.
  private var version = 1
  /// In the order of ranks.
  private var workers: [Worker]
  private var withinHosts: Link?
  private var betweenHosts: Link?
  private var messageSlowdown: Double
  enum CodingKeys: String, CodingKey {
    case version = "fastermoe_profile"
    case workers
    case withinHosts = "within_hosts"
    case betweenHosts = "between_hosts"
    case messageSlowdown = "message_slowdown"
  }

  private struct Link: Codable, Equatable, Sendable {
    var bandwidth: Double
    var latency: Double
    enum CodingKeys: String, CodingKey {
      case bandwidth = "bytes_per_second"
      case latency = "latency_seconds"
    }

    init(_ link: Calibration.Link) { (bandwidth, latency) = (link.rate.value, link.latency.value) }

    func link(_ name: String) throws(Failure) -> Calibration.Link {
      guard bandwidth > 0, bandwidth.isFinite, latency >= 0, latency.isFinite else {
        throw Failure(
          .file, "\(name) must have positive bytes_per_second and latency_seconds of 0 or more, both finite")
      }
      return Calibration.Link(latency: Seconds(latency), rate: ByteRate(bandwidth))
    }
  }

  private struct Worker: Codable, Equatable, Sendable {
    /// Numbered by first appearance: hosts may be called differently the next time.
    var host: Int
    var package: Int
    var numaNode: Int
    var cores: Int
    var threads: Int
    var processor: String
    var instructions: String
    var flops: [RateCurve.Sample] = []
    var weightFlops: [RateCurve.Sample] = []
    var rowHandling = 0.0
    enum CodingKeys: String, CodingKey {
      case host, package, cores, threads, processor, instructions
      case numaNode = "numa_node"
      case flops = "flops_per_second"
      case weightFlops = "weight_gradient_flops_per_second"
      case rowHandling = "row_bytes_per_second"
    }

    init(_ places: Places, rank: Int, threads: Int) {
      let place = places.all[rank]
      (host, package, numaNode) = (places.host[rank], Int(place.package), Int(place.numaNode))
      (cores, self.threads) = (Int(place.cores), threads)
      (processor, instructions) = (place.processorName, place.instructionSet)
    }

    /// What is not the same, in words.
    func difference(from other: Worker) -> String? {
      for (what, own, other) in [
        ("host", host, other.host), ("package", package, other.package), ("NUMA node", numaNode, other.numaNode),
        ("number of cores", cores, other.cores), ("number of threads", threads, other.threads),
      ] where own != other {
        return "its \(what) was \(own) and is \(other)"
      }
      for (what, own, other) in [
        ("processor", processor, other.processor), ("instruction set", instructions, other.instructions),
      ] where own != other {
        return "its \(what) was \"\(own)\" and is \"\(other)\""
      }
      return nil
    }

    func rates(_ rank: Int) throws(Failure) -> ComputeRates {
      func rates(_ samples: [RateCurve.Sample], _ key: String) throws(Failure) -> SIMD8<Double> {
        guard samples.map(\.rows) == ComputeRates.sampledRows else {
          throw Failure(.file, "worker \(rank) has \(key) at other rows than this version measures")
        }
        guard samples.allSatisfy({ $0.rate.value > 0 && $0.rate.value.isFinite }) else {
          throw Failure(.file, "worker \(rank): \(key) must be positive and finite")
        }
        return SIMD8(samples.map(\.rate.value))
      }
      guard rowHandling > 0 else { throw Failure(.file, "worker \(rank): row_bytes_per_second must be positive") }
      return ComputeRates(
        products: try rates(flops, "flops_per_second"),
        weightGrads: try rates(weightFlops, "weight_gradient_flops_per_second"), rowHandling: ByteRate(rowHandling))
    }
  }

  /// `threads` [W]
  init(_ calibration: Calibration, _ places: Places, threads: [Int]) {
    workers = Profile.workers(places, threads)
    for (rank, rates) in calibration.rates.enumerated() {
      workers[rank].flops = ComputeRates.samples(rates.products)
      workers[rank].weightFlops = ComputeRates.samples(rates.weightGrads)
      workers[rank].rowHandling = rates.rowHandling.value
    }
    withinHosts = calibration.withinHosts.map { Link($0) }
    betweenHosts = calibration.betweenHosts.map { Link($0) }
    messageSlowdown = calibration.messageSlowdown
  }

  private static func workers(_ places: Places, _ threads: [Int]) -> [Worker] {
    threads.indices.map { Worker(places, rank: $0, threads: threads[$0]) }
  }

  /// What the file at `path` says of these ranks; nil if there is no file. `shareMemory` says whether they have no links.
  static func read(
    _ path: UnsafePointer<CChar>, _ places: Places, threads: [Int], shareMemory: Bool
  ) throws(Failure) -> Calibration? {
    guard Documents.isThere(path) else { return nil }
    let profile = try Documents.read(Profile.self, from: path)
    do throws(Failure) {
      return try profile.calibration(of: places, threads, shareMemory)
    } catch {
      throw Failure(error.kind, "\(String(cString: path)): \(error.message)")
    }
  }

  /// What one says, wherever it was measured.
  package struct Facts {
    package struct Worker {
      package let host, cores, threads: Int
      package let processor, instructions: String
    }
    /// In the order of ranks.
    package let workers: [Worker]
    package let calibration: Calibration
  }

  /// What the file at `path` says, to be looked at.
  package static func facts(at path: UnsafePointer<CChar>) throws(Failure) -> Facts {
    let profile = try Documents.read(Profile.self, from: path)
    do throws(Failure) {
      guard profile.version == 1 else {
        throw Failure(.file, "fastermoe_profile is \(profile.version); this version reads 1")
      }
      return Facts(
        workers: profile.workers.map {
          Facts.Worker(
            host: $0.host, cores: $0.cores, threads: $0.threads, processor: $0.processor,
            instructions: $0.instructions)
        }, calibration: try profile.measured())
    } catch {
      throw Failure(error.kind, "\(String(cString: path)): \(error.message)")
    }
  }

  private func calibration(of places: Places, _ threads: [Int], _ shareMemory: Bool) throws(Failure) -> Calibration {
    guard version == 1 else { throw Failure(.file, "fastermoe_profile is \(version); this version reads 1") }
    let here = Profile.workers(places, threads)
    guard workers.count == here.count else {
      throw Failure(.file, "was measured with \(workers.count) workers, and here are \(here.count)")
    }
    for (rank, (there, here)) in zip(workers, here).enumerated() {
      guard let difference = there.difference(from: here) else { continue }
      throw Failure(.file, "was measured on another machine: of worker \(rank), \(difference)")
    }
    let areLinked = (!shareMemory && places.haveNeighbours, !shareMemory && places.hosts > 1)
    guard (withinHosts != nil, betweenHosts != nil) == areLinked else {
      throw Failure(.file, "was measured where workers are joined in another way, by memory or by messages")
    }
    return try measured()
  }

  private func measured() throws(Failure) -> Calibration {
    guard messageSlowdown >= 1, messageSlowdown.isFinite else {
      throw Failure(.file, "message_slowdown is \(messageSlowdown); it must be 1 or more")
    }
    var rates: [ComputeRates] = []
    for (rank, worker) in workers.enumerated() { rates.append(try worker.rates(rank)) }
    return Calibration(
      rates: rates, withinHosts: try withinHosts?.link("within_hosts"),
      betweenHosts: try betweenHosts?.link("between_hosts"), messageSlowdown: messageSlowdown)
  }
}

extension WirePeers {
  /// Tells all ranks what rank 0 knows; the others pass nil.
  func share(_ calibration: Calibration?) throws(Failure) -> Calibration {
    var shared = Array(
      repeating: ComputeRates(products: .zero, weightGrads: .zero, rowHandling: ByteRate(0)), count: size)
    // Of what is not there, the rate is infinite.
    var links = Links()
    if let calibration {
      shared = calibration.rates
      links = Links(calibration)
    }
    let failed = shared.withUnsafeMutableBytes { bytes in failure { () throws(Failure) in try broadcast(bytes) } }
    if let failed { throw failed }
    try withUnsafeMutableBytes(of: &links) { bytes throws(Failure) in try broadcast(bytes) }
    return Calibration(
      rates: shared, withinHosts: links.within.link, betweenHosts: links.between.link,
      messageSlowdown: links.messageSlowdown)
  }

  private func broadcast(_ bytes: UnsafeMutableRawBufferPointer) throws(Failure) {
    try broadcast(
      bytes.baseAddress!.assumingMemoryBound(to: Float.self), count: bytes.count / MemoryLayout<Float>.stride, from: 0)
  }

  private struct Links: BitwiseCopyable {
    struct Link: BitwiseCopyable {
      var latency = 0.0
      var rate = Double.infinity
      init(_ link: Calibration.Link? = nil) {
        if let link { (latency, rate) = (link.latency.value, link.rate.value) }
      }
      var link: Calibration.Link? {
        rate.isFinite ? Calibration.Link(latency: Seconds(latency), rate: ByteRate(rate)) : nil
      }
    }
    var within = Link()
    var between = Link()
    var messageSlowdown = 1.0
    init() {}
    init(_ calibration: Calibration) {
      (within, between) = (Link(calibration.withinHosts), Link(calibration.betweenHosts))
      messageSlowdown = calibration.messageSlowdown
    }
  }
}
