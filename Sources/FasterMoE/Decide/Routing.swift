/// Who goes where: the choices of a batch, counted and sorted by expert.
package struct Routing {
  /// [n, k] expert of each slot, or -1: dropped.
  package let choices: UnsafeMutablePointer<Int32>
  /// [n, k]
  package let weights: UnsafeMutablePointer<Float>
  /// [E] slots per expert.
  package let counts: UnsafeMutablePointer<Int64>
  /// [E + 1] first row of each expert among the sorted rows; then how many they are.
  package let firstRow: UnsafeMutablePointer<Int>
  /// [rows] slot (token·k + choice) of each sorted row.
  package let slots: UnsafeMutablePointer<Int32>
  /// [n, k] sorted row of each slot, or -1.
  package let rows: UnsafeMutablePointer<Int32>

  package init(arena: inout Arena, slots count: Int, experts: Int) {
    choices = arena.take(count)
    weights = arena.take(count)
    counts = arena.take(experts)
    firstRow = arena.take(experts + 1)
    slots = arena.take(count)
    rows = arena.take(count)
  }

  /// Counts the choices. O(n·k + E).
  package func count(slots count: Int, experts: Int) {
    counts.update(repeating: 0, count: experts)
    for slot in 0..<count where choices[slot] >= 0 { counts[Int(choices[slot])] += 1 }
  }

  /// Sorts what was counted: rows go by expert in the order of `moves` and, within one, in the order of their slots.
  /// O(n·k + E).
  package func sort(slots count: Int, experts: Int, _ moves: Moves) {
    var first = 0
    moves.forEachExpert { expert in
      firstRow[expert] = first
      first += Int(counts[expert])
    }
    firstRow[experts] = first
    for slot in 0..<count {
      let expert = Int(choices[slot])
      guard expert >= 0 else {
        rows[slot] = -1
        continue
      }
      let row = firstRow[expert]
      firstRow[expert] = row + 1
      slots[row] = Int32(slot)
      rows[slot] = Int32(row)
    }
    // Filling moved each start to its end.
    for expert in 0..<experts { firstRow[expert] -= Int(counts[expert]) }
  }
}

/// Rows of one expert that are computed together.
package struct Block {
  /// Among those that this worker owns; behind them are the copies that it holds of others.
  package let expert: Int32
  /// Its first row among all sorted rows, and how many.
  package let row: Int32
  package let rows: Int32
  /// The block of the same expert before this one, or -1: weight gradients add up in that order.
  package let previous: Int32

  /// Most rows of a block. Weight gradients sum within a block first, so this, not the number of threads, fixes their bits.
  package static let mostRows = mostPanels * Panels.height
  private static let mostPanels = 48

  /// Most blocks that `slots` rows over `experts` can make, those of each round counted.
  package static func mostBlocks(slots: Int, experts: Int) -> Int { min(slots, experts) + slots / (mostRows / 3) + 1 }

  /// Cuts every expert's rows, those of one round, into blocks of near-equal size.
  ///
  /// The largest come first, so that the last to finish are small; but if `inOrder`, the first rows do, so that those are
  /// done first. Blocks of an expert differ by a panel at most and the larger come first, so they keep their order.
  /// `blocks` are behind `made` others, of earlier rounds; the experts are numbered from `firstExpert` on, and `latest` is
  /// the latest block of each number, or -1.
  package static func cut(
    firstRow: UnsafeMutablePointer<Int>, experts: Int, firstExpert: Int = 0, inOrder: Bool,
    into blocks: UnsafeMutablePointer<Block>, behind made: Int, latest: UnsafeMutablePointer<Int32>
  ) -> Int {
    var places = InlineArray<50, Int>(repeating: 0)  // one more than mostPanels + 1
    func visit(_ body: (_ expert: Int, _ row: Int, _ panels: Int, _ rows: Int) -> Void) {
      for expert in 0..<experts {
        var row = firstRow[expert]
        let end = firstRow[expert + 1]
        let panels = Panels.count(end - row)
        let parts = (panels + mostPanels - 1) / mostPanels
        for part in 0..<parts {
          // The first (panels mod parts) blocks are a panel larger.
          let high = panels / parts + (part < panels % parts ? 1 : 0)
          let rows = min(high * Panels.height, end - row)
          body(expert, row, high, rows)
          row += rows
        }
      }
    }
    // All count as of one size where the order is that of rows.
    func size(_ panels: Int) -> Int { inOrder ? 0 : mostPanels - panels }
    visit { _, _, panels, _ in places[size(panels) + 1] += 1 }
    for size in 1..<places.count { places[size] += places[size - 1] }
    let count = places[places.count - 1]
    visit { expert, row, panels, rows in
      let place = places[size(panels)]
      places[size(panels)] = place + 1
      let number = firstExpert + expert
      blocks[made + place] = Block(
        expert: Int32(number), row: Int32(row), rows: Int32(rows), previous: latest[number])
      latest[number] = Int32(made + place)
    }
    return count
  }
}
