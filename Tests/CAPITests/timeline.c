/* timeline.c: what fmoe_pass_write_timeline writes is JSON that says what ran when, on ranks as threads and over a mailbox.
 *
 * `timeline small` is for valgrind; `timeline keep DIRECTORY` leaves the files there, to be looked at. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crew.h"
#include "json.h"

static const uint64_t seed = 22360679;
static int small;
static const char *keep;

/* ---- a trace ------------------------------------------------------------------------------- */

typedef struct piece {
  int process, lane, rank; /* rank: at the other end, -1 */
  const char *name, *category, *trip;
  double begin, end, rows, bytes, round;
} piece;

enum { MOST_PIECES = 20000 };
typedef struct trace {
  json *document;
  int count;
  piece pieces[MOST_PIECES];
} trace;

static int is_named(const trace *t, const char *what, int process, const char *name) {
  for (const json *e = in(t->document, "traceEvents")->first; e; e = e->next)
    if (!strcmp(text_in(e, "name"), what) && number_in(e, "pid", -1) == process &&
        strstr(text_in(in(e, "args"), "name"), name))
      return 1;
  return 0;
}

/* The processes of a rank, as its file names them. */
static int process_of(const trace *t, int32_t rank, const char *kind) {
  char name[50];
  snprintf(name, sizeof name, "rank %d, %s", rank, kind);
  for (int process = 1; process <= 2 * MOST_RANKS + 2; process++)
    if (is_named(t, "process_name", process, name)) return process;
  return 0;
}

static trace *trace_read(const char *path) {
  trace *t = calloc(1, sizeof *t);
  if (!t) abort();
  t->document = json_read(path);
  const json *events = in(t->document, "traceEvents");
  if (!CHECK(events && events->kind == '[', "%s has no events", path)) return t;
  for (const json *e = events->first; e; e = e->next) {
    const char *phase = text_in(e, "ph");
    CHECK(*text_in(e, "name") && number_in(e, "pid", 0) >= 1, "an event without name or process");
    if (!strcmp(phase, "M")) continue;
    if (!CHECK(!strcmp(phase, "X") && t->count < MOST_PIECES, "%s: a phase \"%s\"", text_in(e, "name"), phase)) continue;
    const json *args = in(e, "args");
    double begin = number_in(e, "ts", NAN), length = number_in(e, "dur", NAN);
    t->pieces[t->count++] = (piece){
      .process = (int)number_in(e, "pid", 0), .lane = (int)number_in(e, "tid", 0), .rank = (int)number_in(args, "rank", -1),
      .name = text_in(e, "name"), .category = text_in(e, "cat"), .trip = text_in(args, "trip"), .begin = begin,
      .end = begin + length, .rows = number_in(args, "rows", 0), .bytes = number_in(args, "bytes", 0),
      .round = number_in(args, "round", -1)};
    CHECK(begin >= 0 && length >= 0 && number_in(e, "tid", 0) >= 1 && number_in(args, "waited_us", 0) >= 0,
          "%s: %g us from %g", text_in(e, "name"), length, begin);
  }
  return t;
}

static void trace_free(trace *t) { json_free(t->document), free(t); }

static const double rounding_us = 2e-3; /* both ends of a piece are rounded to nanoseconds */

/* Every piece is within a call, or within what was predicted for it; those of a lane come one after the other. */
static void check_order(const char *what, const trace *t) {
  for (int i = 0; i < t->count; i++) {
    const piece *p = &t->pieces[i];
    int inside = !strcmp(p->category, "call"), lane = 0;
    for (int j = 0; j < t->count; j++) {
      const piece *q = &t->pieces[j];
      if (q->process != p->process) continue;
      inside |= !strcmp(q->category, "call") && q->begin <= p->begin + rounding_us && p->end <= q->end + rounding_us &&
                (!strcmp(q->name, p->trip) || !strcmp(q->name, "route"));
      if (j != i && q->lane == p->lane && q->begin < p->end - rounding_us && p->begin < q->end - rounding_us) lane = 1;
    }
    CHECK(inside, "%s: \"%s\" of %s is in no such call", what, p->name, p->trip);
    CHECK(!lane, "%s: \"%s\" is at the same time as another piece of its lane %d", what, p->name, p->lane);
  }
}

/* Microseconds that S and R, or what `letters` begin with, share with the computing of experts. */
static double overlap(const trace *t, int process, const char *letters) {
  double shared = 0;
  for (int i = 0; i < t->count; i++)
    for (int j = 0; j < t->count; j++) {
      const piece *p = &t->pieces[i], *q = &t->pieces[j];
      if (p->process != process || q->process != process || !strchr(letters, *p->name) || p->name[1] != ' ' ||
          !strchr("CW", *q->name) || q->name[1] != ' ')
        continue;
      shared += fmax(0, fmin(p->end, q->end) - fmax(p->begin, q->begin));
    }
  return shared;
}

static double sum(const trace *t, int process, const char *trip, const char *begins, const char *contains, int rank,
                  int bytes) {
  double all = 0;
  for (int i = 0; i < t->count; i++) {
    const piece *p = &t->pieces[i];
    if (p->process == process && !strcmp(p->trip, trip) && !strncmp(p->name, begins, strlen(begins)) &&
        strstr(p->name, contains) && (rank < 0 || p->rank == rank))
      all += bytes ? p->bytes : p->rows;
  }
  return all;
}

/* ---- passes -------------------------------------------------------------------------------- */

typedef struct scene {
  spread *s;
  fmoe_layer *layer[MOST_RANKS];
  fmoe_plan_options plan;
  int reports;
  const char *name;
  trace *trace[MOST_RANKS];
} scene;

static void path_of(char *path, size_t room, const char *name, int32_t rank) {
  if (keep) snprintf(path, room, "%s/%s-%d.json", keep, name, rank);
  else snprintf(path, room, "/tmp/fastermoe-timeline-%d-%d.json", (int)getpid(), rank);
}

static void run_scene(crew *c, int32_t rank, void *context) {
  scene *at = context;
  const oracle *o = at->s->part[rank];
  char path[300];
  fmoe_plan_report report = {.struct_size = sizeof report};
  path_of(path, sizeof path, at->name, rank);
  at->layer[rank] = layer_of(c->groups[rank], o);
  batch b = batch_of(o, at->layer[rank]);
  for (int turn = 0; turn < 2; turn++) { /* the first one is slowed by memory that is new */
    begin(&b, at->layer[rank]);
    EXPECT(FMOE_OK, fmoe_plan(b.pass, &at->plan, at->reports ? &report : NULL));
    forward(&b), backward(&b);
    EXPECT(FMOE_OK, fmoe_pass_write_timeline(b.pass, path));
    if (turn == 0) fmoe_pass_destroy(b.pass), b.pass = NULL;
  }
  at->trace[rank] = trace_read(path);
  if (!keep) unlink(path);
  batch_free(&b);
}

static int64_t routed(const scene *at, int32_t from, int32_t to, int32_t ranks) {
  const oracle *o = at->s->part[from];
  int64_t rows = 0, local = o->experts / ranks;
  for (int64_t e = to * local; e < (to + 1) * local; e++) {
    const int is_shadow = at->plan.shadowing == 2 && at->plan.shadows[e];
    if (is_shadow ? from == to : 1) rows += o->counts[e];
  }
  return rows;
}

/* Rows and bytes of a rank's measured pieces are those that its experts compute and that it exchanges with each other. */
static void check_traffic(const crew *c, const scene *at, int32_t rank) {
  static const char *const trips[2] = {"forward", "backward"};
  const trace *t = at->trace[rank];
  const int process = process_of(t, rank, "measured");
  const int64_t row = at->s->part[rank]->model * (int64_t)sizeof(float);
  int64_t all = 0;
  for (int32_t r = 0; r < c->ranks; r++) all += routed(at, r, rank, c->ranks);
  for (int64_t e = 0; e < at->s->part[rank]->experts && at->plan.shadowing == 2; e++)
    if (at->plan.shadows[e] && e / (at->s->part[rank]->experts / c->ranks) != rank) all += at->s->part[rank]->counts[e];
  for (int trip = 0; trip < 2; trip++) {
    double computed = sum(t, process, trips[trip], "C ", "rows", -1, 0);
    CHECK(computed == (double)all, "%s, rank %d, %s: %g rows computed, not %lld", at->name, rank, trips[trip], computed,
          (long long)all);
    for (int32_t peer = 0; peer < c->ranks; peer++) {
      if (peer == rank) continue;
      const double out = c->mail ? (double)routed(at, rank, peer, c->ranks) : 0;
      const double into = c->mail ? (double)routed(at, peer, rank, c->ranks) : 0;
      const double got[4] = {
        sum(t, process, trips[trip], "S ", "→", peer, 0), sum(t, process, trips[trip], "S ", "←", peer, 0),
        sum(t, process, trips[trip], "R ", "←", peer, 0), sum(t, process, trips[trip], "R ", "→", peer, 0)};
      CHECK(got[0] == out && got[1] == into && got[2] == out && got[3] == into,
            "%s, %s: ranks %d and %d: S %g, %g, R %g, %g rows, not %g and %g", at->name, trips[trip], rank, peer, got[0],
            got[1], got[2], got[3], out, into);
      const double bytes = sum(t, process, trips[trip], "S ", "", peer, 1) + sum(t, process, trips[trip], "R ", "", peer, 1);
      CHECK(bytes == 2 * (out + into) * (double)row, "%s, %s: %g bytes with rank %d", at->name, trips[trip], bytes, peer);
    }
  }
  CHECK(sum(t, process, "backward", "W ", "rows", -1, 0) >= (double)all, "%s: all rows have weight gradients", at->name);
}

/* All ranks' clocks are one: nobody leaves a call before everybody is in it. */
static void check_clock(const crew *c, const scene *at, const char *call) {
  double begin = 0, end = INFINITY;
  for (int32_t r = 0; r < c->ranks; r++)
    for (int i = 0; i < at->trace[r]->count; i++) {
      const piece *p = &at->trace[r]->pieces[i];
      if (strcmp(p->category, "call") || strcmp(p->name, call) || p->process != process_of(at->trace[r], r, "measured")) continue;
      begin = fmax(begin, p->begin), end = fmin(end, p->end);
    }
  CHECK(begin > 0 && begin < end, "%s: the last rank begins %s at %g, the first ends it at %g", at->name, call, begin, end);
}

static void play(crew *c, scene *at) {
  crew_run(c, run_scene, at);
  for (int32_t r = 0; r < c->ranks; r++) {
    const trace *t = at->trace[r];
    const int measured = process_of(t, r, "measured"), predicted = process_of(t, r, "predicted");
    CHECK(measured && !predicted == !at->reports, "%s: processes %d and %d", at->name, measured, predicted);
    CHECK(is_named(t, "thread_name", measured, "calls") && is_named(t, "thread_name", measured, "communication") &&
              is_named(t, "thread_name", measured, "computation"), "%s: rank %d has its lanes", at->name, r);
    CHECK(!predicted || (is_named(t, "thread_name", predicted, "communication, to others") &&
                        is_named(t, "thread_name", predicted, "communication, from others") &&
                         is_named(t, "thread_name", predicted, "computation")), "%s: and as predicted", at->name);
    check_order(at->name, t);
    check_traffic(c, at, r);
  }
  check_clock(c, at, "forward"), check_clock(c, at, "backward");
}

static void end(crew *c, scene *at) {
  for (int32_t r = 0; r < c->ranks; r++) trace_free(at->trace[r]), fmoe_layer_destroy(at->layer[r]);
  spread_destroy(at->s), crew_destroy(c);
}

static shape shape_of(int64_t E) {
  return small ? (shape){.k = 2, .E = E, .d = 8, .h = 12, .activation = FMOE_GELU}
               : (shape){.k = 2, .E = E, .d = 128, .h = 512, .activation = FMOE_GELU};
}

/* Ranks as threads: rows never move.  Planned with a prediction, which begins where the work did. */
static void test_local(void) {
  static const int64_t tokens[4] = {300, 40, 0, 170}, few[4] = {9, 4, 0, 7};
  for (int32_t ranks = 2; ranks <= 4; ranks *= 2)
    for (int reports = 0; reports < 2; reports++) {
      crew *c = crew_create((crew_options){.ranks = ranks, .threads = 2});
      scene at = {.s = spread_create(ranks, small ? few : tokens, GATED, shape_of(8), seed), .reports = reports,
                  .plan = {.struct_size = sizeof at.plan}, .name = reports ? "local, predicted" : "local"};
      play(c, &at);
      for (int32_t r = 0; r < ranks && reports; r++) {
        const trace *t = at.trace[r];
        const int measured = process_of(t, r, "measured"), predicted = process_of(t, r, "predicted");
        double free = 0;
        for (int trip = 0; trip < 2; trip++) {
          const char *name = trip ? "backward" : "forward", *meeting = trip ? "all ranks meet for backward" : "all ranks meet for forward";
          double met = NAN, begins = NAN, ends = NAN;
          for (int i = 0; i < t->count; i++) {
            const piece *p = &t->pieces[i];
            if (p->process == measured && !strcmp(p->name, meeting)) met = p->end;
            if (p->process == predicted && !strcmp(p->name, name)) begins = p->begin, ends = p->end;
          }
          if (met < free) met = free; /* what was predicted to go before is not over */
          CHECK(fabs(met - begins) <= rounding_us, "%s is measured from %g on and predicted from %g", name, met, begins);
          free = ends;
          double rows = sum(t, predicted, name, "C ", "rows", -1, 0), wanted = sum(t, measured, name, "C ", "rows", -1, 0);
          CHECK(rows == wanted, "rank %d, %s: predicted to compute %g rows, not %g", r, name, rows, wanted);
        }
      }
      end(c, &at);
    }
}

/* No row is computed before rows of its round have begun to come, from the one rank that sends in it. */
static void check_arrivals(const char *what, const trace *t, int process) {
  int pairs = 0;
  for (int i = 0; i < t->count; i++)
    for (int j = 0; j < t->count; j++) {
      const piece *s = &t->pieces[i], *c = &t->pieces[j];
      if (s->process != process || c->process != process || strncmp(s->name, "S ", 2) || !strstr(s->name, "←") ||
          strncmp(c->name, "C ", 2) || c->round != s->round || strcmp(c->trip, s->trip))
        continue;
      pairs++;
      CHECK(c->begin >= s->begin - rounding_us, "%s: \"%s\" begins %g us before \"%s\"", what, c->name,
            s->begin - c->begin, s->name);
    }
  CHECK(pairs >= 6, "%s: %d computes of rows that came", what, pairs);
}

/* Over a transport: rows travel while experts compute, but not with the coarse schedule. */
static void test_schedules(void) {
  static const int64_t tokens[4] = {512, 512, 512, 512}, few[4] = {24, 24, 24, 24};
  for (int32_t schedule = 1; schedule <= 2; schedule++) {
    crew *c = crew_create((crew_options){
      .ranks = 4, .over_mailbox = 1, .mail = {.seed = seed, .delay_microseconds = small ? 100 : 3000, .reorder = 1}});
    scene at = {.s = spread_create(4, small ? few : tokens, BALANCED, shape_of(8), seed),
                .plan = {.struct_size = sizeof at.plan, .schedule = schedule, .shadowing = 1, .group_size = 1},
                .name = schedule == 1 ? "coarse" : "pairwise"};
    play(c, &at);
    double shared = 0;
    for (int32_t r = 0; r < 4 && schedule == 2; r++) check_arrivals(at.name, at.trace[r], process_of(at.trace[r], r, "measured"));
    for (int32_t r = 0; r < 4; r++) shared += overlap(at.trace[r], process_of(at.trace[r], r, "measured"), "SR");
    if (schedule == 1) CHECK(shared <= 100 * rounding_us, "coarse: rows travel for %g us while experts compute", shared);
    else CHECK(small || shared > 1000, "pairwise: rows travel for only %g us while experts compute", shared);
    end(c, &at);
  }
}

/* A shadowed expert comes to each rank but its owner, and its gradients go from each but the owner's neighbour's. */
static void test_shadows(void) {
  static const int64_t tokens[4] = {200, 30, 90, 0}, few[4] = {9, 4, 8, 0};
  static const uint8_t shadows[8] = {1, 0, 0, 0, 0, 1, 0, 0};
  const shape shape = shape_of(8);
  crew *c = crew_create((crew_options){.ranks = 4, .over_mailbox = 1, .mail = {.seed = seed}});
  scene at = {.s = spread_create(4, small ? few : tokens, SKEWED, shape, seed), .name = "shadows",
              .plan = {.struct_size = sizeof at.plan, .schedule = 2, .shadowing = 2, .group_size = 2, .shadows = shadows}};
  play(c, &at);
  double fetched = 0, sent = 0, reduced = 0, added = 0;
  for (int32_t r = 0; r < 4; r++) {
    const int process = process_of(at.trace[r], r, "measured");
    fetched += sum(at.trace[r], process, "forward", "fetch expert ", "←", -1, 1);
    sent += sum(at.trace[r], process, "forward", "fetch expert ", "→", -1, 1);
    added += sum(at.trace[r], process, "backward", "reduce gradients of expert ", "←", -1, 1);
    reduced += sum(at.trace[r], process, "backward", "reduce gradients of expert ", "→", -1, 1);
  }
  const double expert = (double)(2 * shape.d * shape.h + shape.d + shape.h) * sizeof(float);
  CHECK(fetched == sent && added == reduced && fetched == added && fetched >= 6 * expert && fetched < 6 * (expert + 64),
        "2 experts for 3 ranks: %g bytes sent, %g fetched, %g and %g reduced, not %g", sent, fetched, reduced, added, 6 * expert);
  end(c, &at);
}

/* ---- what is refused ----------------------------------------------------------------------- */

static void test_refusals(void) {
  static const int64_t tokens[1] = {5};
  char path[100], link[100];
  crew *c = crew_create((crew_options){.ranks = 1});
  spread *s = spread_create(1, tokens, GATED, (shape){.k = 1, .E = 2, .d = 4, .h = 4, .activation = FMOE_GELU}, seed);
  fmoe_layer *layer = layer_of(c->groups[0], s->part[0]);
  batch b = batch_of(s->part[0], layer);
  snprintf(path, sizeof path, "/tmp/fastermoe-timeline-%d.json", (int)getpid());
  snprintf(link, sizeof link, "/tmp/fastermoe-timeline-%d.link", (int)getpid());
  begin(&b, layer);
  EXPECT(FMOE_ERROR_STAGE, fmoe_pass_write_timeline(b.pass, path));
  EXPECT(FMOE_OK, fmoe_plan(b.pass, NULL, NULL));
  EXPECT(FMOE_ERROR_STAGE, fmoe_pass_write_timeline(b.pass, path));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_pass_write_timeline(b.pass, NULL));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_pass_write_timeline(NULL, path));
  CHECK(access(path, F_OK), "what is refused leaves no file");
  forward(&b);
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_pass_write_timeline(b.pass, NULL));
  EXPECT(FMOE_ERROR_FILE, fmoe_pass_write_timeline(b.pass, "/no-such-directory/timeline.json"));
  EXPECT(FMOE_ERROR_FILE, fmoe_pass_write_timeline(b.pass, "/tmp"));
  EXPECT(FMOE_ERROR_FILE, fmoe_pass_write_timeline(b.pass, "/dev/null"));
  CHECK(!symlink("/tmp/fastermoe-no-such-target", link), "a link");
  EXPECT(FMOE_ERROR_FILE, fmoe_pass_write_timeline(b.pass, link));
  struct stat there;
  CHECK(!lstat(link, &there) && S_ISLNK(there.st_mode) && access("/tmp/fastermoe-no-such-target", F_OK), "the link stays");
  unlink(link);
  EXPECT(FMOE_OK, fmoe_pass_write_timeline(b.pass, path)); /* forward alone */
  trace *t = trace_read(path);
  CHECK(sum(t, 1, "forward", "C ", "rows", -1, 0) == 5 && sum(t, 1, "backward", "", "", -1, 0) == 0, "forward alone");
  trace_free(t);
  backward(&b);
  EXPECT(FMOE_OK, fmoe_pass_write_timeline(b.pass, path)); /* replaces it */
  t = trace_read(path);
  CHECK(sum(t, 1, "backward", "C ", "rows", -1, 0) == 5, "forward and backward");
  trace_free(t);
  unlink(path);
  batch_free(&b), fmoe_layer_destroy(layer), spread_destroy(s), crew_destroy(c);
}

#define RUN(test) (begin_test("timeline: " #test, small ? 500 : 60), test())

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  keep = count > 2 && !strcmp(arguments[1], "keep") ? arguments[2] : NULL;
  printf("timeline: seed %llu\n", (unsigned long long)seed);
  RUN(test_refusals);
  if (!small) RUN(test_local); /* measures speeds, for which valgrind is too slow */
  RUN(test_schedules);
  RUN(test_shadows);
  return summary();
}
