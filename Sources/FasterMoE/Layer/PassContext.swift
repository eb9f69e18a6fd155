/// One thread's view of a running pass; the stages are its methods.
struct PassContext {
  let thread: Int
  let team: Team
  let layer: Layer
  let store: Store
  /// There from forward on.
  let inbox: Inbox!
  let journey: Journey
  let workspace: Workspace
  let desk: Workspace.Desk
  let lane: Recording.Lane
  /// [n, d]; nil only where n is 0.
  let tokens: UnsafePointer<Float>!
  /// As the pass'; there from forward on.
  let results: UnsafeMutablePointer<Float>!
  let count: Int
  let firstToken: Int
  /// Whether an expert's first block writes its gradients instead of adding to them.
  let writesGradients: Bool
  /// Where noise is drawn from, if the gate has any in this pass.
  let noise: RandomStream?
  /// Of what the gate reads, if there is any in this pass.
  let jitter: Jitter?

  var shape: Shape { layer.shape }

  @inline(__always) func source(_ row: Int) -> (Source, Int) {
    let origin = inbox.arrivals.origins[row]
    return (inbox.sources[Int(origin.worker)], Int(origin.row))
  }
  /// A row that this worker's experts compute: its token, and its output's gradient.
  @inline(__always) func tokenRow(_ row: Int) -> UnsafePointer<Float> {
    let (source, at) = source(row)
    return source.token(at)
  }
  @inline(__always) func gradRow(_ row: Int) -> UnsafePointer<Float> {
    let (source, at) = source(row)
    return source.grad(at)
  }
}
