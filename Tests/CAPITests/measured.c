#include "measured.h"

#include <stdlib.h>

char folder[] = "/tmp/fastermoe-measured-XXXXXX";

char *slurp(const char *path) {
  char *text = calloc(1, 1 << 16);
  FILE *in = fopen(path, "r");
  if (in) {
    if (!fread(text, 1, (1 << 16) - 1, in)) text[0] = 0;
    fclose(in);
  }
  return text;
}

void spill(const char *path, const char *text) {
  FILE *out = fopen(path, "w");
  if (!out || fputs(text, out) < 0 || fclose(out)) perror(path), exit(2);
}

const char *of_rank(const char *name, int32_t rank) {
  static _Thread_local char path[200];
  snprintf(path, sizeof path, "%s/%s%d.json", folder, name, rank);
  return path;
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
