import CFasterMoE
import CHints
import FasterMoE
import Glibc

// Where C meets Swift: options of any age in, structs of any age out, failures into a status and a text, handles.

/// Runs one call of the C interface and turns its failure into a status, the text kept for `fmoe_last_error`.
/// A call that all ranks make together looks at the reserve when it can tell the others.
func answer(together isTogether: Bool = false, _ call: () throws(Failure) -> Void) -> fmoe_status {
  do throws(Failure) {
    try withPlainFloats { () throws(Failure) in
      if !isTogether { try Reserve.fill() }
      try call()
    }
    return FMOE_OK
  } catch {
    LastError.set(error.message)
    return switch error.kind {
    case .argument: FMOE_ERROR_ARGUMENT
    case .options: FMOE_ERROR_OPTIONS
    case .stage: FMOE_ERROR_STAGE
    case .file: FMOE_ERROR_FILE
    case .unsupported: FMOE_ERROR_UNSUPPORTED
    case .memory: FMOE_ERROR_MEMORY
    case .topology: FMOE_ERROR_TOPOLOGY
    case .peer: FMOE_ERROR_PEER
    case .disagree: FMOE_ERROR_DISAGREE
    case .timeout: FMOE_ERROR_TIMEOUT
    case .internalDefect: FMOE_ERROR_INTERNAL
    }
  }
}

/// In `body`, and on threads that it makes, the same numbers have the same sums, whatever the host does with its own: rounds
/// otherwise, flushes subnormal numbers, traps.
func withPlainFloats<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
  var before = fenv_t()
  hint_plain_floats(&before)
  defer { fesetenv(&before) }
  return try body()
}

/// The text of each thread's latest failure, in memory that the thread's end gives back.
enum LastError {
  private static let room = 1024
  private static let none: StaticString = ""
  /// In place of a text for which there is no memory.
  private static let wordless: StaticString = "there is no memory left, not even for the text of this failure"
  private static let key: pthread_key_t = {
    var key = pthread_key_t()
    pthread_key_create(&key) { if $0 != bytes(of: wordless) { free($0) } }
    return key
  }()

  static func set(_ message: String) { message.withCString { set($0) } }

  static func set(_ message: UnsafePointer<CChar>) {
    guard let text = kept ?? fresh() else {
      pthread_setspecific(key, bytes(of: wordless))
      return
    }
    strncpy(text.assumingMemoryBound(to: CChar.self), message, room - 1)
  }

  static var text: UnsafePointer<CChar> {
    UnsafePointer((pthread_getspecific(key) ?? bytes(of: none)).assumingMemoryBound(to: CChar.self))
  }

  private static var kept: UnsafeMutableRawPointer? {
    let text = pthread_getspecific(key)
    return text == bytes(of: wordless) ? nil : text
  }

  private static func fresh() -> UnsafeMutableRawPointer? {
    guard let text = calloc(1, room) else { return nil }
    pthread_setspecific(key, text)
    return text
  }

  private static func bytes(of text: StaticString) -> UnsafeMutableRawPointer { .init(mutating: text.utf8Start) }
}

func require<T>(_ pointer: T?, _ name: StaticString) throws(Failure) -> T {
  guard let pointer else { throw Failure(.argument, "\(name) is NULL") }
  return pointer
}

func refuseNull(_ pointer: UnsafeMutablePointer<OpaquePointer?>?, _ name: StaticString) throws(Failure) {
  if pointer == nil { throw Failure(.argument, "\(name) is NULL") }
}

/// Reads a struct that begins with its `struct_size`: what an older, shorter one lacks is zero, and a newer, longer one
/// must hold zeros where this version knows no fields. No header makes a size that is not a multiple of its alignment: then
/// the last field may be there in part, and is taken for missing.
func readOptions<T>(_ given: UnsafePointer<T>?, _ name: StaticString, smallest: Int, zero: T) throws(Failure) -> T {
  guard let given else { return zero }
  let bytes = UnsafeRawPointer(given)
  let size = Int(bytes.load(as: UInt32.self))
  guard size >= smallest else {
    throw Failure(.options, "\(name).struct_size is \(size), less than the \(smallest) bytes of its required fields")
  }
  let known = MemoryLayout<T>.size
  if size > known {
    for offset in known..<size where bytes.load(fromByteOffset: offset, as: UInt8.self) != 0 {
      throw Failure(.options, "\(name) has a field at byte \(offset) that this version does not know")
    }
  }
  let whole = min(size, known) / MemoryLayout<T>.alignment * MemoryLayout<T>.alignment
  var options = zero
  withUnsafeMutableBytes(of: &options) { $0.copyMemory(from: UnsafeRawBufferPointer(start: bytes, count: whole)) }
  return options
}

/// The room that the caller's struct has by its `struct_size`.
func room<T>(in given: UnsafeMutablePointer<T>, _ name: StaticString) throws(Failure) -> Int {
  let size = Int(UnsafeRawPointer(given).load(as: UInt32.self))
  guard size >= 8 else { throw Failure(.options, "\(name)->struct_size is \(size); set it to sizeof the struct") }
  return size
}

/// Fills as much of the caller's struct as it has room for, and says in `struct_size` how much that was.
func write<T>(_ value: T, to out: UnsafeMutablePointer<T>, room: Int) {
  let size = min(room, MemoryLayout<T>.size)
  withUnsafeBytes(of: value) { UnsafeMutableRawPointer(out).copyMemory(from: $0.baseAddress!, byteCount: size) }
  UnsafeMutableRawPointer(out).storeBytes(of: UInt32(size), as: UInt32.self)
}

/// A C handle owns one reference to its object.
func handle(_ object: some AnyObject) -> OpaquePointer { OpaquePointer(Unmanaged.passRetained(object).toOpaque()) }

func object<T: AnyObject>(_ handle: OpaquePointer?, _ name: StaticString, as type: T.Type = T.self) throws(Failure) -> T
{
  Unmanaged<T>.fromOpaque(UnsafeRawPointer(try require(handle, name))).takeUnretainedValue()
}

func release<T: AnyObject>(_ handle: OpaquePointer, as type: T.Type) {
  Unmanaged<T>.fromOpaque(UnsafeRawPointer(handle)).release()
}
