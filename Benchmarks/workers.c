/* workers: what spreading a layer over the workers of one process costs, against one worker with all the threads.
 *
 *   workers [--shapes AB] [--workers W] [--repeats N] [--json FILE]
 *
 * W workers of one thread and one worker of W threads train the same layer on the same tokens, in turns: zero_gradients,
 * gate, forward, backward, reduce_gradients. W defaults to the number of cores. A ratio of 1 means that dispatch between
 * workers costs nothing; the busiest worker's share of rows over the mean says how much the routing itself allows. */
#define _GNU_SOURCE
#include <fastermoe.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "measure.h"

typedef struct shape {
  char name;
  int64_t n, d, h, E;
  int k;
} shape;
static const shape shapes[] = {{'A', 2048, 512, 2048, 8, 2}, {'B', 4096, 1024, 2048, 16, 2}, {'E', 8192, 256, 512, 32, 1}};

typedef struct rank {
  pthread_t thread;
  const shape *s;
  fmoe_group *group;
  fmoe_layer *layer;
  float *x, *y, *dy, *dx; /* [n, d], its part of the batch */
  int64_t n;
  int64_t rows[64]; /* that its tokens sent to each expert */
} rank;

static void *create(void *argument) {
  rank *r = argument;
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = r->s->d, options.d_hidden = r->s->h, options.experts = r->s->E, options.top_k = r->s->k;
  options.activation = FMOE_GELU_TANH, options.seed = 1;
  CHECK(fmoe_layer_create(r->group, &options, &r->layer));
  return NULL;
}

static void *step(void *argument) {
  rank *r = argument;
  fmoe_pass *pass;
  fmoe_routing routing = {.struct_size = sizeof routing};
  CHECK(fmoe_layer_zero_gradients(r->layer));
  CHECK(fmoe_gate(r->layer, r->x, r->n, &pass));
  CHECK(fmoe_pass_routing(pass, &routing));
  memcpy(r->rows, routing.counts, (size_t)r->s->E * sizeof *r->rows);
  CHECK(fmoe_forward(pass, r->y));
  CHECK(fmoe_backward(pass, r->dy, r->dx, NULL));
  fmoe_pass_destroy(pass);
  CHECK(fmoe_layer_reduce_gradients(r->layer));
  return NULL;
}

/* Seconds until all ranks have done it, each on a thread of its own. */
static double all(rank *ranks, int count, void *(*what)(void *)) {
  double begin = now();
  for (int i = 0; i < count; i++)
    if (pthread_create(&ranks[i].thread, NULL, what, &ranks[i])) exit(1);
  for (int i = 0; i < count; i++) pthread_join(ranks[i].thread, NULL);
  return now() - begin;
}

/* `count` ranks of `threads` threads, each with its part of the batch `arrays`: x, y, dy, dx. */
static void start(rank *ranks, int count, int threads, const shape *s, float *arrays[4]) {
  fmoe_group *groups[64];
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads};
  CHECK(fmoe_group_create_local(count, &options, groups));
  for (int i = 0; i < count; i++) {
    int64_t first = s->n * i / count, n = s->n * (i + 1) / count - first;
    float *part[4];
    for (int a = 0; a < 4; a++) part[a] = arrays[a] + first * s->d;
    ranks[i] = (rank){.s = s, .group = groups[i], .x = part[0], .y = part[1], .dy = part[2], .dx = part[3], .n = n};
  }
  all(ranks, count, create);
  for (int warm = 0; warm < 2; warm++) all(ranks, count, step);
}

static void stop(rank *ranks, int count) {
  for (int i = 0; i < count; i++) fmoe_layer_destroy(ranks[i].layer), fmoe_group_destroy(ranks[i].group);
}

/* Rows of the worker that computes most, over the mean. */
static double imbalance(const rank *ranks, int count) {
  int64_t most = 0, sum = 0, E = ranks[0].s->E;
  for (int owner = 0; owner < count; owner++) {
    int64_t rows = 0;
    for (int64_t e = E / count * owner; e < E / count * (owner + 1); e++)
      for (int i = 0; i < count; i++) rows += ranks[i].rows[e];
    sum += rows;
    if (rows > most) most = rows;
  }
  return (double)most * count / (double)sum;
}

int main(int argc, char **argv) {
  const char *names = "AB", *json = NULL;
  int workers = (int)sysconf(_SC_NPROCESSORS_ONLN), repeats = 15;
  for (int i = 1; i < argc; i += 2) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (value && !strcmp(argv[i], "--shapes")) names = value;
    else if (value && !strcmp(argv[i], "--workers")) workers = atoi(value);
    else if (value && !strcmp(argv[i], "--repeats")) repeats = atoi(value);
    else if (value && !strcmp(argv[i], "--json")) json = value;
    else return fprintf(stderr, "usage: workers [--shapes ABE] [--workers W] [--repeats N] [--json FILE]\n"), 2;
  }
  if (workers < 1 || workers > 64 || repeats < 1 || repeats > 1000) return fprintf(stderr, "workers: out of range\n"), 2;
  FILE *out = json ? fopen(json, "w") : NULL;
  if (json && !out) return perror(json), 1;
  if (out) fprintf(out, "{\"rows\": [");
  printf("shape  n     d     h     E   k  workers  one worker ms  %d workers ms  ratio  busiest/mean\n", workers);
  int rows = 0;
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    const shape *s = &shapes[i];
    if (!strchr(names, s->name) || s->E % workers) continue;
    float *arrays[4];
    uint64_t state = 1;
    for (int a = 0; a < 4; a++) {
      if (!(arrays[a] = calloc((size_t)(s->n * s->d), sizeof(float)))) return 1;
      for (int64_t v = 0; v < s->n * s->d; v++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        arrays[a][v] = (float)(state >> 40) * 0x1p-23f - 1;
      }
    }
    rank one[1], many[64];
    start(one, 1, workers, s, arrays);
    start(many, workers, 1, s, arrays);
    double alone[1000], together[1000], ratio[1000];
    for (int r = 0; r < repeats; r++) {
      alone[r] = all(one, 1, step);
      together[r] = all(many, workers, step);
      ratio[r] = alone[r] / together[r];
    }
    double busiest = imbalance(many, workers);
    stop(one, 1), stop(many, workers);
    qsort(alone, (size_t)repeats, sizeof *alone, by_size);
    qsort(together, (size_t)repeats, sizeof *together, by_size);
    qsort(ratio, (size_t)repeats, sizeof *ratio, by_size);
    double a = alone[repeats / 2], t = together[repeats / 2], q = ratio[repeats / 2];
    printf("%-5c  %-5ld %-5ld %-5ld %-3ld %d  %7d  %13.2f  %12.2f  %5.3f  %12.3f\n", s->name, (long)s->n, (long)s->d, (long)s->h,
           (long)s->E, s->k, workers, a * 1e3, t * 1e3, q, busiest);
    fflush(stdout);
    if (out)
      fprintf(out, "%s\n  {\"shape\": \"%c\", \"workers\": %d, \"one_seconds\": %.6g, \"workers_seconds\": %.6g, \"ratio\": %.4f, \"busiest_over_mean\": %.4f}",
              rows++ ? "," : "", s->name, workers, a, t, q, busiest);
    for (int v = 0; v < 4; v++) free(arrays[v]);
  }
  if (out) fprintf(out, "\n ]}\n"), fclose(out);
  printf("\nmedians; ratio: the median of one worker's time over the workers' time in the same round.\n");
  return 0;
}
