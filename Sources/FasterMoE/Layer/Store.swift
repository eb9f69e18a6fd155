/// What belongs to this worker's tokens, R = n·k slots.
struct Store {
  var routing: Routing
  /// [n, E] in panels: logits, then their gradients.
  let logits: Panels
  /// [W, E]
  let traffic: Traffic
  let moves: Moves
  /// [R, d] row-major: expert outputs, then gradients of expert inputs; none where the pass is direct.
  let rows: UnsafeMutablePointer<Float>!
  /// With one choice, and no transport between, experts write what they make of a token into the caller's arrays.
  let isDirect: Bool
  /// [n, k]
  let gradWeights: UnsafeMutablePointer<Float>
  /// Sums over tokens of each gate task: probabilities, or importance and load, [tasks, 2, E padded], and squared
  /// log-sums [tasks]; over all tasks [2, E].
  let taskSums: UnsafeMutablePointer<Float>
  let squareSums: UnsafeMutablePointer<Double>
  let expertSums: UnsafeMutablePointer<Double>
  /// [2, E padded] the loss' slopes in importance and load.
  let slopes: UnsafeMutablePointer<Float>
  /// [E padded] each expert's share of all choices.
  let shares: UnsafeMutablePointer<Float>
  /// [E] choices of all workers that the shares are about.
  let loads: UnsafeMutablePointer<Double>
  /// [E, padded] the layer's bias as the gate found it; nil if there is none.
  let bias: UnsafeMutablePointer<Float>?
  /// [E] how many levels of the tree of places a row for each expert crosses.
  let crossings: UnsafeMutablePointer<Int32>
  /// [W, numbers, E] what all tell each other.
  let told: UnsafeMutablePointer<UInt32>
  let scratch: UnsafeMutablePointer<UInt64>

  init(_ layer: Layer, tokens n: Int, _ arena: inout Arena) {
    let (shape, losses, rule, workers) = (layer.shape, layer.losses, layer.rule, layer.group.size)
    let slots = n * shape.choices
    let experts = Panels.padded(shape.experts)
    let tasks = losses.needProbabilities || layer.variation != 0 ? Pass.gateTasks(n) : 0
    routing = Routing(arena: &arena, slots: slots, experts: shape.experts)
    logits = Panels(arena.take(n * Panels.padded(layer.columns)), width: layer.columns)
    traffic = Traffic(arena: &arena, workers: workers, experts: shape.experts)
    moves = Moves(arena: &arena, traffic)
    isDirect = shape.choices == 1 && (workers == 1 || layer.group.peers.shareMemory)
    rows = isDirect ? nil : arena.take(slots * shape.model)
    gradWeights = arena.take(slots)
    taskSums = arena.take(tasks * 2 * experts)
    squareSums = arena.take(tasks)
    expertSums = arena.take(2 * shape.experts)
    slopes = arena.take(layer.variation != 0 ? 2 * experts : 0)
    shares = arena.take(experts)
    loads = arena.take(shape.experts)
    bias = layer.hasBias ? arena.take(experts) : nil
    crossings = arena.take(shape.experts)
    told = arena.take(workers * rule.numbersTold(choices: shape.choices) * shape.experts)
    scratch = arena.take(rule.scratch(tokens: n, choices: shape.choices, experts: shape.experts))
  }
}
