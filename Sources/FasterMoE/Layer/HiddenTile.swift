import CHints

/// Where 32 columns of hidden units of one panel stand, before and after the activation.
struct HiddenTile {
  let tile: UnsafeMutablePointer<Float>
  let linearTile: UnsafeMutablePointer<Float>
  let column: Int
  let high: Int
  let inner: UnsafeMutablePointer<Float>
  let innerLinear: UnsafeMutablePointer<Float>
  let hidden: UnsafeMutablePointer<Float>
  let blocks: Int
  /// Whether pre-activations are written past the caches.
  var writesPast = false
  /// Of the panel; nil for all.
  var rows: Range<Int>?

  /// Calls `body` with each 16-unit piece of each row: its place in the tile, in the panels, and its row.
  @inline(__always)
  private func forEach(_ body: (_ inTile: Int, _ inPanel: Int, _ row: Int) -> Void) {
    for half in 0..<2 where column / 16 + half < blocks {
      let block = (column / 16 + half) &* high &* 16
      for i in rows ?? 0..<high { body(i &* Strip.width &+ half &* 16, block &+ i &* 16, i) }
    }
  }

  /// Lists what will be written, pre-activations too if `wantsInner`: hidden units come from farther than the second cache.
  @inline(__always)
  func listUnits(isGated: Bool, inner wantsInner: Bool, in asks: inout Asks) {
    for half in 0..<2 where column / 16 + half < blocks {
      let block = (column / 16 + half) &* high &* 16
      for i in 0..<high {
        asks.write(hidden + (block &+ i &* 16))
        guard wantsInner else { continue }
        asks.write(inner + (block &+ i &* 16))
        if isGated { asks.write(innerLinear + (block &+ i &* 16)) }
      }
    }
  }

  /// The tile itself stands in the place of hidden units until all threads are done with theirs.
  func keepTile() { forEach { at, panel, _ in hidden.store(tile.vector(at: at), at: panel) } }
  func readHidden() { forEach { at, panel, _ in tile.store(hidden.vector(at: panel), at: at) } }

  /// Keeps a pre-activation for backward.
  @inline(__always)
  private func keep(_ value: Vector, _ to: UnsafeMutablePointer<Float>) {
    if writesPast { hint_write_past(to, value) } else { to.store(value) }
  }

  /// u = tile + b1 is kept, a = f(u) goes on.
  @inline(__always)
  func activate<F: Nonlinearity>(_: F.Type, bias: UnsafeMutablePointer<Float>, _ h: Int) {
    for half in 0..<2 where column / 16 + half < blocks {
      let added = bias.vector(at: column + half * 16, first: min(16, h - column - half * 16))
      let block = (column / 16 + half) &* high &* 16
      for i in 0..<high {
        let u = tile.vector(at: i &* Strip.width &+ half &* 16) + added
        keep(u, inner + (block &+ i &* 16))
        hidden.store(F.value(u), at: block &+ i &* 16)
      }
    }
  }

  /// a = silu(tile) ⊙ second tile.
  func activateGated() {
    forEach { at, panel, _ in
      let (u, v) = (tile.vector(at: at), linearTile.vector(at: at))
      keep(u, inner + panel)
      keep(v, innerLinear + panel)
      hidden.store(Silu.value(u) * v, at: panel)
    }
  }

  /// With g = dy·W2 in the tile: sums += g ⊙ a, hidden = s·a, du = s·g ⊙ f'(u) in the place of u.
  @inline(__always)
  func deactivate<F: Nonlinearity>(
    _: F.Type, _ scales: UnsafePointer<Float>, _ sums: UnsafeMutablePointer<Float>
  ) {
    forEach { at, panel, row in
      let g = tile.vector(at: at)
      let (a, slope) = F.valueAndSlope(inner.vector(at: panel))
      let s = Vector(repeating: scales[row])
      sums.store(sums.vector(at: row &* 16).addingProduct(g, a), at: row &* 16)
      hidden.store(a * s, at: panel)
      inner.store(g * s * slope, at: panel)
    }
  }

  func deactivateGated(_ scales: UnsafePointer<Float>, _ sums: UnsafeMutablePointer<Float>) {
    forEach { at, panel, row in
      let g = tile.vector(at: at)
      let (a, slope) = Silu.valueAndSlope(inner.vector(at: panel))
      let v = innerLinear.vector(at: panel)
      let s = Vector(repeating: scales[row])
      sums.store(sums.vector(at: row &* 16).addingProduct(g, a * v), at: row &* 16)
      hidden.store(a * v * s, at: panel)
      inner.store(g * s * v * slope, at: panel)
      innerLinear.store(g * s * a, at: panel)
    }
  }
}
