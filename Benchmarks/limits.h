/* limits.h: what this machine can do at most, on so many threads, each on a core of its own.  After measure.h. */
#include <cblas.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void openblas_set_num_threads(int threads);
char *openblas_get_corename(void);

/* An OpenBLAS that is older than the processor takes kernels for the oldest one that it knows, a quarter as fast, and is no
 * yardstick: then the program begins again with those that fit. */
static void take_fitting_openblas(char **argv) {
  const char *fitting = NULL;
#ifdef __x86_64__
  fitting = __builtin_cpu_supports("avx512vl") ? "SkylakeX" : __builtin_cpu_supports("avx2") ? "Haswell" : NULL;
#endif
  if (!fitting || getenv("OPENBLAS_CORETYPE") || strcmp(openblas_get_corename(), "Prescott")) return;
  setenv("OPENBLAS_CORETYPE", fitting, 1);
  execv("/proc/self/exe", argv);
  perror("OPENBLAS_CORETYPE");
}

static float *floats(int64_t count) {
  size_t bytes = ((size_t)count * sizeof(float) + (2u << 20) - 1) & ~(size_t)((2u << 20) - 1);
  float *p = aligned_alloc(2u << 20, bytes);
  if (!p) exit(1);
  madvise(p, bytes, MADV_HUGEPAGE);
  memset(p, 0, bytes);
  return p;
}

static uint64_t state = 1;
static float uniform(void) { /* [-1, 1) */
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)(state >> 40) * 0x1p-23f - 1;
}

#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
#else
typedef float vec __attribute__((vector_size(32)));
#endif

typedef struct probe {
  pthread_t thread;
  int core;
  void *(*run)(void *);
  const float *from;
  int64_t count;
  double result;
} probe;

static void *fma_loop(void *argument) {
  probe *p = argument;
  enum { chains = 12, rounds = 4000000 };
  vec sum[chains], x = {0}, y = {0};
  memset(sum, 0, sizeof sum);
  /* Unknown to the compiler, which would else drop equal chains; not 0, with which sums shrink until they are slow. */
  x += 0.999f, y += (float)(p->core + 1);
  for (int j = 0; j < chains; j++) sum[j] += (float)(j + p->core);
  for (int i = 0; i < rounds; i++)
    for (int j = 0; j < chains; j++) sum[j] = sum[j] * x + y;
  for (int j = 1; j < chains; j++) sum[0] += sum[j];
  p->result = sum[0][0];
  return NULL;
}

static void *read_loop(void *argument) {
  probe *p = argument;
  enum { lanes = sizeof(vec) / sizeof(float) };
  vec sum[8];
  memset(sum, 0, sizeof sum);
  const vec *from = (const vec *)p->from;
  for (int64_t i = 0; i < p->count / lanes; i += 8)
    for (int j = 0; j < 8; j++) sum[j] += from[i + j];
  for (int j = 1; j < 8; j++) sum[0] += sum[j];
  p->result = sum[0][0];
  return NULL;
}

static void *pinned(void *argument) {
  probe *p = argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(p->core, &set);
  sched_setaffinity(0, sizeof set, &set);
  return p->run(p);
}

/* Seconds that the slowest of `threads` needs; the best of three. */
static double timed(void *(*run)(void *), int threads, const float *from, int64_t count) {
  double best = 1e9;
  probe probes[64];
  for (int repeat = 0; repeat < 3; repeat++) {
    double start = now();
    for (int i = 0; i < threads; i++) {
      probes[i] = (probe){0, i, run, from + count / threads * i, count / threads, 0};
      pthread_create(&probes[i].thread, NULL, pinned, &probes[i]);
    }
    for (int i = 0; i < threads; i++) pthread_join(probes[i].thread, NULL);
    if (now() - start < best) best = now() - start;
  }
  return best;
}

static double fma_peak(int threads) {
  return threads * 12.0 * 4000000 * 2 * (sizeof(vec) / sizeof(float)) / timed(fma_loop, threads, NULL, 0);
}

/* Bytes a second that a loop reads which does nothing else, from huge pages or, as a program that asks for nothing gets them,
 * ordinary ones. */
static inline double read_rate(int threads, int ordinary) {
  int64_t count = 64 << 20;
  float *memory = floats(count);
  if (ordinary) { /* given back and touched anew */
    madvise(memory, (size_t)count * sizeof(float), MADV_NOHUGEPAGE);
    madvise(memory, (size_t)count * sizeof(float), MADV_DONTNEED);
    for (int64_t i = 0; i < count; i++) memory[i] = 1;
  }
  double rate = (double)count * sizeof(float) / timed(read_loop, threads, memory, count);
  free(memory);
  return rate;
}
static inline double read_bandwidth(int threads) { return read_rate(threads, 0); }

static float *square[3];
static inline double sgemm_rate(int threads) {
  enum { size = 4096 };
  if (!square[0])
    for (int m = 0; m < 3; m++) {
      square[m] = floats((int64_t)size * size);
      for (int64_t i = 0; i < (int64_t)size * size; i++) square[m][i] = uniform();
    }
  openblas_set_num_threads(threads);
  double start = now();
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, size, size, size, 1, square[0], size, square[1], size, 0,
              square[2], size);
  return 2.0 * size * size * size / (now() - start);
}
