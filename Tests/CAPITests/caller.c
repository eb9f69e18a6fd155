/* caller.c: threads of the host, which may compute in a call: nothing of theirs changes a result, and calls change nothing of
 * theirs. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "batch.h"

static oracle *problem(int32_t activation) {
  uint64_t state = 20220404;
  oracle *o = oracle_create(300, 2, 5, 96, 130, activation);
  fill_float(o->x, o->tokens * o->model, 1, &state);
  fill_float(o->grad_y, o->tokens * o->model, 1, &state);
  for (int64_t i = 0; i < o->tokens * o->model; i += 3) o->grad_y[i] = (float)(o->grad_y[i] * 1e-36);
  fill_values(o, &state);
  return o;
}

static fmoe_group *group_with(int32_t threads) {
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads};
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, &options, &group))) exit(summary());
  return group;
}

/* ---- how the host computes ----------------------------------------------------------------- */

#ifdef __x86_64__
/* Toward zero, without subnormal numbers, and with a trap for all but what is merely not exact. */
static const unsigned odd = 0xE040 | 0x1000;

static void check_mode(const char *call) {
  const unsigned now = _mm_getcsr();
  _mm_setcsr(0x1F80);
  CHECK(now == odd, "%s leaves the floating-point mode as %#x, not %#x", call, now, odd);
  _mm_setcsr(odd);
}

static void test_floating_point_modes(void) {
  oracle *o = problem(FMOE_GELU);
  for (int32_t threads = 1; threads <= 2; threads++) {
    fmoe_group *groups[2];
    fmoe_layer *layers[2];
    batch b[2];
    for (int strange = 0; strange < 2; strange++) {
      const unsigned plain = _mm_getcsr();
      if (strange) _mm_setcsr(odd);
      groups[strange] = group_with(threads); /* whose threads have the mode of their maker */
      if (strange) check_mode("fmoe_group_create_local"), _mm_setcsr(plain);
      layers[strange] = layer_of(groups[strange], o);
      b[strange] = batch_of(o, layers[strange]);
      if (strange) _mm_setcsr(odd);
      begin(&b[strange], layers[strange]);
      if (strange) check_mode("fmoe_gate");
      forward(&b[strange]);
      if (strange) check_mode("fmoe_forward");
      backward(&b[strange]);
      if (strange) check_mode("fmoe_backward"), _mm_setcsr(plain);
      read_gradients(&b[strange], layers[strange]);
    }
    check_bits("the host's floating-point mode does not change bits", &b[1], &b[0]);
    for (int strange = 0; strange < 2; strange++)
      batch_free(&b[strange]), fmoe_layer_destroy(layers[strange]), fmoe_group_destroy(groups[strange]);
  }
  oracle_destroy(o);
}
#endif

/* ---- its place and its stack --------------------------------------------------------------- */

typedef struct trip {
  int32_t threads;
  const oracle *o;
} trip;

static void *travel(void *argument) {
  const trip *t = argument;
  cpu_set_t before, after;
  CHECK(!sched_getaffinity(0, sizeof before, &before), "no affinity");
  fmoe_group *group = group_with(t->threads);
  fmoe_layer *layer = layer_of(group, t->o);
  batch b = run(layer, t->o);
  check_batch("from a thread of its own", &b, t->o), check_gradients("from a thread of its own", &b, t->o);
  batch_free(&b);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  CHECK(!sched_getaffinity(0, sizeof after, &after) && CPU_EQUAL(&before, &after), "the caller was tied to other processors");
  return NULL;
}

enum { STACK = 64 << 10 }; /* half of what the C library of the smallest hosts gives a thread */

static void test_a_thread_with_a_small_stack(void) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  CHECK(!pthread_attr_setstacksize(&attributes, STACK), "no thread has so small a stack");
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++)
    for (int32_t threads = 1; threads <= 3; threads++) {
      oracle *o = problem(activation);
      oracle_gate(o), oracle_run(o);
      trip t = {threads, o};
      pthread_t thread;
      if (pthread_create(&thread, &attributes, travel, &t)) abort();
      pthread_join(thread, NULL);
      oracle_destroy(o);
    }
  pthread_attr_destroy(&attributes);
}

int main(void) {
#ifdef __x86_64__
  test_floating_point_modes();
#endif
  test_a_thread_with_a_small_stack();
  return summary();
}
