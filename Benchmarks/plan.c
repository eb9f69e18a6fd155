/* plan: what planning costs.
 *
 *   make bench                              or: build/plan
 *
 * For clusters of hosts with two workers each, with one to eight experts a worker and ever more skewed rows: the median of
 * fmoe_cluster_plan as predicted best, and its share of the step that it predicts. For long steps, and for those of few
 * workers that take milliseconds. */
#include <fastermoe.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "measure.h"

enum { REPEATS = 9 };

static fmoe_cluster *flat(int workers) {
  char path[] = "/tmp/fastermoe-plan-XXXXXX";
  int handle = mkstemp(path);
  FILE *file = handle < 0 ? NULL : fdopen(handle, "w");
  if (!file) perror(path), exit(1);
  fprintf(file, "{\"fastermoe_cluster\": 1, \"places\": [{\"name\": \"net\"}");
  for (int host = 0; host < workers / 2; host++)
    fprintf(file, ", {\"name\": \"h%d\", \"in\": \"net\", \"up\": {\"bytes_per_second\": 1.2e9, \"latency_seconds\": 2e-5}}",
            host);
  fprintf(file, "], \"workers\": [");
  for (int rank = 0; rank < workers; rank++)
    fprintf(file,
            "%s{\"name\": \"w%d\", \"in\": \"h%d\", \"up\": {\"bytes_per_second\": 8e9}, \"flops_per_second\": [[1, 1e10], "
            "[16, 3e11], [64, 5e11], [512, 6e11]]}",
            rank ? ", " : "", rank, rank / 2);
  fprintf(file, "]}\n");
  fclose(file);
  fmoe_cluster *cluster;
  CHECK(fmoe_cluster_read(path, &cluster));
  unlink(path);
  return cluster;
}

/* With up to `most` workers. */
static void table(int d, int h, int rows, int most) {
  static const struct {
    int workers, experts;
  } sizes[] = {{2, 8}, {2, 16}, {8, 8}, {8, 64}, {16, 16}, {64, 64}, {64, 512}, {256, 256}, {1024, 1024}};
  printf("\nplanning, d %d, h %d, %d rows of each worker:\n%8s %8s %5s %8s %8s %12s %12s %8s\n", d, h, rows, "workers",
         "experts", "Zipf", "shadows", "group", "planning ms", "step ms", "share");
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes && sizes[i].workers <= most; i++) {
    int workers = sizes[i].workers, experts = sizes[i].experts;
    fmoe_cluster *cluster = flat(workers);
    fmoe_layer_options layer = FMOE_LAYER_OPTIONS_INIT;
    layer.d_model = d, layer.d_hidden = h, layer.experts = experts;
    int64_t *counts = malloc(sizeof *counts * (size_t)workers * (size_t)experts);
    for (int skew = 0; skew <= 2; skew++) {
      double sum = 0;
      for (int e = 0; e < experts; e++) sum += pow(e + 1, -0.6 * skew);
      for (int w = 0; w < workers; w++)
        /* Popular experts anywhere: 7919 is prime. */
        for (int e = 0; e < experts; e++)
          counts[(size_t)w * (size_t)experts + (size_t)((int64_t)e * 7919 % experts)] = (int64_t)(rows * pow(e + 1, -0.6 * skew) / sum);
      double seconds[REPEATS];
      fmoe_plan_report report = {.struct_size = sizeof report};
      for (int r = -1; r < REPEATS; r++) {
        double start = now();
        CHECK(fmoe_cluster_plan(cluster, &layer, counts, NULL, &report));
        if (r >= 0) seconds[r] = now() - start;
      }
      double planning = median(seconds, REPEATS);
      printf("%8d %8d %5.1f %8d %8d %12.3f %12.2f %6.2f %%\n", workers, experts, 0.6 * skew, report.shadows,
             report.group_size, planning * 1e3, report.seconds_planned * 1e3, 100 * planning / report.seconds_planned);
      fflush(stdout);
    }
    free(counts);
    fmoe_cluster_destroy(cluster);
  }
}

int main(void) {
  table(1024, 2048, 8192, 1024);
  table(256, 1024, 512, 16);
  return 0;
}
