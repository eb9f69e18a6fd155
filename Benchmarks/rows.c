/* rows: an expert's speed by how many rows it gets.
 *
 *   rows [--threads N] [--model d] [--hidden h] [--experts E] [--csv FILE] [--svg FILE] [--repeats N] [--rows a,b-c,...]
 *
 * Experts of d x h that get 1 to 128 rows each, E of them so that their weights fit no cache. Forward, and backward of the first
 * batch after fmoe_layer_begin_gradients, in GFLOP/s of useful flops, beside what OpenBLAS reaches with the bare products of the
 * same experts, and beside the limit: the machine's FMA peak, or its rate of reading where the weights take longer. The best
 * of the repeats of each, in turns. Says at the end where OpenBLAS was faster. */
#define _GNU_SOURCE
#include <fastermoe.h>
#include <math.h>
#include <unistd.h>

#include "measure.h"
#include "limits.h"

static int64_t d = 1024, h = 4096, E = 16;

enum { MOST = 128 };
typedef struct line { int64_t rows; double speed[2][3]; } line; /* GFLOP/s forward and backward: ours, OpenBLAS, limit */
static line lines[MOST];

/* Forward and backward side by side, over rows on a scale of doublings. */
static void draw(const char *path, int count, int threads) {
  enum { WIDE = 400, HIGH = 260, LEFT = 50, TOP = 40 };
  static const char *titles[] = {"forward", "backward"}, *names[] = {"FasterMoE", "OpenBLAS, bare products", "limit"};
  static const char *colours[] = {"#4477aa", "#ee6677", "#999999"};
  FILE *out = fopen(path, "w");
  if (!out) perror(path), exit(1);
  double most = 0, widest = log2((double)lines[count - 1].rows / (double)lines[0].rows);
  for (int i = 0; i < count; i++)
    for (int l = 0; l < 6; l++) most = fmax(most, lines[i].speed[l / 3][l % 3]);
  most = ceil(most / 20) * 20;
  fprintf(out, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n"
               "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", 2 * (WIDE + LEFT) + 30, HIGH + TOP + 60);
  for (int part = 0; part < 2; part++) {
    const int left = LEFT + part * (WIDE + LEFT + 10);
    fprintf(out, "<text x=\"%d\" y=\"25\" font-size=\"14\">%s, GFLOP/s on %d thread%s (d %ld, h %ld)</text>\n", left, titles[part],
            threads, threads == 1 ? "" : "s", d, h);
    for (double y = 0; y <= most; y += most / 4)
      fprintf(out, "<path d=\"M%d %.1fh%d\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.0f</text>\n", left,
              TOP + HIGH * (1 - y / most), WIDE, left - 6, TOP + HIGH * (1 - y / most) + 4, y);
    for (int i = 0; i < count; i++)
      fprintf(out, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\" font-size=\"10\">%ld</text>\n",
              left + WIDE * log2((double)lines[i].rows / (double)lines[0].rows) / widest, TOP + HIGH + 16, lines[i].rows);
    for (int l = 0; l < 3; l++) {
      fprintf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s points=\"", colours[l], l == 2 ? " stroke-dasharray=\"5 4\"" : "");
      for (int i = 0; i < count; i++)
        fprintf(out, "%.1f,%.1f ", left + WIDE * log2((double)lines[i].rows / (double)lines[0].rows) / widest,
                TOP + HIGH * (1 - lines[i].speed[part][l] / most));
      fprintf(out, "\"/>\n");
      if (part == 0) fprintf(out, "<path d=\"M%d %dh24\" stroke=\"%s\" stroke-width=\"2\"/><text x=\"%d\" y=\"%d\">%s</text>\n", LEFT + l * 200,
                             TOP + HIGH + 46, colours[l], LEFT + l * 200 + 30, TOP + HIGH + 50, names[l]);
    }
    fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">rows of each expert</text>\n", left + WIDE / 2, TOP + HIGH + 32);
  }
  fprintf(out, "</svg>\n");
  fclose(out);
}

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
  take_fitting_openblas(argv);
  int threads = 1, repeats = 5, count = 0;
  const char *csv = NULL, *svg = NULL, *list = "1,2,3,4,6,8,12,16,24,32,48,64,96";
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--threads")) threads = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--model")) d = atoll(argv[i + 1]);
    else if (!strcmp(argv[i], "--hidden")) h = atoll(argv[i + 1]);
    else if (!strcmp(argv[i], "--experts")) E = atoll(argv[i + 1]);
    else if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--rows")) list = argv[i + 1];
    else if (!strcmp(argv[i], "--csv")) csv = argv[i + 1];
    else if (!strcmp(argv[i], "--svg")) svg = argv[i + 1];
    else return fprintf(stderr, "usage: rows [--threads N] [--model d] [--hidden h] [--experts E] [--repeats N] [--rows a,b-c,...] [--csv FILE] [--svg FILE]\n"), 2;
  }
  FILE *out = csv ? fopen(csv, "w") : NULL;
  if (csv && !out) return perror(csv), 1;
  double peak = 0, bandwidth = 0, weights = 8.0 * (double)(E * d * h);
  for (int r = 0; r < 8; r++) peak = fmax(peak, fma_peak(threads)), bandwidth = fmax(bandwidth, read_bandwidth(threads));
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
  printf("%5s  %9s %9s %9s  %9s %9s %9s  %9s\n", "rows", "forward", "OpenBLAS", "limit", "backward", "OpenBLAS", "limit", "GB/s fwd");
  if (out) fprintf(out, "rows,threads,forward,openblas_forward,limit_forward,backward,openblas_backward,limit_backward\n");
  char *copy = strdup(list);
  int slower = 0;
  int64_t wanted[MOST];
  int count_wanted = 0;
  for (char *word = strtok(copy, ","); word; word = strtok(NULL, ",")) {
    int64_t last = strchr(word, '-') ? atoll(strchr(word, '-') + 1) : atoll(word);
    for (int64_t r = atoll(word); r <= last && count_wanted < MOST; r++) wanted[count_wanted++] = r;
  }
  for (int w = 0; w < count_wanted; w++) {
    const int64_t rows = wanted[w], n = rows * E;
    if (rows < 1 || rows > 128) return fprintf(stderr, "rows are 1 to 128, not %ld\n", rows), 2;
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
    double flops = 4.0e-9 * (double)(n * d * h);
    /* Forward reads the weights once; backward too, and writes as much. */
    const double streaming = flops / (weights / bandwidth);
    line *l = &lines[count++];
    *l = (line){rows, {{flops / ours.forward, flops / theirs.forward, fmin(peak * 1e-9, streaming)},
                       {2 * flops / ours.backward, 2 * flops / theirs.backward, fmin(peak * 1e-9, streaming)}}};
    printf("%5ld", rows);
    for (int part = 0; part < 2; part++) printf("  %9.1f %9.1f %9.1f", l->speed[part][0], l->speed[part][1], l->speed[part][2]);
    printf("  %9.1f\n", weights / ours.forward * 1e-9);
    fflush(stdout);
    for (int part = 0; part < 2; part++)
      if (l->speed[part][0] < l->speed[part][1]) slower++, printf("       OpenBLAS was faster %s\n", part ? "backward" : "forward");
    if (!out) continue;
    fprintf(out, "%ld,%d", rows, threads);
    for (int i = 0; i < 6; i++) fprintf(out, ",%.2f", l->speed[i / 3][i % 3]);
    fprintf(out, "\n");
  }
  printf("OpenBLAS was faster in %d of %d cases\n", slower, 2 * count);
  if (svg && count > 1) draw(svg, count, threads);
  if (out) fclose(out);
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group);
  return 0;
}
