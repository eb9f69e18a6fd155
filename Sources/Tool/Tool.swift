import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe` on the command line.
package struct Tool: ParsableCommand {
  package static let version = "0.1.0"
  package static let configuration = CommandConfiguration(
    commandName: "fastermoe",
    abstract: "Plan, measure and look at mixture-of-experts training on CPUs.",
    discussion: "Exit codes: 0 done, 1 could not be done, 2 what was asked for is not right.",
    version: version,
    subcommands: [Plan.self, Topology.self, Calibrate.self, Bench.self, Scale.self, Paper.self])

  package init() {}

  /// Runs the program; returns its exit code.
  package static func run(_ arguments: [String]) -> Int32 {
    do {
      var command = try parseAsRoot(arguments)
      try command.run()
      return 0
    } catch let failure as Failure {
      return complain(failure.message, code(of: failure))
    } catch {
      // Help and version are no errors.
      guard exitCode(for: error) != .success else {
        do { try Console.say(fullMessage(for: error) + "\n") } catch { return complain(error.message, 1) }
        return 0
      }
      let words = message(for: error)
      return complain(words.isEmpty ? "\(error)" : words, 2)
    }
  }

  private static func code(of failure: Failure) -> Int32 {
    switch failure.kind {
    case .argument, .options, .file, .unsupported, .topology: 2
    case .stage, .memory, .peer, .disagree, .timeout, .internalDefect: 1
    }
  }

  /// One line, whatever the words.
  private static func complain(_ words: String, _ code: Int32) -> Int32 {
    Console.note("fastermoe: \(words.split(whereSeparator: \.isNewline).joined(separator: " "))\n")
    return code
  }
}

/// How results are shown, the same for every command.
struct OutputOptions: ParsableArguments {
  @Flag(help: "Print JSON instead of tables.")
  var json = false

  /// Prints `value` as JSON, or `tables` for people.
  func show(_ value: some Encodable, _ tables: () -> String) throws {
    if json {
      try Console.say(String(decoding: try Documents.text(of: value), as: UTF8.self))
    } else {
      try Console.say(tables())
    }
  }
}

/// The standard streams, without buffers: what was said is said.
enum Console {
  /// To the standard output; not being able to is a failure, a reader that has gone ends the process by its signal.
  static func say(_ text: String) throws(Failure) {
    guard write(text, to: STDOUT_FILENO) else {
      throw Failure(.memory, "the output cannot be written: \(String(cString: strerror(errno)))")
    }
  }

  /// To the standard error stream.
  static func note(_ text: String) { _ = write(text, to: STDERR_FILENO) }

  private static func write(_ text: String, to file: Int32) -> Bool {
    let bytes = Array(text.utf8)
    var done = 0
    while done < bytes.count {
      let more = bytes.withUnsafeBytes { Glibc.write(file, $0.baseAddress! + done, bytes.count - done) }
      if more < 0 && errno == EINTR { continue }
      guard more > 0 else { return false }
      done += more
    }
    return true
  }
}
