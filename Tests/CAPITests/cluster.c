/* cluster.c: clusters from and to files, broken files, and plans of every kind.  It runs where it stands: the paper's
 * clusters are files of the repository. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "folder.h"

enum { W = 16, E = 16, ROWS = 2048 };
static const char johnny_file[] = "../../Benchmarks/paper/johnny.json";
static int64_t balanced[W * E], hot[W * E];

static const char *file(const char *name, const char *text) { /* written where `text` is not NULL */
  const char *at = in_folder(name);
  if (text) spit(at, text, strlen(text));
  return at;
}

static fmoe_layer_options layer(int64_t experts) {
  fmoe_layer_options o = FMOE_LAYER_OPTIONS_INIT;
  o.d_model = 1024, o.d_hidden = 2048, o.experts = experts;
  return o;
}

/* ---- files ----------------------------------------------------------------------------------- */

static const char two[] =
    "{\"fastermoe_cluster\": 1, \"places\": [{\"name\": \"root\"}],"
    " \"workers\": [{\"name\": \"a\", \"in\": \"root\", \"up\": {\"bytes_per_second\": 1e9, \"latency_seconds\": 1e-5},"
    " \"down\": {\"bytes_per_second\": 2e9}, \"flops_per_second\": [[1, 1e9], [64, 1e11]]},"
    " {\"name\": \"b\", \"in\": \"root\", \"flops_per_second\": [[1, 5e10]]}],"
    " \"peer_links\": [{\"from\": \"a\", \"to\": \"b\", \"there\": {\"bytes_per_second\": \"infinite\"}}],"
    " \"computing_slowdown\": 1.25}";

/* What is read and written and read again is written alike, and plans alike. */
static void test_round_trip(void) {
  const char *given[] = {johnny_file, file("two.json", two)};
  for (int i = 0; i < 2; i++) {
    fmoe_cluster *first, *second;
    if (!EXPECT(FMOE_OK, fmoe_cluster_read(given[i], &first))) continue;
    const char *once = file("once.json", NULL), *twice = file("twice.json", NULL);
    EXPECT(FMOE_OK, fmoe_cluster_write(first, once));
    if (!EXPECT(FMOE_OK, fmoe_cluster_read(once, &second))) continue;
    EXPECT(FMOE_OK, fmoe_cluster_write(second, twice));
    char *written = text_of(once), *again = text_of(twice);
    CHECK(!strcmp(written, again) && strlen(written) > 100, "%s", given[i]);
    free(written), free(again);
    if (!i) /* 50 Gbit/s for the eight workers of a host, 88 for each */
      CHECK(fabs(fmoe_cluster_remote_share(first) - 50.0 / (8 * 88)) < 1e-9, "%g", fmoe_cluster_remote_share(first));
    CHECK(fmoe_cluster_size(first) == (i ? 2 : W) && fmoe_cluster_size(second) == (i ? 2 : W), "%s", given[i]);
    fmoe_layer_options o = layer(16);
    fmoe_plan_report a = {.struct_size = sizeof a}, b = a;
    EXPECT(FMOE_OK, fmoe_cluster_plan(first, &o, hot, NULL, &a));
    EXPECT(FMOE_OK, fmoe_cluster_plan(second, &o, hot, NULL, &b));
    CHECK(!memcmp(&a, &b, sizeof a), "%g and %g s", a.seconds_planned, b.seconds_planned);
    fmoe_cluster_destroy(first), fmoe_cluster_destroy(second);
  }
  fmoe_cluster *cluster;
  EXPECT(FMOE_OK, fmoe_cluster_read(johnny_file, &cluster));
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_write(cluster, "/no-such-folder/cluster.json"));
  CHECK(strstr(fmoe_last_error(), "/no-such-folder/cluster.json"), "%s", fmoe_last_error());
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_write(cluster, folder));
  const char *link = file("link", NULL);
  CHECK(!symlink("nothing", link), "a link");
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_write(cluster, link)); /* else it would be a file from now on */
  char target[16] = {0};
  CHECK(readlink(link, target, sizeof target - 1) == 7 && !strcmp(target, "nothing") && !unlink(link), "%s", target);
  fmoe_cluster_destroy(cluster);
}

#define ROOT "\"places\": [{\"name\": \"root\"}]"
#define WORKER(rest) "{\"fastermoe_cluster\": 1, " ROOT ", \"workers\": [{\"name\": \"a\", \"in\": \"root\"" rest "}]}"
#define FLOPS ", \"flops_per_second\": [[1, 1e9]]"
#define TREE(places, rest)                                                                                              \
  "{\"fastermoe_cluster\": 1, \"places\": [" places                                                                     \
  "], \"workers\": [{\"name\": \"a\", \"in\": \"root\"" FLOPS "}, {\"name\": \"b\", \"in\": \"root\"" FLOPS "}]" rest "}"

static void test_broken_files(void) {
  static const struct { const char *text, *words; } broken[] = {
      {"", "ends too early"},
      {"{", "ends too early"},
      {"[]", "array"},
      {"not json", "line 1 is wrong at `not json`"},
      {"{\"fastermoe_cluster\": 1,\n\"places\": [,]}", "line 2 is wrong at `,]}`"},
      {"{\"fastermoe_cluster\": 1}}", "line 1 is wrong at `}`"},
      {"{\"fastermoe_cluster\": 1, " ROOT "}", "lacks \"workers\""},
      {"{" ROOT ", \"workers\": []}", "lacks \"fastermoe_cluster\""},
      {"{\"fastermoe_cluster\": 2, " ROOT ", \"workers\": []}", "fastermoe_cluster is 2"},
      {"{\"fastermoe_cluster\": 1, " ROOT ", \"workers\": []}", "no workers"},
      {"{\"fastermoe_cluster\": 1, \"places\": [], \"workers\": [{\"name\": \"a\", \"in\": \"root\"" FLOPS "}]}", "\"root\""},
      {WORKER(""), "workers[0] lacks \"flops_per_second\""},
      {WORKER(FLOPS ", \"flops\": 3"), "workers[0] has the key \"flops\""},
      {WORKER(FLOPS ", \"up\": {\"bandwidth\": 3}"), "workers[0].up has the key \"bandwidth\""},
      {WORKER(FLOPS ", \"up\": null"), "workers[0].up is null"},
      {WORKER(FLOPS ", \"up\": {\"bytes_per_second\": 0}"), "must be positive"},
      {WORKER(FLOPS ", \"up\": {\"bytes_per_second\": -1}"), "must be positive"},
      {WORKER(FLOPS ", \"up\": {\"bytes_per_second\": \"not a number\"}"), "must be positive"},
      {WORKER(FLOPS ", \"up\": {\"bytes_per_second\": \"fast\"}"), "workers[0].up.bytes_per_second"},
      {WORKER(FLOPS ", \"up\": {\"latency_seconds\": -1e-6}"), "latency_seconds"},
      {WORKER(FLOPS ", \"up\": {\"latency_seconds\": \"infinite\"}"), "latency_seconds"},
      {WORKER(FLOPS ", \"up\": {\"latency_seconds\": 1e999}"), "out of range"},
      {WORKER(FLOPS ", \"down\": {\"bytes_per_second\": 1}"), "a link down and none up"},
      {WORKER(", \"flops_per_second\": []"), "no flops_per_second"},
      {WORKER(", \"flops_per_second\": [[1, 0]]"), "positive"},
      {WORKER(", \"flops_per_second\": [[1, \"infinite\"]]"), "finite"},
      {WORKER(", \"flops_per_second\": [[0, 1]]"), "rise"},
      {WORKER(", \"flops_per_second\": [[4, 1], [4, 2]]"), "rise"},
      {WORKER(", \"flops_per_second\": [[1, 2, 3]]"), "a pair"},
      {WORKER(", \"flops_per_second\": [[1]]"), "flops_per_second[0]"},
      {WORKER(", \"flops_per_second\": [[1.5, 1]]"), "flops_per_second[0]"},
      {TREE("{\"name\": \"root\"}, {\"name\": \"root\", \"in\": \"root\"}", ""), "called \"root\""},
      {TREE("{\"name\": \"root\"}, {\"name\": \"other\"}", ""), "only one may be the root"},
      {TREE("{\"name\": \"root\"}, {\"name\": \"\", \"in\": \"root\"}", ""), "name is empty"},
      {TREE("{\"name\": \"root\", \"up\": {}}", ""), "in no place"},
      {TREE("{\"name\": \"root\"}, {\"name\": \"x\", \"in\": \"y\"}, {\"name\": \"y\", \"in\": \"x\"}", ""), "circle"},
      {TREE("{\"name\": \"root\", \"in\": \"root\"}", ""), "circle"},
      {TREE("{\"name\": \"root\"}, {\"name\": \"x\", \"in\": \"a\"}", ""), "a worker and holds nothing"},
      {TREE("{\"name\": \"root\"}, {\"name\": \"x\", \"in\": \"moon\"}", ""), "\"moon\""},
      {TREE("{\"name\": \"root\"}", ", \"peer_links\": [{\"from\": \"a\", \"to\": \"moon\", \"there\": {}}]"), "\"moon\""},
      {TREE("{\"name\": \"root\"}", ", \"peer_links\": [{\"from\": \"a\", \"to\": \"root\", \"there\": {}}]"), "apart"},
      {TREE("{\"name\": \"root\"}", ", \"peer_links\": [{\"from\": \"a\", \"to\": \"a\", \"there\": {}}]"), "apart"},
      {TREE("{\"name\": \"root\"}", ", \"peer_links\": [{\"from\": \"a\", \"to\": \"b\"}]"), "lacks \"there\""},
      {TREE("{\"name\": \"root\"}", ", \"peer_links\": [{\"from\": \"a\", \"to\": \"b\", \"there\": {}},"
                                    " {\"from\": \"b\", \"to\": \"a\", \"there\": {}}]"), "two peer links"},
      {TREE("{\"name\": \"root\"}", ", \"computing_slowdown\": 0.5"), "computing_slowdown"},
      {TREE("{\"name\": \"root\"}", ", \"computing_slowdown\": \"infinite\""), "computing_slowdown"},
      {TREE("{\"name\": \"root\"}", ", \"colour\": \"red\""), "the document has the key \"colour\""},
  };
  for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
    fmoe_cluster *out = (fmoe_cluster *)&out;
    const char *path = file("broken.json", broken[i].text);
    EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read(path, &out));
    CHECK(out == (fmoe_cluster *)&out, "out-parameters are written only on FMOE_OK");
    CHECK(strstr(fmoe_last_error(), path) && strstr(fmoe_last_error(), broken[i].words), "%s\n  gives \"%s\" without \"%s\"",
          broken[i].text, fmoe_last_error(), broken[i].words);
  }
  /* Any prefix of a good file is a bad one. */
  char text[sizeof two];
  for (size_t size = 0; size < sizeof two - 1; size++) {
    fmoe_cluster *out;
    memcpy(text, two, size), text[size] = 0;
    EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read(file("broken.json", text), &out));
  }
  fmoe_cluster *out;
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read(folder, &out));
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read("/dev/zero", &out));
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read("", &out));
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_read("/tmp/\xff\xfe no such file", &out)); /* a path is bytes */
}

/* ---- plans ----------------------------------------------------------------------------------- */

static fmoe_plan_report plan(fmoe_cluster *cluster, const int64_t *counts, fmoe_plan_options options) {
  fmoe_plan_report report = {.struct_size = sizeof report};
  fmoe_layer_options o = layer(E);
  options.struct_size = sizeof options;
  EXPECT(FMOE_OK, fmoe_cluster_plan(cluster, &o, counts, &options, &report));
  CHECK(report.struct_size == sizeof report, "%u", report.struct_size);
  return report;
}

#define NEAR(value, expected) CHECK(fabs((value) - (expected)) <= 5e-4 * fabs(expected), "%g, not %g", (double)(value), (double)(expected))

static void test_plans(fmoe_cluster *johnny) {
  uint8_t shadows[E] = {0};
  fmoe_plan_report r = plan(johnny, balanced, (fmoe_plan_options){.shadowing = 1, .schedule = 1});
  NEAR(r.seconds_plain, 25.957e-3), NEAR(r.seconds_planned, 25.957e-3), NEAR(r.seconds_semi_ideal, 25.957e-3);
  NEAR(r.compute_over_communicate, 0.2783), NEAR(r.compute_over_communicate_step, 0.75 * 0.2783);
  NEAR(r.seconds_ideal, 4 * 5.3687e-3), NEAR(r.flops_per_worker, 1.9856e12);
  CHECK(r.shadows == 0 && r.group_size == W && r.steps > 0, "%d shadows, groups of %d", r.shadows, r.group_size);
  NEAR(plan(johnny, hot, (fmoe_plan_options){.shadowing = 3, .schedule = 1}).seconds_planned, 28.376e-3);
  CHECK(plan(johnny, hot, (fmoe_plan_options){.shadowing = 3}).shadows == 1, "one expert is hot");
  CHECK(plan(johnny, balanced, (fmoe_plan_options){.shadowing = 3}).shadows == 0, "none is");
  CHECK(plan(johnny, hot, (fmoe_plan_options){.shadowing = 4}).shadows == E, "ZeRO stage 3 fetches all");
  shadows[3] = shadows[0] = 1;
  CHECK(plan(johnny, hot, (fmoe_plan_options){.shadowing = 2, .shadows = shadows}).shadows == 2, "as was asked for");
  for (int32_t size = 1; size < 20; size++) {
    r = plan(johnny, hot, (fmoe_plan_options){.shadowing = 1, .schedule = 2, .group_size = size});
    CHECK(r.group_size == (size < W ? size : W) && r.shadows == 0, "groups of %d, not %d", r.group_size, size);
    CHECK(r.seconds_planned >= r.seconds_ideal, "%g s, ideally %g", r.seconds_planned, r.seconds_ideal);
  }
  for (int i = 0; i < 2; i++) {
    r = plan(johnny, i ? hot : balanced, (fmoe_plan_options){0});
    CHECK(r.seconds_planned <= r.seconds_plain && r.seconds_planned >= r.seconds_ideal && r.seconds_ideal > 0,
          "ideal %g, planned %g, plain %g", r.seconds_ideal, r.seconds_planned, r.seconds_plain);
    fmoe_plan_report again = plan(johnny, i ? hot : balanced, (fmoe_plan_options){0});
    CHECK(!memcmp(&r, &again, sizeof r), "the same values give the same plan");
  }
  const int64_t nothing[W * E] = {0};
  r = plan(johnny, nothing, (fmoe_plan_options){0});
  CHECK(r.seconds_planned == 0 && r.flops_per_worker == 0 && isinf(r.compute_over_communicate), "%g s", r.seconds_planned);
  /* A report of an older header is shorter. */
  fmoe_plan_report old = {.struct_size = 56, .seconds_semi_ideal = -1};
  fmoe_layer_options o = layer(E);
  EXPECT(FMOE_OK, fmoe_cluster_plan(johnny, &o, hot, NULL, &old));
  CHECK(old.struct_size == 56 && old.seconds_semi_ideal == -1 && old.seconds_plain > 0, "%u", old.struct_size);
}

static void refuse(fmoe_status status, fmoe_cluster *cluster, fmoe_layer_options *o, const int64_t *counts,
                   fmoe_plan_options options, const char *words) {
  fmoe_plan_report report = {.struct_size = sizeof report, .steps = 123456};
  if (!options.struct_size) options.struct_size = sizeof options;
  EXPECT(status, fmoe_cluster_plan(cluster, o, counts, &options, &report));
  CHECK(report.steps == 123456, "out-parameters are written only on FMOE_OK");
  CHECK(strstr(fmoe_last_error(), words), "\"%s\" without \"%s\"", fmoe_last_error(), words);
}

static void test_refusals(fmoe_cluster *johnny) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options = FMOE_ERROR_OPTIONS;
  const fmoe_plan_options plain = {0};
  fmoe_layer_options good = layer(E), bad;
  fmoe_plan_report report = {.struct_size = sizeof report};
  int64_t counts[W * E];
  EXPECT(argument, fmoe_cluster_plan(NULL, &good, hot, NULL, &report));
  EXPECT(argument, fmoe_cluster_plan(johnny, NULL, hot, NULL, &report));
  EXPECT(argument, fmoe_cluster_plan(johnny, &good, NULL, NULL, &report));
  EXPECT(argument, fmoe_cluster_plan(johnny, &good, hot, NULL, NULL));
  EXPECT(argument, fmoe_cluster_write(johnny, NULL));
  /* Links and devices are not replaced; these are made here, so that nothing of the machine's is at stake. */
  char folder[] = "/tmp/fastermoe-XXXXXX", link[64], pipe[64], kept[8] = "";
  CHECK(mkdtemp(folder) != NULL, "%s", folder);
  snprintf(link, sizeof link, "%s/link", folder), snprintf(pipe, sizeof pipe, "%s/pipe", folder);
  CHECK(!symlink("nowhere", link) && !mkfifo(pipe, 0600), "%s", folder);
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_write(johnny, link));
  EXPECT(FMOE_ERROR_FILE, fmoe_cluster_write(johnny, pipe));
  CHECK(readlink(link, kept, sizeof kept) == 7 && !unlink(link) && !unlink(pipe) && !rmdir(folder), "both are as they were");
  EXPECT(argument, fmoe_cluster_write(NULL, "x"));
  fmoe_cluster_destroy(NULL);
  CHECK(fmoe_cluster_size(NULL) == 0, "%d", fmoe_cluster_size(NULL));
  CHECK(fmoe_cluster_remote_share(NULL) == 0, "%g", fmoe_cluster_remote_share(NULL));
  static const char one[] = "{\"fastermoe_cluster\": 1, \"places\": [{\"name\": \"root\"}], \"workers\": ["
                            "{\"name\": \"a\", \"in\": \"root\", \"flops_per_second\": [[1, 1e9]]}]}";
  fmoe_cluster *lone = NULL;
  EXPECT(FMOE_OK, fmoe_cluster_read(file("one.json", one), &lone));
  CHECK(fmoe_cluster_remote_share(lone) == 0, "one worker leaves no place: %g", fmoe_cluster_remote_share(lone));
  fmoe_cluster_destroy(lone);
  report.struct_size = 4;
  EXPECT(options, fmoe_cluster_plan(johnny, &good, hot, NULL, &report));

  refuse(options, johnny, &good, hot, (fmoe_plan_options){.struct_size = 3}, "struct_size");
  refuse(options, johnny, &good, hot, (fmoe_plan_options){.shadowing = 5}, "shadowing is 0 to 4, not 5");
  refuse(options, johnny, &good, hot, (fmoe_plan_options){.shadowing = -1}, "-1");
  refuse(options, johnny, &good, hot, (fmoe_plan_options){.schedule = 3}, "schedule is 0 to 2, not 3");
  refuse(argument, johnny, &good, hot, (fmoe_plan_options){.group_size = -1}, "group_size");
  refuse(argument, johnny, &good, hot, (fmoe_plan_options){.shadowing = 2}, "shadows is NULL");
  uint8_t shadows[E] = {[7] = 2};
  refuse(argument, johnny, &good, hot, (fmoe_plan_options){.shadowing = 2, .shadows = shadows}, "shadows[7]");
  bad = layer(E + 1), refuse(argument, johnny, &bad, hot, plain, "17 experts cannot be shared equally by 16 workers");
  bad = layer(0), refuse(argument, johnny, &bad, hot, plain, "experts");
  bad = layer((int64_t)W << 24), bad.d_model = bad.d_hidden = 1, refuse(argument, johnny, &bad, hot, plain, "counts are more than");
  bad = layer(INT64_MAX), refuse(argument, johnny, &bad, hot, plain, "experts");
  bad = good, bad.d_model = 0, refuse(argument, johnny, &bad, hot, plain, "d_model");
  static const int64_t wrong[] = {-1, INT64_MIN, INT64_C(1) << 31, INT64_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    memcpy(counts, hot, sizeof counts), counts[3 * E + 5] = wrong[i];
    refuse(argument, johnny, &good, counts, plain, "counts[3][5]");
  }
  /* The largest that are allowed, all at once. */
  for (int i = 0; i < W * E; i++) counts[i] = INT32_MAX;
  for (int32_t shadowing = 0; shadowing <= 4; shadowing++) {
    if (shadowing == 2) continue;
    fmoe_plan_report r = plan(johnny, counts, (fmoe_plan_options){.shadowing = shadowing});
    CHECK(isfinite(r.seconds_planned) && r.seconds_planned >= r.seconds_ideal, "%g s", r.seconds_planned);
  }
}

int main(void) {
  if (!mkdtemp(folder)) return perror(folder), 2;
  for (int i = 0; i < W * E; i++) {
    balanced[i] = ROWS / E;
    hot[i] = i % E == 0 ? 413 : 109; /* a fifth of all rows */
  }
  test_round_trip();
  test_broken_files();
  fmoe_cluster *johnny;
  if (EXPECT(FMOE_OK, fmoe_cluster_read(johnny_file, &johnny))) {
    test_plans(johnny), test_refusals(johnny);
    fmoe_cluster_destroy(johnny);
  }
  const char *names[] = {"two.json", "once.json", "twice.json", "broken.json", "one.json"};
  for (int i = 0; i < 5; i++) unlink(file(names[i], NULL));
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
