// Made by `make choices`.
#if WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.23, 1.11, 1.07, 1.11 times as fast.
    static let intel: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x00f0ff00f0f0ff00fffefffeffffffff,
        straight: 0x000f0ffffffffff0ffffffffffffffff, outer: 0xff0000ff000ffffffffeffdb1eefffff),
      Entry(
        weights: 1048576, threads: 1, transposed: 0xffffffffffffffffffffffffffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x000ff0000fffffff0efeff252ab5ffff),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x0000ff00fffffffffffefffcffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x000000f0000000ffe9be2ac80027ffff),
      Entry(
        weights: 131072, threads: 2, transposed: 0x0000ff00ffffffffffd8fffaffffffff,
        straight: 0x0ffffff0ffffffffffffffffffffffff, outer: 0x000fff00ffff00f09c080f872e76ffff),
      Entry(
        weights: 1048576, threads: 2, transposed: 0xf0fffff0fffff0fffffffed6ffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x00000f0000f0000001040006080327ff),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x00000000fffffffffffefef0ffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x000000000000ff0f8b7b988002e2f5ff),
    ]
  }
#endif
