#include "measured.h"

#include "folder.h"

const char *of_rank(const char *name, int32_t rank) {
  char file[60];
  snprintf(file, sizeof file, "%s%d.json", name, rank);
  return in_folder(file);
}

void run_calibrate(crew *c, int32_t rank, void *unused) {
  (void)unused;
  double start = seconds();
  EXPECT(FMOE_OK, fmoe_group_calibrate(c->groups[rank], moment));
  CHECK(seconds() - start < moment + slack, "took %g s", seconds() - start);
}

void run_write(crew *c, int32_t rank, void *context) {
  fmoe_cluster *cluster;
  if (!EXPECT(FMOE_OK, fmoe_cluster_of_group(c->groups[rank], &cluster))) return;
  CHECK(fmoe_cluster_size(cluster) == c->ranks, "%d workers", fmoe_cluster_size(cluster));
  EXPECT(FMOE_OK, fmoe_cluster_write(cluster, of_rank(context, rank)));
  fmoe_cluster_destroy(cluster);
}
