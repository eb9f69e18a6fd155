import Glibc
import Synchronization

/// Work that a team's threads do together; subclasses say what.
package class TeamWork {
  /// Called once on each thread that does it, `thread` in 0..<team.threads; the calls share the work by the team's counter.
  package func work(thread: Int) {}
}

/// The compute threads of one worker: made once, pinned to its cores, soon asleep between jobs.
///
/// One job at a time. To wake a thread takes as long as a small layer does, so the calling thread begins with a job instead
/// of one of them, if the cores are its own, too; else it soon sleeps meanwhile. Nothing here allocates after init.
package final class Team {
  package let threads: Int
  private let seats: UnsafeMutablePointer<Seat>
  private var started = 0
  private let signal: Signal
  private let callersSeat: () -> Int?
  private let next = Atomic<Int>(0)

  /// Makes the threads; `place` is called on each new thread with its index, to tie it to its core.
  ///
  /// `callersSeat` says, on the thread that calls `run`, instead of which thread that one is to work, if it is.
  package init(
    threads: Int, callersSeat: @escaping () -> Int?, place: @escaping (Int) -> Void
  ) throws(Failure) {
    self.threads = threads
    self.callersSeat = callersSeat
    seats = .allocate(capacity: threads)
    signal = try Signal(threads: threads)
    // The host's signals are for the host's threads: new ones inherit a mask that leaves only a thread's own faults.
    var (none, before) = (sigset_t(), sigset_t())
    sigfillset(&none)
    for fault in [SIGSEGV, SIGBUS, SIGFPE, SIGILL] { sigdelset(&none, fault) }
    pthread_sigmask(SIG_SETMASK, &none, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
    for index in 0..<threads {
      (seats + index).initialize(to: Seat(index: index, signal: signal, place: place))
      let failed = pthread_create(
        &seats[index].thread, nil,
        { seat in
          seat!.assumingMemoryBound(to: Seat.self).pointee.serve()
          return nil
        }, seats + index)
      guard failed == 0 else {
        (seats + index).deinitialize(count: 1)
        throw Failure(.memory, "the system starts no thread \(index + 1) of \(threads): error \(failed)")
      }
      started = index + 1
    }
  }

  deinit {
    signal.post(nil, without: nil)
    for index in 0..<started { pthread_join(seats[index].thread, nil) }
    seats.deinitialize(count: started)
    seats.deallocate()
  }

  /// Has threads call `work.work(thread:)`, the caller alone if the work `isSmall`, and returns when those are done that
  /// had come when the caller found nothing left to take. Not from inside a job.
  package func run(_ work: TeamWork, isSmall: Bool = false) {
    let seat = isSmall ? 0 : callersSeat()
    guard let seat else {
      begin(work)
      return finish()
    }
    let isAlone = isSmall || threads == 1
    next.store(0, ordering: .relaxed)
    if !isAlone { signal.post(.passUnretained(work), without: seat) }
    work.work(thread: seat)
    if !isAlone { signal.wait(forAll: false) }
  }

  /// Has every thread begin `work`, which the caller keeps until `finish` has returned.
  package func begin(_ work: TeamWork) {
    next.store(0, ordering: .relaxed)
    signal.post(.passUnretained(work), without: nil)
  }

  /// Returns when all threads are done.
  package func finish() { signal.wait(forAll: true) }

  /// The next task number of the running job: 0, 1, 2… over all threads.
  @inline(__always) package func take() -> Int { next.wrappingAdd(1, ordering: .relaxed).oldValue }

  /// Returns once `condition` holds, which another thread of the running job is about to bring about; whether it did not
  /// hold at once.
  @discardableResult
  @inline(__always) package func wait(until condition: () -> Bool) -> Bool {
    if condition() { return false }
    // The others are computing on their own cores and mostly come soon. A wait that lasts means that somebody else has
    // their cores, and then the best is to need none.
    guard !Team.yield(until: condition) else { return true }
    var pause = timespec(tv_sec: 0, tv_nsec: 50_000)
    while !condition() { nanosleep(&pause, nil) }
    return true
  }

  /// Waits for `condition` as long as yielding is better than to sleep, some 200 microseconds where nobody else wants the
  /// core; whether it holds. To wake a thread that sleeps can take 50, on a virtual machine whose core sleeps, too.
  @inline(__always) fileprivate static func yield(until condition: () -> Bool) -> Bool {
    for _ in 0..<500 {
      if condition() { return true }
      sched_yield()
    }
    return condition()
  }

  /// What one thread needs to live.
  private struct Seat {
    let index: Int
    let signal: Signal
    let place: (Int) -> Void
    var thread = pthread_t()

    func serve() {
      place(index)
      var seen = 0
      while let work = signal.receive(after: &seen, at: index) {
        work._withUnsafeGuaranteedRef { $0.work(thread: index) }
        signal.leave()
      }
    }
  }
}

/// Hands one job after another to waiting threads and waits until those that came have finished it. Who waits sleeps at last.
private final class Signal: @unchecked Sendable {
  /// One waiting thread's bed.
  private struct Bed {
    var bell = pthread_cond_t()
    var isTaken = false
  }

  private let threads: Int
  private let beds: UnsafeMutablePointer<Bed>
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let done = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  /// Changed under the lock, as all below; these two are read without it by those that only look.
  private let jobs = Atomic<Int>(0)
  private let left = Atomic<Int>(0)
  /// How many threads have come for the job, and how many have left when it is done.
  private var came = 0
  private var awaited = 0
  private var isOpen = false
  /// The thread whose work the caller does.
  private var absent: Int?
  /// Beds from here on have not been looked at for the job.
  private var unseen = 0
  /// Not retained: a thread that let go of the last reference would end its own team. The caller holds one until all are done.
  private var work: Unmanaged<TeamWork>?

  init(threads: Int) throws(Failure) {
    self.threads = threads
    beds = .allocate(capacity: threads)
    beds.initialize(repeating: Bed(), count: threads)
    mutex.initialize(to: pthread_mutex_t())
    done.initialize(to: pthread_cond_t())
    var made = pthread_mutex_init(mutex, nil) == 0 && pthread_cond_init(done, nil) == 0
    for thread in 0..<threads { made = pthread_cond_init(&beds[thread].bell, nil) == 0 && made }
    guard made else { throw Failure(.memory, "the system gives no lock") }
  }

  deinit {
    for thread in 0..<threads { pthread_cond_destroy(&beds[thread].bell) }
    pthread_cond_destroy(done)
    pthread_mutex_destroy(mutex)
    beds.deallocate()
    done.deallocate()
    mutex.deallocate()
  }

  /// Offers `work` to the threads but the `absent` one, nil to send them home.
  func post(_ work: Unmanaged<TeamWork>?, without absent: Int?) {
    pthread_mutex_lock(mutex)
    (self.work, self.absent, isOpen, came, awaited, unseen) = (work, absent, true, 0, threads, 0)
    left.store(0, ordering: .relaxed)
    jobs.wrappingAdd(1, ordering: .releasing)
    wakeTwo()
    pthread_mutex_unlock(mutex)
  }

  /// Waits until all threads have come and left, or all that have come by now: from then on the others are too late.
  func wait(forAll: Bool) {
    if !forAll {
      pthread_mutex_lock(mutex)
      (isOpen, awaited) = (false, came)
      pthread_mutex_unlock(mutex)
    }
    let awaited = awaited
    _ = Team.yield { left.load(ordering: .acquiring) == awaited }
    pthread_mutex_lock(mutex)
    while left.load(ordering: .relaxed) < awaited { pthread_cond_wait(done, mutex) }
    work = nil
    pthread_mutex_unlock(mutex)
  }

  /// Waits until there is a job after the `seen` ones for this thread; nil means that it may end.
  func receive(after seen: inout Int, at thread: Int) -> Unmanaged<TeamWork>? {
    while true {
      _ = Team.yield { jobs.load(ordering: .acquiring) != seen }
      pthread_mutex_lock(mutex)
      defer { pthread_mutex_unlock(mutex) }
      beds[thread].isTaken = true
      while jobs.load(ordering: .relaxed) == seen { pthread_cond_wait(&beds[thread].bell, mutex) }
      beds[thread].isTaken = false
      seen = jobs.load(ordering: .relaxed)
      guard isOpen, thread != absent else { continue }
      came += 1
      wakeTwo()
      return work
    }
  }

  func leave() {
    pthread_mutex_lock(mutex)
    if left.wrappingAdd(1, ordering: .releasing).newValue == awaited { pthread_cond_signal(done) }
    pthread_mutex_unlock(mutex)
  }

  /// Each that comes wakes two of those that sleep: who wakes many, begins late.
  private func wakeTwo() {
    var woken = 0
    while woken < 2, unseen < threads {
      if beds[unseen].isTaken, unseen != absent {
        pthread_cond_signal(&beds[unseen].bell)
        woken += 1
      }
      unseen += 1
    }
  }
}
