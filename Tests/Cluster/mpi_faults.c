/* mpi_faults.c: what becomes of a group whose last rank goes missing, for mpirun -n 3.
 *   late   it sleeps beyond the timeout, before each kind of call; then all of them take new seats and go on
 *   stop   it is stopped for good in the middle of a step; the others notice, and leave with code 42
 *   kill   it is killed; mpirun must end the others, which would wait for ever */
#include <fastermoe_mpi.h>
#include <math.h>
#include <signal.h>
#include <time.h>

#include "check.h"

enum { TOKENS = 300, MODEL = 128, HIDDEN = 16, TOP_K = 2 }; /* some 100 KiB from each rank to each */
enum { LAYER, GATE, FORWARD, BACKWARD, REDUCE, CALLS };
static const char *call_names[CALLS] = {"layer_create", "gate", "forward", "backward", "reduce_gradients"};
/* Others may compute on the same cores: what must end within the timeout has this many seconds more. */
static const double timeout = 0.5, slack = 2;
static float x[TOKENS * MODEL], y[TOKENS * MODEL], grad_x[TOKENS * MODEL];
static int rank, ranks;

typedef struct seat {
  fmoe_group *group;
  fmoe_layer *layer;
  fmoe_pass *pass;
} seat;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void rest(double seconds) {
  struct timespec time = {(time_t)seconds, (long)(1e9 * (seconds - floor(seconds)))};
  nanosleep(&time, NULL);
}

static seat take_seat(double limit) {
  fmoe_group_options options = {.struct_size = sizeof options, .threads = 1, .bind = 1, .timeout_seconds = limit};
  seat s = {NULL, NULL, NULL};
  if (!EXPECT(FMOE_OK, fmoe_group_create_mpi(MPI_COMM_WORLD, &options, &s.group))) MPI_Abort(MPI_COMM_WORLD, 1);
  return s;
}

static void leave(seat *s) {
  fmoe_pass_destroy(s->pass), fmoe_layer_destroy(s->layer), fmoe_group_destroy(s->group);
}

static fmoe_status make(seat *s, int call) {
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = MODEL, options.d_hidden = HIDDEN, options.experts = 2 * ranks, options.top_k = TOP_K;
  switch (call) {
    case LAYER: return fmoe_layer_create(s->group, &options, &s->layer);
    case GATE: return fmoe_gate(s->layer, x, TOKENS, &s->pass);
    case FORWARD: return fmoe_forward(s->pass, y);
    case BACKWARD: return fmoe_backward(s->pass, y, grad_x, NULL);
    default: return fmoe_layer_reduce_gradients(s->layer);
  }
}

static void make_until(seat *s, int call) {
  for (int before = 0; before < call; before++) EXPECT(FMOE_OK, make(s, before));
}

/* The call that somebody is missing from, and one more, which is not waited for. */
static void check_missed(seat *s, int call) {
  double start = now();
  EXPECT(FMOE_ERROR_TIMEOUT, make(s, call));
  CHECK(now() - start < timeout + slack, "%s came back after %.1f s", call_names[call], now() - start);
  seat again = {.group = s->group};
  start = now();
  CHECK(make(&again, LAYER) != FMOE_OK && !again.layer, "the group is broken after %s", call_names[call]);
  CHECK(now() - start < timeout, "a broken group said so after %.1f s", now() - start);
}

/* Code 42, if all went well: not by MPI_Finalize, since MPI still holds messages that nobody will take. */
static int end(MPI_Comm present) {
  int mine[2] = {passed, failed}, sums[2];
  MPI_Allreduce(mine, sums, 2, MPI_INT, MPI_SUM, present);
  if (rank == 0) printf("%d passed, %d failed\n", sums[0], sums[1]), fflush(stdout);
  if (rank == 0) MPI_Abort(MPI_COMM_WORLD, sums[1] ? 1 : 42);
  rest(60);
  return 1;
}

static int late(void) {
  for (int call = 0; call < CALLS; call++) {
    seat s = take_seat(timeout);
    make_until(&s, call);
    if (rank < ranks - 1) check_missed(&s, call);
    else rest(2 * timeout + 0.2), CHECK(make(&s, call) != FMOE_OK, "%s, too late, alone", call_names[call]);
    leave(&s);
  }
  seat s = take_seat(60);
  make_until(&s, CALLS);
  leave(&s);
  return end(MPI_COMM_WORLD);
}

static int stop(void) {
  MPI_Comm present;
  MPI_Comm_split(MPI_COMM_WORLD, rank == ranks - 1, rank, &present);
  seat s = take_seat(timeout);
  make_until(&s, BACKWARD);
  if (rank == ranks - 1) raise(SIGSTOP);
  check_missed(&s, BACKWARD);
  leave(&s);
  return end(present);
}

static int killed(void) {
  seat s = take_seat(0);
  make_until(&s, FORWARD);
  if (rank == ranks - 1) raise(SIGKILL);
  printf("forward came back with %s\n", fmoe_status_name(make(&s, FORWARD)));
  return 1;
}

int main(int count, char **arguments) {
  int level;
  MPI_Init_thread(&count, &arguments, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  for (int i = 0; i < TOKENS * MODEL; i++) x[i] = sinf(0.37f * (float)(i + rank));
  const char *mode = count > 1 ? arguments[1] : "";
  return !strcmp(mode, "late") ? late() : !strcmp(mode, "stop") ? stop() : !strcmp(mode, "kill") ? killed() : 2;
}
