/* misuse.c: what a caller can get wrong, and what the library must leave alone.  Options have options.c. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "subject.h"

/* ---- names and words ----------------------------------------------------------------------- */

static void test_names(void) {
  for (int32_t status = -200; status < 300; status++) CHECK(fmoe_status_name(status), "a name for %d", status);
  CHECK(fmoe_status_name(INT32_MIN) && fmoe_status_name(INT32_MAX), "a name for the ends");
  CHECK(strstr(fmoe_status_name(FMOE_ERROR_STAGE), "STAGE"), "%s", fmoe_status_name(FMOE_ERROR_STAGE));
  CHECK(strstr(fmoe_status_name(FMOE_OK), "OK"), "%s", fmoe_status_name(FMOE_OK));
  CHECK(fmoe_version() == (FMOE_VERSION_MAJOR << 16 | FMOE_VERSION_MINOR << 8 | FMOE_VERSION_PATCH),
        "the loaded library is the header's: %x", fmoe_version());
}

static void *fail_elsewhere(void *unused) {
  CHECK(!strcmp(fmoe_last_error(), ""), "a new thread has no failure yet: %s", fmoe_last_error());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(1, NULL, NULL));
  return unused;
}

static void test_last_error(void) {
  char before[1000];
  pthread_t thread;
  CHECK(fmoe_last_error() && !strcmp(fmoe_last_error(), ""), "no failure yet: %s", fmoe_last_error());
  REFUSED(FMOE_ERROR_ARGUMENT, FMOE_ERROR_ARGUMENT, fmoe_group, fmoe_group_create_local(-3, NULL, &out));
  snprintf(before, sizeof before, "%s", fmoe_last_error());
  CHECK(strstr(before, "-3"), "the words name the value: %s", before);
  if (pthread_create(&thread, NULL, fail_elsewhere, NULL)) abort();
  pthread_join(thread, NULL);
  CHECK(!strcmp(before, fmoe_last_error()), "another thread's failure is not ours: %s", fmoe_last_error());
  fmoe_group_destroy(alone());
  CHECK(!strcmp(before, fmoe_last_error()), "success leaves the words: %s", fmoe_last_error());
}

static void test_set_last_error(void) {
  static char endless[100000];
  char words[] = "no communicator";
  CHECK(fmoe_set_last_error(FMOE_ERROR_PEER, words) == FMOE_ERROR_PEER, "the status comes back");
  words[0] = 'x';
  CHECK(!strcmp(fmoe_last_error(), "no communicator"), "words are copied: %s", fmoe_last_error());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(1, NULL, NULL));
  CHECK(!strstr(fmoe_last_error(), "communicator"), "until the next failure: %s", fmoe_last_error());
  CHECK(fmoe_set_last_error(FMOE_ERROR_FILE, NULL) == FMOE_ERROR_FILE && fmoe_last_error(), "no words are fine");
  memset(endless, 'x', sizeof endless - 1); /* longer than any room for words */
  CHECK(fmoe_set_last_error(FMOE_ERROR_PEER, endless) == FMOE_ERROR_PEER, "the status comes back");
  CHECK(!strncmp(fmoe_last_error(), endless, 20), "as much as fits: %s", fmoe_last_error());
}

/* ---- NULL ---------------------------------------------------------------------------------- */

static void test_null(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  fmoe_layer_options options = layer_options();
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  fmoe_routing routing = {.struct_size = sizeof routing};
  fmoe_plan_report report = {.struct_size = sizeof report};
  int64_t counts[E] = {0};
  fmoe_group_destroy(NULL), fmoe_layer_destroy(NULL), fmoe_pass_destroy(NULL), fmoe_cluster_destroy(NULL);
  EXPECT(argument, fmoe_group_create_local(1, NULL, NULL));
  REFUSED(argument, argument, fmoe_group, fmoe_group_create(NULL, NULL, &out));
  EXPECT(argument, fmoe_group_create(NULL, NULL, NULL));
  EXPECT(argument, fmoe_group_create_local(2, NULL, NULL));
  EXPECT(argument, fmoe_group_calibrate(NULL, 1));
  REFUSED(argument, argument, fmoe_layer, fmoe_layer_create(NULL, &options, &out));
  REFUSED(argument, argument, fmoe_layer, fmoe_layer_create(group, NULL, &out));
  EXPECT(argument, fmoe_layer_create(group, &options, NULL));
  EXPECT(argument, fmoe_layer_values(NULL, &tensors));
  EXPECT(argument, fmoe_layer_values(layer, NULL));
  EXPECT(argument, fmoe_layer_gradients(NULL, &tensors));
  EXPECT(argument, fmoe_layer_gradients(layer, NULL));
  EXPECT(argument, fmoe_layer_zero_gradients(NULL));
  EXPECT(argument, fmoe_layer_begin_gradients(NULL));
  EXPECT(argument, fmoe_layer_reduce_gradients(NULL));
  const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 1};
  EXPECT(argument, fmoe_layer_adamw(NULL, &adamw));
  EXPECT(argument, fmoe_layer_adamw(layer, NULL));
  EXPECT(argument, fmoe_layer_save(NULL, "x"));
  EXPECT(argument, fmoe_layer_save(layer, NULL));
  EXPECT(argument, fmoe_layer_load(NULL, "x"));
  EXPECT(argument, fmoe_layer_load(layer, NULL));
  REFUSED(argument, argument, fmoe_pass, fmoe_gate(NULL, tokens, N, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_gate(layer, NULL, N, &out));
  EXPECT(argument, fmoe_gate(layer, tokens, N, NULL));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(NULL, tokens, N, choices, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, NULL, N, choices, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, NULL, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, choices, NULL, &out));
  EXPECT(argument, fmoe_route(layer, tokens, N, choices, weights, NULL));
  EXPECT(argument, fmoe_pass_routing(NULL, &routing));
  EXPECT(argument, fmoe_plan(NULL, NULL, NULL));
  EXPECT(argument, fmoe_plan(NULL, NULL, &report));
  EXPECT(argument, fmoe_forward(NULL, output));
  EXPECT(argument, fmoe_backward(NULL, grad_output, grad_tokens, NULL));
  EXPECT(argument, fmoe_pass_write_timeline(NULL, "x"));
  REFUSED(argument, argument, fmoe_cluster, fmoe_cluster_of_group(NULL, &out));
  EXPECT(argument, fmoe_cluster_of_group(group, NULL));
  REFUSED(FMOE_ERROR_STAGE, FMOE_ERROR_STAGE, fmoe_cluster, fmoe_cluster_of_group(group, &out)); /* nothing was measured */
  REFUSED(argument, argument, fmoe_cluster, fmoe_cluster_read(NULL, &out));
  EXPECT(argument, fmoe_cluster_read("x", NULL));
  EXPECT(argument, fmoe_cluster_write(NULL, "x"));
  EXPECT(argument, fmoe_cluster_plan(NULL, &options, counts, NULL, &report));
  EXPECT(argument, fmoe_cluster_plan(NULL, NULL, NULL, NULL, NULL));
  fmoe_pass *pass = gated(layer);
  EXPECT(argument, fmoe_pass_routing(pass, NULL));
  EXPECT(argument, fmoe_pass_write_timeline(pass, NULL));
  EXPECT(argument, fmoe_forward(pass, NULL));
  EXPECT(FMOE_OK, fmoe_forward(pass, output)); /* a wrong call has changed nothing */
  EXPECT(argument, fmoe_backward(pass, NULL, grad_tokens, NULL));
  EXPECT(argument, fmoe_backward(pass, grad_output, NULL, NULL));
  EXPECT(argument, fmoe_backward(pass, grad_output, grad_tokens, grad_weights)); /* only for fmoe_route */
  EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
  fmoe_pass_destroy(pass);
  for (int routed = 0; routed < 2; routed++) { /* a rank without tokens has no arrays to show */
    if (routed) EXPECT(FMOE_OK, fmoe_route(layer, NULL, 0, NULL, NULL, &pass));
    else EXPECT(FMOE_OK, fmoe_gate(layer, NULL, 0, &pass));
    EXPECT(FMOE_OK, fmoe_forward(pass, NULL));
    EXPECT(FMOE_OK, fmoe_backward(pass, NULL, NULL, NULL));
    fmoe_pass_destroy(pass);
  }
  check_works(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- several seats in one process; what they do together is for workers.c, faults.c, losses.c and deaths.c ---- */

static void test_local_seats(void) {
  fmoe_group *nobody = (fmoe_group *)(void *)&untouched, *seats[3] = {nobody, nobody, nobody};
  fmoe_group_options wrong = group_options();
  wrong.threads = -1;
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(2, &wrong, seats));
  wrong = group_options(), wrong.topology = "pack:x";
  EXPECT_EITHER(FMOE_ERROR_FILE, FMOE_ERROR_TOPOLOGY, fmoe_group_create_local(2, &wrong, seats));
  CHECK(seats[0] == nobody && seats[1] == nobody, "no seat is written");
  if (limited) { /* more threads than fit: the ranks that were there go again */
    wrong = group_options(), wrong.threads = 2048;
    EXPECT_EITHER(FMOE_ERROR_MEMORY, FMOE_ERROR_ARGUMENT, fmoe_group_create_local(2, &wrong, seats));
    CHECK(seats[0] == nobody && seats[1] == nobody, "no seat is written");
  }
  EXPECT(FMOE_OK, fmoe_group_create_local(2, NULL, seats));
  CHECK(seats[0] != seats[1] && seats[0] != nobody && seats[1] != nobody && seats[2] == nobody, "two seats, no more");
  fmoe_group_destroy(seats[1]), fmoe_group_destroy(seats[0]);
}

/* ---- batches ------------------------------------------------------------------------------- */

static void test_batches(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, memory = FMOE_ERROR_MEMORY;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  static const int64_t negative[] = {-1, INT64_MIN};
  for (int i = 0; i < 2; i++) {
    REFUSED(argument, argument, fmoe_pass, fmoe_gate(layer, tokens, negative[i], &out));
    REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, negative[i], choices, weights, &out));
  }
  for (int bits = 38; bits < 64; bits++) { /* the library must find out before it reads the tokens */
    int64_t n = (int64_t)(UINT64_C(1) << bits) - (bits == 63);
    REFUSED(argument, memory, fmoe_pass, fmoe_gate(layer, tokens, n, &out));
    REFUSED(argument, memory, fmoe_pass, fmoe_route(layer, tokens, n, choices, weights, &out));
  }
  static const int32_t bad_choices[] = {-2, E, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    choices[N * K - 1] = bad_choices[i];
    REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, choices, weights, &out));
  }
  choices[N * K - 1] = -1;
  check_works(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* Calls in any order on a few passes; what each may answer follows from three words of state. */
static void test_stages(void) {
  enum { PASSES = 4, STEPS = 600 };
  struct { fmoe_pass *pass; int planned, ran, finished; } seats[PASSES] = {{NULL, 0, 0, 0}};
  uint64_t state = seed;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  for (int step = 0; step < STEPS; step++) {
    int s = (int)(uniform(&state) * PASSES), action = (int)(uniform(&state) * 6);
    int64_t n = (int64_t)(uniform(&state) * (N + 1));
    fmoe_pass *pass = seats[s].pass;
    fmoe_routing routing = {.struct_size = sizeof routing};
    int planned = seats[s].planned, ran = seats[s].ran, finished = seats[s].finished;
    if (!pass) {
      memset(&seats[s], 0, sizeof seats[s]);
      if (action % 2) EXPECT(FMOE_OK, fmoe_gate(layer, tokens, n, &seats[s].pass));
      else EXPECT(FMOE_OK, fmoe_route(layer, tokens, n, choices, weights, &seats[s].pass));
    } else if (action == 0) {
      EXPECT(planned || ran ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_plan(pass, NULL, NULL));
      seats[s].planned = 1;
    } else if (action == 1 || action == 2) {
      EXPECT(ran ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_forward(pass, output));
      seats[s].ran = 1;
    } else if (action == 3) {
      EXPECT(!ran || finished ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
      seats[s].finished = ran;
    } else if (action == 4) {
      EXPECT(FMOE_OK, fmoe_pass_routing(pass, &routing));
    } else {
      fmoe_pass_destroy(pass);
      seats[s].pass = NULL;
    }
  }
  for (int s = 0; s < PASSES; s++) fmoe_pass_destroy(seats[s].pass);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

static void test_destroy_orders(void) {
  static const char orders[6][4] = {"glp", "gpl", "lgp", "lpg", "pgl", "plg"};
  for (int order = 0; order < 6; order++)
    for (int stage = 0; stage < 4; stage++) {
      fmoe_group *group = alone();
      fmoe_layer *layer = layer_with(group, layer_options());
      fmoe_pass *pass = gated(layer);
      if (stage > 0) EXPECT(FMOE_OK, fmoe_plan(pass, NULL, NULL));
      if (stage > 1) EXPECT(FMOE_OK, fmoe_forward(pass, output));
      if (stage > 2) EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
      for (int i = 0; i < 3; i++)
        if (orders[order][i] == 'g') fmoe_group_destroy(group);
        else if (orders[order][i] == 'l') fmoe_layer_destroy(layer);
        else { /* a pass under way may go on when group and layer are destroyed */
          if (stage < 2) EXPECT(FMOE_OK, fmoe_forward(pass, output));
          if (stage == 1 || stage == 2) EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
          fmoe_pass_destroy(pass);
        }
    }
}

/* ---- tokens that are no numbers ------------------------------------------------------------ */

enum { BIG_N = 40, BIG_D = 17, BIG_E = 4, BIG_H = 23 };

static void run_batch(fmoe_layer *layer, int64_t n, const float *x, const int32_t *given, float *y) {
  static float ones[BIG_N * BIG_D], grad[BIG_N * BIG_D], given_weights[BIG_N * K];
  fmoe_pass *pass = NULL;
  for (int i = 0; i < BIG_N * BIG_D; i++) ones[i] = 1;
  for (int s = 0; s < BIG_N * K; s++) given_weights[s] = 0.5f;
  if (given) EXPECT(FMOE_OK, fmoe_route(layer, x, n, given, given_weights, &pass));
  else EXPECT(FMOE_OK, fmoe_gate(layer, x, n, &pass));
  EXPECT(FMOE_OK, fmoe_forward(pass, y));
  EXPECT(FMOE_OK, fmoe_backward(pass, ones, grad, NULL)); /* whatever it gives, it comes back */
  fmoe_pass_destroy(pass);
}

/* One sick token among others gives a row that is no numbers; the others' rows are those of a run without it. */
static void test_non_finite_tokens(void) {
  static const float values[] = {NAN, INFINITY, -INFINITY};
  static float x[BIG_N * BIG_D], y[BIG_N * BIG_D], x_without[BIG_N * BIG_D], y_without[BIG_N * BIG_D];
  static int32_t given[BIG_N * K], given_without[BIG_N * K];
  enum { SICK = 7, BEFORE = SICK * BIG_D, AFTER = (BIG_N - 1 - SICK) * BIG_D };
  uint64_t state = seed;
  fmoe_group *group = alone();
  for (int s = 0; s < BIG_N * K; s++) given[s] = (int32_t)(uniform(&state) * BIG_E);
  memcpy(given_without, given, SICK * K * sizeof *given);
  memcpy(given_without + SICK * K, given + SICK * K + K, (BIG_N - 1 - SICK) * K * sizeof *given);
  for (int i = 0; i < BIG_N * BIG_D; i++) x[i] = (float)(2 * uniform(&state) - 1);
  memcpy(x_without, x, BEFORE * sizeof *x);
  memcpy(x_without + BEFORE, x + BEFORE + BIG_D, AFTER * sizeof *x);
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++) {
    fmoe_layer_options options = layer_options();
    options.d_model = BIG_D, options.d_hidden = BIG_H, options.experts = BIG_E, options.activation = activation;
    fmoe_layer *layer = layer_with(group, options);
    for (int routed = 0; routed < 2; routed++)
      for (int v = 0; v < 3; v++) {
        int finite = 1;
        x[BEFORE + 3] = values[v];
        run_batch(layer, BIG_N, x, routed ? given : NULL, y);
        run_batch(layer, BIG_N - 1, x_without, routed ? given_without : NULL, y_without);
        for (int c = 0; c < BIG_D; c++) finite &= isfinite(y[BEFORE + c]) != 0;
        CHECK(!finite, "activation %d, routed %d: %g in a token gives a finite row", activation, routed, values[v]);
        CHECK(!memcmp(y, y_without, BEFORE * sizeof *y) &&
                  !memcmp(y + BEFORE + BIG_D, y_without + BEFORE, AFTER * sizeof *y),
              "activation %d, routed %d: %g in a token changes the rows of others", activation, routed, values[v]);
      }
    fmoe_layer_destroy(layer);
  }
  fmoe_group_destroy(group);
}

/* ---- the process around it ----------------------------------------------------------------- */

static void test_good_neighbour(void) {
  struct sigaction before[65], after;
  cpu_set_t cores, cores_after;
  fmoe_group_options o = group_options();
  for (int s = 1; s < 65; s++) memset(&before[s], 0, sizeof after), sigaction(s, NULL, &before[s]);
  sched_getaffinity(0, sizeof cores, &cores);
  check_group(NULL);
  for (o.threads = 1; o.threads < 4; o.threads++) check_group(&o);
  fmoe_group *group = alone(); /* and one that lives */
  sched_getaffinity(0, sizeof cores_after, &cores_after);
  CHECK(CPU_EQUAL(&cores, &cores_after), "the caller's thread keeps its cores");
  for (int s = 1; s < 65; s++)
    if (!sigaction(s, NULL, &after)) CHECK(after.sa_handler == before[s].sa_handler, "signal %d is the host's", s);
  fmoe_group_destroy(group);
}

int main(int count, char **arguments) {
  subject_begin("misuse", count, arguments);
  test_last_error(); /* first: before any failure */
  test_names();
  test_set_last_error();
  test_null();
  test_local_seats();
  test_batches();
  test_stages();
  test_destroy_orders();
  test_non_finite_tokens();
  test_good_neighbour();
  return subject_end();
}
