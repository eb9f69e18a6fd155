import Glibc

extension Layer {
  /// Writes the parameters of all ranks, what AdamW remembers, and where the gate's draws are, to the file at `path` of
  /// rank 0.
  package func save(to path: UnsafePointer<CChar>?) throws(Failure) {
    let courier = Courier(self)
    let own = failure { () throws(Failure) in
      if path == nil { throw Failure(.argument, "path is NULL") }
      try courier.reserve()
    }
    courier.meet(
      try group.agree(
        .save, own,
        same: [UInt64(number), UInt64(moments.map { $0.steps + 1 } ?? 0), UInt64(trainings), 0, 0, 0, 0, 0],
        words: courier.words(moments)))
    let outcome = failure { () throws(Failure) in
      try courier.run { () throws(Failure) in
        let contents = Contents(
          shape, isNoisy: rule.isNoisy, hasBias: values.bias != nil, hasMoments: moments != nil,
          hasPasses: rule.draws || jitter > 0)
        let file = try Safetensors.Writer(path!, contents.stored)
        for counter in contents.counters {
          var value = Int64(counter == .steps ? moments!.steps : trainings).littleEndian
          try file.write(&value, 8)
        }
        for tensor in contents.tensors {
          try Courier.pieces(tensor.count) { first, count throws(Failure) in
            try file.write(try courier.fetch(tensor, first, count), 4 * count)
          }
        }
        try file.finish()
      }
    }
    try group.agree(.save, outcome, from: .call)
  }

  /// Gives all ranks their parts of the file at `path` of rank 0.
  ///
  /// It is read twice: nothing changes before all of it has been found to be sound. So what can stop a load halfway is a
  /// disk that fails or a file that is overwritten in between, or a peer that is lost.
  package func load(from path: UnsafePointer<CChar>?) throws(Failure) {
    let courier = Courier(self)
    var own = failure { () throws(Failure) in
      if path == nil { throw Failure(.argument, "path is NULL") }
      try courier.reserve()
    }
    try group.agree(.load, own, same: [UInt64(number), 0, 0, 0, 0, 0, 0, 0])

    var file: Safetensors.Reader?
    var numbers: [Int?] = []
    var contents: Contents?
    var counts: [Contents.Counter: Int] = [:]
    own = failure { () throws(Failure) in
      try courier.run { () throws(Failure) in
        let reader = try Safetensors.Reader(path!)
        do throws(Failure) {
          (contents, numbers) = try Contents.match(
            reader.tensors, shape, isNoisy: rule.isNoisy, hasBias: values.bias != nil)
        } catch {
          throw error.kind == .file ? reader.file.complaint(error.message) : error
        }
        for place in reader.tensors.indices {
          let counter = numbers[place] == nil ? Contents.Counter(rawValue: reader.tensors[place].name) : nil
          guard reader.hasChecksums || counter != nil else { continue }
          var sum = Checksum()
          try Courier.pieces(reader.tensors[place].bytes.count / 4) { first, count throws(Failure) in
            try courier.wait()
            try reader.read(place, courier.buffer, 4 * count, at: 4 * first)
            sum.add(courier.buffer, 4 * count)
          }
          try reader.check(place, sum)
          if let counter { counts[counter] = try Layer.count(counter, in: courier.buffer, of: reader.file) }
        }
        file = reader
      }
    }
    var news = Notice.Words()
    news.number = UInt64(counts[.steps].map { $0 + 1 } ?? 0)
    news.passes = UInt64(counts[.passes].map { $0 + 1 } ?? 0)
    let words = try group.agree(.load, own, words: news, from: .call)[0].words
    let (told, begun) = (Int(words.number), Int(words.passes))

    var remembered: Moments?
    own = failure { () throws(Failure) in
      guard told > 0 else { return }
      remembered = moments
      if remembered == nil { remembered = try fresh() }
    }
    courier.meet(try group.agree(.load, own, words: courier.words(remembered), from: .call))

    own = failure { () throws(Failure) in
      try courier.run { () throws(Failure) in
        for place in file!.tensors.indices {
          guard let tensor = numbers[place].map({ contents!.tensors[$0] }) else { continue }
          try Courier.pieces(tensor.count) { first, count throws(Failure) in
            try file!.read(place, courier.buffer, 4 * count, at: 4 * first)
            try courier.store(tensor, first, count)
          }
        }
      }
    }
    try group.agree(.load, own, from: .call)
    moments = remembered
    remembered?.steps = told - 1
    if begun > 0 { trainings = begun - 1 }
  }

  private static func count(_ counter: Contents.Counter, in bytes: UnsafeRawPointer, of file: OpenFile) throws(Failure)
    -> Int
  {
    let count = Int64(littleEndian: bytes.loadUnaligned(as: Int64.self))
    // Streams of draws are numbered by passes.
    guard count >= 0, count < (counter == .steps ? 1 << 53 : 1 << 46) else {
      throw file.complaint("tensor \"\(counter.rawValue)\" is \(count), which no number of \(counter) can be")
    }
    return Int(count)
  }
}

/// Lets rank 0, which alone has the file, read and write the blocks of all ranks, piece after piece.
///
/// Ranks of one process wait while it does so itself. Over a transport they run its errands; hearing of each, even of
/// those that are not theirs, they know that it is alive.
private final class Courier {
  private let layer: Layer
  private var group: Group { layer.group }
  private let wire: WirePeers?
  /// [W, blocks] where the blocks of each rank are that this one reaches.
  private var blocks: [UnsafeMutablePointer<Float>?]
  /// [pieceFloats] of the running call.
  private(set) var buffer: UnsafeMutablePointer<Float>

  private static let pieceFloats = 1 << 20

  /// What rank 0 wants of one rank, or of all if `rank` is -1.
  private struct Errand: BitwiseCopyable {
    enum What: UInt32 { case wait, give, take, end }
    var what: UInt32
    var rank: Int32 = -1
    var block = 0
    var first = 0
    var count = 0
  }

  init(_ layer: Layer) {
    self.layer = layer
    wire = layer.group.size > 1 ? layer.group.peers as? WirePeers : nil
    blocks = Array(repeating: nil, count: layer.group.size * Contents.Block.allCases.count)
    buffer = layer.values.base
  }

  /// Has the memory that everything below needs.
  func reserve() throws(Failure) {
    buffer = try group.workspace(bytes: 4 * Courier.pieceFloats).assumingMemoryBound(to: Float.self)
    let each = (4 * Courier.pieceFloats + group.size - 1) / group.size
    try group.peers.reserve(bytes: max(each, MemoryLayout<Errand>.stride), values: 0)
  }

  /// Where this rank's blocks are.
  func words(_ moments: Moments?) -> Notice.Words {
    var words = Notice.Words()
    words.values = UnsafeRawPointer(layer.values.base)
    words.means = UnsafeRawPointer(moments?.means.base)
    words.squares = UnsafeRawPointer(moments?.squares.base)
    for block in Contents.Block.allCases { set(block, of: group.rank, words) }
    return words
  }

  /// Learns where the blocks of the others are.
  func meet(_ all: UnsafePointer<Notice>) {
    guard wire == nil else { return }
    for rank in 0..<group.size {
      for block in Contents.Block.allCases { set(block, of: rank, all[rank].words) }
    }
  }

  private func set(_ block: Contents.Block, of rank: Int, _ words: Notice.Words) {
    let base =
      switch block {
      case .values: words.values
      case .means: words.means
      case .squares: words.squares
      }
    blocks[rank * Contents.Block.allCases.count + block.rawValue] =
      UnsafeMutableRawPointer(mutating: base)?.assumingMemoryBound(to: Float.self)
  }

  private func base(_ rank: Int, _ block: Int) -> UnsafeMutablePointer<Float>? {
    blocks[rank * Contents.Block.allCases.count + block]
  }

  /// Has rank 0 do `body` and the others what it asks for meanwhile.
  func run(_ body: () throws(Failure) -> Void) throws(Failure) {
    guard group.rank == 0 else { return try serve() }
    let own = failure(of: body)
    let end = failure { () throws(Failure) in try send(.end) }
    if let failure = own ?? end { throw failure }
  }

  /// Tells the others that rank 0 is at work.
  func wait() throws(Failure) { try send(.wait) }

  /// Values of `tensor`, `count` from `first` on, until the next call.
  func fetch(_ tensor: Contents.Tensor, _ first: Int, _ count: Int) throws(Failure) -> UnsafePointer<Float> {
    let (owner, block, place) = place(of: tensor, first)
    if let base = base(owner, block) {
      try send(.wait)
      return UnsafePointer(base + place)
    }
    try send(.give, owner, block, place, count)
    try wire!.carry(buffer, count: count, from: owner, to: 0)
    return UnsafePointer(buffer)
  }

  /// Puts what is in the buffer to where `tensor` is, `count` values from `first` on: of its owner, or, of the gate, of all.
  func store(_ tensor: Contents.Tensor, _ first: Int, _ count: Int) throws(Failure) {
    let (owner, block, place) = place(of: tensor, first)
    for rank in 0..<group.size where rank == owner || tensor.part.isOfAll {
      if let base = base(rank, block) { (base + place).update(from: buffer, count: count) }
    }
    guard let wire else { return }
    if tensor.part.isOfAll {
      try send(.take, -1, block, place, count)
      try wire.broadcast(buffer, count: count, from: 0)
    } else if owner != 0 {
      try send(.take, owner, block, place, count)
      try wire.carry(buffer, count: count, from: 0, to: owner)
    } else {
      try send(.wait)
    }
  }

  private func serve() throws(Failure) {
    guard let wire else { return }
    var errand = Errand(what: Errand.What.wait.rawValue)
    while true {
      try wire.tell(&errand, bytes: MemoryLayout<Errand>.stride, from: 0)
      let isMine = Int(errand.rank) == group.rank
      switch Errand.What(rawValue: errand.what) {
      case .give where isMine:
        try wire.carry(base(group.rank, errand.block)! + errand.first, count: errand.count, from: group.rank, to: 0)
      case .take where isMine:
        try wire.carry(base(group.rank, errand.block)! + errand.first, count: errand.count, from: 0, to: group.rank)
      case .take where errand.rank < 0:
        try wire.broadcast(base(group.rank, errand.block)! + errand.first, count: errand.count, from: 0)
      case .end: return
      default: break
      }
    }
  }

  private func send(_ what: Errand.What, _ rank: Int = -1, _ block: Int = 0, _ first: Int = 0, _ count: Int = 0)
    throws(Failure)
  {
    guard let wire else { return }
    var errand = Errand(what: what.rawValue, rank: Int32(rank), block: block, first: first, count: count)
    try wire.tell(&errand, bytes: MemoryLayout<Errand>.stride, from: 0)
  }

  /// Whose value number `first` of `tensor` is, and where in the block: blocks are laid out alike on all ranks.
  private func place(of tensor: Contents.Tensor, _ first: Int) -> (owner: Int, block: Int, place: Int) {
    let each = layer.owned.count
    let start = layer.values.tensor(tensor.part) - layer.values.base
    return (tensor.expert / each, tensor.block.rawValue, start + tensor.expert % each * tensor.count + first)
  }

  /// Cuts `count` values into pieces that fit the buffer, each but the last a multiple of 32 bytes.
  static func pieces(_ count: Int, _ body: (_ first: Int, _ count: Int) throws(Failure) -> Void) throws(Failure) {
    for first in stride(from: 0, to: count, by: pieceFloats) { try body(first, min(pieceFloats, count - first)) }
  }
}
