import Foundation
import Synchronization
import Testing

@testable import FasterMoE

/// Who works on a job, and that nobody is still at it when the call returns.
struct TeamTests {
  /// Every task counted where it is done, by threads that note themselves.
  final class Count: TeamWork {
    var team: Team!
    private var tasks = 0
    private let done = UnsafeMutablePointer<Int>.allocate(capacity: 40)
    /// [threads] how often each thread was called, and whether by the thread that called `run`.
    let calls: UnsafeMutablePointer<Int>
    let byCaller: UnsafeMutablePointer<Bool>
    private let threads: Int
    var caller = pthread_self()
    var spins = 0

    init(threads: Int) {
      self.threads = threads
      calls = .allocate(capacity: threads)
      byCaller = .allocate(capacity: threads)
    }
    deinit {
      done.deallocate()
      calls.deallocate()
      byCaller.deallocate()
    }

    func prepare(tasks: Int, spins: Int) {
      self.tasks = tasks
      done.update(repeating: 0, count: tasks)
      calls.update(repeating: 0, count: threads)
      byCaller.update(repeating: false, count: threads)
      (caller, self.spins) = (pthread_self(), spins)
    }

    override func work(thread: Int) {
      calls[thread] += 1
      byCaller[thread] = pthread_equal(caller, pthread_self()) != 0
      while case let task = team!.take(), task < tasks {
        for _ in 0..<spins { sched_yield() }
        done[task] += 1
      }
    }

    var isEachDoneOnce: Bool { (0..<tasks).allSatisfy { done[$0] == 1 } }
  }

  /// A team whose caller works in turns instead of each thread, or never.
  static func team(_ threads: Int, callerWorks: Bool) throws -> (Team, Count) {
    nonisolated(unsafe) var turn = 0
    func seat() -> Int? {
      turn += 1
      return callerWorks ? turn % threads : nil
    }
    let team = try Team(threads: threads, callersSeat: seat) { _ in }
    let count = Count(threads: threads)
    count.team = team
    return (team, count)
  }

  @Test(arguments: [1, 2, 3, 6], [false, true])
  func everyTaskIsDoneOnce(threads: Int, callerWorks: Bool) throws {
    let (team, count) = try TeamTests.team(threads, callerWorks: callerWorks)
    var numbers = Numbers(UInt64(threads))
    for job in 0..<200 {
      // Some jobs are over before a thread wakes, some begin while it still looks for the next one.
      if job % 4 == 0 { usleep(UInt32(numbers.below(600))) }
      count.prepare(tasks: numbers.below(40), spins: numbers.below(30))
      let isSmall = job % 7 == 3
      team.run(count, isSmall: isSmall)
      #expect(count.isEachDoneOnce)
      let called = (0..<threads).filter { count.calls[$0] > 0 }
      #expect(called.allSatisfy { count.calls[$0] == 1 })
      #expect(called.count { count.byCaller[$0] } == (callerWorks || isSmall ? 1 : 0))
      #expect(!isSmall || called.count == 1)
      #expect(callerWorks || isSmall || called.count == threads)
    }
  }

  @Test(arguments: [1, 2, 5])
  func everyThreadBegins(threads: Int) throws {
    let (team, count) = try TeamTests.team(threads, callerWorks: true)
    for job in 0..<100 {
      if job % 3 == 0 { usleep(500) }
      count.prepare(tasks: 20, spins: 3)
      team.begin(count)
      team.finish()
      #expect(count.isEachDoneOnce)
      #expect((0..<threads).allSatisfy { count.calls[$0] == 1 && !count.byCaller[$0] })
      count.prepare(tasks: 20, spins: 0)
      team.run(count)
      #expect(count.isEachDoneOnce)
    }
  }

  /// A job that the caller cannot end alone: its first task lasts until the others have one each.
  @Test(arguments: [2, 3, 6])
  func thoseThatSleepJoin(threads: Int) throws {
    final class Together: TeamWork {
      let team: Team
      let taken = Atomic<Int>(0)
      init(_ team: Team) { self.team = team }
      override func work(thread: Int) {
        guard team.take() < team.threads else { return }
        taken.wrappingAdd(1, ordering: .relaxed)
        team.wait { self.taken.load(ordering: .relaxed) == self.team.threads }
      }
    }
    let (team, _) = try TeamTests.team(threads, callerWorks: true)
    for job in 0..<30 {
      if job % 2 == 0 { usleep(600) }
      let work = Together(team)
      team.run(work)
      #expect(work.taken.load(ordering: .relaxed) == threads)
    }
  }

  /// Who calls works instead of the thread of the core it is on, unless other ranks have some of those that it may be on.
  @Test func callersWorkWhereTheirCoresAre() throws {
    let topology = try Topology()
    let cores = topology.cores.count
    func check(_ group: Group, worksAs seat: Int?) throws {
      let threads = group.team.threads
      let count = Count(threads: threads)
      count.team = group.team
      count.prepare(tasks: 5, spins: 2)
      group.team.run(count)
      #expect((0..<threads).map { count.byCaller[$0] && count.calls[$0] > 0 } == (0..<threads).map { $0 == seat })
      #expect(count.isEachDoneOnce)
    }
    var options = Group.Options()
    let alone = try Group.local(1, options)[0]
    onThreads(cores) { core in
      guard topology.bindCallingThread(toCore: core) else { return }
      #expect(topology.coreOfCallingThread == core)
      try alone.exclusively { try check(alone, worksAs: core) }
    }
    // A group that may use one core alone, and a caller elsewhere.
    if cores > 1 {
      nonisolated(unsafe) var narrow: Group?
      onThreads(1) { _ in
        if topology.bindCallingThread(toCore: 0) { narrow = try Group.local(1, options)[0] }
      }
      onThreads(2) { core in
        guard let narrow, topology.bindCallingThread(toCore: core) else { return }
        try narrow.exclusively { try check(narrow, worksAs: core == 0 ? 0 : nil) }
      }
    }
    // Together they would run on this thread; each has a job of its own here.
    if cores > 1 { for group in try Group.local(2, options) { try check(group, worksAs: nil) } }
    options.pins = false
    options.threads = 2
    for group in try Group.local(2, options) { try check(group, worksAs: 0) }
  }

  /// What one thread does before another wakes, and what it does not.
  @Test func smallJobsAreSmall() throws {
    func shape(_ experts: Int, _ model: Int) throws -> Shape {
      try Shape(model: model, hidden: 4 * model, experts: experts, choices: 1, activation: .gelu)
    }
    func isSmall(_ tokens: Int, _ experts: Int, _ model: Int) throws -> Bool {
      try Pass.floatsAtGate(tokens, columns: experts, shape(experts, model)) < Pass.fewFloats
    }
    #expect(try isSmall(1, 64, 512) && isSmall(16, 8, 256) && isSmall(64, 4, 64))
    #expect(try !isSmall(500, 512, 64) && !isSmall(8000, 8, 8) && !isSmall(200, 8, 1024))
    #expect(try Pass.floatsOfRows(64, shape(8, 256)) < Pass.fewFloats)
    #expect(try Pass.floatsOfRows(8000, shape(8, 8)) > Pass.fewFloats)
    #expect(try Pass.floatsAtGate(0, columns: 8, shape(8, 256)) == 0 && Pass.floatsOfRows(0, shape(8, 256)) == 0)
  }

  /// Threads that wake for a job that is over find no work that is gone, and a team that goes takes them along.
  @Test func whoComesTooLateTouchesNothing() throws {
    for round in 0..<200 {
      var made = Optional(try TeamTests.team(3, callerWorks: true))
      if round % 2 == 0 { usleep(400) }
      made!.1.prepare(tasks: 1, spins: 0)
      made!.0.run(made!.1)
      #expect(made!.1.isEachDoneOnce)
      made!.1.team = nil
      made = nil
    }
  }
}
