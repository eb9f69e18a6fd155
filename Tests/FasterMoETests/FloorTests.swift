import Foundation
import Testing

/// The floors of the house: a file names only types of its own floor and of those below it.
@Suite struct FloorTests {
  private static let floors = ["Ground", "Machine", "Decide", "Layer"]
  private static let sources = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().appending(path: "Sources")

  private static func files(_ folder: String) -> [(name: String, text: String)] {
    let root = sources.appending(path: folder)
    let found = FileManager.default.enumerator(at: root, includingPropertiesForKeys: nil)!
    return found.compactMap { $0 as? URL }.filter { $0.pathExtension == "swift" }.map {
      ($0.lastPathComponent, try! String(contentsOf: $0, encoding: .utf8))
    }
  }

  /// The text without comments, which may name anything.
  private static func code(_ text: String) -> String {
    text.split(separator: "\n").map { $0.split(separator: "//", maxSplits: 1, omittingEmptySubsequences: false)[0] }
      .joined(separator: "\n")
  }

  private static func typesDeclared(in text: String) -> [String] {
    code(text).matches(
      of: /(?:^|\n)(?:package |private |fileprivate |final )*(?:struct|class|enum|protocol|typealias) (\w+)/
    )
    .map { String($0.1) }
  }

  @Test func everyFloorNamesOnlyItselfAndThoseBelow() {
    var upper: [String: String] = [:]
    for floor in Self.floors.reversed() {
      for file in Self.files("FasterMoE/\(floor)") {
        let words = Set(Self.code(file.text).matches(of: /\w+/).map { String($0.0) })
        for (type, home) in upper where words.contains(type) {
          Issue.record("\(floor)/\(file.name) names \(type), which lives on \(home)")
        }
      }
      for file in Self.files("FasterMoE/\(floor)") {
        for type in Self.typesDeclared(in: file.text) { upper[type] = floor }
      }
    }
    #expect(upper["Layer"] == "Layer" && upper["Tiles"] == "Ground", "the test must find the types")
  }

  @Test func foreignLibrariesHaveOneFileEach() {
    let all = (Self.floors.map { "FasterMoE/\($0)" } + ["CAPI"]).flatMap(Self.files)
    #expect(all.filter { $0.text.contains("import CHwloc") }.map(\.name) == ["Topology.swift"])
    #expect(all.filter { $0.text.contains("import Foundation") }.map(\.name) == ["Documents.swift"])
    let withHeader = all.filter { $0.text.contains("import CFasterMoE") }.map(\.name).sorted()
    // What the library allocates by is no part of the interface.
    let roof = Self.files("CAPI").map(\.name).filter { $0 != "Allocation.swift" }
    #expect(withHeader == roof.sorted(), "C structs stay on the roof")
  }

  /// The tool stands beside the roof: on the library's own types, not on C's, and without a foreign library of its own.
  @Test func theToolImportsTheLibraryAlone() {
    let files = Self.files("Tool")
    #expect(files.contains { $0.name == "Plan.swift" })
    for file in files {
      let imports = file.text.matches(of: /(?:^|\n)import (\w+)/).map { String($0.1) }
      #expect(Set(imports).isSubset(of: ["ArgumentParser", "FasterMoE", "Glibc"]), "\(file.name) imports \(imports)")
    }
    for file in (Self.floors.map { "FasterMoE/\($0)" } + ["CAPI"]).flatMap(Self.files) {
      #expect(!file.text.contains("import Tool") && !file.text.contains("import ArgumentParser"))
    }
  }

  @Test func decisionsKnowNoThreadsClocksOrFiles() {
    for file in Self.files("FasterMoE/Decide") {
      for word in ["Glibc", "pthread", "Atomic", "clock_gettime", "fopen", "Team"] {
        #expect(!Self.code(file.text).contains(word), "\(file.name) names \(word)")
      }
    }
  }

  /// A gate is its own file, a case of the options and a constant of the header. But the plain one is everybody's default.
  @Test func aGateIsKnownToItsFileAndTheOptionsAlone() {
    let all = (Self.floors.map { "FasterMoE/\($0)" } + ["CAPI"]).flatMap(Self.files)
    let gates = all.flatMap { file in
      Self.code(file.text).matches(of: /struct (\w+): Gate\b/).map { (name: String($0.1), home: file.name) }
    }
    #expect(gates.count >= 6, "the test must find the gates")
    for (gate, home) in gates where gate != "TopKGate" {
      let names = all.filter { Self.code($0.text).contains(gate) }.map(\.name).filter { $0 != home }
      #expect(names == ["Options.swift"], "\(gate) is named by \(names)")
    }
  }
}
