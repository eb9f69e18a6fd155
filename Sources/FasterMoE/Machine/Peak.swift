import CHints

/// How fast a team's cores multiply and add if nothing else is to be done: the limit that products are measured against.
package final class Peak: TeamWork {
  private let rounds = 3_000_000
  /// [threads] what each thread computed, so that it is not left out.
  private let results: UnsafeMutablePointer<Float>

  /// Flops per second of all threads; the best of some short runs.
  package static func rate(of team: Team) -> FlopRate {
    let peak = Peak(threads: team.threads)
    var best = FlopRate(0)
    for _ in 0..<5 {
      let start = Seconds.now
      team.begin(peak)
      team.finish()
      let work = Flops(Double(2 * 16 * Int(HINT_CHAINS) * peak.rounds * team.threads))
      best = max(best, work / Seconds(Seconds.now.value - start.value))
    }
    return best
  }

  private init(threads: Int) {
    results = .allocate(capacity: threads)
    results.initialize(repeating: 0, count: threads)
  }

  deinit { results.deallocate() }

  package override func work(thread: Int) { results[thread] = hint_multiply_add(rounds, Float(thread + 1)) }
}
