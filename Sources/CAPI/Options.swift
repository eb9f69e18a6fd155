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
    for (loss, name) in [(c.balance_loss, "balance_loss"), (c.z_loss, "z_loss")] where !(loss >= 0 && loss.isFinite) {
      throw Failure(.argument, "\(name) must be a finite number, 0 or more, not \(loss)")
    }
    guard c.top_k >= 0 else { throw Failure(.argument, "top_k must not be negative, not \(c.top_k)") }
    let experts = Int(c.experts)
    let gate = try GateOptions(c)
    let shape = try Shape(
      model: Int(c.d_model), hidden: Int(c.d_hidden), experts: experts,
      choices: c.top_k > 0 ? Int(c.top_k) : max(1, min(gate.choices, experts)), activation: activation)
    guard c.input_jitter >= 0, c.input_jitter < 1 else {
      throw Failure(.argument, "input_jitter must be in [0, 1), not \(c.input_jitter)")
    }
    guard c.bias_step >= 0, c.bias_step <= 1 else {
      throw Failure(.argument, "bias_step must be in [0, 1], not \(c.bias_step)")
    }
    self.init(
      shape, gate: gate.rule, gateNumbers: gate.numbers, losses: RouterLosses(balance: c.balance_loss, z: c.z_loss),
      jitter: Float(c.input_jitter), biasStep: Float(c.bias_step), seed: c.seed)
  }
}

/// The fields of a layer's options that are about its gate. A new gate is a case here and a rule in Decide/Gates.
struct GateOptions {
  let rule: any Gate
  /// The default of top_k.
  let choices: Int
  /// What ranks must agree on.
  let numbers: SIMD4<UInt64>

  init(_ c: fmoe_layer_options) throws(Failure) {
    let (name, choices, has) = try GateOptions.known(Int(c.gate))
    guard c.capacity_factor == 0 || has.contains(.capacity) else {
      throw Failure(.options, "capacity_factor is set, but \(name) has no capacity")
    }
    guard c.capacity_factor >= 0, c.capacity_factor.isFinite else {
      throw Failure(.argument, "capacity_factor must be a finite number, 0 or more, not \(c.capacity_factor)")
    }
    guard c.drop == 0 || has.contains(.capacity) else {
      throw Failure(.options, "drop is set, but \(name) has no capacity")
    }
    guard let dropping = Capacity.Dropping(rawValue: Int(c.drop)) else {
      throw Failure(.options, "drop \(c.drop) is none of FMOE_DROP_LAST ... FMOE_DROP_UNIMPORTANT")
    }
    guard c.reserved == 0 else { throw Failure(.options, "fmoe_layer_options.reserved must be 0") }
    guard c.remote_share == 0 || has.contains(.limit) else {
      throw Failure(.options, "remote_share is set, but \(name) limits nothing")
    }
    guard c.bias_step == 0 || has.contains(.preference) else {
      throw Failure(.options, "bias_step is set, but \(name) does not choose by a bias")
    }
    func capacity(_ factor: Double) -> Capacity {
      let given = c.capacity_factor > 0 ? c.capacity_factor : factor
      return Capacity(factor: given, inEvaluation: 2 * given, dropping: dropping)
    }
    guard c.remote_share >= 0, c.remote_share <= 1 else {
      throw Failure(.argument, "remote_share must be in (0, 1], not \(c.remote_share)")
    }
    let share = c.remote_share > 0 ? c.remote_share : nil
    self.choices = choices
    numbers = [
      UInt64(c.gate) << 8 | UInt64(c.drop), c.capacity_factor.bitPattern, c.remote_share.bitPattern, 0,
    ]
    switch Int(c.gate) {
    case FMOE_GATE_NOISY: rule = NoisyGate()
    case FMOE_GATE_SWITCH: rule = SwitchGate(capacity(1.25))
    case FMOE_GATE_GSHARD: rule = GShardGate(capacity(1))
    case FMOE_GATE_BASE:
      guard c.top_k <= 1 else { throw Failure(.options, "top_k is \(c.top_k), but FMOE_GATE_BASE chooses one expert") }
      guard c.balance_loss == 0 else {
        throw Failure(.options, "balance_loss is set, but FMOE_GATE_BASE balances by sharing out")
      }
      rule = BaseGate()
    case FMOE_GATE_TOPOLOGY: rule = NearGate(share: share, .top)
    case FMOE_GATE_HIERARCHICAL: rule = NearGate(share: share, .every)
    case FMOE_GATE_SWIPE: rule = SwipeGate()
    default: rule = TopKGate()
    }
  }

  /// What a gate has besides scores: a capacity, a limit on what leaves a place, a bias where it chooses.
  private struct Traits: OptionSet {
    let rawValue: Int
    static let capacity = Traits(rawValue: 1)
    static let limit = Traits(rawValue: 2)
    static let preference = Traits(rawValue: 4)
  }

  /// A gate's name, its own top_k, and what it has.
  private static func known(_ gate: Int) throws(Failure) -> (String, Int, Traits) {
    switch gate {
    case FMOE_GATE_TOPK: return ("FMOE_GATE_TOPK", 2, .preference)
    case FMOE_GATE_NOISY: return ("FMOE_GATE_NOISY", 2, [])
    case FMOE_GATE_SWITCH: return ("FMOE_GATE_SWITCH", 1, [.capacity, .preference])
    case FMOE_GATE_GSHARD: return ("FMOE_GATE_GSHARD", 2, [.capacity, .preference])
    case FMOE_GATE_BASE: return ("FMOE_GATE_BASE", 1, [])
    case FMOE_GATE_TOPOLOGY: return ("FMOE_GATE_TOPOLOGY", 2, [.limit, .preference])
    case FMOE_GATE_HIERARCHICAL: return ("FMOE_GATE_HIERARCHICAL", 2, [.limit, .preference])
    case FMOE_GATE_SWIPE: return ("FMOE_GATE_SWIPE", 2, [])
    default: throw Failure(.options, "gate \(gate) is none of FMOE_GATE_TOPK ... FMOE_GATE_SWIPE")
    }
  }
}

extension Layer.Update {
  init(_ given: UnsafePointer<fmoe_adamw_options>?) throws(Failure) {
    let required = MemoryLayout<fmoe_adamw_options>.offset(of: \.beta1)!
    let c = try readOptions(
      try require(given, "options"), "fmoe_adamw_options", smallest: required, zero: fmoe_adamw_options())
    guard 0...2 ~= c.zero_gradients else {
      throw Failure(.options, "zero_gradients is 0, 1 or 2, not \(c.zero_gradients)")
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
      decaying: c.decay_biases == 1 ? .all : .matrices, used: c.zero_gradients == 1 ? .zeroed : .kept,
      beginsGradients: c.zero_gradients == 2)
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
  if shadowing == .given { request.shadows = try expertSet(try require(c.shadows, "shadows"), experts: experts) }
  request.shadowing = shadowing
  request.schedule = schedule
  request.groupSize = Int(c.group_size)
  return request
}

/// The experts that `shadows` [E] marks with 1.
func expertSet(_ shadows: UnsafePointer<UInt8>, experts: Int) throws(Failure) -> [Int] {
  var set: [Int] = []
  for expert in 0..<experts where shadows[expert] != 0 {
    guard shadows[expert] == 1 else {
      throw Failure(.argument, "shadows[\(expert)] is 0 or 1, not \(shadows[expert])")
    }
    set.append(expert)
  }
  return set
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
    var bits: Int64 = 0
    for place in 0..<workers * experts {
      traffic.counts[place] = UInt32(truncatingIfNeeded: counts[place])
      bits |= counts[place]
    }
    // A bit of any that is negative or too large.
    guard bits & ~Int64(Int32.max) == 0 else {
      let place = (0..<workers * experts).first { !(0...Int64(Int32.max)).contains(counts[$0]) }!
      throw Failure(
        .argument, "counts[\(place / experts)][\(place % experts)] is \(counts[place]); it must be in 0..\(Int32.max)")
    }
    var planner = Planner(traffic, shape, on: cluster)
    return try planner.plan(request).report
  }
}
