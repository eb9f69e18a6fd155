import Foundation
import Testing

@testable import FasterMoE

@Suite struct TimelineTests {
  private static func at(_ milliseconds: Double) -> Seconds { Seconds(1000 + milliseconds * 1e-3) }

  // MARK: Recording

  /// A lane that is full keeps what it has, and counts what it has not.
  @Test func lanesAreBounded() throws {
    let recording = Recording(threads: 2)
    try recording.begin()
    let lane = recording.lane(1)
    for number in 0..<100 {
      lane.add(
        Recording.Entry(kind: .experts, place: Int32(number), times: Movement(from: Self.at(0), to: Self.at(1))))
    }
    #expect(lane.entries.count + lane.leftOut == 100 && lane.leftOut > 0)
    #expect(lane.entries.enumerated().allSatisfy { $0 == Int($1.place) }, "the first ones")
    #expect(recording.lane(0).entries.isEmpty && recording.caller.entries.isEmpty)

    let kept = lane.entries.count
    let leftOut = lane.leftOut
    try recording.reserve(blocks: 1000, peers: 3, shadows: 2)
    #expect(
      recording.lane(1).entries.count == kept && recording.lane(1).leftOut == leftOut, "more room forgets nothing")
    #expect(recording.lane(1).entries.enumerated().allSatisfy { $0 == Int($1.place) })
    try recording.begin()
    #expect(recording.lane(1).entries.isEmpty && recording.lane(1).leftOut == 0)
    for _ in 0..<4000 { recording.lane(1).add(.combine, from: Self.at(0)) }
    #expect(recording.lane(1).entries.count >= 4000, "room for 4 tasks a block")
    try recording.reserve(blocks: 1 << 30, peers: 0, shadows: 0)
    for _ in 0..<2 * Recording.mostTasks { recording.lane(0).add(.combine, from: Self.at(0)) }
    #expect(recording.lane(0).entries.count < 2 * Recording.mostTasks && recording.lane(0).leftOut > 0)
  }

  @Test func tasksOfOneBlockBecomeOneUnlessTheyPause() throws {
    let recording = Recording(threads: 1)
    try recording.begin()
    let lane = recording.lane(0)
    func entries() -> [(Recording.Kind, Int32, Int32)] { lane.entries.map { ($0.kind, $0.place, $0.rows) } }
    let start = Seconds.now
    lane.addTask(.expertGrads, block: 1, rows: 10, from: start)
    lane.addTask(.expertGrads, block: 1, rows: 5, from: start)
    #expect(lane.entries.count == 1 && lane.entries[0].rows == 15 && lane.entries[0].times.begin == start)
    lane.addTask(.expertGrads, block: 2, rows: 5, from: .now)
    lane.addTask(.weightGrads, block: 2, rows: 7, from: .now)
    let before = lane.entries[2].times.end
    lane.addTask(.weightGrads, block: 2, rows: 7, from: .now)
    #expect(lane.entries.count == 3 && lane.entries[2].rows == 7 && lane.entries[2].times.end >= before)
    lane.addTask(.weightGrads, block: 2, rows: 7, from: lane.entries[2].times.end + Seconds(1e-3))
    #expect(lane.entries.count == 4)
  }

  // MARK: A pass

  /// One pass of a worker alone, begun and gone as far as `stage`.
  private static func pass(_ layer: Layer, forward: Bool = true, backward: Bool = true, _ body: (Pass) throws -> Void)
    throws
  {
    let (n, d) = (300, layer.shape.model)
    var numbers = Numbers(50)
    let (tokens, gradOutput) = (numbers.array(n * d), numbers.array(n * d))
    var (output, gradTokens) = ([Float](repeating: 0, count: n * d), [Float](repeating: 0, count: n * d))
    try tokens.withUnsafeBufferPointer { tokens in
      let pass = try layer.gate(tokens: tokens.baseAddress, count: n)
      if forward { try output.withUnsafeMutableBufferPointer { try pass.forward($0.baseAddress) } }
      if backward {
        try gradTokens.withUnsafeMutableBufferPointer {
          try pass.backward(gradOutput, gradTokens: $0.baseAddress, gradWeights: nil)
        }
      }
      try body(pass)
      pass.end()
    }
  }

  private static func layer(threads: Int) throws -> Layer {
    var options = Group.Options()
    options.threads = threads
    let shape = try Shape(model: 20, hidden: 140, experts: 5, choices: 2, activation: .gelu)
    return try Layer.together(Group.local(1, options)[0]) { Layer.Options(shape, seed: 7) }
  }

  /// Whatever the threads: every row once a trip, each lane in order, all within its call; and again from the same memory.
  @Test(arguments: [1, 2, 3])
  func aPassRecordsItsWork(threads: Int) throws {
    let layer = try Self.layer(threads: threads)
    for _ in 0..<3 {
      try Self.pass(layer) { pass in
        let calls = pass.recording.caller.entries
        #expect(calls.map(\.kind) == [.gateCall, .forwardCall, .backwardCall])
        for (before, call) in zip(calls, calls.dropFirst()) { #expect(before.times.end <= call.times.begin) }
        var rows: [Recording.Kind: Int] = [:]
        for thread in 0..<threads {
          var last = calls[0].times.begin
          for entry in pass.recording.lane(thread).entries {
            #expect(last <= entry.times.begin && entry.times.begin <= entry.times.end, "a lane is in order")
            last = entry.times.end
            let call =
              switch entry.kind {
              case .gate: calls[0]
              case .experts, .combine: calls[1]
              default: calls[2]
              }
            #expect(call.times.begin <= entry.times.begin && entry.times.end <= call.times.end)
            rows[entry.kind, default: 0] += Int(entry.rows)
          }
          #expect(pass.recording.lane(thread).leftOut == 0)
        }
        #expect(rows[.experts] == 600 && rows[.expertGrads] == 600 && rows[.weightGrads]! >= 600)
        #expect([Recording.Kind.gate, .combine, .combineGrads].allSatisfy { rows[$0] != nil })
      }
    }
  }

  @Test func aFullLaneIsSaidInTheTrace() throws {
    try Self.pass(Self.layer(threads: 2)) { pass in
      #expect(Trace(pass).leftOut == 0 && Trace(pass).otherData["left_out"] == nil)
      let lane = pass.recording.lane(1)
      while lane.leftOut < 3 { lane.add(.combineGrads, from: .now) }
      let trace = Trace(pass)
      let moments = trace.traceEvents.filter { $0.ph == "i" }
      #expect(moments.count == 1 && moments[0].args?.leftOut == 3 && moments[0].name.contains("3 pieces left out"))
      #expect(trace.leftOut == 3 && trace.otherData["left_out"] != nil)
      let pieces = trace.traceEvents.filter { $0.ph == "X" && $0.tid == moments[0].tid }
      #expect(pieces.count == lane.entries.count && pieces.allSatisfy { $0.ts! <= moments[0].ts! })
    }
  }

  /// Without forward there is nothing to see, and without a prediction there is no lane of it.
  @Test func aTimelineNeedsAForward() throws {
    let layer = try Self.layer(threads: 1)
    let path = FileManager.default.temporaryDirectory.appending(path: "fastermoe-\(getpid())-timeline.json").path
    defer { try? FileManager.default.removeItem(atPath: path) }
    try Self.pass(layer, forward: false, backward: false) { pass in
      let refused = failure { () throws(Failure) in try pass.writeTimeline(to: path) }
      #expect(refused?.kind == .stage && !FileManager.default.fileExists(atPath: path))
    }
    try Self.pass(layer, backward: false) { pass in
      try pass.writeTimeline(to: path)
      let text = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(filePath: path))) as? [String: Any]
      let events = try #require(text?["traceEvents"] as? [[String: Any]])
      #expect(Set(events.map { $0["pid"] as? Int }) == [Trace.measured(0)])
      #expect(events.contains { $0["name"] as? String == "forward" })
      #expect(!events.contains { $0["name"] as? String == "backward" })
    }
  }
}
