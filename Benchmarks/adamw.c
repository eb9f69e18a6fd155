/* adamw.c: how much of the memory's bandwidth fmoe_layer_adamw uses.
 *
 *   make bench-adamw                       or: build/adamw [--threads N]
 *
 * Beside it, in turns and on as many threads, a loop that does nothing but move the same bytes: it reads four arrays of
 * the layer's size and writes three of them (four when gradients are zeroed), a multiply and an add each.  STREAM's triad
 * is there for comparison with other machines: a = b + 3 c, 12 bytes counted for each element.  All arrays are larger
 * than any cache; the best of several rounds counts, and the ratio is of the medians. */
#include <fastermoe.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "measure.h"

enum { ROUNDS = 15, MOST = 256 };
static long count; /* floats of each array */
static float *array[4];
static int threads = 2;

static void move(long from, long to) {
  float *restrict p = array[0], *restrict m = array[1], *restrict v = array[2];
  const float *restrict g = array[3];
  for (long i = from; i < to; i++) {
    float x = g[i];
    p[i] += x, m[i] = 0.5f * m[i] + x, v[i] = 0.5f * v[i] + x;
  }
}

static void move_and_zero(long from, long to) {
  float *restrict p = array[0], *restrict m = array[1], *restrict v = array[2], *restrict g = array[3];
  for (long i = from; i < to; i++) {
    float x = g[i];
    p[i] += x, m[i] = 0.5f * m[i] + x, v[i] = 0.5f * v[i] + x, g[i] = 0;
  }
}

static void triad(long from, long to) {
  float *restrict a = array[0];
  const float *restrict b = array[1], *restrict c = array[2];
  for (long i = from; i < to; i++) a[i] = b[i] + 3 * c[i];
}

/* Threads that wait for each round, as the library's do. */
static void (*volatile work)(long from, long to);
static pthread_barrier_t begin, end;

static void *serve(void *index) {
  long i = (long)index;
  for (;;) {
    pthread_barrier_wait(&begin);
    if (!work) return NULL;
    work(count * i / threads, count * (i + 1) / threads);
    pthread_barrier_wait(&end);
  }
}

static double time_of(void (*what)(long, long)) {
  double start = now();
  work = what;
  pthread_barrier_wait(&begin), pthread_barrier_wait(&end);
  return now() - start;
}


static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  if (argc == 3 && !strcmp(argv[1], "--threads")) threads = atoi(argv[2]);
  if (threads < 1 || threads > MOST) return 2;
  fmoe_group_options of_group = {.struct_size = sizeof of_group, .threads = threads};
  fmoe_layer_options of_layer = {.struct_size = sizeof of_layer, .d_model = 1024, .d_hidden = 2048, .experts = 16};
  fmoe_adamw_options how = {.struct_size = sizeof how, .learning_rate = 1e-3, .weight_decay = 0.1};
  fmoe_group *group;
  fmoe_layer *layer;
  CHECK(fmoe_group_create_local(1, &of_group, &group));
  CHECK(fmoe_layer_create(group, &of_layer, &layer));
  fmoe_tensors g = {.struct_size = sizeof g};
  CHECK(fmoe_layer_gradients(layer, &g));
  count = 16 * (2L * 1024 * 2048 + 1024 + 2048) + 16 * 1024;
  for (long i = 0; i < 16L * 1024 * 2048; i++) g.w1[i] = g.w2[i] = (float)(i % 1000) / 1000 - 0.5f;
  for (int a = 0; a < 4; a++) { /* on huge pages, as the library's */
    if (posix_memalign((void **)&array[a], 2 << 20, (size_t)count * sizeof(float))) return 1;
    madvise(array[a], (size_t)count * sizeof(float), MADV_HUGEPAGE);
    memset(array[a], 0, (size_t)count * sizeof(float));
  }
  pthread_t crew[MOST];
  pthread_barrier_init(&begin, NULL, (unsigned)threads + 1), pthread_barrier_init(&end, NULL, (unsigned)threads + 1);
  for (long i = 0; i < threads; i++) pthread_create(&crew[i], NULL, serve, (void *)i);

  enum { ADAMW, MOVE, ZEROING, MOVE_AND_ZERO, TRIAD, KINDS };
  const char *const names[KINDS] = {"fmoe_layer_adamw", "the same bytes alone", "fmoe_layer_adamw, zero_gradients",
                                    "the same bytes alone", "STREAM triad"};
  const double bytes[KINDS] = {28, 28, 32, 32, 12};
  double seconds[KINDS][ROUNDS];
  for (int round = -1; round < ROUNDS; round++) /* the first one takes memory */
    for (int kind = 0; kind < KINDS; kind++) {
      double start = now(), taken;
      how.zero_gradients = kind == ZEROING;
      if (kind == ADAMW || kind == ZEROING) {
        CHECK(fmoe_layer_adamw(layer, &how));
        taken = now() - start;
      } else {
        taken = time_of(kind == MOVE ? move : kind == TRIAD ? triad : move_and_zero);
      }
      if (round >= 0) seconds[kind][round] = taken;
    }
  printf("%.1f million parameters, %d threads\n", (double)count / 1e6, threads);
  for (int kind = 0; kind < KINDS; kind++) {
    qsort(seconds[kind], ROUNDS, sizeof(double), ascending);
    double middle = seconds[kind][ROUNDS / 2];
    printf("%-34s %6.1f ms  %6.1f GB/s", names[kind], middle * 1e3, bytes[kind] * (double)count / middle / 1e9);
    if (kind == MOVE || kind == MOVE_AND_ZERO) printf("  share %.2f", middle / seconds[kind - 1][ROUNDS / 2]);
    printf("\n");
  }
  work = NULL;
  pthread_barrier_wait(&begin);
  for (int i = 0; i < threads; i++) pthread_join(crew[i], NULL);
  for (int a = 0; a < 4; a++) free(array[a]);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}
