import ArgumentParser
import FasterMoE
import Glibc

/// `fastermoe calibrate`: how fast workers of this machine train.
struct Calibrate: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measure how fast this machine's workers train and keep it in a profile.",
    discussion: """
      Workers are threads of one process, which share memory; what a program over MPI measures of its links by \
      fmoe_group_calibrate is in its own profile. The profile is for programs of as many workers and threads on this \
      machine; with --cluster it is a cluster, too, to which links can be added by hand.

        fastermoe calibrate --workers 2 --profile machine.json --cluster cluster.json
      """)

  @Option(help: ArgumentHelp("How many workers share the machine.", valueName: "number"))
  var workers = 1

  @Option(help: ArgumentHelp("Threads of each worker; 0: one for each core of its share.", valueName: "number"))
  var threads = 0

  @Option(help: ArgumentHelp("About how long to measure.", valueName: "seconds"))
  var seconds = 5.0

  @Option(help: ArgumentHelp("Where the profile goes; a file that is there is replaced.", valueName: "file"))
  var profile: String?

  @Option(help: ArgumentHelp("Where the workers go as a cluster for fastermoe plan.", valueName: "file"))
  var cluster: String?

  @OptionGroup var output: OutputOptions

  private struct Report: Encodable {
    struct Worker: Encodable {
      let rank: Int
      let threads: Int
      let products, weightGrads: [[Double]]
      let rowHandling: Double
      enum CodingKeys: String, CodingKey {
        case rank, threads
        case products = "flops_per_second"
        case weightGrads = "weight_gradient_flops_per_second"
        case rowHandling = "row_bytes_per_second"
      }
    }
    let workers: [Worker]
  }

  func run() throws {
    guard workers >= 1, workers <= Group.mostThreads else {
      throw Failure(.argument, "--workers is from 1 to \(Group.mostThreads), not \(workers)")
    }
    guard seconds > 0, seconds <= 86400 else {
      throw Failure(.argument, "--seconds is more than 0 and at most 86400, not \(seconds)")
    }
    guard threads >= 0 else { throw Failure(.argument, "--threads is not negative") }
    var options = Group.Options()
    options.threads = threads
    // Where it cannot be written, that is said before it is measured.
    for path in [profile, cluster].compactMap({ $0 }) { _ = try Draft(of: path) }
    // The group has no profile: one that is there may be of another machine, and is not read.
    let groups = try Group.local(workers, options)

    let bar = ProgressBar(seconds: seconds)
    let ranks = Ranks(groups) { group throws(Failure) in
      try group.exclusively { () throws(Failure) in try group.calibrate(for: Seconds(seconds)) }
    }
    while !ranks.wait(Seconds(0.1)) { bar.advance() }
    bar.clear()
    if let failure = ranks.failure { throw failure }
    let calibration = groups[0].calibration!
    if let profile { try groups[0].write(calibration, to: profile) }
    if let cluster { try Documents.write(Cluster.Document(groups[0].places, calibration), to: cluster) }
    let rows = ComputeRates.sampledRows
    let report = Report(
      workers: groups.enumerated().map { rank, group in
        let rates = calibration.rates[rank]
        return Report.Worker(
          rank: rank, threads: group.team.threads,
          products: rows.enumerated().map { [Double($1), rates.products[$0]] },
          weightGrads: rows.enumerated().map { [Double($1), rates.weightGrads[$0]] },
          rowHandling: rates.rowHandling.value)
      })
    try output.show(report) {
      report.workers.map { worker in
        "worker \(worker.rank), \(worker.threads) thread\(worker.threads == 1 ? "" : "s"); \(Calibrate.words(of: worker.rowHandling))\n"
          + table(
            ["rows of an expert", "GFLOP/s with rows", "GFLOP/s of weights' gradients"],
            zip(worker.products, worker.weightGrads).map {
              [fixed($0[0], 0), fixed($0[1] * 1e-9, 1), fixed($1[1] * 1e-9, 1)]
            }, left: [])
      }.joined(separator: "\n")
        + (profile.map { "\nprofile: \($0)\n" } ?? "\nnot kept: --profile FILE keeps it\n")
    }
  }

  /// It is a difference of two times, which is nothing or less where others use the machine, too. No memory has 10 TB/s.
  private static func words(of handling: Double) -> String {
    handling < 1e13 ? "rows are handled at \(rate(handling, "B/s"))" : "no time for handling rows could be told"
  }
}

/// Calls that ranks which are threads of this process make together.
private final class Ranks {
  private let groups: [Group]
  private let body: (Group) throws(Failure) -> Void
  private let lock: UnsafeMutablePointer<pthread_mutex_t>
  private var left: Int
  private var threads: [pthread_t] = []
  private(set) var failure: Failure?

  private final class Seat {
    let ranks: Ranks
    let group: Group
    init(_ ranks: Ranks, _ group: Group) { (self.ranks, self.group) = (ranks, group) }
  }

  init(_ groups: [Group], _ body: @escaping (Group) throws(Failure) -> Void) {
    (self.groups, self.body, left) = (groups, body, groups.count)
    lock = .allocate(capacity: 1)
    lock.initialize(to: pthread_mutex_t())
    pthread_mutex_init(lock, nil)
    for group in groups {
      var thread = pthread_t()
      let seat = Unmanaged.passRetained(Seat(self, group))
      let status = pthread_create(
        &thread, nil,
        {
          let seat = Unmanaged<Seat>.fromOpaque($0!).takeRetainedValue()
          seat.ranks.call(seat.group)
          return nil
        }, seat.toOpaque())
      precondition(status == 0, "a machine that gives teams their threads gives one more for each")
      threads.append(thread)
    }
  }

  deinit {
    pthread_mutex_destroy(lock)
    lock.deallocate()
  }

  private func call(_ group: Group) {
    let failed = FasterMoE.failure { () throws(Failure) in try body(group) }
    pthread_mutex_lock(lock)
    if failure == nil { failure = failed }
    left -= 1
    pthread_mutex_unlock(lock)
  }

  /// Whether all ranks are done, after so long at most.
  func wait(_ time: Seconds) -> Bool {
    let end = Seconds.now + time
    while true {
      pthread_mutex_lock(lock)
      let isDone = left == 0
      pthread_mutex_unlock(lock)
      guard !isDone else {
        for thread in threads { pthread_join(thread, nil) }
        threads = []
        return true
      }
      guard Seconds.now < end else { return false }
      usleep(10_000)
    }
  }
}

/// How much of a time that is known before is over, on a terminal's error stream; nothing elsewhere.
struct ProgressBar {
  private let seconds: Double
  private let start = Seconds.now
  private let isShown = isatty(STDERR_FILENO) != 0

  init(seconds: Double) {
    self.seconds = seconds
    guard isShown else { return }
    // Who interrupts gets a clean line, and the process ends by that signal all the same.
    signal(SIGINT) { number in
      let clean: StaticString = "\r\u{1B}[K"
      _ = Glibc.write(STDERR_FILENO, clean.utf8Start, clean.utf8CodeUnitCount)
      signal(number, SIG_DFL)
      raise(number)
    }
  }

  func advance() {
    guard isShown else { return }
    let share = min(1, (Seconds.now.value - start.value) / seconds)
    let full = Int(share * 40)
    Console.note(
      "\r[\(String(repeating: "=", count: full))\(String(repeating: " ", count: 40 - full))] \(fixed(share * 100, 0)) %"
    )
  }

  func clear() { if isShown { Console.note("\r\u{1B}[K") } }
}
