import Testing

@testable import FasterMoE

/// Tests draw numbers from here, so that a failure can be repeated.
struct Numbers {
  static let seed: UInt64 = 20_220_404
  private var stream: RandomStream
  private var index = 0
  init(_ name: UInt64) { stream = RandomStream(seed: Self.seed, stream: name) }
  mutating func next() -> Float {
    index += 1
    return stream.uniform(index, bound: 1)
  }
  mutating func array(_ count: Int) -> [Float] { (0..<count).map { _ in next() } }
  mutating func below(_ limit: Int) -> Int { min(limit - 1, Int((next() + 1) / 2 * Float(limit))) }
}

@Suite struct KernelTests {
  /// A chain of k fused multiply-adds of numbers below 1 in size errs by at most k half-ulps of its partial sums, which
  /// stay below k; on random signs both grow as √k.
  static func bound(terms: Int) -> Double { 8 * Double(terms).squareRoot() * Double(Float.ulpOfOne) }

  /// Rows in panels, with memory that shows what is written beyond them.
  final class PanelMatrix {
    let panels: Panels
    let memory: UnsafeMutableBufferPointer<Float>
    init(_ rows: [[Float]], width: Int) {
      memory = .allocate(capacity: max(1, rows.count) * Panels.padded(width) + 16)
      memory.initialize(repeating: 7)
      panels = Panels(memory.baseAddress!, width: width)
      let flat = rows.flatMap { $0 }
      flat.withUnsafeBufferPointer { all in panels.fill(rows: rows.count) { all.baseAddress! + $0 * width } }
    }
    deinit { memory.deallocate() }
  }

  private static func matrix(_ rows: Int, _ columns: Int, _ numbers: inout Numbers) -> [[Float]] {
    (0..<rows).map { _ in numbers.array(columns) }
  }

  /// Every row count 1…70, odd depths and columns, against Double loops; both ways to pack the right factor.
  @Test func productsEqualDoubleLoops() {
    var numbers = Numbers(1)
    for rows in 1...70 {
      for (depth, columns) in [(1, 1), (15, 33), (16, 32), (37, 53), (64, 48), (130, 16)]
      where rows % 5 == depth % 5 || rows < 13 {
        let a = Self.matrix(rows, depth, &numbers)
        let b = Self.matrix(depth, columns, &numbers)
        let left = PanelMatrix(a, width: depth)
        defer { withExtendedLifetime(left) {} }
        let flat = b.flatMap { $0 }
        let flatTransposed = (0..<columns).flatMap { c in b.map { $0[c] } }
        for transposed in [false, true] {
          let strip = UnsafeMutablePointer<Float>.allocate(capacity: depth * 32 + 1)
          let tile = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
          defer {
            strip.deallocate()
            tile.deallocate()
          }
          strip[depth * 32] = 99
          for column in stride(from: 0, to: columns, by: 32) {
            if transposed {
              Strip.rows(
                of: flatTransposed, stride: depth, depth: depth, from: column, limit: columns, into: strip)
            } else {
              Strip.columns(of: flat, stride: columns, depth: depth, from: column, limit: columns, into: strip)
            }
            #expect(strip[depth * 32] == 99)
            Panels.forEach(rows: rows) { first, high in
              Self.product(left.panels, first, high, strip, depth, tile)
              for i in 0..<high {
                for c in 0..<min(32, columns - column) {
                  let exact = (0..<depth).reduce(0.0) { $0 + Double(a[first + i][$1]) * Double(b[$1][column + c]) }
                  #expect(
                    abs(Double(tile[i * 32 + c]) - exact) <= Self.bound(terms: depth), "rows \(rows), depth \(depth)")
                }
                for c in min(32, columns - column)..<32 { #expect(tile[i * 32 + c] == 0) }
              }
            }
          }
        }
      }
    }
  }

  /// As many lines as a tile can ask for, of which some will be written.
  private static func withAsks(for memory: UnsafePointer<Float>, _ body: (Asks) -> Void) {
    withUnsafeTemporaryAllocation(of: UnsafeRawPointer.self, capacity: Asks.most) {
      var asks = Asks(in: $0.baseAddress!)
      for _ in 0..<Asks.most { asks.read(memory) }
      for _ in 0..<Asks.mostWrites { asks.write(memory) }
      body(asks)
    }
  }

  /// What is asked for of a strip is what packing it will read, in however many shares.
  @Test(arguments: [1, 3, 22]) func sharesListEachLineOfAStripOnce(shares: Int) {
    let nobody = UnsafeRawPointer(bitPattern: 1)!
    let lines = UnsafeMutablePointer<UnsafeRawPointer>.allocate(capacity: Asks.most)
    let matrix = UnsafeMutablePointer<Float>.allocate(capacity: 100 * 70)
    defer { (lines.deallocate(), matrix.deallocate()) }
    for (isTransposed, depth, columns) in [(true, 100, 70), (true, 64, 32), (false, 100, 70), (false, 7, 64)] {
      let stride = isTransposed ? depth : columns
      let factor =
        isTransposed
        ? Factor(transposing: matrix, depth: depth, columns: columns) : Factor(matrix, depth: depth, columns: columns)
      for (column, rows) in [(0, 0..<depth), (32, 0..<depth), (64, 3..<7)] {
        var listed: [UnsafeRawPointer] = []
        for share in 0..<shares {
          lines.initialize(repeating: nobody, count: Asks.most)
          var asks = Asks(in: lines)
          factor.list(column, rows, share: share, of: shares, in: &asks)
          listed += UnsafeBufferPointer(start: lines, count: Asks.most).prefix { $0 != nobody }
        }
        let width = column..<max(column, min(columns, column + 32))
        let (pieces, length) = isTransposed ? (width, rows) : (rows, width)
        let expected = pieces.flatMap { piece in
          Swift.stride(from: length.lowerBound, to: length.upperBound, by: 16).map {
            UnsafeRawPointer(matrix + piece * stride + $0)
          }
        }
        #expect(listed == expected)
      }
    }
  }

  @Test func outerProductsEqualDoubleLoops() {
    var numbers = Numbers(2)
    for rows in [1, 2, 11, 12, 13, 24, 35, 70] {
      for (leftWidth, rightWidth) in [(1, 1), (8, 48), (17, 33), (40, 100)] {
        let a = Self.matrix(rows, leftWidth, &numbers)
        let b = Self.matrix(rows, rightWidth, &numbers)
        let left = PanelMatrix(a, width: leftWidth)
        let right = PanelMatrix(b, width: rightWidth)
        defer { withExtendedLifetime((left, right)) {} }
        let tile = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
        defer { tile.deallocate() }
        var column = 0
        while column < leftWidth {
          defer { column += Tiles.outerRows(at: column) }
          for block in 0..<right.panels.blocks {
            for blocks in 1...Tiles.outerBlocks where block + blocks <= right.panels.blocks {
              Self.withAsks(for: tile) {
                Tiles.outer(
                  left.panels, from: column, right.panels, block: block, blocks: blocks, rows: rows, times: 1,
                  .desk, to: tile, stride: blocks * 16, $0)
              }
              for i in 0..<min(Tiles.outerRows(at: column), leftWidth - column) {
                for c in 0..<min(blocks * 16, rightWidth - block * 16) {
                  let exact = (0..<rows).reduce(0.0) { $0 + Double(a[$1][column + i]) * Double(b[$1][block * 16 + c]) }
                  #expect(abs(Double(tile[i * blocks * 16 + c]) - exact) <= Self.bound(terms: rows))
                }
              }
            }
          }
        }
      }
    }
  }

  /// Memory for products of up to `rows` rows, and a desk in it.
  final class DeskMemory {
    let desk: Product.Desk
    private let memory: UnsafeMutableRawPointer
    init(rows: Int, longest: Int) {
      var size = Arena()
      _ = Product.Desk(arena: &size, rows: rows, longest: longest)
      memory = .allocate(byteCount: size.bytes, alignment: 64)
      memory.initializeMemory(as: UInt8.self, repeating: 0xFF, count: size.bytes)
      var arena = Arena(over: memory)
      desk = Product.Desk(arena: &arena, rows: rows, longest: longest)
    }
    deinit { memory.deallocate() }
  }

  /// Deep matrices are packed a part at a time, which is not to show in the bits.
  @Test(arguments: [100, 128, 129, 300, 513]) func partsOfAStripGiveTheBitsOfTheWhole(depth: Int) {
    var numbers = Numbers(8)
    let columns = 40
    let weights = numbers.array(depth * columns)
    let strip = UnsafeMutablePointer<Float>.allocate(capacity: depth * 32)
    defer { strip.deallocate() }
    for rows in [1, 11, 12, 25, 150] {
      let memory = DeskMemory(rows: rows, longest: depth)
      let left = PanelMatrix(Self.matrix(rows, depth, &numbers), width: depth)
      defer { withExtendedLifetime((memory, left)) {} }
      weights.withUnsafeBufferPointer { weights in
        for factor in [
          Factor(weights.baseAddress!, depth: depth, columns: columns),
          Factor(transposing: weights.baseAddress!, depth: depth, columns: columns),
        ] {
          var seen = 0
          Product.forEachTile(rows, in: 0..<columns, by: .strips, Product(left.panels, factor, on: memory.desk)) {
            column, row, high, tile, _ in
            seen += high
            let expected = UnsafeMutablePointer<Float>.allocate(capacity: Panels.height * 32)
            defer { expected.deallocate() }
            factor.pack(column, 0..<depth, into: strip)
            Self.product(left.panels, row, high, strip, depth, expected)
            #expect(
              (0..<high * 32).allSatisfy { tile[$0].bitPattern == expected[$0].bitPattern }, "rows \(rows), row \(row)")
          }
          #expect(seen == 2 * rows)
        }
      }
    }
  }

  /// Gradients of weights against Double loops, some columns of them, added and written; both ways to walk them give the
  /// same bits.
  @Test(arguments: [1, 12, 13, 47, 48, 49, 128, 239, 240, 241, 500]) func sumsOverRowsEqualDoubleLoops(rows: Int) {
    var numbers = Numbers(9)
    let memory = DeskMemory(rows: rows, longest: 64)
    defer { withExtendedLifetime(memory) {} }
    for (leftWidth, range, rightWidth) in [(1, 0..<1, 1), (48, 0..<48, 48), (230, 16..<221, 33), (105, 96..<105, 64)] {
      let a = Self.matrix(rows, leftWidth, &numbers)
      let b = Self.matrix(rows, rightWidth, &numbers)
      let left = PanelMatrix(a, width: leftWidth)
      let right = PanelMatrix(b, width: rightWidth)
      defer { withExtendedLifetime((left, right)) {} }
      for writes in [false, true] {
        let before = numbers.array(leftWidth * rightWidth)
        // Whole lines of memory are written past the caches, others are not.
        func gradient(byRows: Bool, shift: Int) -> [Float] {
          let gradient = UnsafeMutableRawPointer.allocate(byteCount: 4 * (before.count + 16), alignment: 64)
          defer { gradient.deallocate() }
          let values = gradient.assumingMemoryBound(to: Float.self) + shift
          values.update(from: before, count: before.count)
          Outer.add(
            left.panels, range, right.panels, rows: rows, times: 0.5, to: values, stride: rightWidth, writes: writes,
            byRows: byRows, on: memory.desk)
          return Array(UnsafeBufferPointer(start: values, count: before.count))
        }
        let sums = gradient(byRows: false, shift: 0)
        for (byRows, shift) in [(true, 0), (false, 4), (true, 4)] {
          #expect(sums.map(\.bitPattern) == gradient(byRows: byRows, shift: shift).map(\.bitPattern))
        }
        for row in 0..<leftWidth {
          for column in 0..<rightWidth {
            let at = row * rightWidth + column
            guard range.contains(row) else {
              #expect(sums[at].bitPattern == before[at].bitPattern, "another row")
              continue
            }
            let exact = (0..<rows).reduce(0.0) { $0 + Double(a[$1][row]) * Double(b[$1][column]) } / 2
            #expect(abs(Double(sums[at]) - exact - (writes ? 0 : Double(before[at]))) <= Self.bound(terms: rows))
          }
        }
      }
    }
  }

  /// The same row gives the same bits whatever stands beside it: how rows are cut cannot matter.
  @Test func aRowsBitsDoNotDependOnItsPanel() {
    var numbers = Numbers(3)
    let depth = 100
    let rows = Self.matrix(12, depth, &numbers)
    let weights = numbers.array(depth * 32)
    let whole = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
    let part = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
    defer {
      whole.deallocate()
      part.deallocate()
    }
    let all = PanelMatrix(rows, width: depth)
    defer { withExtendedLifetime(all) {} }
    Self.product(all.panels, 0, 12, weights, depth, whole)
    for high in 1...11 {
      let some = PanelMatrix(Array(rows[..<high]), width: depth)
      defer { withExtendedLifetime(some) {} }
      Self.product(some.panels, 0, high, weights, depth, part)
      for i in 0..<high * 32 { #expect(part[i].bitPattern == whole[i].bitPattern) }
    }
  }

  /// A panel times a whole strip, in one piece.
  private static func product(
    _ left: Panels, _ first: Int, _ high: Int, _ strip: UnsafePointer<Float>, _ depth: Int,
    _ tile: UnsafeMutablePointer<Float>
  ) {
    withAsks(for: strip) {
      Tiles.product(
        panel: left.panel(first), high: high, strip: strip, depth: depth, into: tile, begins: true, next: left.panel(0),
        $0)
    }
  }

  /// That `tile` [rows, 32] is what the packed strip gives, bit by bit.
  private static func expectBitsOfTiles(
    _ tile: UnsafePointer<Float>, _ left: Panels, rows: Int, strip: UnsafePointer<Float>, depth: Int
  ) {
    let expected = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
    defer { expected.deallocate() }
    Panels.forEach(rows: rows) { first, high in
      product(left, first, high, strip, depth, expected)
      for i in 0..<high {
        for c in 0..<32 {
          #expect(
            tile[(first + i) * 32 + c].bitPattern == expected[i * 32 + c].bitPattern, "rows \(rows), depth \(depth)")
        }
      }
    }
  }

  /// Weights read in place give the bits that packed strips give, for every row count and odd depths.
  @Test func fewRowsGiveTheBitsOfTiles() {
    var numbers = Numbers(5)
    for depth in [1, 15, 16, 17, 64, 100] {
      let weights = numbers.array(32 * depth)
      let strip = UnsafeMutablePointer<Float>.allocate(capacity: depth * 32)
      let scratch = UnsafeMutablePointer<Float>.allocate(capacity: FewRows.scratch(depth: depth))
      let tile = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
      defer { for memory in [strip, scratch, tile] { memory.deallocate() } }
      weights.withUnsafeBufferPointer { weights in
        let factor = Factor(transposing: weights.baseAddress!, depth: depth, columns: 32)
        #expect(factor.rowsInPlace(17) == nil && factor.rowsInPlace(16) == weights.baseAddress! + 16 * depth)
        factor.pack(0, 0..<depth, into: strip)
        for rows in 1...Choices.mostRows {
          let left = PanelMatrix(Self.matrix(rows, depth, &numbers), width: depth)
          defer { withExtendedLifetime(left) {} }
          FewRows.prepare(left.panels, rows: rows, scratch: scratch)
          for half in 0..<2 {
            FewRows.product(
              left.panels, rows: rows, weights: factor.rowsInPlace(half * 16)!, depth: depth, scratch: scratch,
              into: tile + half * 16)
          }
          Self.expectBitsOfTiles(tile, left.panels, rows: rows, strip: strip, depth: depth)
        }
      }
    }
  }

  @Test func blocksAreTurned() {
    let square = (0..<(16 * 20)).map { Float($0) }
    let turned = transposed(square, stride: 20)
    for row in 0..<16 { #expect((0..<16).allSatisfy { turned[row][$0] == Float($0 * 20 + row) }) }
  }

  /// The dots of very few rows against Double loops, and a row's bits whatever stands beside it.
  @Test func dotsEqualDoubleLoops() {
    var numbers = Numbers(7)
    for depth in [1, 15, 16, 17, 64, 100, 1024] {
      let weights = numbers.array(FewRows.columns * depth)
      let scratch = UnsafeMutablePointer<Float>.allocate(capacity: Dots.scratch)
      let tile = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
      defer { for memory in [scratch, tile] { memory.deallocate() } }
      let rows = Self.matrix(Dots.most, depth, &numbers)
      var bits: [[UInt32]] = []
      for count in 1...Dots.most {
        let left = PanelMatrix(Array(rows[..<count]), width: depth)
        defer { withExtendedLifetime(left) {} }
        Dots.product(left.panels, rows: count, weights: weights, depth: depth, scratch: scratch, into: tile)
        for row in 0..<count {
          for c in 0..<FewRows.columns {
            let exact = (0..<depth).reduce(0.0) { $0 + Double(rows[row][$1]) * Double(weights[c * depth + $1]) }
            #expect(abs(Double(tile[row * 32 + c]) - exact) <= Self.bound(terms: depth), "row \(row), depth \(depth)")
          }
          let own = (0..<FewRows.columns).map { tile[row * 32 + $0].bitPattern }
          if row < bits.count { #expect(own == bits[row]) } else { bits.append(own) }
        }
      }
    }
  }

  /// And so does a matrix whose rows are added up where it stands, some of them at a time.
  @Test func matricesInPlaceGiveTheBitsOfTiles() {
    var numbers = Numbers(6)
    for (depth, count) in [(1, 1), (15, 15), (16, 16), (40, 16), (64, 32), (100, 48)] {
      let columns = 32
      let weights = numbers.array(columns * depth + 16)
      let strip = UnsafeMutablePointer<Float>.allocate(capacity: depth * 32)
      let sums = UnsafeMutablePointer<Float>.allocate(capacity: Choices.mostRows * 16)
      let tile = UnsafeMutablePointer<Float>.allocate(capacity: Tiles.floats(rows: Choices.mostRows))
      defer { for memory in [strip, sums, tile] { memory.deallocate() } }
      weights.withUnsafeBufferPointer { weights in
        let factor = Factor(weights.baseAddress!, depth: depth, columns: columns)
        #expect(factor.matrixInPlace == weights.baseAddress!)
        #expect(Factor(weights.baseAddress!, depth: depth, columns: columns - 1).matrixInPlace == nil)
        factor.pack(0, 0..<depth, into: strip)
        for rows in 1...Choices.mostRows {
          let left = PanelMatrix(Self.matrix(rows, depth, &numbers), width: depth)
          defer { withExtendedLifetime(left) {} }
          for column in [0, 16] {
            sums.update(repeating: 0, count: rows * 16)
            for from in stride(from: 0, to: depth, by: count) {
              let isLast = from + count >= depth
              FewRows.add(
                left.panels, rows: rows, from: from, count: min(count, depth - from),
                weights: weights.baseAddress! + (from * columns + column), stride: columns, to: sums,
                into: isLast ? tile + column : sums, apart: isLast ? 32 : 16)
            }
          }
          Self.expectBitsOfTiles(tile, left.panels, rows: rows, strip: strip, depth: depth)
        }
      }
    }
  }
}
