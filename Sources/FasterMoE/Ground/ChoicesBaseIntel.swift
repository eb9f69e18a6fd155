// Made by `make choices`.
#if !WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.56, 1.38, 1.28, 1.23 times as fast.
    static let intel: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x00f0f0f0fff00ffff4f0fff0d7fffffe,
        straight: 0x0ff000ff00fff00ff3feffffffffffff, outer: 0x000000000000000000004008021fffff),
      Entry(
        weights: 1048576, threads: 1, transposed: 0xf0fff0f0ffffffffdcfefffcfffdfff0,
        straight: 0xffffff0fff0fffffffffffffffffffff, outer: 0x000000000000f00000000000001027ff),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x00000000ff00fffff8fefffffffffff5,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x00000000000000000000000000003fff),
      Entry(
        weights: 131072, threads: 2, transposed: 0xf0f000f0f000f0ff38c0fffefffefcf2,
        straight: 0x0f00fff0f0ffffffe34edff9ffffffff, outer: 0x000000000000000000000000007fffff),
      Entry(
        weights: 1048576, threads: 2, transposed: 0xf0fff0fffff0fffff8fcffbcfffffff0,
        straight: 0x0ff0ff0fffffffffffefffffffffffff, outer: 0x00000000000000000000000000206bff),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x00000f00f00000fffbd0fffffdfff6f0,
        straight: 0x00fffff0000000f07ff7ffffffffffff, outer: 0x00000000000000000008000000001fff),
    ]
  }
#endif
