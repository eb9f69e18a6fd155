import Glibc

/// The safetensors format: 8 bytes that say how long the header is, little end first; the header, JSON; the tensors'
/// bytes, one behind the other.
///
/// What is written here also has checksums, in the header's `__metadata__`: `xxh64.NAME` of each tensor's bytes and
/// `fastermoe.header` of the header's text with its own digits all 0. So no byte can change unnoticed but in what
/// other programs have written, which need no checksums.
package enum Safetensors {
  package struct Tensor: Equatable, Sendable {
    package let name: String
    /// `F32`, `I64` and the like.
    package let type: String
    package let shape: [Int]
    /// Where it is behind the header.
    package let bytes: Range<Int>

    package init(_ name: String, _ type: String, _ shape: [Int], _ bytes: Range<Int>) {
      (self.name, self.type, self.shape, self.bytes) = (name, type, shape, bytes)
    }
  }

  /// Longest header that readers of the format accept.
  private static let mostHeaderBytes = 100_000_000
  private static let own = "fastermoe."
  private static let headerKey = "fastermoe.header"
  private static let format = ("fastermoe.format", "1")
  private static let zeros = String(repeating: "0", count: 16)
  private static func key(of tensor: String) -> String { "xxh64.\(tensor)" }

  /// Where the header's own digits are in its text.
  private static func digits(in text: UnsafeRawBufferPointer) -> Int? {
    let before = Array("\"\(headerKey)\":\"".utf8)
    for place in 0..<max(0, text.count - before.count - zeros.utf8.count)
    where text[place] == before[0] && text[place..<place + before.count].elementsEqual(before) {
      return place + before.count
    }
    return nil
  }

  private static func checksum(ofHeader text: UnsafeRawBufferPointer, digits: Int) -> String {
    var copy = Array(text)
    for digit in 0..<zeros.utf8.count { copy[digits + digit] = UInt8(ascii: "0") }
    var sum = Checksum()
    copy.withUnsafeBytes { sum.add($0.baseAddress!, $0.count) }
    return sum.digits
  }

  // MARK: Writing

  /// Writes tensors one after the other, in the order in which they were announced.
  package final class Writer {
    private let draft: Draft
    /// The first 8 bytes and the header.
    private var text: [UInt8]
    /// Where the digits of each tensor and, last, of the header are in the text.
    private var digits: [Int] = []
    private let sizes: [Int]
    private var tensor = 0
    private var written = 0
    private var sum = Checksum()

    package init(_ path: UnsafePointer<CChar>, _ tensors: [Tensor]) throws(Failure) {
      draft = try Draft(of: path)
      sizes = tensors.map(\.bytes.count)
      text = Array(repeating: 0, count: 8)
      func add(_ words: String) { text += words.utf8 }
      add("{\"__metadata__\":{\"\(format.0)\":\"\(format.1)\"")
      for key in tensors.map({ key(of: $0.name) }) + [headerKey] {
        add(",\"\(key)\":\"")
        digits.append(text.count)
        add("\(zeros)\"")
      }
      add("}")
      for tensor in tensors {
        add(",\"\(tensor.name)\":{\"dtype\":\"\(tensor.type)\",\"shape\":[")
        add(tensor.shape.map(String.init).joined(separator: ","))
        add("],\"data_offsets\":[\(tensor.bytes.lowerBound),\(tensor.bytes.upperBound)]}")
      }
      add("}")
      // Whoever maps the file finds the first tensor on a cache line of its own.
      while text.count % 64 != 0 { add(" ") }
      guard text.count - 8 <= mostHeaderBytes else {
        throw Failure(
          .file, "\(String(cString: path)): \(tensors.count) tensors are more than a file of this format can list")
      }
      withUnsafeBytes(of: UInt64(text.count - 8).littleEndian) { for at in 0..<8 { text[at] = $0[at] } }
      try draft.write(text, text.count)
    }

    /// Appends to the tensor whose turn it is. Every piece of one but the last is a multiple of 32 bytes.
    package func write(_ bytes: UnsafeRawPointer, _ count: Int) throws(Failure) {
      precondition(tensor < sizes.count && written + count <= sizes[tensor], "as long as announced")
      sum.add(bytes, count)
      try draft.write(bytes, count)
      written += count
      guard written == sizes[tensor] else { return }
      enter(sum.digits, at: digits[tensor])
      sum = Checksum()
      written = 0
      tensor += 1
    }

    /// After all tensors: from now on the path leads to them.
    package func finish() throws(Failure) {
      precondition(tensor == sizes.count, "all tensors that were announced")
      let own = digits[tensor] - 8
      enter(
        text.withUnsafeBytes { checksum(ofHeader: UnsafeRawBufferPointer(rebasing: $0[8...]), digits: own) },
        at: own + 8)
      try draft.rewrite(text, text.count, at: 0)
      try draft.replace()
    }

    private func enter(_ word: String, at place: Int) {
      for (at, digit) in word.utf8.enumerated() { text[place + at] = digit }
    }
  }

  // MARK: Reading

  /// A file whose header is sound.
  package final class Reader {
    package let file: OpenFile
    /// In the order of their bytes, which fill the file behind the header without a gap.
    package let tensors: [Tensor]
    /// What it states about the bytes of each tensor; nil if another program wrote it.
    private let sums: [String]?
    private let start: Int

    package init(_ path: UnsafePointer<CChar>) throws(Failure) {
      file = try OpenFile(path)
      var length: UInt64 = 0
      guard file.bytes >= 8 else { throw file.complaint("is no safetensors file: it ends before its header") }
      try file.read(&length, 8, at: 0)
      length = UInt64(littleEndian: length)
      guard length <= UInt64(mostHeaderBytes) else {
        throw file.complaint("is no safetensors file: its header would have \(length) bytes")
      }
      start = 8 + Int(length)
      guard start <= file.bytes else {
        throw file.complaint("ends at byte \(file.bytes), inside its header, which goes to \(start)")
      }
      let memory = try Region(bytes: Int(length), for: "the header of a file")
      try file.read(memory.base, Int(length), at: 8)
      let text = UnsafeRawBufferPointer(start: memory.base, count: Int(length))
      let header = try Documents.decode(Header.self, from: text, in: path)
      tensors = try Reader.inOrder(header.tensors, in: file, from: start)
      sums = try Reader.sums(header.metadata, tensors, text, file)
    }

    /// Whether its bytes can be told from altered ones.
    package var hasChecksums: Bool { sums != nil }

    /// Reads `count` bytes of a tensor, from its byte `offset` on.
    package func read(_ tensor: Int, _ bytes: UnsafeMutableRawPointer, _ count: Int, at offset: Int) throws(Failure) {
      try file.read(bytes, count, at: start + tensors[tensor].bytes.lowerBound + offset)
    }

    /// Fails unless `sum` is the one that the file states for the bytes of a tensor.
    package func check(_ tensor: Int, _ sum: Checksum) throws(Failure) {
      guard let sums, sums[tensor] != sum.digits else { return }
      throw file.complaint("tensor \"\(tensors[tensor].name)\" is not what was saved: its checksum differs")
    }

    private static func inOrder(_ tensors: [Tensor], in file: OpenFile, from start: Int) throws(Failure) -> [Tensor] {
      let size = file.bytes - start
      let sorted = tensors.sorted {
        ($0.bytes.lowerBound, $0.bytes.upperBound) < ($1.bytes.lowerBound, $1.bytes.upperBound)
      }
      var end = 0
      for tensor in sorted {
        guard tensor.bytes.lowerBound == end else {
          throw file.complaint(
            "tensor \"\(tensor.name)\" begins at byte \(tensor.bytes.lowerBound) of the data, not at \(end)")
        }
        guard tensor.bytes.upperBound <= size else {
          throw file.complaint(
            "ends at byte \(size) of the data, inside tensor \"\(tensor.name)\", which goes to \(tensor.bytes.upperBound)"
          )
        }
        end = tensor.bytes.upperBound
      }
      guard end == size else { throw file.complaint("has \(size - end) bytes behind its last tensor") }
      return sorted
    }

    private static func sums(
      _ metadata: [String: String], _ tensors: [Tensor], _ text: UnsafeRawBufferPointer, _ file: OpenFile
    ) throws(Failure) -> [String]? {
      guard metadata.keys.contains(where: { $0.hasPrefix(own) }) else { return nil }
      guard metadata[format.0] == format.1 else {
        throw file.complaint("is not of a format that this version knows: \(format.0) is not \(format.1)")
      }
      guard let place = digits(in: text), metadata[headerKey] == checksum(ofHeader: text, digits: place) else {
        throw file.complaint("its header is not what was saved: its checksum differs")
      }
      var sums: [String] = []
      for tensor in tensors {
        guard let sum = metadata[key(of: tensor.name)] else {
          throw file.complaint("tensor \"\(tensor.name)\" has no checksum")
        }
        sums.append(sum)
      }
      return sums
    }
  }

  /// A header as JSON has it.
  private struct Header: Decodable {
    var tensors: [Tensor] = []
    var metadata: [String: String] = [:]

    private struct Key: CodingKey {
      let stringValue: String
      var intValue: Int? { nil }
      init(stringValue: String) { self.stringValue = stringValue }
      init?(intValue: Int) { nil }
    }

    private struct Entry: Decodable {
      let dtype: String
      let shape: [Int]
      let data_offsets: [Int]
    }

    init(from decoder: any Decoder) throws {
      let members = try decoder.container(keyedBy: Key.self)
      for key in members.allKeys {
        try Reserve.fill()  // each entry takes some dozen small blocks, and there may be any number of them
        if key.stringValue == "__metadata__" {
          metadata = try members.decode([String: String].self, forKey: key)
          continue
        }
        let entry = try members.decode(Entry.self, forKey: key)
        guard entry.data_offsets.count == 2, entry.data_offsets[0] >= 0, entry.data_offsets[0] <= entry.data_offsets[1]
        else {
          throw DecodingError.dataCorruptedError(
            forKey: key, in: members, debugDescription: "has data_offsets that are no range")
        }
        tensors.append(
          Tensor(key.stringValue, entry.dtype, entry.shape, entry.data_offsets[0]..<entry.data_offsets[1]))
      }
    }
  }
}
