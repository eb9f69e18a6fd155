// Made by `make choices`.
#if WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.12, 1.08, 1.11, 1.15 times as fast.
    static let intel: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x0f000000ff000000fff8fc00ffffffef,
        straight: 0x000000000000000070efffffffffffff, outer: 0x000000000000000000000000805fffe7),
      Entry(
        weights: 1048576, threads: 1, transposed: 0xfff0ff00fffffff0fffffff0ffffffff,
        straight: 0x0000ffffffffffffffffffffffffffff, outer: 0x00000000000000000000000000000177),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x0000000000000000fffffedfffffffff,
        straight: 0xffffffffffffffffffffffffffffffff, outer: 0x0000000000000000000003a822006000),
      Entry(
        weights: 131072, threads: 2, transposed: 0xff000000fff0f000ffe0fc80fffefe0f,
        straight: 0x00000000000000000000ffffefffffff, outer: 0x0000000f0000000f0000000001fffffa),
      Entry(
        weights: 1048576, threads: 2, transposed: 0xfff0f000ffffff00ffffff40ffffffdf,
        straight: 0x000fffffffffffffffffffffffffffff, outer: 0x000ff00000000000000000000000000b),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x0000000000000000be84ff50ffffffff,
        straight: 0xfff00fffffffffffffffffffffffffff, outer: 0x000000f0000000f02102080001000003),
    ]
  }
#endif
