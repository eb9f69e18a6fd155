import Testing

@testable import FasterMoE

@Suite struct ScratchTests {
  /// Whatever was taken since no mark was released keeps its values, however much is taken besides.
  @Test func whatIsTakenStaysUntilItsMarkIsReleased() {
    var numbers = Numbers(41)
    let memory = Scratch()
    var kept: [(values: UnsafeMutableBufferPointer<Int>, fill: Int)] = []
    var marks: [(mark: Scratch.Mark, count: Int)] = []
    for turn in 0..<3000 {
      switch numbers.below(4) {
      case 0: marks.append((memory.mark, kept.count))
      case 1:
        guard let last = marks.popLast() else { continue }
        memory.release(to: last.mark)
        kept.removeLast(kept.count - last.count)
      default:
        // Now and then more than a chunk.
        let count = numbers.below(20) == 0 ? 10_000 + numbers.below(10_000) : numbers.below(300)
        let values = memory.take(count, of: turn)
        #expect(values.count == count && (count == 0 || Int(bitPattern: values.baseAddress!) % 64 == 0))
        kept.append((values, turn))
      }
      if turn % 50 == 0 { for (values, fill) in kept { #expect(values.allSatisfy { $0 == fill }) } }
    }
    for (values, fill) in kept { #expect(values.allSatisfy { $0 == fill }) }
  }

  @Test func whatIsGivenBackServesAgain() {
    let memory = Scratch()
    let mark = memory.mark
    let first: UnsafeMutableBufferPointer<Double> = memory.take(100)
    memory.release(to: mark)
    let again: UnsafeMutableBufferPointer<Double> = memory.take(100)
    #expect(first.baseAddress == again.baseAddress)
    let next = memory.copy([1, 2, 3])
    #expect(Array(next) == [1, 2, 3])
    #expect(UnsafeRawPointer(again.baseAddress! + 100) <= UnsafeRawPointer(next.baseAddress!))
  }
}
