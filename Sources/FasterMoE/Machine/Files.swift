import Glibc

/// A file that takes the place of the one at a path, as a whole or not at all: until `replace` it is a draft beside it.
///
/// A path is bytes, not text. Failures are `.file` and name the path and the reason. Who goes before `replace` takes the
/// draft away; a process that is killed leaves it behind, and the file at the path as it was.
package final class Draft {
  private let path: [CChar]
  private let draft: [CChar]
  private var file: Int32
  private var written = 0
  private var isReplaced = false

  /// What is at `path` and no file, such as a device or a link, is refused.
  package init(of path: UnsafePointer<CChar>) throws(Failure) {
    var there = stat()
    guard lstat(path, &there) != 0 || there.st_mode & S_IFMT == S_IFREG else {
      throw Failure(.file, "\(String(cString: path)): cannot be written: it is no file that could be replaced")
    }
    self.path = joined(path, "")
    // A name that is taken is somebody's at work, or of a process that was killed.
    var attempt = 0
    var name: [CChar]
    repeat {
      name = joined(path, ".\(getpid())-\(attempt).draft")
      file = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
      attempt += 1
    } while file < 0 && errno == EEXIST && attempt < 1000
    draft = name
    guard file >= 0 else { throw systemRefusal(path, "cannot be written") }
  }

  deinit {
    if file >= 0 { close(file) }
    if file >= 0 && !isReplaced { unlink(draft) }
  }

  /// Appends `count` bytes.
  package func write(_ bytes: UnsafeRawPointer, _ count: Int) throws(Failure) {
    try write(bytes, count, at: written)
    // What is dirty when the end comes is what `replace` has to wait for, and with it whoever waits for this rank.
    let before = written
    written += count
    if before / Draft.dirty != written / Draft.dirty, fdatasync(file) != 0, errno != EINVAL { throw refusal }
  }

  /// Writes over bytes that are there.
  package func rewrite(_ bytes: UnsafeRawPointer, _ count: Int, at offset: Int) throws(Failure) {
    try write(bytes, count, at: offset)
  }

  /// From now on the path leads to what was written, which a power cut does not change any more.
  package func replace() throws(Failure) {
    guard fsync(file) == 0 || errno == EINVAL, rename(draft, path) == 0 else { throw refusal }
    isReplaced = true
    let end = path.lastIndex(of: CChar(bitPattern: UInt8(ascii: "/")))
    let folder = open(end.map { Array(path[...$0]) + [0] } ?? joined(".", ""), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    // A folder that may be written to and not be read cannot be asked.
    guard folder >= 0 else { return }
    defer { close(folder) }
    guard fsync(folder) == 0 || errno == EINVAL else { throw refusal }
  }

  /// Bytes after which the system is made to write them to its disk.
  private static let dirty = 256 << 20

  private func write(_ bytes: UnsafeRawPointer, _ count: Int, at offset: Int) throws(Failure) {
    var done = 0
    while done < count {
      let more = pwrite(file, bytes + done, count - done, offset + done)
      if more < 0 && errno == EINTR { continue }
      guard more > 0 else { throw refusal }
      done += more
    }
  }

  private var refusal: Failure { systemRefusal(path, "cannot be written") }
}

/// A file that is there, read at any place.
package final class OpenFile {
  package let bytes: Int
  private let path: [CChar]
  private let file: Int32

  package init(_ path: UnsafePointer<CChar>) throws(Failure) {
    self.path = joined(path, "")
    // A pipe would wait here for somebody who writes.
    file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard file >= 0 else { throw systemRefusal(path, "cannot be read") }
    var there = stat()
    let isKnown = fstat(file, &there) == 0
    guard isKnown, there.st_mode & S_IFMT == S_IFREG else {
      close(file)
      throw Failure(.file, "\(String(cString: path)): cannot be read: it is no file")
    }
    bytes = Int(there.st_size)
  }

  deinit { close(file) }

  package func read(_ bytes: UnsafeMutableRawPointer, _ count: Int, at offset: Int) throws(Failure) {
    var done = 0
    while done < count {
      let more = pread(file, bytes + done, count - done, off_t(offset + done))
      if more < 0 && errno == EINTR { continue }
      guard more >= 0 else { throw systemRefusal(path, "cannot be read") }
      guard more > 0 else { throw complaint("has become shorter while it was read") }
      done += more
    }
  }

  package func complaint(_ words: String) -> Failure {
    path.withUnsafeBufferPointer { Failure(.file, "\(String(cString: $0.baseAddress!)): \(words)") }
  }
}

/// Why the system refused what was just tried with `path`.
func systemRefusal(_ path: UnsafePointer<CChar>, _ what: String) -> Failure {
  var words = [CChar](repeating: 0, count: 256)
  strerror_r(errno, &words, words.count)
  return Failure(
    .file, words.withUnsafeBufferPointer { "\(String(cString: path)): \(what): \(String(cString: $0.baseAddress!))" })
}

/// A path and what is behind it, for C.
private func joined(_ path: UnsafePointer<CChar>, _ end: String) -> [CChar] {
  Array(UnsafeBufferPointer(start: path, count: strlen(path))) + end.utf8CString
}
