// Made by `make choices`.
#if !WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.9, 1.59, 1.6, 1.31 times as fast.
    static let measured: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x00000000f000000f7001e0feffffffff,
        straight: 0x000000f00f0f00ffff7fffffffffffff, outer: 0xf0ffffffff0fffffffffffffffffffff),
      Entry(
        weights: 1048576, threads: 1, transposed: 0x00f0f0f00ff0fff0bb81fcf5ffffffff,
        straight: 0xf00ffff000fff0fffffeffffffffffff, outer: 0xff0ff0ff0fff0fff577ffffffeffffff),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x000ff0ff0000f0f09acbfff7ffffffff,
        straight: 0x0000f0f0000000ff7dbdf7ffffffffff, outer: 0xf0ffff00ff00ffff6fffffffffffffff),
      Entry(
        weights: 131072, threads: 2, transposed: 0x00000000000000001901fef1f9fdffff,
        straight: 0x0f0000f0000f0f002effffffffffffff, outer: 0xf00fffffffffff0fffffffffffffffff),
      Entry(
        weights: 1048576, threads: 2, transposed: 0x00f0000000f0f0fffe80fdf0ffffffff,
        straight: 0xff00ff000000ffffffffffffffffffff, outer: 0xfff00000ffff0fffffffffffffffffff),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x00f000ff0f0000f00808f0f0feffffff,
        straight: 0xf0000000ff0f0f007fffffffffffffff, outer: 0x00000f0fff0ffffffe7fffffffffffff),
    ]
  }
#endif
