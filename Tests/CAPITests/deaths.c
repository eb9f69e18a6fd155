/* deaths.c: several processes when one of them dies.  The others get a status, in time, and go on alone. */
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "seat.h"
#include "sockets.h"

typedef struct death {
  spread *s;
  int32_t victim;
  int place;      /* the call in which it dies */
  int64_t starts; /* at which start of its transport; 0: before the call */
} death;

static const double socket_timeout = 5;

/* One rank's process; returns its exit code, if it lives. */
static int run_process(sockets *wire, int32_t rank, const death *d) {
  const int is_victim = rank == d->victim;
  fmoe_transport transport = sockets_transport(wire, rank);
  fmoe_group_options options = {.struct_size = sizeof options, .threads = 1, .bind = 1,
                                .timeout_seconds = socket_timeout};
  seat at = {.o = d->s->part[rank]};
  fmoe_status status = FMOE_OK;
  EXPECT(FMOE_OK, fmoe_group_create(&transport, &options, &at.group));
  for (int place = CREATE; place <= PLACES && status == FMOE_OK; place++) {
    if (is_victim && place == d->place && !d->starts) raise(SIGKILL);
    if (is_victim && place == d->place) sockets_die(wire, d->starts);
    double start = seconds();
    status = call(&at, place < PLACES ? place : REDUCE);
    if (is_victim && place == d->place) raise(SIGKILL); /* fewer starts than that */
    CHECK(seconds() - start < socket_timeout + slack, "rank %d: %s took %.3f s", rank,
          place < PLACES ? place_names[place] : "the last call", seconds() - start);
    /* In the call of the death a rank may have had all it needed; in the next it has not. */
    CHECK(place < d->place ? status == FMOE_OK : is_lost(status) || (place == d->place && status == FMOE_OK),
          "rank %d, where %d dies in %s: call %d: %s", rank, d->victim, place_names[d->place], place,
          fmoe_status_name(status));
  }
  CHECK(is_broken("a peer died", &at, socket_timeout), "waited in a broken group");
  leave_seat(&at), fmoe_group_destroy(at.group);
  check_life_goes_on();
  return failed != 0;
}

static void check_death(death d) {
  enum { RANKS = 3 };
  sockets *wire = sockets_create(RANKS);
  pid_t children[RANKS];
  fflush(stdout);
  for (int32_t r = 0; r < RANKS; r++) {
    if ((children[r] = fork()) < 0) abort();
    if (children[r]) continue;
    begin_test("deaths: a process whose peer dies", 100);
    int code = run_process(wire, r, &d);
    fflush(stdout);
    _exit(code);
  }
  sockets_close(wire);
  for (int32_t r = 0; r < RANKS; r++) {
    int status;
    if (waitpid(children[r], &status, 0) != children[r]) abort();
    CHECK(r == d.victim ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL
                        : WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "rank %d of %d, where rank %d dies in %s at start %lld: %s %d", r, RANKS, d.victim, place_names[d.place],
          (long long)d.starts, WIFSIGNALED(status) ? "signal" : "exit",
          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
}

static void test_dying_process(void) {
  death d = {.s = small_spread(3, GATED)};
  int deaths = 1;
  check_death((death){.s = d.s, .place = CREATE, .victim = 1});
  for (d.place = FORWARD; d.place <= REDUCE; d.place++)
    for (d.starts = 0; d.starts <= 3; d.starts++) d.victim = (int32_t)(d.place + d.starts) % 3, check_death(d), deaths++;
  injected("a rank's process killed, in every call of a step", deaths,
           "FMOE_ERROR_PEER or FMOE_ERROR_TIMEOUT on the others, in time");
  spread_destroy(d.s);
}

#define RUN(test) (begin_test("deaths: " #test, 400), test())

int main(void) {
  printf("deaths: seed %llu\n", (unsigned long long)seed);
  RUN(test_dying_process); /* it forks, which is best done before there were threads */
  check_life_goes_on();
  return summary();
}
