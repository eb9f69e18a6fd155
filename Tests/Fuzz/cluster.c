/* cluster.c: bytes as a cluster's JSON.  What is read can be written and read again as the same, and planned on. */
#include <math.h>

#include "fuzz.h"

static void plan(fmoe_cluster *cluster, int32_t workers, uint8_t luck) {
  enum { MOST = 16 };
  static int64_t counts[MOST * MOST];
  const fmoe_layer_options layer = {.struct_size = sizeof layer, .d_model = 64, .d_hidden = 128, .experts = workers,
                                    .top_k = 1};
  for (int i = 0; i < workers * workers; i++) counts[i] = i * 37 % 101 + (i % workers ? 0 : luck);
  for (int32_t shadowing = 0; shadowing <= 4; shadowing += shadowing ? 1 : 3) {
    const fmoe_plan_options options = {.struct_size = sizeof options, .shadowing = shadowing};
    fmoe_plan_report report = {.struct_size = sizeof report};
    if (FAIR(fmoe_cluster_plan(cluster, &layer, counts, &options, &report)) != FMOE_OK) continue;
    DEMAND(report.seconds_planned >= 0 && !isnan(report.seconds_plain), "planned %g, plain %g", report.seconds_planned,
           report.seconds_plain);
    DEMAND(shadowing || !(report.seconds_planned > report.seconds_plain), "planned %.17g, plain %.17g",
           report.seconds_planned, report.seconds_plain);
    DEMAND(report.group_size >= 1 && report.group_size <= workers, "%d of %d", report.group_size, workers);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fmoe_cluster *cluster = NULL, *again = NULL;
  spit("cluster.json", data, size);
  if (FAIR(fmoe_cluster_read("cluster.json", &cluster)) != FMOE_OK) {
    DEMAND(!cluster, "after %s", fmoe_last_error());
    DEMAND(strstr(fmoe_last_error(), "cluster.json"), "%s", fmoe_last_error());
    return 0;
  }
  int32_t workers = fmoe_cluster_size(cluster);
  double share = fmoe_cluster_remote_share(cluster);
  DEMAND(workers >= 1 && workers <= 4096, "%d workers", workers);
  DEMAND(share >= 0 && share <= 1, "remote share %g", share);
  DEMAND(FAIR(fmoe_cluster_write(cluster, "written.json")) == FMOE_OK, "%s", fmoe_last_error());
  DEMAND(FAIR(fmoe_cluster_read("written.json", &again)) == FMOE_OK, "%s", fmoe_last_error());
  DEMAND(FAIR(fmoe_cluster_write(again, "again.json")) == FMOE_OK, "%s", fmoe_last_error());
  size_t sizes[2];
  void *texts[2] = {slurp("written.json", &sizes[0]), slurp("again.json", &sizes[1])};
  DEMAND(sizes[0] == sizes[1] && !memcmp(texts[0], texts[1], sizes[0]), "%zu and %zu bytes", sizes[0], sizes[1]);
  free(texts[0]), free(texts[1]);
  if (workers <= 16) plan(cluster, workers, size ? data[size - 1] : 0);
  fmoe_cluster_destroy(cluster), fmoe_cluster_destroy(again);
  return 0;
}
