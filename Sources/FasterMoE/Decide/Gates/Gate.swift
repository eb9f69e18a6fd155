/// A gate: which experts the scores of a token choose, and with what weight.
///
/// All gates learn scores x·gate, let each token choose its k highest (`TopK`) and weigh these by `weighing`. What makes
/// one gate differ from another is here: it moves or drops choices by what its own worker knows (`settle`) and by what all
/// workers have told each other (`hear`). Both are pure: they read a batch and write its choices.
package protocol Gate: Sendable {
  var weighing: Weighing { get }
  /// Whether normal noise of a learned width is added to the scores in training.
  var isNoisy: Bool { get }
  /// Whether anything is left to chance in training.
  var draws: Bool { get }
  /// Whether choices are dropped that were weighed together with others, so that backward must recall them.
  var dropsWeighedChoices: Bool { get }
  /// Whether links that were measured decide what may leave a place.
  var heedsLinks: Bool { get }
  /// Whether choices may not leave a place as they like: shadowed experts then count as local.
  var limitsPlaces: Bool { get }
  /// Whether what `hear` makes of the choices must be told again, since the others cannot know it.
  var tellsAgain: Bool { get }
  /// Numbers for each expert that a worker tells all others.
  func numbersTold(choices: Int) -> Int
  /// Words of scratch memory that `settle` and `hear` take.
  func scratch(tokens: Int, choices: Int, experts: Int) -> Int
  /// Has the worker's own rule its way after every token chose by its scores, and writes what is told to the others;
  /// returns how many choices it moved to other experts.
  func settle(_ batch: GateBatch) -> Int
  /// Hears what all have told: drops choices that the rule leaves no room for, and fills in every worker's `counts` [W, E]
  /// and the `shares` [E] of all choices that the balance loss is about. Returns how many choices it moved.
  func hear(_ batch: GateBatch, counts: UnsafeMutablePointer<UInt32>, shares: UnsafeMutablePointer<Float>) -> Int
}

extension Gate {
  package var isNoisy: Bool { false }
  package var draws: Bool { isNoisy }
  package var dropsWeighedChoices: Bool { false }
  package var heedsLinks: Bool { false }
  package var limitsPlaces: Bool { false }
  package var tellsAgain: Bool { false }
  package func numbersTold(choices: Int) -> Int { 1 }
  package func scratch(tokens: Int, choices: Int, experts: Int) -> Int { 0 }
  package func settle(_ batch: GateBatch) -> Int {
    batch.count(into: batch.told(by: batch.rank))
    return 0
  }
  package func hear(_ batch: GateBatch, counts: UnsafeMutablePointer<UInt32>, shares: UnsafeMutablePointer<Float>)
    -> Int
  {
    batch.takeCounts(counts)
    batch.share(of: batch.tokensOfAll * batch.choices, into: shares) { counts[$0 * batch.experts + $1] }
    return 0
  }
}

/// The gate that only chooses: the k highest scores.
package struct TopKGate: Gate {
  package init() {}
  package var weighing: Weighing { .softmaxOfChosen }
}

/// What one worker's batch is to its gate. Its memory is the pass's; nobody keeps it.
package struct GateBatch {
  package let tokens: Int
  package let choices: Int
  package let experts: Int
  package let rank: Int
  package let workers: Int
  /// Among the tokens of all workers: how many are before this worker's, and how many there are.
  package let firstToken: Int
  package let tokensOfAll: Int
  package let isTraining: Bool
  /// Of this pass; what is drawn for a token goes by its place among all workers' tokens.
  package let random: RandomStream
  /// [n, E]
  package let scores: Panels
  /// [n, k] expert of each slot or -1, and its weight.
  package let picks: UnsafeMutablePointer<Int32>
  package let weights: UnsafeMutablePointer<Float>
  /// [E, padded] what each expert has besides its score where tokens choose; nil where only scores do.
  package let bias: UnsafePointer<Float>?
  /// [E] how many levels of the tree of places a row for each expert crosses, and how many there are; none if the expert
  /// will be shadowed.
  package let crossings: UnsafePointer<Int32>
  package let levels: Int
  /// Which share of choices may leave a place by the links that were measured; nil where none were.
  package let measuredShare: Double?
  /// [W, numbers, E] what each worker tells.
  package let told: UnsafeMutablePointer<UInt32>
  package let numbers: Int
  /// [E] choices of all workers that `shares` are about.
  package let loads: UnsafeMutablePointer<Double>
  package let scratch: UnsafeMutablePointer<UInt64>
  /// One token's scores and probabilities [E, padded].
  package let logits: UnsafeMutablePointer<Float>
  package let probabilities: UnsafeMutablePointer<Float>

  /// [numbers, E]
  package func told(by worker: Int) -> UnsafeMutablePointer<UInt32> { told + worker * numbers * experts }

  /// This worker's choices for each expert that are left.
  package func count(into counts: UnsafeMutablePointer<UInt32>) {
    counts.update(repeating: 0, count: experts)
    for slot in 0..<tokens * choices where picks[slot] >= 0 { counts[Int(picks[slot])] += 1 }
  }

  /// This worker's first, second... choices for each expert [k, E], before any was dropped.
  package func countChoices(into counts: UnsafeMutablePointer<UInt32>) {
    counts.update(repeating: 0, count: choices * experts)
    for slot in 0..<tokens * choices { counts[slot % choices * experts + Int(picks[slot])] += 1 }
  }

  /// The experts of a worker.
  package func owned(by worker: Int) -> Range<Int> {
    let each = experts / workers
    return worker * each..<(worker + 1) * each
  }

  /// Takes every worker's first numbers as its counts.
  package func takeCounts(_ counts: UnsafeMutablePointer<UInt32>) {
    for worker in 0..<workers { (counts + worker * experts).update(from: told(by: worker), count: experts) }
  }

  /// Each expert's share of `all`, as the sum over workers of `number`, which is its load.
  package func share(of all: Int, into shares: UnsafeMutablePointer<Float>, _ number: (Int, Int) -> UInt32) {
    for expert in 0..<experts {
      let sum = (0..<workers).reduce(0.0) { $0 + Double(number($1, expert)) }
      loads[expert] = sum
      shares[expert] = all > 0 ? Float(sum / Double(all)) : 0
    }
  }

  package func drop(_ slot: Int) {
    picks[slot] = -1
    weights[slot] = 0
  }

  /// One token's scores into `logits`, -∞ behind the last expert.
  package func readScores(_ token: Int) {
    for block in 0..<Panels.padded(experts) / Panels.lanes {
      logits.store(scores.block(block, row: token, of: tokens).vector(), at: block * Panels.lanes)
    }
    for expert in experts..<Panels.padded(experts) { logits[expert] = -.infinity }
  }

  package func score(_ token: Int, _ expert: Int) -> Float {
    scores.block(expert / Panels.lanes, row: token, of: tokens)[expert % Panels.lanes]
  }

  /// By what a token chooses: the score, or with the bias what it makes of that.
  package func preference(_ token: Int, _ expert: Int) -> Float {
    let score = score(token, expert)
    guard let bias else { return score }
    return Bias.preference(Vector(repeating: score), Vector(repeating: bias[expert]))[0]
  }

  /// Weighs a token's picks again, from its scores.
  package func weigh(_ token: Int, by weighing: Weighing) {
    readScores(token)
    if weighing.needsProbabilities(choices: choices) {
      _ = TopK.softmax(logits, experts: experts, into: probabilities)
    }
    weighing.weigh(
      picks + token * choices, choices: choices, logits: logits, probabilities: probabilities,
      into: weights + token * choices)
  }
}
