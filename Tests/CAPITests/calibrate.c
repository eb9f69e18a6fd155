/* calibrate.c: groups that measure themselves, and what they make of it.  The files that keep it are in profiles.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "measured.h"

/* ---- measured, written, read, planned --------------------------------------------------------- */

typedef struct scene {
  spread *s;
  shape shape;
  fmoe_plan_report report[MOST_RANKS];
} scene;

/* Reports, refused before something was measured. */
static void run_uncalibrated(crew *c, int32_t rank, void *context) {
  scene *at = context;
  fmoe_cluster *cluster = (fmoe_cluster *)&cluster;
  EXPECT(FMOE_ERROR_STAGE, fmoe_cluster_of_group(c->groups[rank], &cluster));
  CHECK(strstr(fmoe_last_error(), "fmoe_group_calibrate") && cluster == (fmoe_cluster *)&cluster, "%s", fmoe_last_error());
  if (!c->mail || c->ranks == 1) return;
  fmoe_plan_report report = {.struct_size = sizeof report};
  fmoe_layer *layer = layer_of(c->groups[rank], at->s->part[rank]);
  batch b = batch_of(at->s->part[rank], layer);
  begin(&b, layer);
  EXPECT(FMOE_ERROR_UNSUPPORTED, fmoe_plan(b.pass, NULL, &report));
  CHECK(strstr(fmoe_last_error(), "fmoe_group_calibrate"), "%s", fmoe_last_error());
  fmoe_plan_options paper = {.struct_size = sizeof paper, .shadowing = 3};
  EXPECT(FMOE_ERROR_UNSUPPORTED, fmoe_plan(b.pass, &paper, NULL));
  EXPECT(FMOE_OK, fmoe_plan(b.pass, NULL, NULL));
  batch_free(&b);
  fmoe_layer_destroy(layer);
}

static const fmoe_plan_options plans[] = {
    {.schedule = 0}, {.shadowing = 1}, {.shadowing = 1, .schedule = 2, .group_size = 1}, {.shadowing = 1, .schedule = 1},
    {.shadowing = 3}, {.shadowing = 4}, {.schedule = 2},
};
enum { PLANS = sizeof plans / sizeof plans[0] };

/* A step by each plan is the oracle's, and its prediction that of the cluster which the group makes of itself. */
static void run_plans(crew *c, int32_t rank, void *context) {
  scene *at = context;
  const oracle *o = at->s->part[rank];
  fmoe_cluster *cluster;
  if (!EXPECT(FMOE_OK, fmoe_cluster_read(of_rank("cluster", 0), &cluster))) return;
  fmoe_layer *layer = layer_of(c->groups[rank], o);
  fmoe_layer_options options = options_of(o);
  int64_t *counts = calloc((size_t)(c->ranks * at->shape.E), sizeof *counts);
  for (int32_t r = 0; r < c->ranks; r++)
    for (int64_t i = 0; i < at->s->part[r]->tokens * o->choices; i++)
      if (at->s->part[r]->choice[i] >= 0) counts[r * at->shape.E + at->s->part[r]->choice[i]]++;
  for (int i = -1; i < PLANS; i++) { /* -1: forward plans by itself */
    fmoe_plan_options plan = i < 0 ? (fmoe_plan_options){0} : plans[i];
    plan.struct_size = sizeof plan;
    batch b = batch_of(o, layer);
    EXPECT(FMOE_OK, fmoe_layer_zero_gradients(layer));
    begin(&b, layer);
    fmoe_plan_report got = {.struct_size = sizeof got}, wanted = got;
    const int is_reported = !c->mail || i % 2 == 0; /* one that is asked for by one rank is made by all */
    if (i >= 0 && plan.shadowing == 3 && !c->mail && c->ranks > 1) {
      EXPECT(FMOE_ERROR_UNSUPPORTED, fmoe_plan(b.pass, &plan, &got));
    } else if (i >= 0 && EXPECT(FMOE_OK, fmoe_plan(b.pass, &plan, is_reported || rank == 0 ? &got : NULL)) &&
               (is_reported || rank == 0)) {
      EXPECT(FMOE_OK, fmoe_cluster_plan(cluster, &options, counts, &plan, &wanted));
      CHECK(!c->mail || c->ranks == 1 || !memcmp(&got, &wanted, sizeof got),
            "plan %d: %g s in groups of %d with %d shadows, but of the cluster %g s, %d, %d",
            i, got.seconds_planned, got.group_size, got.shadows, wanted.seconds_planned, wanted.group_size, wanted.shadows);
      CHECK(got.seconds_planned > 0 && got.seconds_ideal <= got.seconds_planned, "%g s, ideally %g", got.seconds_planned, got.seconds_ideal);
    }
    forward(&b), backward(&b);
    EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
    read_gradients(&b, layer);
    check_batch("a plan by prediction", &b, o), check_gradients("a plan by prediction", &b, o);
    batch_free(&b);
  }
  free(counts);
  fmoe_layer_destroy(layer);
  fmoe_cluster_destroy(cluster);
}

static void test_calibrated(int32_t ranks, int over_mailbox, int routing) {
  static const int64_t tokens[MOST_RANKS] = {90, 3, 41, 17};
  scene at = {.shape = {.k = 2, .E = 2 * ranks, .d = 24, .h = 36, .activation = FMOE_GELU}};
  at.s = spread_create(ranks, tokens, routing, at.shape, seed);
  crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = over_mailbox, .timeout = 60});
  crew_run(c, run_uncalibrated, &at);
  for (int again = 0; again < 2; again++) {
    crew_run(c, run_calibrate, NULL);
    crew_run(c, run_write, "cluster");
    char *first = text_of(of_rank("cluster", 0));
    for (int32_t r = 0; r < ranks; r++) {
      char *text = text_of(of_rank("cluster", r));
      CHECK(!strcmp(text, first) && strlen(text) > 100, "rank %d made another cluster: %s", r, text);
      free(text);
    }
    CHECK(!strstr(first, "latency_seconds") == (!over_mailbox || ranks == 1), "who shares memory has no links: %s", first);
    CHECK(strstr(first, "\"rank 0\"") && strstr(first, "\"host 0 ("), "names: %s", first);
    free(first);
    crew_run(c, run_plans, &at);
  }
  for (int32_t r = 0; r < ranks; r++) unlink(of_rank("cluster", r));
  crew_destroy(c);
  spread_destroy(at.s);
}

static void test_calibrate(void) {
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) test_calibrated(ranks, over_mailbox, ranks == 2 ? GATED : SKEWED);
}

/* ---- one rank at fault ----------------------------------------------------------------------------- */

static void run_wrong(crew *c, int32_t rank, void *unused) {
  static const double wrong[] = {0, -1, NAN, INFINITY, -INFINITY};
  (void)unused;
  fmoe_cluster *cluster;
  for (int i = 0; i < 5; i++)
    EXPECT(rank ? FMOE_ERROR_PEER : FMOE_ERROR_ARGUMENT, fmoe_group_calibrate(c->groups[rank], rank ? moment : wrong[i]));
  EXPECT(FMOE_ERROR_DISAGREE, fmoe_group_calibrate(c->groups[rank], rank ? 0.1 : 0.2));
  EXPECT(FMOE_OK, fmoe_group_calibrate(c->groups[rank], 1e-9)); /* as short as can be */
  EXPECT(FMOE_ERROR_DISAGREE, rank ? fmoe_group_calibrate(c->groups[rank], 0.1) : fmoe_cluster_of_group(c->groups[0], &cluster));
  EXPECT(rank ? FMOE_ERROR_PEER : FMOE_ERROR_ARGUMENT, fmoe_cluster_of_group(c->groups[rank], rank ? &cluster : NULL));
  if (EXPECT(FMOE_OK, fmoe_cluster_of_group(c->groups[rank], &cluster))) fmoe_cluster_destroy(cluster);
}

static void test_wrong_calls(void) {
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    crew *c = crew_create((crew_options){.ranks = 2, .over_mailbox = over_mailbox, .timeout = 60});
    crew_run(c, run_wrong, NULL);
    crew_destroy(c);
  }
}

typedef struct loss {
  int64_t starts, ends; /* of rank 1, at which its transport fails; 0: it never comes to calibrate */
  int loud;
} loss;

static void run_lost(crew *c, int32_t rank, void *context) {
  const loss *l = context;
  const int is_absent = !l->starts && !l->ends;
  if (rank == 1 && is_absent) return;
  if (rank == 1) mailbox_fail(c->mail, 1, l->starts, l->ends, l->loud);
  double start = seconds();
  EXPECT_EITHER(FMOE_ERROR_TIMEOUT, FMOE_ERROR_PEER, fmoe_group_calibrate(c->groups[rank], moment));
  CHECK(seconds() - start < moment + c->options.timeout + slack, "took %g s", seconds() - start);
  start = seconds();
  EXPECT_EITHER(FMOE_ERROR_TIMEOUT, FMOE_ERROR_PEER, fmoe_group_calibrate(c->groups[rank], moment)); /* the group is broken */
  CHECK(seconds() - start < slack, "took %g s", seconds() - start);
}

static void test_lost_rank(void) {
  static const loss losses[] = {{0, 0, 0}, {4, 0, 0}, {0, 7, 0}, {20, 0, 1}, {0, 60, 1}, {100, 0, 0}, {0, 150, 0}};
  for (size_t i = 0; i < sizeof losses / sizeof losses[0]; i++) {
    crew *c = crew_create((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 0.7});
    loss l = losses[i];
    crew_run(c, run_lost, &l);
    crew_destroy(c);
  }
  crew *c = crew_create((crew_options){.ranks = 2, .timeout = 0.3});
  loss absent = {0, 0, 0};
  crew_run(c, run_lost, &absent);
  crew_destroy(c);
}

/* ---- gates that limit what leaves a host ------------------------------------------------------------ */

/* Which this rank's is: the library asks for it. */
static _Thread_local const char *host_name;
int gethostname(char *name, size_t size) { return snprintf(name, size, "%s", host_name ? host_name : "here") < 0; }

static void join_from(crew *c, int32_t rank, void *unused) {
  (void)unused;
  host_name = rank / 2 ? "there" : "here";
  if (!EXPECT(FMOE_OK, crew_join(c, rank))) exit(summary());
}

/* A gate without a share of its own chooses as one that is given `share`. */
static void same_as(fmoe_group *group, const oracle *o, int32_t gate, double share, int64_t *moved) {
  fmoe_layer_options options = options_of(o);
  fmoe_layer *layers[2];
  fmoe_routing r[2] = {{.struct_size = sizeof r[0]}, {.struct_size = sizeof r[0]}};
  batch b[2];
  for (int given = 0; given < 2; given++) {
    options.gate = gate, options.remote_share = given ? share : 0;
    if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layers[given]))) exit(summary());
    b[given] = batch_of(o, layers[given]);
    EXPECT(FMOE_OK, fmoe_gate(layers[given], b[given].x, o->tokens, &b[given].pass));
    EXPECT(FMOE_OK, fmoe_pass_routing(b[given].pass, &r[given]));
  }
  CHECK(r[0].moved == r[1].moved && !memcmp(r[0].choices, r[1].choices, (size_t)(o->tokens * o->choices) * sizeof(int32_t)),
        "gate %d moves %lld choices, but with a share of %g %lld", gate, (long long)r[0].moved, share, (long long)r[1].moved);
  *moved = r[0].moved;
  for (int given = 0; given < 2; given++) batch_free(&b[given]), fmoe_layer_destroy(layers[given]);
}

static void run_shares(crew *c, int32_t rank, void *context) {
  const spread *s = context;
  fmoe_cluster *cluster;
  int64_t usual[2], moved[2];
  for (int i = 0; i < 2; i++) same_as(c->groups[rank], s->part[rank], FMOE_GATE_TOPOLOGY + i, 0.14, &usual[i]);
  EXPECT(FMOE_OK, fmoe_group_calibrate(c->groups[rank], moment));
  if (!EXPECT(FMOE_OK, fmoe_cluster_of_group(c->groups[rank], &cluster))) return;
  double share = fmoe_cluster_remote_share(cluster);
  CHECK(share > 0 && share <= 1, "%g", share);
  for (int i = 0; i < 2; i++) same_as(c->groups[rank], s->part[rank], FMOE_GATE_TOPOLOGY + i, share, &moved[i]);
  CHECK(fabs(share - 0.14) < 0.02 || (moved[0] < usual[0]) == (share > 0.14), "%lld, %lld", (long long)moved[0], (long long)usual[0]);
  if (rank == 0) printf("calibrate: of a share of 0.14, %lld choices move, of a measured %g %lld\n", (long long)usual[0], share, (long long)moved[0]);
  fmoe_cluster_destroy(cluster);
}

static void test_measured_share(void) {
  static const int64_t tokens[4] = {200, 200, 200, 200};
  const shape shape = {.k = 2, .E = 8, .d = 12, .h = 20, .activation = FMOE_GELU};
  spread *s = spread_create(4, tokens, GATED, shape, seed);
  crew *c = crew_without_groups((crew_options){.ranks = 4, .over_mailbox = 1, .timeout = 60});
  crew_run(c, join_from, NULL);
  crew_run(c, run_shares, s);
  crew_destroy(c), spread_destroy(s);
}

#define RUN(test) (begin_test("calibrate: " #test, 200), test())

int main(void) {
  printf("seed %llu\n", (unsigned long long)seed);
  if (!mkdtemp(folder)) return perror(folder), 2;
  RUN(test_calibrate);
  RUN(test_measured_share);
  RUN(test_wrong_calls);
  RUN(test_lost_rank);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
