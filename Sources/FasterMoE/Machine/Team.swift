import Glibc
import Synchronization

/// Work that a team's threads do together; subclasses say what.
package class TeamWork {
  /// Called once on every thread, `thread` in 0..<team.threads; the calls share the work by the team's counter.
  package func work(thread: Int) {}
}

/// The compute threads of one worker: made once, pinned to its cores, soon asleep between jobs.
///
/// One job at a time; the thread that calls `run` soon sleeps meanwhile, so the cores belong to the team. Nothing here
/// allocates after init.
package final class Team {
  package let threads: Int
  private let seats: UnsafeMutablePointer<Seat>
  private var started = 0
  private let signal: Signal
  private let next = Atomic<Int>(0)
  private let waiting = Atomic<Int>(0)
  private let round = Atomic<Int>(0)

  /// Makes the threads; `place` is called on each new thread with its index, to tie it to its core.
  package init(threads: Int, place: @escaping (Int) -> Void) throws(Failure) {
    self.threads = threads
    seats = .allocate(capacity: threads)
    signal = try Signal()
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
    signal.post(nil, to: started)
    for index in 0..<started { pthread_join(seats[index].thread, nil) }
    seats.deinitialize(count: started)
    seats.deallocate()
  }

  /// Has every thread call `work.work(thread:)` and returns when all are done. Not from inside a job.
  package func run(_ work: TeamWork) {
    begin(work)
    finish()
  }

  /// Has every thread begin `work`, which the caller keeps until `finish` has returned.
  package func begin(_ work: TeamWork) {
    next.store(0, ordering: .relaxed)
    signal.post(.passUnretained(work), to: threads)
  }

  /// Returns when all threads are done.
  package func finish() { signal.wait() }

  /// The next task number of the running job: 0, 1, 2… over all threads.
  @inline(__always) package func take() -> Int { next.wrappingAdd(1, ordering: .relaxed).oldValue }

  /// Waits until all threads of the running job are here; then the task numbers begin at 0 again.
  package func barrier() {
    let mine = round.load(ordering: .relaxed)
    if waiting.wrappingAdd(1, ordering: .acquiringAndReleasing).newValue == threads {
      waiting.store(0, ordering: .relaxed)
      next.store(0, ordering: .relaxed)
      round.wrappingAdd(1, ordering: .releasing)
    } else {
      wait { self.round.load(ordering: .acquiring) != mine }
    }
  }

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
      while let work = signal.receive(after: &seen) {
        work._withUnsafeGuaranteedRef { $0.work(thread: index) }
        signal.finished()
      }
    }
  }
}

/// Hands one job after another to waiting threads and waits until all of them have finished it. Who waits sleeps at last.
private final class Signal: @unchecked Sendable {
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let posted = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private let done = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  /// Changed under the lock; read without it by those that only look.
  private let jobs = Atomic<Int>(0)
  private let unfinished = Atomic<Int>(0)
  /// Not retained: a thread that let go of the last reference would end its own team. The caller holds one until all are done.
  private var work: Unmanaged<TeamWork>?

  init() throws(Failure) {
    mutex.initialize(to: pthread_mutex_t())
    posted.initialize(to: pthread_cond_t())
    done.initialize(to: pthread_cond_t())
    guard pthread_mutex_init(mutex, nil) == 0, pthread_cond_init(posted, nil) == 0, pthread_cond_init(done, nil) == 0
    else { throw Failure(.memory, "the system gives no lock") }
  }

  deinit {
    pthread_cond_destroy(done)
    pthread_cond_destroy(posted)
    pthread_mutex_destroy(mutex)
    done.deallocate()
    posted.deallocate()
    mutex.deallocate()
  }

  /// Wakes the threads with `work`, nil to send them home.
  func post(_ work: Unmanaged<TeamWork>?, to threads: Int) {
    pthread_mutex_lock(mutex)
    self.work = work
    unfinished.store(threads, ordering: .relaxed)
    jobs.wrappingAdd(1, ordering: .releasing)
    pthread_cond_broadcast(posted)
    pthread_mutex_unlock(mutex)
  }

  /// Waits until all threads have finished.
  func wait() {
    _ = Team.yield { unfinished.load(ordering: .acquiring) == 0 }
    pthread_mutex_lock(mutex)
    while unfinished.load(ordering: .relaxed) > 0 { pthread_cond_wait(done, mutex) }
    work = nil
    pthread_mutex_unlock(mutex)
  }

  /// Waits until there is a job after the `seen` ones; nil means that the thread may end.
  func receive(after seen: inout Int) -> Unmanaged<TeamWork>? {
    _ = Team.yield { jobs.load(ordering: .acquiring) != seen }
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    while jobs.load(ordering: .relaxed) == seen { pthread_cond_wait(posted, mutex) }
    seen = jobs.load(ordering: .relaxed)
    return work
  }

  func finished() {
    pthread_mutex_lock(mutex)
    if unfinished.wrappingSubtract(1, ordering: .releasing).newValue == 0 { pthread_cond_signal(done) }
    pthread_mutex_unlock(mutex)
  }
}
