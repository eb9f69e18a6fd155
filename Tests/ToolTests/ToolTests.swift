import Foundation
import Testing

@testable import FasterMoE
@testable import Tool

/// A file that is gone with its test.
private func withFile(_ text: String, _ body: (String) throws -> Void) throws {
  let path = FileManager.default.temporaryDirectory.appending(
    path: "fastermoe-tool-\(getpid())-\(UInt32.random(in: 0...UInt32.max))"
  ).path
  try text.write(toFile: path, atomically: false, encoding: .utf8)
  defer { try? FileManager.default.removeItem(atPath: path) }
  try body(path)
}

private func counts(_ batch: Batch) -> [Int] {
  (0..<batch.traffic.workers * batch.traffic.experts).map { Int(batch.traffic.counts[$0]) }
}

private func complaint(_ body: () throws -> Void) -> String? {
  do { try body() } catch { return (error as? Failure)?.message ?? "\(error)" }
  return nil
}

@Suite struct ToolTests {
  // MARK: Layers

  @Test func layersAreReadFromWordsAndFiles() throws {
    let layer = try LayerDescription("d=64,h=128,E=8,k=1,n=100,activation=swiglu")
    let shape = try layer.shape(workers: 4)
    #expect(shape.model == 64 && shape.hidden == 128 && shape.experts == 8 && shape.choices == 1)
    #expect(shape.activation == .swiglu)
    #expect(try layer.rows(shape) == 100)
    let short = try LayerDescription("h=128,d=64").shape(workers: 4)
    #expect(short.experts == 4 && short.choices == 2 && short.activation == .gelu)
    #expect(try LayerDescription("d=64,h=128").shape(workers: 1).choices == 1, "no more choices than experts")
    try withFile(#"{"d_model": 64, "d_hidden": 128, "experts": 8, "top_k": 1, "tokens": 100, "activation": "swiglu"}"#)
    { path in
      let read = try LayerDescription(path)
      #expect(read == layer)
    }
  }

  @Test(arguments: [
    ("d=64", "h is missing"), ("d=64,h", "\"h\" is not like"), ("d=64,h=1x", "no whole number"),
    ("d=64,h=8,d=3", "twice"), ("d=64,h=8,q=3", "\"q\" is not known"), ("d=64,h=8,activation=tanh", "none of gelu"),
    ("d=0,h=8", "d_model must be positive"), ("d=8,h=8,k=9", "top_k is 9"), ("d=8,h=8,n=0", "n is 0"),
    ("d=8,h=8,n=2147483647", "fit 31 bits"), ("/nowhere", "cannot be read"),
    ("d=99999999999999999999,h=8", "no whole number"),
  ])
  func layersThatAreNotRightAreNamed(_ text: String, _ words: String) {
    let said = complaint {
      let layer = try LayerDescription(text)
      _ = try layer.rows(try layer.shape(workers: 2))
    }
    #expect(said?.contains(words) ?? false, "\(said ?? "nothing")")
  }

  // MARK: Counts

  @Test func countsAreReadLineByLine() throws {
    try withFile("# rows\n1,2\n3 4 # of the second\n\n\n5;6\n7\t8\n") { path in
      let reader = try CountsReader(path)
      #expect(try reader.next(workers: 2, experts: 2).map(counts) == [1, 2, 3, 4])
      #expect(try reader.next(workers: 2, experts: 2).map(counts) == [5, 6, 7, 8])
      #expect(try reader.next(workers: 2, experts: 2) == nil)
    }
  }

  @Test(arguments: [
    ("1,2\n3\n", "line 2 has 1 numbers"), ("1,2\n3,4,5\n", "line 2 has 3 numbers"), ("1,2\n", "has 1 lines"),
    ("1,2\n3,4\n5,6\n", "line 3 is one more"), ("1,2\n3,-4\n", "line 2: \"-4\""), ("1,2\n3,4.5\n", "line 2: \"4.5\""),
    ("1,2\n3,2147483648\n", "line 2: \"2147483648\""), ("1,2\n3,99999999999999999999999\n", "no whole number"),
    ("1,2\n3,four\n", "\"four\""), ("1,2\n3,4\u{0}\u{FF}\n", "no whole number"),
  ])
  func countsThatAreNotRightAreNamed(_ text: String, _ words: String) throws {
    try withFile(text) { path in
      let said = complaint { _ = try CountsReader(path).next(workers: 2, experts: 2) }
      #expect(said?.contains(words) ?? false, "\(said ?? "nothing")")
      #expect(said?.contains(path) ?? false)
    }
  }

  /// Every worker's rows are all there; an expert's rows of all workers are its share of all but for a row a worker and,
  /// since what is rounded evens out, far less.
  @Test(arguments: [[1, 1], [1, 7], [16, 16], [48, 96], [200, 400]], [1, 30, 2048])
  func sharesBecomeWholeRows(_ size: [Int], _ rows: Int) throws {
    let (workers, experts) = (size[0], size[1])
    for exponent in [0, 0.7, 1.2, 50] {
      let shares = Batch.zipf(exponent, experts: experts, seed: 1)
      #expect(abs(shares.reduce(0, +) - 1) < 1e-9)
      let batch = try Batch(workers: workers, rows: rows, shares: shares)
      let all = counts(batch)
      for worker in 0..<workers {
        #expect(all[worker * experts..<(worker + 1) * experts].reduce(0, +) == rows)
      }
      for expert in 0..<experts {
        let got = stride(from: expert, to: all.count, by: experts).reduce(0) { $0 + all[$1] }
        #expect(abs(Double(got) - shares[expert] * Double(rows * workers)) <= 5)
      }
    }
  }

  @Test func ranksOfPopularityAreDealtOut() {
    let inOrder = Batch.zipf(1, experts: 9, seed: 0)
    #expect(inOrder == inOrder.sorted(by: >) && abs(inOrder[0] / inOrder[8] - 9) < 1e-12)
    let dealt = Batch.zipf(1, experts: 9, seed: 5)
    #expect(dealt != inOrder && dealt.sorted(by: >) == inOrder && dealt == Batch.zipf(1, experts: 9, seed: 5))
  }

  // MARK: Routing of the paper

  /// 4 of 16 experts get up to 20 % each, 3.2 times the mean, and other ones each time; the others are alike.
  @Test func skewIsWhatThePaperSays() {
    let routing = SkewedRouting(hot: 0.25, most: 3.2, iterations: 1, seed: 1)
    var (highest, sets) = (0.0, Set<[Int]>())
    for iteration in 0..<200 {
      let shares = routing.shares(experts: 16, model: 0, layer: 3, iteration: iteration)
      #expect(abs(shares.reduce(0, +) - 1) < 1e-12 && shares.allSatisfy { $0 > 0 })
      let (top, least) = (shares.max()!, shares.min()!)
      #expect(top >= 1 / 16.0 && top <= 0.2 && shares.count(where: { $0 == least }) == 12)
      highest = max(highest, top)
      sets.insert(shares.indices.filter { shares[$0] > least })
    }
    #expect(highest > 0.19 && sets.count > 150)
  }

  @Test func capacityDropsAndGatesMoveRows() throws {
    var document = Cluster.Document()
    document.places = [.init(name: "net")]
    for host in 0..<2 {
      document.places.append(.init(name: "h\(host)", in: "net", up: .init(bandwidth: 1e9)))
      for worker in 0..<2 {
        document.workers.append(
          .init(
            name: "w\(host)\(worker)", in: "h\(host)", up: .init(bandwidth: 4e9),
            flops: [.init(rows: 1, rate: FlopRate(1))]))
      }
    }
    let cluster = try Cluster(document)
    #expect(cluster.remoteShare == 0.125)
    let batch = try Batch(workers: 4, rows: 800, shares: [0.5, 0.1, 0.2, 0.2])
    let near = counts(try batch.keptNear(on: cluster))
    for worker in 0..<4 {
      let own = Array(near[worker * 4..<worker * 4 + 4])
      #expect(own.reduce(0, +) == 800)
      // An eighth of 800 may leave.
      let remote = worker < 2 ? own[2] + own[3] : own[0] + own[1]
      #expect(remote <= 100 && remote >= 98)
    }
    // Local rows stay in proportion, 5 to 1 and 1 to 1.
    #expect(abs(near[0] - 5 * near[1]) <= 6 && abs(near[10] - near[11]) <= 2)
    let (limited, rows) = try batch.withCapacity(200)
    #expect(counts(limited)[0] == 200 && rows == counts(limited).reduce(0, +) && rows == 4 * (200 + 80 + 160 + 160))
  }

  // MARK: Clusters

  @Test func clustersAreRepeatedPlaceByPlace() throws {
    var document = Cluster.Document()
    document.places = [.init(name: "net"), .init(name: "a", in: "net"), .init(name: "a.x", in: "a")]
    for name in ["1", "2"] {
      document.workers.append(.init(name: name, in: "a.x", flops: [.init(rows: 1, rate: FlopRate(1))]))
    }
    document.workers.append(.init(name: "3", in: "net", flops: [.init(rows: 1, rate: FlopRate(2))]))
    document.peers = [.init(from: "1", to: "2", there: .init(bandwidth: 5))]
    #expect(try document.repeated(to: 3) == document)
    #expect(try document.repeated(to: 2).workers.map(\.name) == ["1", "2"])
    let twice = try document.repeated(to: 6)
    #expect(twice.workers.map(\.name) == ["1", "2", "3", "1+1", "2+1", "3+1"])
    #expect(twice.workers[3].in == "a.x+1" && twice.workers[5].in == "net" && twice.places.count == 5)
    #expect(twice.peers!.map(\.from) == ["1", "1+1"])
    let cluster = try Cluster(twice)
    #expect(cluster.workers == 6 && cluster.peers.count == 4)
    #expect(complaint { _ = try document.repeated(to: 4) }?.contains("add up to 4") ?? false)
    document.peers = [.init(from: "1", to: "3", there: .init())]
    #expect(complaint { _ = try document.repeated(to: 6) }?.contains("joins places") ?? false)
  }

  /// Buckets of ZeRO-3's copies take what single copies take but for one bucket on its way.
  @Test func predictionsNameWhatBounds() throws {
    var document = Cluster.Document()
    document.places = [.init(name: "net")]
    for rank in 0..<4 {
      document.workers.append(
        .init(
          name: "w\(rank)", in: "net", up: .init(bandwidth: rank == 2 ? 1e8 : 1e9),
          flops: [.init(rows: 1, rate: FlopRate(1e12))]))
    }
    let slow = try Cluster(document)
    let shape = try LayerDescription("d=64,h=64,n=512").shape(workers: 4)
    let batch = try Batch(workers: 4, rows: 1024, shares: Batch.zipf(0, experts: 4, seed: 0))
    var all = try Prediction.all(batch, shape, on: slow)
    #expect(all.map(\.prediction.strategy) == ["FastMoE", "ZeRO-3", "Algorithm 1", "ours"])
    #expect(all[0].prediction.bound == "link w2 -> net" || all[0].prediction.bound == "link net -> w2")
    for worker in document.workers.indices { document.workers[worker].up = nil }
    document.workers[1].flops = [.init(rows: 1, rate: FlopRate(1e10))]
    all = try Prediction.all(batch, shape, on: try Cluster(document))
    #expect(all[0].prediction.bound == "computing of w1" && all[0].prediction.busiestLink == nil)
    #expect(all[0].prediction.speedup == 1 && all[3].prediction.seconds <= all[0].prediction.seconds)
    #expect(
      complaint { _ = try RooflineChart.make(all.map(\.prediction), on: slow) }?.contains("nothing is sent") ?? false)
  }

  // MARK: Text

  @Test func numbersAreShort() {
    #expect(brief(0.00123456) == "0.00123" && brief(12.345) == "12.3" && brief(12345) == "12345" && brief(0) == "0")
    #expect(rate(2.5e9, "B/s") == "2.50 GB/s" && rate(.infinity, "B/s") == "no limit")
    #expect(time(2.5e-5) == "25.0 us" && time(1.5) == "1.50 s")
    #expect(table(["", "b"], [["x", "1"], ["long", "22"]]) == "       b\nx      1\nlong  22\n")
  }

  @Test func chartsHaveAllThatTheyName() throws {
    var chart = Chart(title: "a < b", xName: "x", yName: "y")
    chart.lines = [Chart.Line(name: "l", colour: "#123", points: [(1, 2), (10, 20)])]
    chart.points = [Chart.Point(name: "p", colour: "#456", x: 3, y: 4)]
    let parser = XMLCheck(chart.text)
    #expect(parser.isWhole && chart.text.contains("a &lt; b") && !chart.text.contains("nan"))
  }
}

/// Whether every element of a picture is closed where it should be.
private struct XMLCheck {
  let isWhole: Bool
  init(_ text: String) {
    var open: [Substring] = []
    var isWhole = true
    for match in text.matches(of: /<(\/?)([a-z]+)[^>]*?(\/?)>/) {
      if !match.1.isEmpty {
        isWhole = isWhole && open.popLast() == match.2
      } else if match.3.isEmpty {
        open.append(match.2)
      }
    }
    self.isWhole = isWhole && open.isEmpty
  }
}
