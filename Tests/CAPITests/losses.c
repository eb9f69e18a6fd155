/* losses.c: several workers when one of them is late, silent or cut off, or its transport fails.  Every rank gets a status,
 * and nobody waits longer than it asked to.  Processes that die are in deaths.c. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "seat.h"

/* ---- one rank is lost ---------------------------------------------------------------------- */

/* A time-out has to be waited for, so most are short; but where the machine stands still for that long, ranks give up that
 * only should have begun, and a run tells nothing.  Then the next time-out is tried; the last one must do. */
static const double patience[] = {0.4, 1.6, 6.4};
enum { PATIENCES = sizeof patience / sizeof *patience };

/* Joins, where there is no group yet, and makes the calls before `place`; whether nobody gave up meanwhile. */
static int get_to(int place, seat *at, crew *c, int32_t rank) {
  fmoe_status status = c->groups[rank] ? FMOE_OK : crew_join(c, rank);
  at->group = c->groups[rank];
  for (int before = CREATE; status == FMOE_OK && before < place; before++) status = call(at, before);
  CHECK(status == FMOE_OK || is_lost(status), "rank %d, before %s: %s", rank, place_names[place], fmoe_status_name(status));
  return status == FMOE_OK;
}

/* Ranks that still have to join where that takes all of them. */
static crew *impatient_crew(int32_t ranks, int over_mailbox, double timeout) {
  const crew_options options = {.ranks = ranks, .over_mailbox = over_mailbox, .timeout = timeout};
  return over_mailbox ? crew_without_groups(options) : crew_create(options);
}

enum { POISON = 0xa5 };

static void poison(seat *at) {
  size_t bytes = (size_t)(at->o->tokens * at->o->model) * sizeof(float);
  if (at->layer) memset(at->b.y, POISON, bytes), memset(at->b.grad_x, POISON, bytes);
}

static void check_poison(const char *what, const seat *at) {
  const unsigned char *y = (const unsigned char *)at->b.y, *grad_x = (const unsigned char *)at->b.grad_x;
  int64_t bytes = at->layer ? at->o->tokens * at->o->model * (int64_t)sizeof(float) : 0;
  for (int64_t i = 0; i < bytes; i++)
    if (y[i] != POISON || grad_x[i] != POISON) i = bytes, CHECK(0, "%s: written to after the call had returned", what);
}

typedef struct silence {
  spread *s;
  int place;
  int32_t absent;
  double timeout;
  atomic_int timeouts;
  atomic_int gave_up, waited; /* ranks before the place; ranks for what should fail at once */
  double began[MOST_RANKS];
  pthread_barrier_t given_up, came;
} silence;

/* A rank does not call.  The others give up; then it calls after all, into memory that is no longer theirs to give. */
static void run_silence(crew *c, int32_t rank, void *context) {
  silence *q = context;
  const int is_absent = rank == q->absent;
  char what[200];
  seat at = seat_of(c, rank, q->s);
  snprintf(what, sizeof what, "%s: rank %d of %d, where %d does not call %s", c->mail ? "mailbox" : "local", rank,
           c->ranks, q->absent, place_names[q->place]);
  fmoe_status status = FMOE_OK;
  double ended = 0;
  if (!get_to(q->place, &at, c, rank)) {
    q->gave_up++;
  } else if (!is_absent) {
    q->began[rank] = seconds();
    status = call(&at, q->place);
    ended = seconds();
    poison(&at);
  }
  pthread_barrier_wait(&q->given_up);
  const int tells = !q->gave_up;
  if (tells && !is_absent) {
    /* In one process who came first gives up for all; over a transport each rank by itself. */
    double first = q->began[rank];
    for (int32_t r = 0; r < c->ranks; r++)
      if (!c->mail && r != q->absent && q->began[r] < first) first = q->began[r];
    if (status == FMOE_ERROR_TIMEOUT) q->timeouts++;
    CHECK(is_lost(status) && ended - q->began[rank] < q->timeout + slack, "%s: %s after %.3f s", what,
          fmoe_status_name(status), ended - q->began[rank]);
    CHECK(status != FMOE_ERROR_TIMEOUT || ended - first > 0.9 * q->timeout, "%s: given up after %.3f s", what, ended - first);
  }
  if (tells && is_absent) {
    /* Over a transport it may find its peers' messages of that call and even succeed, but not in the next. */
    for (int turn = 0; status == FMOE_OK && turn < (c->mail ? 3 : 1); turn++) {
      double start = seconds();
      status = call(&at, !turn ? q->place : at.layer && turn == 2 ? REDUCE : CREATE);
      double took = seconds() - start;
      CHECK(took < q->timeout + slack, "%s: late, took %.3f s", what, took);
      if (!c->mail && took >= q->timeout) q->waited++;
    }
    CHECK(is_lost(status), "%s: late, got %s", what, fmoe_status_name(status));
  }
  pthread_barrier_wait(&q->came);
  if (tells) {
    if (!is_absent) check_poison(what, &at);
    if (!is_broken(what, &at, q->timeout)) q->waited++;
  }
  leave_seat(&at);
}

/* Whether it was told what happens. */
static int try_silence(spread *s, int over_mailbox, int place, double timeout) {
  silence q = {.s = s, .place = place, .absent = place % s->ranks, .timeout = timeout};
  crew *c = impatient_crew(s->ranks, over_mailbox, timeout);
  if (pthread_barrier_init(&q.given_up, NULL, (unsigned)s->ranks) || pthread_barrier_init(&q.came, NULL, (unsigned)s->ranks))
    abort();
  crew_run(c, run_silence, &q);
  CHECK(q.gave_up || q.timeouts > 0, "who waits longest says TIMEOUT");
  pthread_barrier_destroy(&q.given_up), pthread_barrier_destroy(&q.came);
  crew_destroy(c);
  return !q.gave_up && !q.waited;
}

static void test_silent_rank(void) {
  spread *s = small_spread(3, GATED);
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++)
    for (int place = CREATE; place < PLACES; place++) {
      int turn = 0;
      while (turn < PATIENCES && !try_silence(s, over_mailbox, place, patience[turn])) turn++;
      CHECK(turn < PATIENCES, "%s: a rank gave up before, or waited in a broken group", place_names[place]);
    }
  spread_destroy(s);
  check_life_goes_on();
  injected("a rank that does not call, in every call of a step, and calls too late", 2 * PLACES,
           "FMOE_ERROR_TIMEOUT; nothing is written after a call has returned");
}

/* A rank never comes to the group. */
static void run_absence(crew *c, int32_t rank, void *context) {
  const double start = seconds();
  (void)context;
  if (rank == 1) return;
  fmoe_status status = crew_join(c, rank);
  CHECK(is_lost(status) && seconds() - start < c->options.timeout + slack, "%s after %.3f s", fmoe_status_name(status),
        seconds() - start);
}

static void test_absent_rank(void) {
  crew *c = crew_without_groups((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 0.4});
  crew_run(c, run_absence, NULL);
  for (int32_t r = 0; r < 3; r++)
    CHECK(!c->groups[r] && mailbox_released(c->mail, r) == 0, "rank %d: no group, nothing to release", r);
  crew_destroy(c);
}

typedef struct departure {
  spread *s;
  int place;
} departure;

/* The last rank destroys all it has while the others wait for it, without any timeout. */
static void run_departure(crew *c, int32_t rank, void *context) {
  const departure *d = context;
  char what[100];
  seat at = seat_of(c, rank, d->s);
  snprintf(what, sizeof what, "rank %d, left alone in %s", rank, place_names[d->place]);
  for (int place = CREATE; place < d->place; place++) EXPECT(FMOE_OK, call(&at, place));
  if (rank == c->ranks - 1) {
    usleep(30000); /* by then the others most likely wait; if not, they find it gone */
    fmoe_group_destroy(c->groups[rank]), c->groups[rank] = NULL;
    leave_seat(&at);
    return;
  }
  double start = seconds();
  fmoe_status status = call(&at, d->place);
  CHECK(status == FMOE_ERROR_PEER && seconds() - start < slack, "%s: %s after %.3f s", what, fmoe_status_name(status),
        seconds() - start);
  CHECK(is_broken(what, &at, slack), "%s: waited in a broken group", what);
  leave_seat(&at);
}

static void test_leaving_rank(void) {
  departure d = {.s = small_spread(3, GATED)};
  for (d.place = CREATE; d.place < PLACES; d.place++) {
    crew *c = crew_create((crew_options){.ranks = 3});
    crew_run(c, run_departure, &d);
    crew_destroy(c);
  }
  spread_destroy(d.s);
  injected("a rank of threads that destroys its group while others wait", PLACES, "FMOE_ERROR_PEER at once");
}

typedef struct cut {
  spread *s;
  int place;
  atomic_int untold; /* ranks that gave up before the place, or waited where they should not */
} cut;

/* From one call on, a rank's messages do not arrive, nor do messages to it; it does not know. */
static void run_cut(crew *c, int32_t rank, void *context) {
  cut *d = context;
  char what[100];
  seat at = seat_of(c, rank, d->s);
  snprintf(what, sizeof what, "rank %d, where rank 1 is cut off in %s", rank, place_names[d->place]);
  if (!get_to(d->place, &at, c, rank)) {
    d->untold++;
  } else {
    if (rank == 1) mailbox_drop(c->mail, 1);
    double start = seconds();
    fmoe_status status = call(&at, d->place);
    if (status == FMOE_OK && rank != 1) status = call(&at, REDUCE); /* had it before the cut: not the next time */
    CHECK(is_lost(status) && seconds() - start < 2 * (c->options.timeout + slack), "%s: %s after %.3f s", what,
          fmoe_status_name(status), seconds() - start);
    if (!is_broken(what, &at, c->options.timeout)) d->untold++;
  }
  leave_seat(&at);
}

static int try_cut(spread *s, int place, double timeout) {
  cut d = {.s = s, .place = place};
  crew *c = impatient_crew(3, 1, timeout);
  crew_run(c, run_cut, &d);
  crew_destroy(c);
  return !d.untold;
}

static void test_dropped_messages(void) {
  spread *s = small_spread(3, GATED);
  for (int place = CREATE; place < PLACES; place++) {
    int turn = 0;
    while (turn < PATIENCES && !try_cut(s, place, patience[turn])) turn++;
    CHECK(turn < PATIENCES, "%s: a rank gave up before, or waited in a broken group", place_names[place]);
  }
  spread_destroy(s);
  injected("a rank cut off from the others, in every call of a step", PLACES, "FMOE_ERROR_TIMEOUT or FMOE_ERROR_PEER");
}

/* ---- the transport fails ------------------------------------------------------------------- */

typedef struct failure {
  spread *s;
  int32_t rank;               /* whose transport */
  int64_t starts, ends;       /* at which of its calls, see mailbox_fail */
  int loud, after_join;       /* whether the count begins once there are groups */
  mailbox_traffic clean;      /* out: of that rank, up to the end of the step */
  fmoe_status status[MOST_RANKS]; /* out */
} failure;

/* A step and two calls more, in which at the latest all ranks notice. */
static void run_failure(crew *c, int32_t rank, void *context) {
  failure *f = context;
  if (rank == f->rank && !f->after_join) mailbox_fail(c->mail, rank, f->starts, f->ends, f->loud);
  f->status[rank] = crew_join(c, rank);
  if (f->status[rank] != FMOE_OK) return;
  const mailbox_traffic joined = mailbox_sent(c->mail, rank);
  if (rank == f->rank && f->after_join) mailbox_fail(c->mail, rank, f->starts, f->ends, f->loud);
  seat at = seat_of(c, rank, f->s);
  for (int place = CREATE; f->status[rank] == FMOE_OK && place < PLACES + 2; place++) {
    if (place == PLACES && rank == f->rank) {
      f->clean = mailbox_sent(c->mail, rank);
      if (f->after_join) f->clean.starts -= joined.starts, f->clean.ends -= joined.ends;
    }
    f->status[rank] = call(&at, place < PLACES ? place : REDUCE);
  }
  if (f->status[rank] != FMOE_OK) CHECK(is_broken("a transport failed", &at, slack), "waited in a broken group");
  leave_seat(&at);
}

/* Whether it happened, or will not since nobody gave up before. */
static int check_failure(failure f, int32_t ranks, double timeout) {
  crew *c = impatient_crew(ranks, 1, timeout);
  double start = seconds();
  crew_run(c, run_failure, &f);
  double took = seconds() - start;
  const int happened = mailbox_failed(c->mail, f.rank);
  int tells = 1;
  for (int32_t r = 0; r < ranks; r++) tells &= happened || !is_lost(f.status[r]);
  for (int32_t r = 0; r < ranks; r++) {
    const int had_group = c->groups[r] != NULL;
    CHECK(happened || !tells ? is_lost(f.status[r]) : f.status[r] == FMOE_OK,
          "%d ranks, %s: rank %d fails at start %lld, end %lld%s: rank %d got %s", ranks, f.loud ? "loud" : "silent",
          f.rank, (long long)f.starts, (long long)f.ends, f.after_join ? " with a group" : "", r,
          fmoe_status_name(f.status[r]));
    fmoe_group_destroy(c->groups[r]), c->groups[r] = NULL;
    CHECK(mailbox_released(c->mail, r) == had_group, "rank %d: released %d times", r, mailbox_released(c->mail, r));
  }
  CHECK(!tells || took < 4 * timeout + slack, "%s failure took %.3f s", f.loud ? "a loud" : "a silent", took);
  crew_destroy(c);
  return tells;
}

static int check_silent_failure(failure f, int32_t ranks) {
  f.loud = 0;
  int turn = 0;
  while (turn < PATIENCES && !check_failure(f, ranks, patience[turn] / 2)) turn++;
  return CHECK(turn < PATIENCES, "a rank gave up before the failure at start %lld, end %lld", (long long)f.starts,
               (long long)f.ends);
}

/* At every start and at the end of every request, loudly; at some of them silently, since each takes a timeout. */
static void test_failing_transport(void) {
  enum { SILENT_POINTS = 6 };
  static const double loud_timeout = 20;
  long long failures = 0;
  for (int32_t ranks = 2; ranks <= 3; ranks++) {
    failure f = {.s = small_spread(ranks, GATED), .after_join = ranks == 3, .loud = 1};
    crew *c = impatient_crew(ranks, 1, loud_timeout);
    crew_run(c, run_failure, &f); /* without any failure, to count */
    crew_destroy(c);
    const int64_t starts = f.clean.starts, ends = f.clean.ends;
    CHECK(f.status[0] == FMOE_OK && starts > 0 && ends == starts, "a clean run: %lld starts, %lld ends",
          (long long)starts, (long long)ends);
    for (f.rank = 0; f.rank < ranks; f.rank++) {
      f.ends = 0;
      for (f.starts = 1; f.starts <= starts; f.starts++, failures++)
        CHECK(check_failure(f, ranks, loud_timeout), "a rank gave up");
      f.starts = 0;
      for (f.ends = 1; f.ends <= ends; f.ends++, failures++) CHECK(check_failure(f, ranks, loud_timeout), "a rank gave up");
    }
    f.rank = 1, f.ends = 0;
    for (f.starts = 1; f.starts <= starts; f.starts += 1 + starts / SILENT_POINTS) failures += check_silent_failure(f, ranks);
    f.starts = 0;
    for (f.ends = 1; f.ends <= ends; f.ends += 1 + ends / SILENT_POINTS) failures += check_silent_failure(f, ranks);
    spread_destroy(f.s);
  }
  injected("a transport that fails at its i-th call, all i, from joining to reduce, 2 and 3 ranks", failures,
           "FMOE_ERROR_PEER or FMOE_ERROR_TIMEOUT on every rank, in time");
}

#define RUN(test) (begin_test("losses: " #test, 400), test())

int main(void) {
  printf("losses: seed %llu\n", (unsigned long long)seed);
  RUN(test_silent_rank);
  RUN(test_absent_rank);
  RUN(test_leaving_rank);
  RUN(test_dropped_messages);
  RUN(test_failing_transport);
  check_life_goes_on();
  return summary();
}
