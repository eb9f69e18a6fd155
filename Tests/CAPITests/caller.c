/* caller.c: threads of the host, which may compute in a call: nothing of theirs changes a result, and calls change nothing of
 * theirs.  It runs where it stands: a cluster is a file of the repository.
 * `caller small` is for valgrind: it leaves out floating-point modes, of which valgrind emulates some and no traps, and small
 * stacks, where a step by every gate and activation would take it minutes. */
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "alone.h"

static int small;

/* Every third gradient so small that what follows from it is below the normal numbers. */
static oracle *faint_problem(int32_t activation) {
  oracle *o = problem(300, 2, 5, 96, 130, activation);
  for (int64_t i = 0; i < o->tokens * o->model; i += 3) o->grad_y[i] = (float)(o->grad_y[i] * 1e-36);
  return o;
}

/* ---- how the host computes ----------------------------------------------------------------- */

static const int traps = FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW | FE_UNDERFLOW;

/* Toward zero, without subnormal numbers where that can be had, and with a trap for all but what is merely not exact. */
static void be_odd(void) {
  fesetenv(FE_DFL_ENV);
  fesetround(FE_TOWARDZERO);
#ifdef __x86_64__
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
  feenableexcept(traps);
}

static void be_plain(void) { fesetenv(FE_DFL_ENV); }

static void check_odd(const char *call) {
  int same = fegetround() == FE_TOWARDZERO && fegetexcept() == traps && !fetestexcept(FE_ALL_EXCEPT);
#ifdef __x86_64__
  same = same && (_mm_getcsr() & 0x8040) == 0x8040;
#endif
  be_plain();
  CHECK(same, "%s leaves another floating-point mode, or flags", call);
  be_odd();
}

static void test_training_in_any_mode(void) {
  oracle *o = faint_problem(FMOE_GELU);
  for (int32_t threads = 1; threads <= 2; threads++) {
    fmoe_group *groups[2];
    fmoe_layer *layers[2];
    batch b[2];
    for (int odd = 0; odd < 2; odd++) {
      if (odd) be_odd();
      groups[odd] = pinned_group_with(threads); /* whose threads have the mode of their maker */
      if (odd) check_odd("fmoe_group_create_local"), be_plain();
      layers[odd] = layer_of(groups[odd], o);
      b[odd] = batch_of(o, layers[odd]);
      if (odd) be_odd();
      begin(&b[odd], layers[odd]);
      if (odd) check_odd("fmoe_gate");
      forward(&b[odd]);
      if (odd) check_odd("fmoe_forward");
      backward(&b[odd]);
      if (odd) check_odd("fmoe_backward"), be_plain();
      read_gradients(&b[odd], layers[odd]);
    }
    check_bits("the host's floating-point mode does not change bits", &b[1], &b[0]);
    for (int odd = 0; odd < 2; odd++) batch_free(&b[odd]), fmoe_layer_destroy(layers[odd]), fmoe_group_destroy(groups[odd]);
  }
  oracle_destroy(o);
}

/* Numbers of a file are read alike, and plans predicted. */
static void test_planning_in_any_mode(void) {
  fmoe_layer_options layer = FMOE_LAYER_OPTIONS_INIT;
  layer.d_model = 1000, layer.d_hidden = 3000, layer.experts = 16;
  int64_t counts[16 * 16];
  for (int i = 0; i < 16 * 16; i++) counts[i] = i % 16 ? 100 + i % 7 : 900;
  fmoe_plan_report reports[2] = {{.struct_size = sizeof reports[0]}, {.struct_size = sizeof reports[0]}};
  double shares[2] = {0};
  for (int odd = 0; odd < 2; odd++) {
    fmoe_cluster *cluster = NULL;
    if (odd) be_odd();
    EXPECT(FMOE_OK, fmoe_cluster_read("../../Benchmarks/paper/johnny.json", &cluster));
    if (odd) check_odd("fmoe_cluster_read");
    EXPECT(FMOE_OK, fmoe_cluster_plan(cluster, &layer, counts, NULL, &reports[odd]));
    if (odd) check_odd("fmoe_cluster_plan");
    shares[odd] = fmoe_cluster_remote_share(cluster);
    if (odd) check_odd("fmoe_cluster_remote_share"), be_plain();
    fmoe_cluster_destroy(cluster);
  }
  CHECK(!memcmp(&reports[0], &reports[1], sizeof reports[0]), "%.17g and %.17g s", reports[0].seconds_planned,
        reports[1].seconds_planned);
  CHECK(shares[0] == shares[1] && shares[0] > 0, "%.17g and %.17g", shares[0], shares[1]);
}

/* ---- its place and its stack --------------------------------------------------------------- */

typedef struct trip {
  int32_t threads;
  const oracle *o;
} trip;

static void *travel(void *argument) {
  const trip *t = argument;
  cpu_set_t before, after;
  sigset_t mask, left;
  sigemptyset(&mask), sigaddset(&mask, SIGUSR1);
  CHECK(!sched_getaffinity(0, sizeof before, &before) && !pthread_sigmask(SIG_SETMASK, &mask, NULL), "no affinity, no mask");
  fmoe_group *group = pinned_group_with(t->threads);
  fmoe_layer *layer = layer_of(group, t->o);
  batch b = run(layer, t->o);
  check_batch("from a thread of its own", &b, t->o), check_gradients("from a thread of its own", &b, t->o);
  batch_free(&b);
  fmoe_layer_destroy(layer);
  for (int32_t gate = FMOE_GATE_NOISY; gate <= FMOE_GATE_SWIPE; gate++) {
    const int one = gate == FMOE_GATE_SWITCH || gate == FMOE_GATE_BASE;
    fmoe_layer_options options = {.struct_size = sizeof options, .d_model = t->o->model, .d_hidden = 70, .experts = 60,
                                  .top_k = one ? 1 : 2, .gate = gate, .activation = t->o->activation};
    fmoe_pass *pass = NULL;
    float *y = calloc((size_t)(t->o->tokens * t->o->model), sizeof *y), *x = calloc((size_t)(t->o->tokens * t->o->model), sizeof *x);
    if (!x || !y) abort();
    EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer));
    EXPECT(FMOE_OK, fmoe_gate(layer, x, t->o->tokens, &pass));
    EXPECT(FMOE_OK, fmoe_forward(pass, y));
    EXPECT(FMOE_OK, fmoe_backward(pass, y, x, NULL));
    fmoe_pass_destroy(pass), fmoe_layer_destroy(layer), free(x), free(y);
  }
  fmoe_group_destroy(group);
  CHECK(!sched_getaffinity(0, sizeof after, &after) && CPU_EQUAL(&before, &after), "the caller was tied to other processors");
  CHECK(!pthread_sigmask(SIG_SETMASK, NULL, &left) && sigismember(&left, SIGUSR1) == 1 && !sigismember(&left, SIGUSR2) &&
            !sigismember(&left, SIGTERM), "the caller's signal mask was changed");
  return NULL;
}

enum { STACK = 64 << 10 }; /* half of what the C library of the smallest hosts gives a thread */

static void test_a_thread_with_a_small_stack(void) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  CHECK(!pthread_attr_setstacksize(&attributes, STACK), "no thread has so small a stack");
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++)
    for (int32_t threads = 1; threads <= 3; threads++) {
      oracle *o = faint_problem(activation);
      oracle_gate(o), oracle_run(o);
      trip t = {threads, o};
      pthread_t thread;
      if (pthread_create(&thread, &attributes, travel, &t)) abort();
      pthread_join(thread, NULL);
      oracle_destroy(o);
    }
  pthread_attr_destroy(&attributes);
}

/* ---- several at once ------------------------------------------------------------------------ */

typedef struct player {
  fmoe_layer *layer;
  batch wanted;
} player;

static void *run_often(void *argument) {
  const player *p = argument;
  for (int i = 0; i < 5; i++) {
    batch b = run(p->layer, p->wanted.o);
    check_bits("threads of the host do not disturb each other", &b, &p->wanted);
    batch_free(&b);
  }
  return NULL;
}

/* Two host threads, each with a layer of its own: first of two groups, then of one. */
static void test_two_threads_at_once(void) {
  oracle *o[2] = {crowded_problem(small ? 20 : 200, 2, small ? 6 : 64, small ? 5 : 96, FMOE_GELU),
                  problem(small ? 6 : 90, 4, 5, 37, 53, FMOE_SWIGLU)};
  for (int groups = 2; groups > 0; groups--) {
    fmoe_group *group[2] = {group_with(2), group_with(2)};
    player players[2];
    pthread_t threads[2];
    for (int t = 0; t < 2; t++)
      players[t].layer = layer_of(group[t % groups], o[t]), players[t].wanted = run_alone(o[t], 2);
    for (int t = 0; t < 2; t++)
      if (pthread_create(&threads[t], NULL, run_often, &players[t])) abort();
    for (int t = 0; t < 2; t++) pthread_join(threads[t], NULL);
    for (int t = 0; t < 2; t++) batch_free(&players[t].wanted), fmoe_layer_destroy(players[t].layer);
    for (int t = 0; t < 2; t++) fmoe_group_destroy(group[t]);
  }
  oracle_destroy(o[0]), oracle_destroy(o[1]);
}

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  printf("caller: seed %llu\n", (unsigned long long)seed);
  if (!small) {
    test_training_in_any_mode();
    test_planning_in_any_mode();
    test_a_thread_with_a_small_stack();
  }
  test_two_threads_at_once();
  return summary();
}
