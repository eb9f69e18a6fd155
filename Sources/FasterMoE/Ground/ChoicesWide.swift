// Made by `make choices`.
#if WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.21, 1.25, 1.24, 1.11 times as fast.
    static let amd: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x000f0000000000008081fcffffffffff,
        straight: 0xff0f0ffff0ffffffbfffffffffffffff, outer: 0x0000f0f00000f000fc40b940d1826f4f),
      Entry(
        weights: 1048576, threads: 1, transposed: 0x00000f00fff0ffffffffffffffefffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x0f00000fff0ffff0b17440dd8fefbff7),
      Entry(
        weights: 4194304, threads: 1, transposed: 0xff00ff0fff0ffffffffeffffffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0xff0ff00000ff0f005ba4624bcfea4678),
      Entry(
        weights: 131072, threads: 2, transposed: 0x0000000000000000fce0f8fbffffffff,
        straight: 0x0f0000ffffffffffffffffffffffffff, outer: 0x00000fff0f0000f0a185602de0cd4847),
      Entry(
        weights: 1048576, threads: 2, transposed: 0x000000000f0f0000df61fdefdf8fffff,
        straight: 0xff0ff0fff0ffffffffffffffffffffff, outer: 0x00f000000000000031923cfb631ebdf2),
      Entry(
        weights: 4194304, threads: 2, transposed: 0xff0000000f0f0000fb04fc8fffcfffff,
        straight: 0xfffffff0ffffffffffffffffffffffff, outer: 0xff000ff000f0ffff890ed1c4372fc677),
    ]
  }
#endif
