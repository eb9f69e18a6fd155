/* rows: an expert's speed by how many rows it gets.
 *
 *   rows [--threads N] [--model d] [--hidden h] [--csv FILE] [--repeats N] [--rows a,b,c]
 *
 * Experts of d x h that get 1 to 96 rows each, E of them so that their weights fit no cache. Forward, and backward of the first
 * batch after fmoe_layer_begin_gradients, in GFLOP/s of useful flops, beside what OpenBLAS reaches with the bare products of the
 * same experts, and beside the limit: the machine's FMA peak, or its rate of reading where the weights take longer. The best
 * of the repeats of each, in turns. */
#define _GNU_SOURCE
#include <fastermoe.h>
#include <math.h>
#include <unistd.h>

#include "measure.h"
#include "limits.h"

static int64_t d = 1024, h = 4096, E = 16;

typedef struct speeds { double forward, backward; } speeds; /* seconds */

static speeds bare_products(fmoe_layer *layer, int64_t rows, int threads) {
  int m = (int)rows, D = (int)d, H = (int)h;
  fmoe_tensors v = {.struct_size = sizeof v}, g = {.struct_size = sizeof g};
  CHECK(fmoe_layer_values(layer, &v));
  CHECK(fmoe_layer_gradients(layer, &g));
  static float *x, *y, *a;
  if (!x) x = floats(128 * d), y = floats(128 * d), a = floats(128 * h);
  openblas_set_num_threads(threads);
  double begin = now();
  for (int64_t e = 0; e < E; e++) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, H, D, 1, x, D, v.w1 + e * h * d, D, 0, a, H);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, D, H, 1, a, H, v.w2 + e * h * d, H, 0, y, D);
  }
  double between = now();
  for (int64_t e = 0; e < E; e++) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, H, D, 1, y, D, v.w2 + e * h * d, H, 0, a, H);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, D, H, m, 1, y, D, a, H, 0, g.w2 + e * h * d, H);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, D, H, 1, a, H, v.w1 + e * h * d, D, 0, x, D);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, H, D, m, 1, a, H, x, D, 0, g.w1 + e * h * d, D);
  }
  return (speeds){between - begin, now() - between};
}

int main(int argc, char **argv) {
  int threads = 1, repeats = 5;
  const char *csv = NULL, *list = "1,2,3,4,6,8,12,16,24,32,48,64,96";
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--threads")) threads = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--model")) d = atoll(argv[i + 1]);
    else if (!strcmp(argv[i], "--hidden")) h = atoll(argv[i + 1]);
    else if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--rows")) list = argv[i + 1];
    else if (!strcmp(argv[i], "--csv")) csv = argv[i + 1];
    else return fprintf(stderr, "usage: rows [--threads N] [--model d] [--hidden h] [--repeats N] [--rows a,b,c] [--csv FILE]\n"), 2;
  }
  FILE *out = csv ? fopen(csv, "w") : NULL;
  if (csv && !out) return perror(csv), 1;
  const double peak = fma_peak(threads), bandwidth = read_bandwidth(threads), weights = 8.0 * (double)(E * d * h);
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads};
  fmoe_layer_options layer_options = FMOE_LAYER_OPTIONS_INIT;
  layer_options.d_model = d, layer_options.d_hidden = h, layer_options.experts = E, layer_options.top_k = 1;
  fmoe_group *group;
  fmoe_layer *layer;
  CHECK(fmoe_group_create_local(1, &options, &group));
  CHECK(fmoe_layer_create(group, &layer_options, &layer));
  float *x = floats(128 * E * d), *y = floats(128 * E * d), *ones = floats(128 * E);
  int32_t *choices = calloc((size_t)(128 * E), sizeof *choices);
  for (int64_t i = 0; i < 128 * E; i++) choices[i] = (int32_t)(i % E), ones[i] = 1;
  for (int64_t i = 0; i < 128 * E * d; i++) x[i] = uniform();
  printf("d %ld, h %ld, E %ld, %d threads; FMA peak %.0f GFLOP/s, reading %.1f GB/s\n", d, h, E, threads, peak * 1e-9,
         bandwidth * 1e-9);
  printf("%5s  %9s %9s %9s %7s  %9s %9s %9s\n", "rows", "forward", "OpenBLAS", "limit", "GB/s", "backward", "OpenBLAS", "limit");
  if (out) fprintf(out, "rows,threads,forward,openblas_forward,limit_forward,backward,openblas_backward,limit_backward\n");
  char *copy = strdup(list);
  for (char *word = strtok(copy, ","); word; word = strtok(NULL, ",")) {
    int64_t rows = atoll(word), n = rows * E;
    speeds ours = {1e9, 1e9}, theirs = {1e9, 1e9};
    for (int r = -1; r < repeats; r++) {
      fmoe_pass *pass;
      CHECK(fmoe_layer_begin_gradients(layer));
      double start = now();
      CHECK(fmoe_route(layer, x, n, choices, ones, &pass));
      CHECK(fmoe_forward(pass, y));
      double between = now();
      CHECK(fmoe_backward(pass, x, y, NULL));
      double end = now();
      fmoe_pass_destroy(pass);
      speeds other = bare_products(layer, rows, threads);
      if (r < 0) continue;
      ours.forward = fmin(ours.forward, between - start), ours.backward = fmin(ours.backward, end - between);
      theirs.forward = fmin(theirs.forward, other.forward), theirs.backward = fmin(theirs.backward, other.backward);
    }
    double flops = 4.0 * (double)(n * d * h);
    /* Forward reads the weights once, backward too and writes as much. */
    double forward = fmin(peak, flops / (weights / bandwidth)), backward = fmin(peak, 2 * flops / (2 * weights / bandwidth));
    printf("%5ld  %9.1f %9.1f %9.1f %7.1f  %9.1f %9.1f %9.1f\n", rows, flops / ours.forward * 1e-9, flops / theirs.forward * 1e-9,
           forward * 1e-9, weights / ours.forward * 1e-9, 2 * flops / ours.backward * 1e-9, 2 * flops / theirs.backward * 1e-9, backward * 1e-9);
    fflush(stdout);
    if (out)
      fprintf(out, "%ld,%d,%.2f,%.2f,%.2f,%.2f,%.2f,%.2f\n", rows, threads, flops / ours.forward * 1e-9, flops / theirs.forward * 1e-9,
              forward * 1e-9, 2 * flops / ours.backward * 1e-9, 2 * flops / theirs.backward * 1e-9, backward * 1e-9);
  }
  if (out) fclose(out);
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group);
  return 0;
}
