import CFasterMoE
import FasterMoE

// The doors of the library, in the order of fastermoe.h: unwrap, call, translate.

// MARK: Status

@_cdecl("fmoe_status_name") @implementation
public func fmoe_status_name(_ status: Int32) -> UnsafePointer<CChar>! {
  let name: StaticString =
    switch fmoe_status(UInt32(bitPattern: status)) {
    case FMOE_OK: "FMOE_OK"
    case FMOE_ERROR_ARGUMENT: "FMOE_ERROR_ARGUMENT"
    case FMOE_ERROR_OPTIONS: "FMOE_ERROR_OPTIONS"
    case FMOE_ERROR_STAGE: "FMOE_ERROR_STAGE"
    case FMOE_ERROR_FILE: "FMOE_ERROR_FILE"
    case FMOE_ERROR_UNSUPPORTED: "FMOE_ERROR_UNSUPPORTED"
    case FMOE_ERROR_MEMORY: "FMOE_ERROR_MEMORY"
    case FMOE_ERROR_TOPOLOGY: "FMOE_ERROR_TOPOLOGY"
    case FMOE_ERROR_PEER: "FMOE_ERROR_PEER"
    case FMOE_ERROR_DISAGREE: "FMOE_ERROR_DISAGREE"
    case FMOE_ERROR_TIMEOUT: "FMOE_ERROR_TIMEOUT"
    case FMOE_ERROR_INTERNAL: "FMOE_ERROR_INTERNAL"
    default: "unknown status"
    }
  return UnsafeRawPointer(name.utf8Start).assumingMemoryBound(to: CChar.self)
}

@_cdecl("fmoe_last_error") @implementation
public func fmoe_last_error() -> UnsafePointer<CChar>! { LastError.text }

@_cdecl("fmoe_set_last_error") @implementation
public func fmoe_set_last_error(_ status: fmoe_status, _ words: UnsafePointer<CChar>!) -> fmoe_status {
  if let words { LastError.set(words) }
  return status
}

@_cdecl("fmoe_version") @implementation
public func fmoe_version() -> UInt32 {
  UInt32(FMOE_VERSION_MAJOR) << 16 | UInt32(FMOE_VERSION_MINOR) << 8 | UInt32(FMOE_VERSION_PATCH)
}

// MARK: Group

@_cdecl("fmoe_group_create") @implementation
public func fmoe_group_create(
  _ transport: UnsafePointer<fmoe_transport>!, _ options: UnsafePointer<fmoe_group_options>!,
  _ out: UnsafeMutablePointer<OpaquePointer?>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let transport = try HostTransport(transport)
    var given = Group.Options()
    let refused = failure { () throws(Failure) in
      // First, since this rank waits for the others by its own timeout even to say that it cannot go on.
      given.timeout = try groupTimeout(options)
      given = try groupOptions(options)
      try refuseNull(out, "out")
    }
    let group = try Group.over(transport, given, failure: refused)
    transport.keep()
    out.pointee = handle(group)
  }
}

@_cdecl("fmoe_group_create_local") @implementation
public func fmoe_group_create_local(
  _ size: Int32, _ options: UnsafePointer<fmoe_group_options>!, _ out: UnsafeMutablePointer<OpaquePointer?>!
) -> fmoe_status {
  answer { () throws(Failure) in
    let out = try require(out, "out")
    guard size >= 1 else { throw Failure(.argument, "size must be positive, not \(size)") }
    guard size <= Group.mostThreads else {
      throw Failure(.argument, "\(size) ranks are more than the \(Group.mostThreads) one process may have")
    }
    let groups = try Group.local(Int(size), try groupOptions(options))
    for (rank, group) in groups.enumerated() { out[rank] = handle(group) }
  }
}

@_cdecl("fmoe_group_calibrate") @implementation
public func fmoe_group_calibrate(_ group: OpaquePointer!, _ seconds: Double) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let group: Group = try object(group, "group")
    try group.exclusively { () throws(Failure) in try group.calibrate(for: Seconds(seconds)) }
  }
}

@_cdecl("fmoe_group_destroy") @implementation
public func fmoe_group_destroy(_ group: OpaquePointer!) {
  if let group { release(group, as: Group.self) }
}

// MARK: Layer

@_cdecl("fmoe_layer_create") @implementation
public func fmoe_layer_create(
  _ group: OpaquePointer!, _ options: UnsafePointer<fmoe_layer_options>!, _ out: UnsafeMutablePointer<OpaquePointer?>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let group: Group = try object(group, "group")
    let layer = try group.exclusively { () throws(Failure) in
      try Layer.together(group) { () throws(Failure) in
        try refuseNull(out, "out")
        return try Layer.Options(options)
      }
    }
    out.pointee = handle(layer)
  }
}

@_cdecl("fmoe_layer_destroy") @implementation
public func fmoe_layer_destroy(_ layer: OpaquePointer!) {
  if let layer { release(layer, as: Layer.self) }
}

@_cdecl("fmoe_layer_set_training") @implementation
public func fmoe_layer_set_training(_ layer: OpaquePointer!, _ training: Int32) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    guard training == 0 || training == 1 else {
      throw Failure(.argument, "training is 0 or 1, not \(training)")
    }
    layer.group.exclusively { layer.isTraining = training == 1 }
  }
}

@_cdecl("fmoe_layer_expect_shadows") @implementation
public func fmoe_layer_expect_shadows(_ layer: OpaquePointer!, _ shadows: UnsafePointer<UInt8>!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    var set: [Int]?
    if let shadows { set = try expertSet(shadows, experts: layer.shape.experts) }
    try layer.group.exclusively { () throws(Failure) in try layer.awaitShadows(set) }
  }
}

@_cdecl("fmoe_layer_values") @implementation
public func fmoe_layer_values(_ layer: OpaquePointer!, _ out: UnsafeMutablePointer<fmoe_tensors>!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    try writeTensors(layer.valueTensors, of: layer, to: out)
  }
}

@_cdecl("fmoe_layer_gradients") @implementation
public func fmoe_layer_gradients(_ layer: OpaquePointer!, _ out: UnsafeMutablePointer<fmoe_tensors>!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    try writeTensors(layer.gradientTensors, of: layer, to: out)
  }
}

private func writeTensors(_ t: Layer.Tensors, of layer: Layer, to out: UnsafeMutablePointer<fmoe_tensors>?)
  throws(Failure)
{
  let out = try require(out, "out")
  write(
    fmoe_tensors(
      struct_size: 0, local_experts: Int32(layer.owned.count), first_expert: Int64(layer.owned.lowerBound),
      gate: t.gate, w1: t.inward, b1: t.inwardBias, w2: t.outward, b2: t.outwardBias, w3: t.inwardLinear,
      noise: t.noise,
      gate_bias: t.bias),
    to: out, room: try room(in: out, "out"))
}

@_cdecl("fmoe_layer_zero_gradients") @implementation
public func fmoe_layer_zero_gradients(_ layer: OpaquePointer!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    layer.group.exclusively { layer.zeroGradients() }
  }
}

@_cdecl("fmoe_layer_begin_gradients") @implementation
public func fmoe_layer_begin_gradients(_ layer: OpaquePointer!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    layer.group.exclusively { layer.beginGradients() }
  }
}

@_cdecl("fmoe_layer_reduce_gradients") @implementation
public func fmoe_layer_reduce_gradients(_ layer: OpaquePointer!) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    try layer.group.exclusively { () throws(Failure) in try layer.reduceGradients() }
  }
}

@_cdecl("fmoe_layer_adamw") @implementation
public func fmoe_layer_adamw(_ layer: OpaquePointer!, _ options: UnsafePointer<fmoe_adamw_options>!) -> fmoe_status {
  answer { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    let update = try Layer.Update(options)
    try layer.group.exclusively { () throws(Failure) in try layer.adamw(update) }
  }
}

@_cdecl("fmoe_layer_save") @implementation
public func fmoe_layer_save(_ layer: OpaquePointer!, _ path: UnsafePointer<CChar>!) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    try layer.group.exclusively { () throws(Failure) in try layer.save(to: path) }
  }
}

@_cdecl("fmoe_layer_load") @implementation
public func fmoe_layer_load(_ layer: OpaquePointer!, _ path: UnsafePointer<CChar>!) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    try layer.group.exclusively { () throws(Failure) in try layer.load(from: path) }
  }
}

// MARK: Step

@_cdecl("fmoe_gate") @implementation
public func fmoe_gate(
  _ layer: OpaquePointer!, _ tokens: UnsafePointer<Float>!, _ n: Int64, _ out: UnsafeMutablePointer<OpaquePointer?>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    let refused = failure { () throws(Failure) in try refuseNull(out, "out") }
    let pass = try layer.group.exclusively { () throws(Failure) in
      try layer.gate(tokens: tokens, count: Int(n), refused: refused)
    }
    out.pointee = handle(pass)
  }
}

@_cdecl("fmoe_route") @implementation
public func fmoe_route(
  _ layer: OpaquePointer!, _ tokens: UnsafePointer<Float>!, _ n: Int64, _ choices: UnsafePointer<Int32>!,
  _ weights: UnsafePointer<Float>!, _ out: UnsafeMutablePointer<OpaquePointer?>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let layer: Layer = try object(layer, "layer")
    let refused = failure { () throws(Failure) in try refuseNull(out, "out") }
    let pass = try layer.group.exclusively { () throws(Failure) in
      try layer.route(tokens: tokens, count: Int(n), choices: choices, weights: weights, refused: refused)
    }
    out.pointee = handle(pass)
  }
}

@_cdecl("fmoe_pass_routing") @implementation
public func fmoe_pass_routing(_ pass: OpaquePointer!, _ out: UnsafeMutablePointer<fmoe_routing>!) -> fmoe_status {
  answer { () throws(Failure) in
    let pass: Pass = try object(pass, "pass")
    let out = try require(out, "out")
    let routing = pass.routing
    write(
      fmoe_routing(
        struct_size: 0, top_k: Int32(pass.shape.choices), tokens: Int64(pass.count), choices: routing.choices,
        weights: routing.weights, counts: routing.counts, balance_loss: pass.balanceLoss, z_loss: pass.zLoss,
        dropped: Int64(pass.dropped), moved: Int64(pass.moved)),
      to: out, room: try room(in: out, "out"))
  }
}

@_cdecl("fmoe_plan") @implementation
public func fmoe_plan(
  _ pass: OpaquePointer!, _ options: UnsafePointer<fmoe_plan_options>!,
  _ report: UnsafeMutablePointer<fmoe_plan_report>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let pass: Pass = try object(pass, "pass")
    var space = 0
    let plan = try pass.group.exclusively { () throws(Failure) in
      try pass.plan(wantsReport: report != nil) { () throws(Failure) in
        if let report { space = try room(in: report, "report") }
        return try planRequest(options, experts: pass.shape.experts)
      }
    }
    if let plan, let report { write(cReport(plan), to: report, room: space) }
  }
}

private func cReport(_ plan: PlanReport) -> fmoe_plan_report {
  fmoe_plan_report(
    struct_size: 0, shadows: Int32(plan.shadows), group_size: Int32(plan.groupSize), steps: Int32(plan.steps),
    seconds_plain: plan.plain.value, seconds_planned: plan.planned.value, seconds_ideal: plan.ideal.value,
    compute_over_communicate: plan.computeOverCommunicate, flops_per_worker: plan.flopRatePerWorker.value,
    seconds_semi_ideal: plan.semiIdeal.value, compute_over_communicate_step: plan.stepRatio)
}

@_cdecl("fmoe_forward") @implementation
public func fmoe_forward(_ pass: OpaquePointer!, _ output: UnsafeMutablePointer<Float>!) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let pass: Pass = try object(pass, "pass")
    try pass.group.exclusively { () throws(Failure) in try pass.forward(output) }
  }
}

@_cdecl("fmoe_backward") @implementation
public func fmoe_backward(
  _ pass: OpaquePointer!, _ grad_output: UnsafePointer<Float>!, _ grad_tokens: UnsafeMutablePointer<Float>!,
  _ grad_weights: UnsafeMutablePointer<Float>!
) -> fmoe_status {
  answer(together: true) { () throws(Failure) in
    let pass: Pass = try object(pass, "pass")
    try pass.group.exclusively { () throws(Failure) in
      try pass.backward(grad_output, gradTokens: grad_tokens, gradWeights: grad_weights)
    }
  }
}

@_cdecl("fmoe_pass_write_timeline") @implementation
public func fmoe_pass_write_timeline(_ pass: OpaquePointer!, _ path: UnsafePointer<CChar>!) -> fmoe_status {
  answer { () throws(Failure) in
    let pass: Pass = try object(pass, "pass")
    let path = try require(path, "path")
    try pass.group.exclusively { () throws(Failure) in try pass.writeTimeline(to: path) }
  }
}

@_cdecl("fmoe_pass_destroy") @implementation
public func fmoe_pass_destroy(_ pass: OpaquePointer!) {
  guard let pass else { return }
  let ended = Unmanaged<Pass>.fromOpaque(UnsafeRawPointer(pass)).takeRetainedValue()
  let group = ended.group
  group.exclusively { ended.end() }
}

// MARK: Cluster

@_cdecl("fmoe_cluster_of_group") @implementation
public func fmoe_cluster_of_group(_ group: OpaquePointer!, _ out: UnsafeMutablePointer<OpaquePointer?>!) -> fmoe_status
{
  answer(together: true) { () throws(Failure) in
    let group: Group = try object(group, "group")
    let refused = failure { () throws(Failure) in try refuseNull(out, "out") }
    let cluster = try group.exclusively { () throws(Failure) in try group.cluster(refused: refused) }
    out.pointee = handle(ClusterBox(cluster))
  }
}

@_cdecl("fmoe_cluster_read") @implementation
public func fmoe_cluster_read(_ path: UnsafePointer<CChar>!, _ out: UnsafeMutablePointer<OpaquePointer?>!)
  -> fmoe_status
{
  answer { () throws(Failure) in
    let path = try require(path, "path")
    _ = try require(out, "out")
    out[0] = handle(try ClusterBox(reading: path))
  }
}

@_cdecl("fmoe_cluster_size") @implementation
public func fmoe_cluster_size(_ cluster: OpaquePointer!) -> Int32 {
  let box = try? object(cluster, "cluster", as: ClusterBox.self)
  return Int32(box?.cluster.workers ?? 0)
}

@_cdecl("fmoe_cluster_remote_share") @implementation
public func fmoe_cluster_remote_share(_ cluster: OpaquePointer!) -> Double {
  let box = try? object(cluster, "cluster", as: ClusterBox.self)
  return withPlainFloats { box?.cluster.remoteShare ?? 0 }
}

@_cdecl("fmoe_cluster_write") @implementation
public func fmoe_cluster_write(_ cluster: OpaquePointer!, _ path: UnsafePointer<CChar>!) -> fmoe_status {
  answer { () throws(Failure) in
    let box: ClusterBox = try object(cluster, "cluster")
    try Documents.write(box.cluster.document, to: try require(path, "path"))
  }
}

@_cdecl("fmoe_cluster_plan") @implementation
public func fmoe_cluster_plan(
  _ cluster: OpaquePointer!, _ layer: UnsafePointer<fmoe_layer_options>!, _ counts: UnsafePointer<Int64>!,
  _ options: UnsafePointer<fmoe_plan_options>!, _ report: UnsafeMutablePointer<fmoe_plan_report>!
) -> fmoe_status {
  answer { () throws(Failure) in
    let box: ClusterBox = try object(cluster, "cluster")
    let shape = try Layer.Options(layer).shape
    let counts = try require(counts, "counts")
    let space = try room(in: try require(report, "report"), "report")
    let request = try planRequest(options, experts: shape.experts)
    write(cReport(try box.plan(shape, counts, request)), to: report, room: space)
  }
}

@_cdecl("fmoe_cluster_destroy") @implementation
public func fmoe_cluster_destroy(_ cluster: OpaquePointer!) {
  if let cluster { release(cluster, as: ClusterBox.self) }
}
