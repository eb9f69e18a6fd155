// Made by `make choices`.
#if !WIDE_VECTORS
  extension Choices {
    // `Dots` beside the kernels in place for 1, 2... rows: 1.84, 1.64, 1.43, 1.52 times as fast.
    static let amd: InlineArray<6, Entry> = [
      Entry(
        weights: 131072, threads: 1, transposed: 0x0000000000000000d00001f0dff4ffff,
        straight: 0x00000000000000ffffffffffffffffff, outer: 0x0000000000f00f0019e3fe1ce080840f),
      Entry(
        weights: 1048576, threads: 1, transposed: 0x000000000ff0000000004090fbfffff0,
        straight: 0x00f000f000000fffffffffffffffffff, outer: 0x0000000000000000000000000010037f),
      Entry(
        weights: 4194304, threads: 1, transposed: 0x000000000000000000000000fffefff4,
        straight: 0x00000000000000f0fff7ffffffffffff, outer: 0x00000000000000000000000000000001),
      Entry(
        weights: 131072, threads: 2, transposed: 0x00000000000000f07a003870eff0ffff,
        straight: 0xfff0ff00ff0ffffffffffdffffffffff, outer: 0x000000000000000001c62a1fc17dffff),
      Entry(
        weights: 1048576, threads: 2, transposed: 0x0000000000000000000000b0faf0fff2,
        straight: 0x00000000000000008dffffffffffffef, outer: 0x000000000000000000000040000009ff),
      Entry(
        weights: 4194304, threads: 2, transposed: 0x000000000000000000000000c0f8fff0,
        straight: 0x00000000000000ffe13ff7feffffffff, outer: 0x00000000000000000080000000000511),
    ]
  }
#endif
