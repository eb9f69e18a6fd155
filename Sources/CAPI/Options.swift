import CFasterMoE
import FasterMoE

// The C options structs, read into the library's own types.

func groupOptions(_ given: UnsafePointer<fmoe_group_options>?) throws(Failure) -> Group.Options {
  let c = try readOptions(given, "fmoe_group_options", smallest: 4, zero: fmoe_group_options())
  guard c.threads >= 0 else { throw Failure(.argument, "threads must not be negative, not \(c.threads)") }
  guard c.bind == 0 || c.bind == 1 else { throw Failure(.options, "bind is 0 or 1, not \(c.bind)") }
  guard c.reserved == 0 else { throw Failure(.options, "fmoe_group_options.reserved must be 0") }
  var options = Group.Options()
  options.threads = Int(c.threads)
  options.pins = c.bind == 0
  (options.topology, options.profile) = (c.topology, c.profile)
  options.timeout = try groupTimeout(given)
  return options
}

func groupTimeout(_ given: UnsafePointer<fmoe_group_options>?) throws(Failure) -> Seconds? {
  let c = try readOptions(given, "fmoe_group_options", smallest: 4, zero: fmoe_group_options())
  guard c.timeout_seconds >= 0 else {
    throw Failure(.argument, "timeout_seconds must not be negative, not \(c.timeout_seconds)")
  }
  return c.timeout_seconds > 0 ? Seconds(c.timeout_seconds) : nil
}

extension Layer.Options {
  init(_ given: UnsafePointer<fmoe_layer_options>?) throws(Failure) {
    let required = MemoryLayout<fmoe_layer_options>.offset(of: \.activation)!
    let c = try readOptions(
      try require(given, "options"), "fmoe_layer_options", smallest: required, zero: fmoe_layer_options())
    let activation: Activation
    switch Int(c.activation) {
    case FMOE_GELU: activation = .gelu
    case FMOE_GELU_TANH: activation = .geluTanh
    case FMOE_RELU: activation = .relu
    case FMOE_SILU: activation = .silu
    case FMOE_SWIGLU: activation = .swiglu
    default: throw Failure(.options, "activation \(c.activation) is none of FMOE_GELU ... FMOE_SWIGLU")
    }
    try Layer.Options.checkGate(Int(c.gate))
    guard c.capacity_factor == 0 else {
      throw Failure(.options, "capacity_factor is set, but FMOE_GATE_TOPK has no capacity")
    }
    guard c.remote_share == 0 else { throw Failure(.options, "remote_share is set, but FMOE_GATE_TOPK limits nothing") }
    for (loss, name) in [(c.balance_loss, "balance_loss"), (c.z_loss, "z_loss")] where !(loss >= 0 && loss.isFinite) {
      throw Failure(.argument, "\(name) must be a finite number, 0 or more, not \(loss)")
    }
    guard c.top_k >= 0 else { throw Failure(.argument, "top_k must not be negative, not \(c.top_k)") }
    let experts = Int(c.experts)
    let shape = try Shape(
      model: Int(c.d_model), hidden: Int(c.d_hidden), experts: experts,
      choices: c.top_k > 0 ? Int(c.top_k) : max(1, min(2, experts)), activation: activation)
    self.init(shape, losses: RouterLosses(balance: c.balance_loss, z: c.z_loss), seed: c.seed)
  }

  private static func checkGate(_ gate: Int) throws(Failure) {
    let later = [
      FMOE_GATE_NOISY: "FMOE_GATE_NOISY", FMOE_GATE_SWITCH: "FMOE_GATE_SWITCH", FMOE_GATE_GSHARD: "FMOE_GATE_GSHARD",
      FMOE_GATE_BASE: "FMOE_GATE_BASE", FMOE_GATE_TOPOLOGY: "FMOE_GATE_TOPOLOGY",
      FMOE_GATE_HIERARCHICAL: "FMOE_GATE_HIERARCHICAL",
    ]
    if let name = later[gate] { throw Failure(.unsupported, "gate \(name) is not in this version yet") }
    guard gate == FMOE_GATE_TOPK else {
      throw Failure(.options, "gate \(gate) is none of FMOE_GATE_TOPK ... FMOE_GATE_HIERARCHICAL")
    }
  }
}

extension Layer.Update {
  init(_ given: UnsafePointer<fmoe_adamw_options>?) throws(Failure) {
    let required = MemoryLayout<fmoe_adamw_options>.offset(of: \.beta1)!
    let c = try readOptions(
      try require(given, "options"), "fmoe_adamw_options", smallest: required, zero: fmoe_adamw_options())
    guard c.zero_gradients == 0 || c.zero_gradients == 1 else {
      throw Failure(.options, "zero_gradients is 0 or 1, not \(c.zero_gradients)")
    }
    guard c.decay_biases == 0 || c.decay_biases == 1 else {
      throw Failure(.options, "decay_biases is 0 or 1, not \(c.decay_biases)")
    }
    guard c.reserved == 0 else { throw Failure(.options, "fmoe_adamw_options.reserved must be 0") }
    for (value, name) in [
      (c.learning_rate, "learning_rate"), (c.epsilon, "epsilon"), (c.weight_decay, "weight_decay"),
      (c.gradient_scale, "gradient_scale"),
    ] where !(value >= 0 && value.isFinite) {
      throw Failure(.argument, "\(name) must be a finite number, 0 or more, not \(value)")
    }
    for (beta, name) in [(c.beta1, "beta1"), (c.beta2, "beta2")] where !(beta >= 0 && beta < 1) {
      throw Failure(.argument, "\(name) must be 0 or more and less than 1, not \(beta)")
    }
    func chosen(_ value: Double, or usual: Double) -> Double { value == 0 ? usual : value }
    self.init(
      AdamW(
        rate: c.learning_rate, beta1: chosen(c.beta1, or: 0.9), beta2: chosen(c.beta2, or: 0.999),
        epsilon: chosen(c.epsilon, or: 1e-8), decay: c.weight_decay, scale: chosen(c.gradient_scale, or: 1)),
      decaying: c.decay_biases == 1 ? .all : .matrices, used: c.zero_gradients == 1 ? .zeroed : .kept)
  }
}

func planRequest(_ given: UnsafePointer<fmoe_plan_options>?, experts: Int) throws(Failure) -> PlanRequest {
  let c = try readOptions(given, "fmoe_plan_options", smallest: 4, zero: fmoe_plan_options())
  guard let shadowing = PlanRequest.Shadowing(rawValue: Int(c.shadowing)) else {
    throw Failure(.options, "shadowing is 0 to 4, not \(c.shadowing)")
  }
  guard let schedule = PlanRequest.Schedule(rawValue: Int(c.schedule)) else {
    throw Failure(.options, "schedule is 0 to 2, not \(c.schedule)")
  }
  var request = PlanRequest()
  if shadowing == .given {
    let shadows = try require(c.shadows, "shadows")
    for expert in 0..<experts where shadows[expert] != 0 {
      guard shadows[expert] == 1 else {
        throw Failure(.argument, "shadows[\(expert)] is 0 or 1, not \(shadows[expert])")
      }
      request.shadows.append(expert)
    }
  }
  request.shadowing = shadowing
  request.schedule = schedule
  request.groupSize = Int(c.group_size)
  return request
}

/// What a `fmoe_cluster` handle owns.
final class ClusterBox {
  let cluster: Cluster

  init(_ cluster: Cluster) { self.cluster = cluster }

  init(reading path: UnsafePointer<CChar>) throws(Failure) {
    let document = try Documents.read(Cluster.Document.self, from: path)
    do throws(Failure) {
      cluster = try Cluster(document)
    } catch {
      throw Failure(error.kind, "\(String(cString: path)): \(error.message)")
    }
  }

  /// `counts` [W, E]
  func plan(_ shape: Shape, _ counts: UnsafePointer<Int64>, _ request: PlanRequest) throws(Failure) -> PlanReport {
    let (workers, experts) = (cluster.workers, shape.experts)
    try Planner.check(workers: workers, experts: experts)
    var size = Arena()
    _ = Traffic(arena: &size, workers: workers, experts: experts)
    let memory = try Region(bytes: size.bytes, for: "the counts of a batch")
    var arena = Arena(over: memory.base)
    let traffic = Traffic(arena: &arena, workers: workers, experts: experts)
    for place in 0..<workers * experts {
      guard counts[place] >= 0, counts[place] <= Int64(Int32.max) else {
        throw Failure(
          .argument,
          "counts[\(place / experts)][\(place % experts)] is \(counts[place]); it must be in 0..\(Int32.max)")
      }
      traffic.counts[place] = UInt32(counts[place])
    }
    var planner = Planner(traffic, shape, on: cluster)
    return try planner.plan(request).report
  }
}
