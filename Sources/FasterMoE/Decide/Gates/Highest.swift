/// The highest of many scores, by keys that are all different: so which they are never depends on how they are found.
package enum Highest {
  /// A key in the order of scores: NaN ranks as -∞, and of equal scores the one with the lower index is higher.
  @inline(__always) package static func key(_ score: Float, _ index: Int) -> UInt64 {
    let value = score == score ? score + 0 : -.infinity  // -0 + 0 is 0, its equal
    let bits = value.bitPattern
    let ordered = bits >> 31 == 0 ? bits | 1 << 31 : ~bits
    return UInt64(ordered) << 32 | UInt64(UInt32.max - UInt32(index))
  }

  @inline(__always) package static func index(_ key: UInt64) -> Int {
    Int(UInt32.max - UInt32(truncatingIfNeeded: key))
  }

  /// Moves the `count` highest of `all` different keys to the front, in any order. O(all) on average.
  package static func select(_ count: Int, of keys: UnsafeMutablePointer<UInt64>, _ all: Int) {
    var (low, high) = (0, all)  // what is before is among the highest, what is behind is not
    var luck: UInt64 = 0x9E37_79B9_7F4A_7C15
    while low < count && count < high {
      luck = luck &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      let pivot = keys[low + Int((luck >> 33) % UInt64(high - low))]
      var (left, right) = (low, high - 1)
      while true {
        while keys[left] > pivot { left += 1 }
        while keys[right] < pivot { right -= 1 }
        guard left < right else { break }
        (keys[left], keys[right]) = (keys[right], keys[left])
        // One of the two is the pivot where only one may move on.
        if keys[left] == pivot { right -= 1 } else { left += 1 }
      }
      // The pivot stands at `left` now.
      if count <= left { high = left } else { low = left + 1 }
    }
  }
}
