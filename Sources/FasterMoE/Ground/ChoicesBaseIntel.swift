// Made by `make choices`.
#if !WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.56, 1.39, 1.33, 1.2 times as fast.
    static let intel: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x000000f0f0f0f0f0f0e0fefcffffffee,
        straight: 0xff0fffffffffffffffffffffffffffff, outer: 0x0000000000000000000000000000003f),
      Entry(
        weights: 1048576, threads: 1, transposed: 0x00f0f000ff0ffff07cfcfffffffffff8,
        straight: 0xfffff0ffff0fffffffffffffffffffff, outer: 0x0000000000000000000000000000042f),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x000000000000f0fff8f0fb79fcfff7f0,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x0000000000000000000000000000000f),
      Entry(
        weights: 131072, threads: 2, transposed: 0x000000f0fff0f0fff0e0fef1f4fefefe,
        straight: 0x0fffffffffffffffffffffffffffffff, outer: 0x0000000000000000000000000000001f),
      Entry(
        weights: 1048576, threads: 2, transposed: 0xf0f0f00f0ff0fffffcfcffbefdfcfef0,
        straight: 0xfffff0ffffffffffffffffffffffffff, outer: 0x0000000000000000000000000000003f),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x0000000000000000d090ded6fcfffbf0,
        straight: 0x0f0fffffffffffffefffffffffffffff, outer: 0x0000000000000000000000000000000f),
    ]
  }
#endif
