import ArgumentParser
import FasterMoE
import Glibc

/// A layer as files and options describe it.
package struct LayerDescription: Codable, Equatable {
  package var name: String?
  package var model: Int
  package var hidden: Int
  /// Missing: one for each worker.
  package var experts: Int?
  package var choices: Int?
  /// Of each worker.
  package var tokens: Int?
  package var activation: String?
  enum CodingKeys: String, CodingKey {
    case name, experts, tokens, activation
    case model = "d_model"
    case hidden = "d_hidden"
    case choices = "top_k"
  }

  /// `d=1024,h=2048,E=16,k=2,n=1024,activation=gelu`, or a JSON file with the same.
  package init(_ text: String) throws(Failure) {
    guard text.contains("=") else {
      self = try Documents.read(LayerDescription.self, from: text)
      return
    }
    (model, hidden) = (0, 0)
    var seen: Set<Substring> = []
    for part in text.split(separator: ",", omittingEmptySubsequences: false) {
      let pair = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      guard pair.count == 2 else { throw Failure(.argument, "layer: \"\(part)\" is not like d=1024") }
      let (key, value) = (pair[0], pair[1])
      guard seen.insert(key).inserted else { throw Failure(.argument, "layer: \(key) is there twice") }
      if key == "activation" {
        activation = String(value)
        continue
      }
      guard let number = Int(value) else { throw Failure(.argument, "layer: \(key) is \"\(value)\", no whole number") }
      switch key {
      case "d": model = number
      case "h": hidden = number
      case "E": experts = number
      case "k": choices = number
      case "n": tokens = number
      default:
        throw Failure(.argument, "layer: \"\(key)\" is not known; it has d, h, E, k, n and activation")
      }
    }
    for key in ["d", "h"] where !seen.contains(Substring(key)) {
      throw Failure(.argument, "layer: \(key) is missing")
    }
  }

  package func shape(workers: Int) throws(Failure) -> Shape {
    let known: [(String, Activation)] = [
      ("gelu", .gelu), ("gelu_tanh", .geluTanh), ("relu", .relu), ("silu", .silu), ("swiglu", .swiglu),
    ]
    guard let activation = known.first(where: { $0.0 == self.activation ?? "gelu" })?.1 else {
      throw Failure(
        .argument,
        "layer: activation \"\(self.activation!)\" is none of \(known.map(\.0).joined(separator: ", "))")
    }
    let experts = experts ?? workers
    return try Shape(
      model: model, hidden: hidden, experts: experts, choices: choices ?? min(2, max(1, experts)),
      activation: activation)
  }

  /// Rows of each worker.
  package func rows(_ shape: Shape) throws(Failure) -> Int {
    let tokens = tokens ?? 1024
    guard tokens > 0, tokens <= Int(Int32.max) / shape.choices else {
      throw Failure(.argument, "layer: n is \(tokens); n times k must be positive and fit 31 bits")
    }
    return tokens * shape.choices
  }
}

/// The counts of one batch with the memory they stand in.
package final class Batch {
  package let traffic: Traffic
  private let memory: Region

  /// All zeros.
  package init(workers: Int, experts: Int) throws(Failure) {
    try Planner.check(workers: workers, experts: experts)
    var size = Arena()
    _ = Traffic(arena: &size, workers: workers, experts: experts)
    memory = try Region(bytes: size.bytes, for: "the counts of a batch")
    var arena = Arena(over: memory.base)
    traffic = Traffic(arena: &arena, workers: workers, experts: experts)
  }

  /// `rows` of each worker, shared out by `shares` [E], which sum up to 1: every worker has its part but for what must be
  /// rounded, and that evens out over the workers. O(W·E).
  package convenience init(workers: Int, rows: Int, shares: [Double]) throws(Failure) {
    try self.init(workers: workers, experts: shares.count)
    var sums = [0.0]
    for share in shares { sums.append(sums.last! + share * Double(rows)) }
    sums[shares.count] = Double(rows)
    for worker in 0..<workers {
      // Where the first whole row ends: spread evenly by the golden ratio, whatever the number of workers.
      let phase = (Double(worker) * 0.618_033_988_749_894_9).truncatingRemainder(dividingBy: 1)
      let counts = traffic.counts + worker * shares.count
      sums.withUnsafeBufferPointer { sums in
        var before = Int32(0)
        for expert in 0..<shares.count - 1 {
          let next = Int32(sums[expert + 1] + phase)
          counts[expert] = UInt32(bitPattern: next &- before)
          before = next
        }
        counts[shares.count - 1] = UInt32(Int32(rows) - before)
      }
    }
  }

  /// Popularity by the law of Zipf, 1/r^s for the expert of rank r; the ranks are dealt out by `seed`, or stand in the
  /// experts' order where it is 0.
  package static func zipf(_ exponent: Double, experts: Int, seed: UInt64) -> [Double] {
    var shares = (1...experts).map { pow(Double($0), -exponent) }
    let sum = shares.reduce(0, +)
    for expert in shares.indices { shares[expert] /= sum }
    guard seed != 0 else { return shares }
    return shuffled(experts, seed: seed, stream: 0).map { shares[$0] }
  }

  /// The numbers below `count` in an order that depends on seed and stream alone.
  package static func shuffled(_ count: Int, seed: UInt64, stream: UInt64) -> [Int] {
    let numbers = RandomStream(seed: seed, stream: stream)
    return (0..<count).sorted { (numbers.share($0), $0) < (numbers.share($1), $1) }
  }

  package var isEmpty: Bool {
    !(0..<traffic.workers * traffic.experts).contains { traffic.counts[$0] > 0 }
  }
}

/// Reads counts from text: a line for each worker, a number for each expert, between them commas or blanks; an empty line
/// ends a batch, and what is behind a # is a remark.
package final class CountsReader {
  private let name: String
  private let file: UnsafeMutablePointer<FILE>
  private var line = 0
  private var text: UnsafeMutablePointer<CChar>?
  private var room = 0

  /// "-" is the standard input.
  package init(_ path: String) throws(Failure) {
    name = path == "-" ? "standard input" : path
    guard let file = path == "-" ? fdopen(dup(STDIN_FILENO), "r") : fopen(path, "re") else {
      throw Failure(.file, "\(path): cannot be read: \(String(cString: strerror(errno)))")
    }
    self.file = file
  }

  deinit {
    free(text)
    fclose(file)
  }

  /// The next batch; nil where there is none.
  package func next(workers: Int, experts: Int) throws(Failure) -> Batch? {
    var batch: Batch?
    var worker = 0
    while case let length = getline(&text, &room, file), length >= 0 {
      line += 1
      guard let row = try numbers(length, experts, into: batch, worker, workers) else {
        if worker > 0 { break }
        continue
      }
      if batch == nil { batch = try Batch(workers: workers, experts: experts) }
      if worker == 0 { _ = try numbers(length, experts, into: batch, 0, workers) }
      guard row == experts else {
        throw Failure(.file, "\(name): line \(line) has \(row) numbers, not one for each of \(experts) experts")
      }
      worker += 1
    }
    guard ferror(file) == 0 else {
      throw Failure(.file, "\(name): cannot be read: \(String(cString: strerror(errno)))")
    }
    guard worker == 0 || worker == workers else {
      throw Failure(
        .file, "\(name): the batch up to line \(line) has \(worker) lines, not one for each of \(workers) workers")
    }
    return batch
  }

  /// How many numbers are in the line just read, which go to a worker's counts; nil where there are none.
  private func numbers(_ length: Int, _ experts: Int, into batch: Batch?, _ worker: Int, _ workers: Int)
    throws(Failure) -> Int?
  {
    let bytes = UnsafeRawBufferPointer(start: text, count: length)
    let counts = batch.map { $0.traffic.counts + worker * experts }
    var (at, found) = (0, 0)
    func isDigit(_ byte: UInt8) -> Bool { byte >= 48 && byte < 58 }
    while at < length {
      let byte = bytes[at]
      if byte == UInt8(ascii: "#") { break }
      if byte <= 32 || byte == UInt8(ascii: ",") || byte == UInt8(ascii: ";") {
        at += 1
        continue
      }
      var value = 0
      let start = at
      while at < length, isDigit(bytes[at]), value <= Int(Int32.max) {
        value = value * 10 + Int(bytes[at] - 48)
        at += 1
      }
      guard at > start, value <= Int(Int32.max), at == length || bytes[at] <= 32 || ",;#".utf8.contains(bytes[at])
      else {
        let rest = bytes[start...].prefix { $0 > 32 && $0 != UInt8(ascii: ",") }
        let word = String(decoding: rest.prefix(20), as: UTF8.self)
        throw Failure(.file, "\(name): line \(line): \"\(word)\" is no whole number from 0 to \(Int32.max)")
      }
      if found < experts, worker < workers, let counts { counts[found] = UInt32(value) }
      found += 1
    }
    guard found > 0 else { return nil }
    guard worker < workers else {
      throw Failure(
        .file, "\(name): line \(line) is one more than there are workers, \(workers); an empty line ends a batch")
    }
    return found
  }
}

/// Options that say what moves: shared by commands that predict.
struct WorkloadOptions: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      """
      Sizes, as d=1024,h=2048,E=16,k=2,n=1024,activation=gelu, or a JSON file: widths, experts (one for each worker), \
      choices (2), tokens of each worker (1024), activation.
      """, valueName: "layer"))
  var layer: String

  @Option(
    help: ArgumentHelp(
      "Rows of each worker for each expert: a line a worker, a number an expert; - is the standard input.",
      valueName: "file"))
  var counts: String?

  @Option(
    help: ArgumentHelp(
      "Popularity of experts by the law of Zipf with this exponent; 0, the default: all alike.", valueName: "s"))
  var zipf: Double?

  @Option(help: ArgumentHelp("Counts of many batches, each ended by an empty line.", valueName: "file"))
  var trace: String?

  @Option(help: ArgumentHelp("Deals the ranks of popularity out to experts; 0: in their order.", valueName: "number"))
  var seed: UInt64 = 1

  func check() throws(Failure) {
    guard [counts != nil, zipf != nil, trace != nil].count(where: { $0 }) <= 1 else {
      throw Failure(.argument, "--counts, --zipf and --trace exclude each other")
    }
    if let zipf, !(zipf >= 0 && zipf <= 100) {
      throw Failure(.argument, "--zipf is an exponent from 0 to 100, not \(zipf)")
    }
  }

  /// Calls `body` with one batch after another, only one of which is kept.
  func forEachBatch(_ shape: Shape, workers: Int, rows: Int, _ body: (Batch) throws -> Void) throws {
    guard let path = counts ?? trace else {
      let shares = Batch.zipf(zipf ?? 0, experts: shape.experts, seed: zipf == nil ? 0 : seed)
      return try body(try Batch(workers: workers, rows: rows, shares: shares))
    }
    let reader = try CountsReader(path)
    var batches = 0
    while let batch = try reader.next(workers: workers, experts: shape.experts) {
      guard counts == nil || batches == 0 else {
        throw Failure(.file, "\(path): has more than one batch; --trace takes these")
      }
      guard !batch.isEmpty else { throw Failure(.file, "\(path): batch \(batches + 1) has no rows at all") }
      try body(batch)
      batches += 1
    }
    guard batches > 0 else { throw Failure(.file, "\(path): has no counts") }
  }
}

/// Options that name a cluster.
struct ClusterOptions: ParsableArguments {
  @Option(help: ArgumentHelp("The cluster, a JSON file; docs/model.md has its keys.", valueName: "file"))
  var cluster: String

  @Option(
    help: ArgumentHelp(
      "As if the cluster had so many workers: the places in its root are repeated.", valueName: "number"))
  var workers: Int?

  func read() throws(Failure) -> Cluster.Document {
    try ClusterOptions.read(cluster)
  }

  static func read(_ path: String) throws(Failure) -> Cluster.Document {
    try Documents.read(Cluster.Document.self, from: path)
  }

  func make() throws(Failure) -> Cluster {
    do throws(Failure) {
      var document = try read()
      if let workers {
        _ = try Cluster(document)
        document = try document.repeated(to: workers)
      }
      return try Cluster(document)
    } catch {
      guard error.kind == .file, !error.message.hasPrefix(cluster) else { throw error }
      throw Failure(.file, "\(cluster): \(error.message)")
    }
  }
}
