/* calibrate.c: groups that measure themselves, what they make of it, and files that keep it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crew.h"

static const uint64_t seed = 22360679;
static const double moment = 0.15; /* seconds to measure for */
static const double slack = 60;    /* seconds more, on a loaded machine: less than any hang */
static char folder[] = "/tmp/fastermoe-calibrate-XXXXXX";
static char profile[100];

static char *slurp(const char *path) { /* the caller frees it */
  char *text = calloc(1, 1 << 16);
  FILE *in = fopen(path, "r");
  if (in) {
    if (!fread(text, 1, (1 << 16) - 1, in)) text[0] = 0;
    fclose(in);
  }
  return text;
}

static void spill(const char *path, const char *text) {
  FILE *out = fopen(path, "w");
  if (!out || fputs(text, out) < 0 || fclose(out)) perror(path), exit(2);
}

static const char *of_rank(const char *name, int32_t rank) {
  static _Thread_local char path[200];
  snprintf(path, sizeof path, "%s/%s%d.json", folder, name, rank);
  return path;
}

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

static void run_calibrate(crew *c, int32_t rank, void *unused) {
  (void)unused;
  double start = seconds();
  EXPECT(FMOE_OK, fmoe_group_calibrate(c->groups[rank], moment));
  CHECK(seconds() - start < moment + slack, "took %g s", seconds() - start);
}

static void run_write(crew *c, int32_t rank, void *context) {
  fmoe_cluster *cluster;
  if (!EXPECT(FMOE_OK, fmoe_cluster_of_group(c->groups[rank], &cluster))) return;
  CHECK(fmoe_cluster_size(cluster) == c->ranks, "%d workers", fmoe_cluster_size(cluster));
  EXPECT(FMOE_OK, fmoe_cluster_write(cluster, of_rank(context, rank)));
  fmoe_cluster_destroy(cluster);
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
    char *first = slurp(of_rank("cluster", 0));
    for (int32_t r = 0; r < ranks; r++) {
      char *text = slurp(of_rank("cluster", r));
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

/* ---- profiles ------------------------------------------------------------------------------------ */

static void join_as(crew *c, int32_t rank, void *context) {
  fmoe_status *status = context;
  status[rank] = crew_join(c, rank);
  if (status[rank] == FMOE_ERROR_FILE) /* this rank's text names the file */
    CHECK(rank == 0 && strstr(fmoe_last_error(), c->options.profile), "%s", fmoe_last_error());
}

/* Making a group with this file fails on rank 0 with words, and on all others. */
static void check_refused(int32_t ranks, const char *text, const char *words) {
  spill(profile, text);
  crew *c = crew_without_groups((crew_options){.ranks = ranks, .over_mailbox = 1, .timeout = 20, .profile = profile});
  fmoe_status status[MOST_RANKS];
  crew_run(c, join_as, status);
  for (int32_t r = 0; r < ranks; r++)
    CHECK(status[r] == (r ? FMOE_ERROR_PEER : FMOE_ERROR_FILE), "rank %d: %s", r, fmoe_status_name(status[r]));
  crew_destroy(c);
  fmoe_group *group = (fmoe_group *)&group;
  fmoe_group_options o = {.struct_size = sizeof o, .profile = profile, .threads = 1};
  EXPECT(FMOE_ERROR_FILE, fmoe_group_create_local(1, &o, &group));
  CHECK(group == (fmoe_group *)&group, "out-parameters are written only on FMOE_OK");
  if (words) CHECK(strstr(fmoe_last_error(), profile), "\"%s\" names no file", fmoe_last_error());
}

/* `text` with the first `from` made `to`; the caller frees it. */
static char *with(const char *text, const char *from, const char *to) {
  const char *at = strstr(text, from);
  char *made = malloc(strlen(text) + strlen(to) + 1);
  if (!CHECK(at, "no %s in %s", from, text)) return strcpy(made, text);
  sprintf(made, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  return made;
}

static void test_profiles(void) {
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    unlink(profile);
    crew_options options = {.ranks = 2, .over_mailbox = over_mailbox, .timeout = 60, .profile = profile};
    crew *c = crew_create(options); /* no file yet, which is fine */
    CHECK(access(profile, F_OK), "and none is made");
    crew_run(c, run_calibrate, NULL);
    crew_run(c, run_write, "first");
    crew_destroy(c);
    char *text = slurp(profile);
    CHECK(strstr(text, "\"fastermoe_profile\" : 1"), "%s", text);
    c = crew_create(options);
    crew_run(c, run_write, "second");
    char *first = slurp(of_rank("first", 0));
    for (int32_t r = 0; r < 2; r++) {
      char *second = slurp(of_rank("second", r));
      CHECK(!strcmp(first, second) && strlen(first) > 100, "read back: %s", second);
      free(second), unlink(of_rank("first", r)), unlink(of_rank("second", r));
    }
    char *after = slurp(profile);
    CHECK(!strcmp(text, after), "reading changes no file");
    free(first), free(after);
    crew_destroy(c);
    if (over_mailbox) {
      static const struct { const char *from, *to; } changes[] = {
          {"\"threads\" : 1", "\"threads\" : 2"}, {"\"host\" : 0", "\"host\" : 1"}, {"\"package\" : 0", "\"package\" : 3"},
          {"\"numa_node\" : 0", "\"numa_node\" : 1"}, {"\"cores\" : ", "\"cores\" : 9"}, {"x86-64-v", "x86-64-w"},
          {"\"processor\" : \"", "\"processor\" : \"Other "}, {"\"fastermoe_profile\" : 1", "\"fastermoe_profile\" : 2"},
          {"\"within_hosts\"", "\"between_hosts\""}, {"\"message_slowdown\" : ", "\"message_slowdown\" : -"},
          {"\"latency_seconds\" : ", "\"latency_seconds\" : -"}, {"\"bytes_per_second\" : ", "\"bytes_per_second\" : -"},
          {"\"workers\"", "\"worker\""}, {"{", "["}, {" 576,", " 577,"}, /* rows, and no digits of a rate */
      };
      for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        if (changes[i].from[0] == 'x' && !strstr(text, changes[i].from)) continue; /* another architecture */
        char *other = with(text, changes[i].from, changes[i].to);
        check_refused(2, other, "");
        free(other);
      }
      check_refused(3, text, "2 workers");
      check_refused(2, "", "");
    } else {
      check_refused(2, text, NULL); /* who shares memory is not who has links; and one worker is not two */
    }
    free(text);
  }
  unlink(profile);
}

static void run_unwritable(crew *c, int32_t rank, void *context) {
  const spread *s = context;
  fmoe_cluster *cluster;
  EXPECT(rank ? FMOE_ERROR_PEER : FMOE_ERROR_FILE, fmoe_group_calibrate(c->groups[rank], 0.05));
  EXPECT(FMOE_ERROR_STAGE, fmoe_cluster_of_group(c->groups[rank], &cluster)); /* nothing has changed */
  fmoe_layer *layer = layer_of(c->groups[rank], s->part[rank]);
  batch b = run(layer, s->part[rank]);
  check_batch("the group goes on", &b, s->part[rank]);
  batch_free(&b), fmoe_layer_destroy(layer);
}

static void run_some_profile(crew *c, int32_t rank, void *unused) {
  (void)unused;
  fmoe_transport transport = mailbox_transport(c->mail, rank);
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .profile = rank ? profile : NULL};
  fmoe_group *group;
  EXPECT(FMOE_ERROR_DISAGREE, fmoe_group_create(&transport, &o, &group));
}

static void test_bad_paths(void) {
  static const int64_t tokens[2] = {20, 31};
  const shape shape = {.k = 2, .E = 4, .d = 12, .h = 20, .activation = FMOE_GELU};
  spread *s = spread_create(2, tokens, GATED, shape, seed);
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    crew *c = crew_create((crew_options){
        .ranks = 2, .over_mailbox = over_mailbox, .timeout = 60, .profile = "/no-such-folder/profile.json"});
    crew_run(c, run_unwritable, s);
    crew_destroy(c);
  }
  spread_destroy(s);
  fmoe_group *group;
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .profile = folder}; /* there, but not to be read */
  EXPECT(FMOE_ERROR_FILE, fmoe_group_create_local(1, &o, &group));
  crew *c = crew_without_groups((crew_options){.ranks = 2, .over_mailbox = 1});
  crew_run(c, run_some_profile, NULL);
  crew_destroy(c);
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
  snprintf(profile, sizeof profile, "%s/profile.json", folder);
  RUN(test_calibrate);
  RUN(test_measured_share);
  RUN(test_profiles);
  RUN(test_bad_paths);
  RUN(test_wrong_calls);
  RUN(test_lost_rank);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
