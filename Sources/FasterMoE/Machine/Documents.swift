import FoundationEssentials
import Glibc

/// Values kept in JSON files. Every key of a file must be known, and a file is written whole or not at all.
///
/// A path is bytes, not text. Failures are `.file` and name the path, the place in the document and the reason.
package enum Documents {
  /// Whether there is anything at `path`, be it readable or not.
  package static func isThere(_ path: UnsafePointer<CChar>) -> Bool { access(path, F_OK) == 0 || errno != ENOENT }

  /// The value that the file at `path` holds.
  package static func read<Value: Codable>(_ type: Value.Type, from path: UnsafePointer<CChar>) throws(Failure) -> Value
  {
    let data = try bytes(of: path)
    let room = try room(for: data)
    defer { free(room) }
    do {
      let value = try decoder.decode(type, from: data)
      // What a value does not write back, it has not understood.
      let known = try decoder.decode(Skeleton.self, from: encoder.encode(value))
      if let stranger = try decoder.decode(Skeleton.self, from: data).stranger(to: known) {
        throw Failure(.file, "\(String(cString: path)): \(stranger)")
      }
      return value
    } catch let failure as Failure {
      throw failure
    } catch {
      var syntax = Syntax(data)
      throw Failure(.file, "\(String(cString: path)): \(syntax.complaint ?? reason(of: error))")
    }
  }

  /// Replaces the file at `path`: who reads it meanwhile sees the old one or the new one. What is there and no file, such
  /// as a device or a link, stays.
  package static func write(_ value: some Encodable, to path: UnsafePointer<CChar>) throws(Failure) {
    let bytes: [UInt8]
    do throws(Failure) { bytes = try text(of: value) } catch {
      throw Failure(error.kind, "\(String(cString: path)): \(error.message)")
    }
    let draft = try Draft(of: path)
    try draft.write(bytes, bytes.count)
    try draft.replace()
  }

  /// A value as JSON, with a line's end.
  package static func text(of value: some Encodable) throws(Failure) -> [UInt8] {
    let room = try Reserve.room(16 << 20, for: "a document")  // up to a megabyte of text
    defer { free(room) }
    do { return Array(try encoder.encode(value)) + [UInt8(ascii: "\n")] } catch {
      throw Failure(.file, reason(of: error))
    }
  }

  /// The value that `text` holds, a part of the file at `path`. Keys that are not known are passed over.
  static func decode<Value: Decodable>(
    _ type: Value.Type, from text: UnsafeRawBufferPointer, in path: UnsafePointer<CChar>
  ) throws(Failure) -> Value {
    let data = Data(text)
    let room = try room(for: data)
    defer { free(room) }
    do { return try decoder.decode(type, from: data) } catch let failure as Failure { throw failure } catch {
      var syntax = Syntax(data)
      throw Failure(.file, "\(String(cString: path)): \(syntax.complaint ?? reason(of: error))")
    }
  }

  private static func bytes(of path: UnsafePointer<CChar>) throws(Failure) -> Data {
    let file = open(path, O_RDONLY | O_CLOEXEC)
    guard file >= 0 else { throw systemRefusal(path, "cannot be read") }
    defer { close(file) }
    var data = Data()
    var piece = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let count = Glibc.read(file, &piece, piece.count)
      if count < 0 && errno == EINTR { continue }
      guard count >= 0 else { throw systemRefusal(path, "cannot be read") }
      if count == 0 { return data }
      data.append(piece, count: count)
      guard data.count <= mostBytes else {
        throw Failure(.file, "\(String(cString: path)): is longer than the \(mostBytes) bytes a document may have")
      }
    }
  }

  private static let mostBytes = 256 << 20

  /// Up to 40 bytes for each byte were counted.
  private static func room(for text: Data) throws(Failure) -> UnsafeMutableRawPointer {
    try Reserve.room(256 << 10 + 48 * text.count, for: "a document of \(text.count) bytes")
  }

  private static func reason(of error: any Error) -> String {
    switch error {
    case DecodingError.keyNotFound(let key, let context): "\(place(context.codingPath))lacks \"\(key.stringValue)\""
    case DecodingError.typeMismatch(_, let context), DecodingError.valueNotFound(_, let context):
      "\(place(context.codingPath))is not what it should be: \(context.debugDescription)"
    // Well-formed, but a number is beyond what a Double holds: the decoder's words are about all of the document.
    case DecodingError.dataCorrupted(let context) where context.codingPath.isEmpty:
      "has a number that is malformed or out of range"
    case DecodingError.dataCorrupted(let context): "\(place(context.codingPath))\(context.debugDescription)"
    default: "\(error)"
    }
  }

  /// The way to a value: `places[3].up `.
  private static func place(_ path: [any CodingKey]) -> String {
    guard !path.isEmpty else { return "" }
    return path.reduce("") { way, key in
      key.intValue.map { "\(way)[\($0)]" } ?? (way.isEmpty ? key.stringValue : "\(way).\(key.stringValue)")
    } + " "
  }

  // JSON has no infinity; a rate without limit is written in words.
  private static var decoder: JSONDecoder {
    let decoder = JSONDecoder()
    decoder.nonConformingFloatDecodingStrategy = .convertFromString(
      positiveInfinity: "infinite", negativeInfinity: "-infinite", nan: "not a number")
    return decoder
  }

  private static var encoder: JSONEncoder {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    encoder.nonConformingFloatEncodingStrategy = .convertToString(
      positiveInfinity: "infinite", negativeInfinity: "-infinite", nan: "not a number")
    return encoder
  }
}

/// The keys of a document without its values.
private enum Skeleton: Decodable {
  case object([String: Skeleton])
  case array([Skeleton])
  case value, null

  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let members = try? container.decode([String: Skeleton].self) {
      self = .object(members)
    } else if let elements = try? container.decode([Skeleton].self) {
      self = .array(elements)
    } else {
      self = .value
    }
  }

  /// What is here and not in `known`, in words.
  func stranger(to known: Skeleton, at path: String = "") -> String? {
    switch (self, known) {
    case (.object(let members), .object(let others)):
      for (key, member) in members.sorted(by: { $0.key < $1.key }) {
        let way = path.isEmpty ? key : "\(path).\(key)"
        guard let other = others[key] else {
          if case .null = member { return "\(way) is null; leave out what is not there" }
          return "\(path.isEmpty ? "the document" : path) has the key \"\(key)\", which is not known"
        }
        if let stranger = member.stranger(to: other, at: way) { return stranger }
      }
    case (.array(let elements), .array(let others)):
      for (index, pair) in zip(elements, others).enumerated() {
        if let stranger = pair.0.stranger(to: pair.1, at: "\(path)[\(index)]") { return stranger }
      }
    default: break
    }
    return nil
  }
}

/// Finds where a text stops being JSON, which the decoder keeps to itself.
private struct Syntax {
  private let text: [UInt8]
  private var at = 0

  init(_ data: Data) { text = Array(data) }

  /// Where and what, or nil for JSON.
  var complaint: String? {
    mutating get {
      at = 0
      let isValue = value(depth: 0)
      space()
      if isValue && at == text.count { return nil }
      guard at < text.count else { return "is not JSON: it ends too early" }
      let line = 1 + text[..<at].count { $0 == UInt8(ascii: "\n") }
      let rest = String(decoding: text[at...].prefix { $0 != UInt8(ascii: "\n") }.prefix(30), as: UTF8.self)
      return "is not JSON: line \(line) is wrong at `\(rest)`"
    }
  }

  private mutating func space() { while at < text.count, [9, 10, 13, 32].contains(text[at]) { at += 1 } }

  private mutating func take(_ byte: Unicode.Scalar) -> Bool {
    space()
    guard at < text.count, text[at] == UInt8(ascii: byte) else { return false }
    at += 1
    return true
  }

  private mutating func value(depth: Int) -> Bool {
    guard depth < 500 else { return false }
    if take("{") { return list(until: "}") { $0.string() && $0.take(":") && $0.value(depth: depth + 1) } }
    if take("[") { return list(until: "]") { $0.value(depth: depth + 1) } }
    if at < text.count, text[at] == UInt8(ascii: "\"") { return string() }
    let start = at
    while at < text.count, text[at] > 32, !",:{}[]\"".utf8.contains(text[at]) { at += 1 }
    let word = String(decoding: text[start..<at], as: UTF8.self)
    if ["true", "false", "null"].contains(word) || Double(word).map({ $0 == $0 && !word.contains("n") }) ?? false {
      return true
    }
    at = start
    return false
  }

  private mutating func list(until end: Unicode.Scalar, _ element: (inout Syntax) -> Bool) -> Bool {
    if take(end) { return true }
    repeat { guard element(&self) else { return false } } while take(",")
    return take(end)
  }

  private mutating func string() -> Bool {
    guard take("\"") else { return false }
    while at < text.count, text[at] != UInt8(ascii: "\""), text[at] >= 32 {
      at += text[at] == UInt8(ascii: "\\") ? 2 : 1
    }
    at = min(at, text.count)
    return take("\"")
  }
}
