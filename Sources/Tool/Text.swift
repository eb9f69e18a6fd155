import Glibc

/// A number with so many digits behind its point.
func fixed(_ value: Double, _ digits: Int) -> String {
  guard value.isFinite else { return value.isNaN ? "-" : "inf" }
  var text = [CChar](repeating: 0, count: 400)
  return withVaList([Int32(digits), value]) {
    vsnprintf(&text, text.count, "%.*f", $0)
    return String(cString: text)
  }
}

/// A number with three digits that count.
func brief(_ value: Double) -> String {
  guard value.isFinite, value != 0 else { return fixed(value, 0) }
  return fixed(value, max(0, 2 - Int(log10(abs(value)).rounded(.down))))
}

/// A rate of bytes or flops with its prefix.
func rate(_ value: Double, _ unit: String) -> String {
  guard value.isFinite else { return "no limit" }
  for (size, prefix) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] where value >= size {
    return "\(brief(value / size)) \(prefix)\(unit)"
  }
  return "\(brief(value)) \(unit)"
}

/// A span of time with its unit.
func time(_ seconds: Double) -> String {
  for (size, unit) in [(1, "s"), (1e-3, "ms"), (1e-6, "us")] where seconds >= size {
    return "\(brief(seconds / size)) \(unit)"
  }
  return "\(brief(seconds * 1e9)) ns"
}

/// Columns of text; the first and those named left stand at their left.
func table(_ head: [String], _ rows: [[String]], left: Set<Int> = [0]) -> String {
  let widths = head.indices.map { column in ([head] + rows).reduce(0) { max($0, $1[column].count) } }
  return ([head] + rows).map { row in
    let line = row.enumerated().map { column, cell in
      let gap = String(repeating: " ", count: widths[column] - cell.count)
      return left.contains(column) ? cell + gap : gap + cell
    }.joined(separator: "  ")
    return String(line.reversed().drop { $0 == " " }.reversed()) + "\n"
  }.joined()
}
