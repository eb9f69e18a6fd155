import FasterMoE
import Foundation
import Synchronization

// Measures which kernels are fastest, by rows, sizes and threads, and prints the table of this CPU level and maker; the GFLOP/s that
// decided go to a file: see `make choices`.

func stop(_ words: String) -> Never {
  try? FileHandle.standardError.write(contentsOf: Data("\(words)\n".utf8))
  exit(2)
}

/// Matrices of one size, more than caches hold, and what a thread needs to multiply with them.
final class Trial: @unchecked Sendable {
  enum Way { case transposed(Product.Kernel), straight(Product.Kernel), outer(byRows: Bool) }

  let model, hidden, matrices: Int
  let threads: Int
  private let next = Atomic<Int>(0)
  var way = Way.outer(byRows: true)
  var rows = 1
  private let weights: Region
  private let gradients: Region
  private let scratch: Region
  private let scratchBytes: Int

  init(model: Int, hidden: Int, threads: Int) throws {
    (self.model, self.hidden, self.threads) = (model, hidden, threads)
    matrices = max(2 * threads, Trial.bytes / (4 * model * hidden))
    weights = try Region(bytes: matrices * model * hidden * 4, for: "weights")
    gradients = try Region(bytes: matrices * model * hidden * 4, for: "gradients")
    var size = Arena()
    _ = Trial.desk(model, hidden, &size)
    scratchBytes = size.bytes
    scratch = try Region(bytes: threads * scratchBytes, for: "scratch")
    let values = weights.base.assumingMemoryBound(to: Float.self)
    for i in 0..<matrices * model * hidden { values[i] = Float(i % 251) / 251 - 0.5 }
    memset(gradients.base, 1, gradients.bytes)
    memset(scratch.base, 0, scratch.bytes)
  }

  /// More than caches hold.
  static let bytes = 64 << 20

  private static func desk(_ model: Int, _ hidden: Int, _ arena: inout Arena) -> (Product.Desk, Panels, Panels) {
    func panels(_ width: Int) -> Panels {
      Panels(arena.take(Choices.mostRows * Panels.padded(width)), width: width)
    }
    return (
      Product.Desk(arena: &arena, rows: Choices.mostRows, longest: max(model, hidden)), panels(model), panels(hidden)
    )
  }

  /// Both products of `way` with each matrix.
  private func work(thread: Int) {
    var arena = Arena(over: scratch.base + thread * scratchBytes)
    let (desk, narrow, wide) = Trial.desk(model, hidden, &arena)
    while case let task = next.wrappingAdd(1, ordering: .relaxed).oldValue, task < 2 * matrices {
      let isInward = task % 2 == 0
      let place = task / 2 * model * hidden
      let matrix = UnsafePointer(weights.base.assumingMemoryBound(to: Float.self) + place)
      let left = isInward ? narrow : wide
      let columns = isInward ? hidden : model
      switch way {
      case .transposed(let kernel):
        multiply(left, Factor(transposing: matrix, depth: left.width, columns: columns), kernel, desk)
      case .straight(let kernel): multiply(left, Factor(matrix, depth: left.width, columns: columns), kernel, desk)
      case .outer(let byRows):
        // As many of its rows at a time as a task takes.
        for first in stride(from: 0, to: columns, by: Outer.columnsAtOnce) {
          Outer.add(
            isInward ? wide : narrow, first..<min(columns, first + Outer.columnsAtOnce), left, rows: rows, times: 1,
            to: gradients.base.assumingMemoryBound(to: Float.self) + place, stride: left.width, writes: true,
            byRows: byRows, on: desk)
        }
      }
    }
  }

  /// The others as threads of their own, which take some microseconds of milliseconds.
  private func run() {
    next.store(0, ordering: .relaxed)
    var others: [pthread_t] = []
    for thread in 1..<max(threads, 1) {
      var id = pthread_t()
      let seat = Unmanaged.passRetained(Seat(trial: self, thread: thread)).toOpaque()
      let failed = pthread_create(
        &id, nil,
        {
          let seat = Unmanaged<Seat>.fromOpaque($0!).takeRetainedValue()
          seat.trial.work(thread: seat.thread)
          return nil
        }, seat)
      guard failed == 0 else { stop("the system starts no thread") }
      others.append(id)
    }
    work(thread: 0)
    for id in others { pthread_join(id, nil) }
  }

  private final class Seat {
    let trial: Trial
    let thread: Int
    init(trial: Trial, thread: Int) { (self.trial, self.thread) = (trial, thread) }
  }

  private func multiply(_ left: Panels, _ factor: Factor, _ kernel: Product.Kernel, _ desk: Product.Desk) {
    Product.forEachTile(rows, in: 0..<factor.columns, by: kernel, Product(left, factor, on: desk)) { _, _, _, _, _ in }
  }

  /// Seconds of each of `ways`, the best of some rounds in turns.
  func seconds(_ ways: [Way]) -> [Double] {
    var best = [Double](repeating: .infinity, count: ways.count)
    for _ in 0..<3 {
      for (index, way) in ways.enumerated() {
        self.way = way
        let start = Seconds.now
        run()
        best[index] = min(best[index], Seconds.now.value - start.value)
      }
    }
    return best
  }
}

guard CommandLine.arguments.count == 2, let csv = fopen(CommandLine.arguments[1], "w") else {
  stop("usage: Choose CSV, where the speeds that decide are written")
}
fputs("rows,d,h,threads,transposed in place,strips,straight in place,strips,sums by rows,by columns,dots\n", csv)

let cores = sysconf(Int32(_SC_NPROCESSORS_ONLN))
let sizes = [(256, 512), (512, 2048), (1024, 4096)]
var entries: [String] = []
/// By rows, how much longer the kernels in place take than the dots, of all sizes on one thread.
var dots = [Double](repeating: 0, count: Dots.most)
do {
  for threads in cores > 1 ? [1, cores] : [1] {
    for (model, hidden) in sizes {
      let trial = try Trial(model: model, hidden: hidden, threads: threads)
      var masks = (transposed: UInt128(0), straight: UInt128(0), outer: UInt128(0))
      for rows in Array(1...64) + Array(stride(from: 68, through: Choices.mostRows, by: 4)) {
        trial.rows = rows
        let times = trial.seconds(
          [
            .transposed(.inPlace), .transposed(.strips), .straight(.inPlace), .straight(.strips),
            .outer(byRows: true), .outer(byRows: false), .transposed(.dots),
          ].dropLast(rows > Dots.most ? 1 : 0))
        // Above 64 for the four rows that end here.
        let four: UInt128 = 0xf
        let bit = rows > 64 ? four << (rows - 4) : UInt128(1) << (rows - 1)
        if times[0] <= times[1] { masks.transposed |= bit }
        if times[2] <= times[3] { masks.straight |= bit }
        if times[4] <= times[5] { masks.outer |= bit }
        if rows <= Dots.most, threads == 1 { dots[rows - 1] += times[0] / times[6] / Double(sizes.count) }
        let flops = 4e-9 * Double(rows * trial.matrices * model * hidden)
        let words =
          [rows, model, hidden, threads].map(String.init) + times.map { String(Double(Int(10 * flops / $0)) / 10) }
        fputs(words.joined(separator: ",") + "\n", csv)
      }
      func hex(_ mask: UInt128) -> String {
        let digits = String(mask, radix: 16)
        return "0x" + String(repeating: "0", count: 32 - digits.count) + digits
      }
      entries.append(
        "      Entry(weights: \(model * hidden), threads: \(threads), transposed: \(hex(masks.transposed)), "
          + "straight: \(hex(masks.straight)), outer: \(hex(masks.outer))),")
    }
  }
} catch { stop("\(error)") }
fclose(csv)
let gains = dots.map { String(Double(Int(100 * $0)) / 100) }.joined(separator: ", ")
#if WIDE_VECTORS
  let level = "#if WIDE_VECTORS"
#else
  let level = "#if !WIDE_VECTORS"
#endif
print("// Made by `make choices`.")
print(level)
print("  extension Choices {")
print("    // `Dots` beside the kernels in place for 1, 2... rows: \(gains) times as fast.")
print("    static let \(Choices.isIntel ? "intel" : "amd"): InlineArray<\(entries.count), Entry> = [")
for entry in entries { print(entry) }
print("    ]\n  }\n#endif")
