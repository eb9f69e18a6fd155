/* bench: how close a training step of one MoE layer comes to the machine's limits.
 *
 *   bench [--shapes ABCDES] [--threads 1,2] [--routing balanced,zipf] [--gradients begin|zero] [--repeats N] [--json FILE]
 *
 * A step is what a host does for each batch except its optimiser: begin_gradients (or zero_gradients), gate, forward, backward. Useful
 * flops are those of the experts alone, 4·n·k·d·h forward and 12·n·k·d·h forward + backward; the gate, dispatch,
 * activation and combine count as lost time. Each figure is the best of its repeats, and each share is against
 * OpenBLAS's sgemm at 4096^3 on the same threads, timed between the repeats: speeds drift on shared machines. Beside
 * each step stands what OpenBLAS reaches with the bare products of its experts, everything else left out. */
#define _GNU_SOURCE
#include <fastermoe.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "measure.h"
#include "limits.h"

typedef struct shape {
  char name;
  int64_t n, d, h, E;
  int k;
} shape;
static const shape shapes[] = {
  {'A', 2048, 512, 2048, 8, 2}, {'B', 4096, 1024, 2048, 16, 2}, {'C', 512, 1024, 4096, 64, 2},
  {'D', 8, 1024, 4096, 8, 2},   {'E', 8192, 256, 512, 32, 1}, {'S', 64, 64, 64, 4, 1},
};

/* ---- the layer ----------------------------------------------------------------------------------------------- */
typedef struct bench {
  shape s;
  fmoe_group *group;
  fmoe_layer *layer;
  float *x, *y, *dy, *dx;
  double busiest; /* load of the busiest expert over the mean */
} bench;

/* Shifts the gate's last column, which meets a token entry of 1, until expert e's load is near share[e]. */
static void steer(bench *b, const double *share) {
  fmoe_tensors values = {.struct_size = sizeof values};
  CHECK(fmoe_layer_values(b->layer, &values));
  for (int round = 0; round < 60; round++) {
    fmoe_pass *pass;
    fmoe_routing routing = {.struct_size = sizeof routing};
    CHECK(fmoe_gate(b->layer, b->x, b->s.n, &pass));
    CHECK(fmoe_pass_routing(pass, &routing));
    b->busiest = 0;
    for (int64_t e = 0; e < b->s.E; e++) {
      double load = (double)routing.counts[e] / (double)(b->s.n * b->s.k);
      if (load * (double)b->s.E > b->busiest) b->busiest = load * (double)b->s.E;
      values.gate[e * b->s.d + b->s.d - 1] += (float)(0.3 / (1 + 0.2 * round) * log((share[e] + 1e-4) / (load + 1e-4)));
    }
    fmoe_pass_destroy(pass);
  }
}

static void start(bench *b, shape s, int threads, int zipf) {
  b->s = s;
  fmoe_group_options group = {.struct_size = sizeof group, .threads = threads};
  fmoe_layer_options layer = FMOE_LAYER_OPTIONS_INIT;
  layer.d_model = s.d, layer.d_hidden = s.h, layer.experts = s.E, layer.top_k = s.k;
  layer.activation = FMOE_GELU_TANH, layer.seed = 1;
  CHECK(fmoe_group_create_local(1, &group, &b->group));
  CHECK(fmoe_layer_create(b->group, &layer, &b->layer));
  float **arrays[] = {&b->x, &b->y, &b->dy, &b->dx};
  for (int a = 0; a < 4; a++) {
    *arrays[a] = floats(s.n * s.d);
    for (int64_t i = 0; i < s.n * s.d; i++) (*arrays[a])[i] = uniform();
  }
  for (int64_t i = 0; i < s.n; i++) b->x[i * s.d + s.d - 1] = 1;
  double share[64], sum = 0;
  for (int64_t e = 0; e < s.E; e++) sum += share[e] = zipf ? pow((double)e + 1, -1.2) : 1;
  for (int64_t e = 0; e < s.E; e++) share[e] /= sum;
  steer(b, share);
}

static void stop(bench *b) {
  fmoe_layer_destroy(b->layer);
  fmoe_group_destroy(b->group);
  free(b->x), free(b->y), free(b->dy), free(b->dx);
}

static int zeroes; /* whether a step zeroes gradients, instead of beginning them */

/* Seconds of one forward alone (gate + forward), or of a training step. */
static double step(bench *b, int backward) {
  fmoe_pass *pass;
  double begin = now();
  if (backward) CHECK((zeroes ? fmoe_layer_zero_gradients : fmoe_layer_begin_gradients)(b->layer));
  CHECK(fmoe_gate(b->layer, b->x, b->s.n, &pass));
  CHECK(fmoe_forward(pass, b->y));
  if (backward) CHECK(fmoe_backward(pass, b->dy, b->dx, NULL));
  fmoe_pass_destroy(pass);
  return now() - begin;
}

/* Seconds that OpenBLAS needs for the six products of each expert's forward and backward, nothing else. */
static double bare_products(const bench *b, int threads) {
  const shape *s = &b->s;
  int m = (int)(s->n * s->k / s->E), d = (int)s->d, h = (int)s->h;
  fmoe_tensors v = {.struct_size = sizeof v}, g = {.struct_size = sizeof g};
  CHECK(fmoe_layer_values(b->layer, &v));
  CHECK(fmoe_layer_gradients(b->layer, &g));
  float *x = floats((int64_t)m * d), *y = floats((int64_t)m * d), *a = floats((int64_t)m * h);
  openblas_set_num_threads(threads);
  double begin = now();
  for (int64_t e = 0; e < s->E; e++) {
    const float *w1 = v.w1 + e * h * d, *w2 = v.w2 + e * h * d;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, h, d, 1, x, d, w1, d, 0, a, h);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, d, h, 1, a, h, w2, h, 0, y, d);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, h, d, 1, y, d, w2, h, 0, a, h);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, d, h, m, 1, y, d, a, h, 1, g.w2 + e * h * d, h);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, d, h, 1, a, h, w1, d, 0, x, d);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, h, d, m, 1, a, h, x, d, 1, g.w1 + e * h * d, d);
  }
  double seconds = now() - begin;
  free(x), free(y), free(a);
  return seconds;
}

/* ---- memory: a process of its own for each shape -------------------------------------------------------------- */
static double status_kb(const char *field) {
  FILE *file = fopen("/proc/self/status", "r");
  char line[256];
  double kb = 0;
  while (file && fgets(line, sizeof line, file))
    if (!strncmp(line, field, strlen(field))) kb = atof(line + strlen(field) + 1);
  if (file) fclose(file);
  return kb;
}

/* Bytes that the library took at most beyond parameters and gradients, over those of what backward needs of a batch:
 * each slot's input row, pre-activations and output row. */
static double memory_ratio(shape s, int threads) {
  int ends[2];
  double ratio = -1;
  if (pipe(ends)) return -1;
  pid_t child = fork();
  if (child == 0) {
    bench b;
    double host = 4.0 * (double)(s.n * s.d) * 4;
    start(&b, (shape){'-', 16, 32, 32, 2, 1}, threads, 0); /* code, threads and hwloc are not the batch's */
    step(&b, 1);
    stop(&b);
    double before = status_kb("VmRSS:") * 1024;
    start(&b, s, threads, 0);
    for (int i = 0; i < 3; i++) step(&b, 1);
    double parameters = 4.0 * ((double)s.E * (double)(2 * s.d * s.h + s.d + s.h) + (double)(s.E * s.d));
    double used = status_kb("VmHWM:") * 1024 - before - host - 2 * parameters;
    ratio = used / (4.0 * (double)(s.n * s.k) * (double)(s.h + 2 * s.d));
    if (write(ends[1], &ratio, sizeof ratio) < 0) _exit(1);
    _exit(0);
  }
  close(ends[1]);
  if (read(ends[0], &ratio, sizeof ratio) != sizeof ratio) ratio = -1;
  close(ends[0]);
  waitpid(child, NULL, 0);
  return ratio;
}

int main(int argc, char **argv) {
  take_fitting_openblas(argv);
  const char *names = "ABE", *threads_list = NULL, *routings = "balanced,zipf", *json = NULL;
  int repeats = 9;
  for (int i = 1; i < argc; i += 2) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (value && !strcmp(argv[i], "--shapes")) names = value;
    else if (value && !strcmp(argv[i], "--threads")) threads_list = value;
    else if (value && !strcmp(argv[i], "--routing")) routings = value;
    else if (value && !strcmp(argv[i], "--repeats")) repeats = atoi(value);
    else if (value && !strcmp(argv[i], "--gradients") && (!strcmp(value, "begin") || !strcmp(value, "zero"))) zeroes = *value == 'z';
    else if (value && !strcmp(argv[i], "--json")) json = value;
    else {
      fprintf(stderr, "usage: bench [--shapes ABCDES] [--threads 1,2] [--routing balanced,zipf] [--gradients begin|zero] [--repeats N] [--json FILE]\n");
      return 2;
    }
  }
  char both[16] = "1";
  long cores = sysconf(_SC_NPROCESSORS_ONLN);
  if (cores >= 2) strcpy(both, "1,2");
  if (!threads_list) threads_list = both;

  double memory[8][64];
  int sizes[8], count = 0;
  for (const char *p = threads_list; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
    if (count < 8 && atoi(p) > 0 && atoi(p) <= 64) sizes[count++] = atoi(p);
  for (int t = 0; t < count; t++) /* before any thread starts here: each forks */
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      if (strchr(names, shapes[i].name)) memory[t][i] = memory_ratio(shapes[i], sizes[t]);

  FILE *out = json ? fopen(json, "w") : NULL;
  if (json && !out) return perror(json), 1;
  if (out) fprintf(out, "{\"limits\": [");
  double reading[8], plain[8]; /* bytes a second, from huge pages and from ordinary ones */
  printf("OpenBLAS's kernels: %s\n", openblas_get_corename());
  printf("limits   threads  FMA GFLOP/s  sgemm 4096^3 GFLOP/s  memory read GB/s  from 4 KiB pages GB/s\n");
  for (int t = 0; t < count; t++) {
    double fma = fma_peak(sizes[t]), blas = sgemm_rate(sizes[t]), read = reading[t] = read_rate(sizes[t], 0);
    plain[t] = read_rate(sizes[t], 1);
    printf("         %7d  %11.1f  %20.1f  %16.1f  %21.1f\n", sizes[t], fma * 1e-9, blas * 1e-9, read * 1e-9, plain[t] * 1e-9);
    if (out)
      fprintf(out, "%s{\"threads\": %d, \"fma\": %.4g, \"sgemm\": %.4g, \"read\": %.4g, \"read_small_pages\": %.4g}", t ? ", " : "", sizes[t], fma, blas, read, plain[t]);
  }
  if (out) fprintf(out, "],\n \"rows\": [");
  printf("\nshape  n     d     h     E   k  routing   max/mean  threads  forward ms  share   step ms  share  OpenBLAS  sgemm GFLOP/s  memory\n");
  int rows = 0;
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    shape s = shapes[i];
    if (!strchr(names, s.name)) continue;
    for (int zipf = 0; zipf < 2; zipf++) {
      if (!strstr(routings, zipf ? "zipf" : "balanced")) continue;
      for (int t = 0; t < count; t++) {
        bench b;
        start(&b, s, sizes[t], zipf);
        double forward = 1e9, full = 1e9, bare = 1e9, blas = 0;
        const int streams = s.n * s.k < 16 * s.E; /* few rows: reading the weights is what forward waits for */
        for (int r = 0; r < repeats; r++) {
          if (r % 3 == 0) blas = fmax(blas, sgemm_rate(sizes[t]));
          if (r % 3 == 0) bare = fmin(bare, bare_products(&b, sizes[t]));
          if (r % 3 == 0 && streams) reading[t] = fmax(reading[t], read_rate(sizes[t], 0)), plain[t] = fmax(plain[t], read_rate(sizes[t], 1));
          if (r % 3 == 0) step(&b, 1); /* warms what the sgemm has thrown out */
          forward = fmin(forward, step(&b, 0));
          full = fmin(full, step(&b, 1));
        }
        stop(&b);
        double flops = 4.0 * (double)(s.n * s.k) * (double)(s.d * s.h);
        printf("%-5c  %-5ld %-5ld %-5ld %-3ld %d  %-8s  %8.2f  %7d  %10.3f  %5.3f  %8.3f  %5.3f  %8.3f  %13.1f  %6.2f\n", s.name, (long)s.n,
               (long)s.d, (long)s.h, (long)s.E, s.k, zipf ? "zipf" : "balanced", b.busiest, sizes[t], forward * 1e3,
               flops / forward / blas, full * 1e3, 3 * flops / full / blas,
               3 * flops / bare / blas, blas * 1e-9, memory[t][i]);
        const double weights = 8.0 * (double)(s.E * s.d * s.h) / forward;
        if (streams)
          printf("       forward reads weights at %.1f GB/s: %.2f of a loop that reads huge pages, %.2f of one that reads 4 KiB pages\n",
                 weights * 1e-9, weights / reading[t], weights / plain[t]);
        fflush(stdout);
        if (out)
          fprintf(out,
                  "%s\n  {\"shape\": \"%c\", \"routing\": \"%s\", \"threads\": %d, \"busiest_over_mean\": %.3f, \"forward_seconds\": %.6g, "
                  "\"step_seconds\": %.6g, \"forward_share\": %.4f, \"step_share\": %.4f, \"openblas_products_share\": %.4f, \"sgemm\": %.4g, \"memory_ratio\": %.3f}",
                  rows++ ? "," : "", s.name, zipf ? "zipf" : "balanced", sizes[t], b.busiest, forward, full, flops / forward / blas,
                  3 * flops / full / blas, 3 * flops / bare / blas, blas, memory[t][i]);
      }
    }
  }
  if (out) fprintf(out, "\n ]}\n"), fclose(out);
  printf("\nshare: useful expert flops over time, against sgemm on the same threads. step: %s_gradients, gate, forward, backward.\n"
         "OpenBLAS: its share with the bare products of a balanced step, on the same threads.\n"
         "memory: peak beyond parameters and gradients, over n·k·(h + 2d) floats that backward needs.\n",
         zeroes ? "zero" : "begin");
  return 0;
}
