/// What a rank says when it enters a call that all ranks make together; as long for every call, so that ranks in
/// different calls still understand each other.
package struct Notice: BitwiseCopyable {
  package enum Call: UInt32 {
    case createGroup = 1, createLayer, gate, route, plan, forward, backward, reduce, calibrate, clusterOfGroup, save,
      load

    var name: String {
      switch self {
      case .createGroup: "fmoe_group_create"
      case .createLayer: "fmoe_layer_create"
      case .gate: "fmoe_gate"
      case .route: "fmoe_route"
      case .plan: "fmoe_plan"
      case .forward: "fmoe_forward"
      case .backward: "fmoe_backward"
      case .reduce: "fmoe_layer_reduce_gradients"
      case .calibrate: "fmoe_group_calibrate"
      case .clusterOfGroup: "fmoe_cluster_of_group"
      case .save: "fmoe_layer_save"
      case .load: "fmoe_layer_load"
      }
    }
  }
  package typealias Same = SIMD8<UInt64>
  /// What a call tells the others: a number of its own, and where this rank's part of a pass or a layer is in memory.
  package struct Words: BitwiseCopyable {
    package var number: UInt64 = 0
    /// Of a layer, in a load.
    package var passes: UInt64 = 0
    package var tokens, gradOutput, slots, weights, rows, gradWeights, values, means, squares,
      copyGrads: UnsafeRawPointer?
    package init(number: Int = 0) { self.number = UInt64(number) }
  }

  private let call: UInt32
  /// 0, or 1 from a rank that cannot go on.
  private let hasFailed: UInt32
  private let same: Same
  package let words: Words

  /// Fails unless all ranks are in `call`, can go on, and say the same where they must.
  package static func agree(
    _ call: Call, _ own: Failure?, same: Same = .init(repeating: 0), words: Words = Words(),
    from entrance: Entrance = .host, with peers: any Peers, into all: UnsafeMutablePointer<Notice>
  ) throws(Failure) {
    let own = own ?? failure(of: Reserve.fill)
    // In its place, where there are as many bytes behind it as an element of an array has.
    all[peers.rank] = Notice(call: call.rawValue, hasFailed: own == nil ? 0 : 1, same: same, words: words)
    do throws(Failure) {
      try peers.gather(all + peers.rank, bytes: MemoryLayout<Notice>.stride, into: all, from: entrance)
    } catch {
      throw own ?? error
    }
    if let own { throw own }
    for rank in 0..<peers.size where all[rank].hasFailed != 0 {
      throw Failure(.peer, "\(call.name) failed on rank \(rank), whose own error says why; the group can go on")
    }
    for rank in 0..<peers.size where all[rank].call != all[0].call {
      let names = [0, rank].map { Call(rawValue: all[$0].call)?.name ?? "a call of another version" }
      throw Failure(.disagree, "rank 0 is in \(names[0]) while rank \(rank) is in \(names[1])")
    }
    for rank in 0..<peers.size where all[rank].same != all[0].same {
      throw Failure(
        .disagree, "rank 0 and rank \(rank) call \(call.name) with different options or on different objects")
    }
  }
}
