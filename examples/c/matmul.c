/* matmul.c: the team, and a matrix product in four steps: cut into blocks, pack, multiply in registers, store. */
#include "matmul.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- team ---------------------------------------------------------------------------------- */
struct team {
  pthread_mutex_t lock;
  pthread_cond_t called, finished;
  void (*task)(const void *job, int index);
  const void *job;
  int next, count; /* indices next..count-1 are still to be taken */
  int running;     /* indices taken and not yet done */
  int leaving;
  int helpers;
  pthread_t helper[];
};

/* Takes indices until none is left; the lock is held, except while a task runs. */
static void work(team *crew) {
  while (crew->next < crew->count) {
    int index = crew->next++;
    crew->running++;
    pthread_mutex_unlock(&crew->lock);
    crew->task(crew->job, index);
    pthread_mutex_lock(&crew->lock);
    crew->running--;
  }
}

static void *help(void *argument) {
  team *crew = argument;
  pthread_mutex_lock(&crew->lock);
  while (!crew->leaving) {
    work(crew);
    if (crew->running == 0) pthread_cond_signal(&crew->finished);
    pthread_cond_wait(&crew->called, &crew->lock); /* asleep, not spinning: the cores belong to whoever has work */
  }
  pthread_mutex_unlock(&crew->lock);
  return NULL;
}

team *team_create(int size) {
  team *crew = calloc(1, sizeof *crew + (size_t)size * sizeof crew->helper[0]);
  if (!crew) return NULL;
  pthread_mutex_init(&crew->lock, NULL);
  pthread_cond_init(&crew->called, NULL);
  pthread_cond_init(&crew->finished, NULL);
  for (; crew->helpers < size - 1; crew->helpers++)
    if (pthread_create(&crew->helper[crew->helpers], NULL, help, crew) != 0) {
      team_destroy(crew);
      return NULL;
    }
  return crew;
}

void team_run(team *crew, int count, void (*task)(const void *job, int index), const void *job) {
  if (!crew || crew->helpers == 0 || count == 1) {
    for (int index = 0; index < count; index++) task(job, index);
    return;
  }
  pthread_mutex_lock(&crew->lock);
  crew->task = task;
  crew->job = job;
  crew->next = 0;
  crew->count = count;
  pthread_cond_broadcast(&crew->called);
  work(crew);
  while (crew->running > 0) pthread_cond_wait(&crew->finished, &crew->lock);
  pthread_mutex_unlock(&crew->lock);
}

void team_destroy(team *crew) {
  if (!crew) return;
  pthread_mutex_lock(&crew->lock);
  crew->leaving = 1;
  pthread_cond_broadcast(&crew->called);
  pthread_mutex_unlock(&crew->lock);
  for (int i = 0; i < crew->helpers; i++) pthread_join(crew->helper[i], NULL);
  pthread_cond_destroy(&crew->finished);
  pthread_cond_destroy(&crew->called);
  pthread_mutex_destroy(&crew->lock);
  free(crew);
}

/* ---- the tile that lives in registers ------------------------------------------------------- */
/* HIGH rows of a times WIDE columns of b: HIGH * 2 sums, enough of them to hide the latency of a multiply-add, few
 * enough to fit beside two vectors of b and one of a. */
#if defined(__AVX512F__)
enum { LANES = 16, HIGH = 8 };
#elif defined(__AVX__)
enum { LANES = 8, HIGH = 6 };
#else
enum { LANES = 4, HIGH = 6 };
#endif
enum { WIDE = 2 * LANES };
enum { DEEP = 256, BROAD = 4 * WIDE }; /* a packed block of b, [DEEP, BROAD], stays in the second cache */
typedef float lanes __attribute__((vector_size(4 * LANES), may_alias));

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* tile [HIGH, WIDE] = a times b, both packed: a [k, HIGH] is stored column after column, b [k, WIDE] row after row. */
static inline void multiply(int k, const float *a, const float *b, lanes tile[HIGH][2]) {
  lanes sum[HIGH][2] = {{{0}}};
  for (int p = 0; p < k; p++) {
    lanes left = ((const lanes *)b)[2 * p], right = ((const lanes *)b)[2 * p + 1];
    for (int i = 0; i < HIGH; i++) {
      sum[i][0] += a[p * HIGH + i] * left;
      sum[i][1] += a[p * HIGH + i] * right;
    }
  }
  for (int i = 0; i < HIGH; i++) tile[i][0] = sum[i][0], tile[i][1] = sum[i][1];
}

/* packed [k, high] = the transpose of from [count, k], with zeros in place of the rows from count to high.  `high` is a
 * constant wherever this is called: the full panels, which are most, become straight code. */
static inline void pack(view from, int count, int k, int high, float *packed) {
  if (count < high) {
    memset(packed, 0, (size_t)k * (size_t)high * sizeof packed[0]);
    for (int p = 0; p < k; p++)
      for (int i = 0; i < count; i++) packed[p * high + i] = from.at[i * from.row + p * from.column];
  } else if (from.row == 1) {
    for (int p = 0; p < k; p++)
      for (int i = 0; i < high; i++) packed[p * high + i] = from.at[i + p * from.column];
  } else {
    for (int p = 0; p < k; p++)
      for (int i = 0; i < high; i++) packed[p * high + i] = from.at[i * from.row + p * from.column];
  }
}

static inline view from(view matrix, int row, int column) { /* the part that starts at (row, column) */
  matrix.at += row * matrix.row + column * matrix.column;
  return matrix;
}

/* ---- matmul -------------------------------------------------------------------------------- */
typedef struct product {
  int m, n, k;
  view a, b;
  int how;
  float *c;
  ptrdiff_t width;
  int high, across; /* a task is a block of c, [high, BROAD]; `across` of them lie side by side */
} product;

/* One block of c: for each slice of k, packs b once, and a as it comes by. */
static void multiply_block(const void *job, int index) {
  const product *whole = job;
  int row = index / whole->across * whole->high, column = index % whole->across * BROAD;
  int m = smaller(whole->high, whole->m - row), n = smaller(BROAD, whole->n - column);
  float packed_a[DEEP * HIGH] __attribute__((aligned(64))), packed_b[DEEP * BROAD] __attribute__((aligned(64)));
  lanes tile[HIGH][2];
  for (int p = 0; p < whole->k; p += DEEP) {
    int deep = smaller(DEEP, whole->k - p), set = whole->how == SET && p == 0;
    for (int j = 0; j < n; j += WIDE)
      pack(turned(from(whole->b, p, column + j)), smaller(WIDE, n - j), deep, WIDE, packed_b + j * deep);
    for (int i = 0; i < m; i += HIGH) {
      pack(from(whole->a, row + i, p), smaller(HIGH, m - i), deep, HIGH, packed_a);
      for (int j = 0; j < n; j += WIDE) {
        multiply(deep, packed_a, packed_b + j * deep, tile);
        int wide = smaller(WIDE, n - j);
        for (int y = 0; y < HIGH && i + y < m; y++) {
          const float *sums = (const float *)tile[y];
          float *out = whole->c + (row + i + y) * whole->width + column + j;
          for (int x = 0; x < wide; x++) out[x] = set ? sums[x] : out[x] + sums[x];
        }
      }
    }
  }
}

void matmul(team *crew, int m, int n, int k, view a, view b, int how, float *c, ptrdiff_t width) {
  int across = (n + BROAD - 1) / BROAD, threads = crew ? crew->helpers + 1 : 1;
  int down = threads > 1 ? (4 * threads + across - 1) / across : 1; /* several blocks per thread, to even out the end */
  int high = (m / down + HIGH - 1) / HIGH * HIGH;
  if (high < 4 * HIGH) high = 4 * HIGH; /* shorter blocks would pack b more often than it is worth */
  product whole = {m, n, k, a, b, how, c, width, high, across};
  team_run(crew, (m + high - 1) / high * across, multiply_block, &whole);
}
