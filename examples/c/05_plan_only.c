/* 05_plan_only.c: what would a step take on machines that are not here?  Nothing runs; times are predictions.
 *
 *     05_plan_only CLUSTER.json [E]       05_cluster.json is four hosts of two workers each, on 10 Gbit/s Ethernet
 *
 * The counts say how many rows each worker sends to each expert: first all alike, then half of them to one.  Four ways
 * to run the layer, forward and backward, are compared; docs/model.md explains how they are predicted. */
#include <fastermoe.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                          \
  do {                                                       \
    if ((call) != FMOE_OK) {                                 \
      fprintf(stderr, "%s: %s\n", #call, fmoe_last_error()); \
      exit(1);                                               \
    }                                                        \
  } while (0)

enum { MODEL = 1024, HIDDEN = 2048, ROWS = 8192 }; /* d h and n·k of each worker */

static const struct {
  const char *name;
  int32_t shadowing, schedule;
} ways[] = {
    {"coarse: FastMoE", 1, 1},
    {"Algorithm 1 of the paper", 3, 0},
    {"every expert: ZeRO stage 3", 4, 0},
    {"as predicted best", 0, 0},
};

static void compare(fmoe_cluster *cluster, const fmoe_layer_options *layer, const int64_t *counts, const char *title) {
  double coarse = 0;
  printf("%s\n  %-28s %9s %9s %9s %8s %6s %6s\n", title, "", "ms", "times", "TFLOP/s", "shadows", "group", "steps");
  for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
    fmoe_plan_options options = {.struct_size = sizeof options, .shadowing = ways[i].shadowing};
    options.schedule = ways[i].schedule;
    fmoe_plan_report report = {.struct_size = sizeof report};
    CHECK(fmoe_cluster_plan(cluster, layer, counts, &options, &report));
    if (i == 0) {
      coarse = report.seconds_planned;
      printf("  R_CC %.3f (of the step %.3f); ideal %.2f ms, semi-ideal %.2f ms\n", report.compute_over_communicate,
             report.compute_over_communicate_step, report.seconds_ideal * 1e3, report.seconds_semi_ideal * 1e3);
    }
    printf("  %-28s %9.2f %9.2f %9.3f %8d %6d %6d\n", ways[i].name, report.seconds_planned * 1e3,
           coarse / report.seconds_planned, report.flops_per_worker * 1e-12, report.shadows, report.group_size,
           report.steps);
  }
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "05_plan_only CLUSTER.json [E]\n");
    return 2;
  }
  fmoe_cluster *cluster;
  CHECK(fmoe_cluster_read(argv[1], &cluster));
  int64_t workers = fmoe_cluster_size(cluster), experts = argc > 2 ? atoll(argv[2]) : workers;
  fmoe_layer_options layer = FMOE_LAYER_OPTIONS_INIT;
  layer.d_model = MODEL;
  layer.d_hidden = HIDDEN;
  layer.experts = experts;
  if (experts < 2 || experts % workers) {
    fprintf(stderr, "E must be a multiple of the %" PRId64 " workers, and 2 or more\n", workers);
    return 2;
  }
  int64_t *counts = malloc(sizeof *counts * (size_t)(workers * experts)); /* [W, E] */
  if (!counts) return 1;
  for (int64_t i = 0; i < workers * experts; i++) counts[i] = ROWS / experts;
  printf("%" PRId64 " workers, %" PRId64 " experts, d %d, h %d, %d rows of each worker\n", workers, experts, MODEL, HIDDEN,
         ROWS);
  compare(cluster, &layer, counts, "balanced");
  for (int64_t i = 0; i < workers * experts; i++)
    counts[i] = i % experts == 0 ? ROWS / 2 : ROWS / 2 / (experts - 1);
  compare(cluster, &layer, counts, "expert 0 gets half of all rows");
  free(counts);
  fmoe_cluster_destroy(cluster);
  return 0;
}
