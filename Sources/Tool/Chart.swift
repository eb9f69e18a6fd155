import FasterMoE
import Glibc

/// A picture of lines and points over two logarithmic axes, as SVG.
struct Chart {
  struct Line {
    let name: String
    let colour: String
    /// As SVG has it, "" for a whole line.
    var dashes = ""
    var hasPoints = false
    let points: [(x: Double, y: Double)]
  }
  struct Point {
    let name: String
    let colour: String
    let x, y: Double
  }

  let title, xName, yName: String
  var lines: [Line] = []
  var points: [Point] = []
  /// Values of x that get a mark of their own; empty: 1, 2 and 5 of each decade.
  var xMarks: [Double] = []
  static let colours = ["#4477aa", "#aa3377", "#228833", "#ee6677", "#ccbb44", "#66ccee"]

  private static let (left, top, width, height, legend) = (78.0, 44.0, 560.0, 400.0, 190.0)

  func write(to path: String) throws(Failure) {
    let draft = try Draft(of: path)
    let bytes = Array(text.utf8)
    try draft.write(bytes, bytes.count)
    try draft.replace()
  }

  private struct Axis {
    let low, high: Double
    init(_ values: [Double]) {
      let known = values.filter { $0 > 0 && $0.isFinite }
      let (least, most) = (known.min() ?? 0.1, known.max() ?? 10)
      low = least / 1.25
      high = max(most * 1.25, low * 4)
    }
    func share(_ value: Double) -> Double { log(value / low) / log(high / low) }
    /// 1, 2 and 5 of each decade; of many decades only 1.
    var marks: [Double] {
      let steps = high / low > 1e4 ? [1.0] : [1, 2, 5]
      return (Int(log10(low).rounded(.down))...Int(log10(high).rounded(.up))).flatMap { decade in
        steps.map { $0 * pow(10, Double(decade)) }
      }.filter { $0 >= low && $0 <= high }
    }
  }

  private static func escaped(_ text: String) -> String {
    text.reduce(into: "") { out, character in
      switch character {
      case "&": out += "&amp;"
      case "<": out += "&lt;"
      case ">": out += "&gt;"
      case "\"": out += "&quot;"
      default: out.append(character)
      }
    }
  }

  private static func number(_ value: Double) -> String {
    if value >= 1000 && value == value.rounded() { return "\(Int(value))" }
    let text = value >= 100 ? fixed(value, 0) : brief(value)
    guard text.contains(".") else { return text }
    let short = text.reversed().drop { $0 == "0" }.drop { $0 == "." }
    return String(short.reversed())
  }

  var text: String {
    let x = Axis(lines.flatMap { $0.points.map(\.x) } + points.map(\.x))
    let y = Axis(lines.flatMap { $0.points.map(\.y) } + points.map(\.y))
    let (left, top, width, height) = (Chart.left, Chart.top, Chart.width, Chart.height)
    func across(_ value: Double) -> Double { left + width * x.share(value) }
    func down(_ value: Double) -> Double { top + height * (1 - y.share(value)) }
    func at(_ x: Double, _ y: Double) -> String { "\(fixed(across(x), 1)) \(fixed(down(y), 1))" }
    var svg =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"\(Int(left + width + Chart.legend))\" height=\"\(Int(top + height + 64))\" font-family=\"sans-serif\" font-size=\"13\">\n"
    svg += "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    func words(_ words: String, _ x: Double, _ y: Double, _ anchor: String = "start", _ more: String = "") {
      svg +=
        "<text x=\"\(fixed(x, 1))\" y=\"\(fixed(y, 1))\" text-anchor=\"\(anchor)\"\(more)>\(Chart.escaped(words))</text>\n"
    }
    words(title, left, 24, "start", " font-size=\"15\"")
    for mark in xMarks.isEmpty ? x.marks : xMarks {
      svg += "<path d=\"M\(fixed(across(mark), 1)) \(fixed(top, 1)) V\(fixed(top + height, 1))\" stroke=\"#ddd\"/>\n"
      words(Chart.number(mark), across(mark), top + height + 18, "middle")
    }
    for mark in y.marks {
      svg += "<path d=\"M\(fixed(left, 1)) \(fixed(down(mark), 1)) H\(fixed(left + width, 1))\" stroke=\"#ddd\"/>\n"
      words(Chart.number(mark), left - 8, down(mark) + 4, "end")
    }
    svg += "<rect x=\"\(left)\" y=\"\(top)\" width=\"\(width)\" height=\"\(height)\" fill=\"none\" stroke=\"#333\"/>\n"
    words(xName, left + width / 2, top + height + 46, "middle")
    svg +=
      "<text transform=\"translate(20 \(fixed(top + height / 2, 1))) rotate(-90)\" text-anchor=\"middle\">\(Chart.escaped(yName))</text>\n"
    var place = top + 14
    for line in lines {
      let dashes = line.dashes.isEmpty ? "" : " stroke-dasharray=\"\(line.dashes)\""
      let path = line.points.enumerated().map { ($0 == 0 ? "M" : "L") + at($1.x, $1.y) }.joined(separator: " ")
      svg += "<path d=\"\(path)\" fill=\"none\" stroke=\"\(line.colour)\" stroke-width=\"2\"\(dashes)/>\n"
      if line.hasPoints {
        for point in line.points {
          svg +=
            "<circle cx=\"\(fixed(across(point.x), 1))\" cy=\"\(fixed(down(point.y), 1))\" r=\"3.5\" fill=\"\(line.colour)\"/>\n"
        }
      }
      let start = left + width + 14
      svg +=
        "<path d=\"M\(start) \(place - 4) h24\" stroke=\"\(line.colour)\" stroke-width=\"2\"\(dashes)/>\n"
      words(line.name, start + 30, place)
      place += 22
    }
    for point in points {
      svg +=
        "<circle cx=\"\(fixed(across(point.x), 1))\" cy=\"\(fixed(down(point.y), 1))\" r=\"6\" fill=\"\(point.colour)\" stroke=\"white\"/>\n"
      svg += "<circle cx=\"\(left + width + 26)\" cy=\"\(place - 4)\" r=\"6\" fill=\"\(point.colour)\"/>\n"
      words(point.name, left + width + 44, place)
      place += 22
    }
    return svg + "</svg>\n"
  }
}

/// The DDL-Roofline (FasterMoE §3) with what strategies reach.
enum RooflineChart {
  static func make(_ predictions: [Prediction], on cluster: Cluster) throws(Failure) -> Chart {
    let sent = predictions.filter { $0.stepRatio != nil && $0.flopsPerWorker > 0 }
    guard !sent.isEmpty else {
      throw Failure(.argument, "no roofline: nothing is sent, so that computing over communicating is infinite")
    }
    // Two thirds of a step are products with rows, one is gradients of weights.
    let peak =
      cluster.rates.reduce(0.0) { $0 + 3 / (2 / $1.products.peak.value + 1 / $1.weightGrads.peak.value) }
      / Double(cluster.workers) * 1e-12
    let ratios = sent.map { $0.stepRatio! }
    let (low, high) = (min(0.2, ratios.min()! / 2), max(5, ratios.max()! * 2))
    let steps = (0...100).map { low * pow(high / low, Double($0) / 100) } + [1]
    func line(_ name: String, _ dashes: String, _ height: (Double) -> Double) -> Chart.Line {
      Chart.Line(name: name, colour: "#333", dashes: dashes, points: steps.sorted().map { ($0, height($0)) })
    }
    var chart = Chart(
      title: "DDL-Roofline: \(cluster.workers) workers, peak \(brief(peak)) TFLOP/s each",
      xName: "R_CC of the step: seconds of computing / seconds of communicating",
      yName: "P-bar: TFLOP/s of each worker")
    chart.lines = [
      line("ideal, P·min(1, R)", "") { peak * min(1, $0) },
      line("semi-ideal, P·R/(R+1)", "7 4") { peak * $0 / ($0 + 1) },
      line("both ways at once", "2 4") { peak * min(1, 2 * $0) },
    ]
    chart.points = sent.enumerated().map {
      Chart.Point(
        name: "\($1.strategy), \(brief($1.seconds * 1e3)) ms", colour: Chart.colours[$0], x: $1.stepRatio!,
        y: $1.flopsPerWorker * 1e-12)
    }
    return chart
  }
}
