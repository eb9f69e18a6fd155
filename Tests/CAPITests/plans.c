/* plans.c: whatever the plan of a pass, the outputs are the same bits, and gradients the same to rounding.
 *
 * Ranks are threads, over the library's own memory and over a mailbox.  `plans small` is for valgrind. */
#include <string.h>

#include "scene.h"

/* The same batch with no plan, the default plan and a named one: the same bits. */
static void run_plans(crew *c, int32_t rank, void *context) {
  scene *at = context;
  const fmoe_plan_options plain = {.struct_size = sizeof plain, .shadowing = 1, .schedule = 1};
  make_layer(c, rank, &at->all);
  fmoe_layer *layer = at->all.layer[rank];
  batch unplanned = run(layer, at->all.s->part[rank]);
  check_batch("plan", &unplanned, unplanned.o);
  for (int plan = 0; plan < 2; plan++) {
    batch b = batch_of(at->all.s->part[rank], layer);
    EXPECT(FMOE_OK, fmoe_layer_zero_gradients(layer));
    begin(&b, layer);
    EXPECT(FMOE_OK, fmoe_plan(b.pass, plan ? &plain : NULL, NULL));
    forward(&b), backward(&b);
    EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
    read_gradients(&b, layer);
    check_bits("a plan of no shadows changes no bit", &b, &unplanned);
    batch_free(&b);
  }
  batch_free(&unplanned);
}

/* Any schedule, any set of shadows and any group size: the same outputs bit for bit, gradients to rounding. */
static void run_any_plan(crew *c, int32_t rank, void *context) {
  scene *at = context;
  const oracle *o = at->all.s->part[rank];
  uint8_t shadows[64];
  uint64_t dice = seed; /* the same on all ranks */
  make_layer(c, rank, &at->all);
  fmoe_layer *layer = at->all.layer[rank];
  batch unplanned = run(layer, o);
  for (int turn = 0; turn < (small ? 6 : 14); turn++) {
    /* None, the first (which is hot), all, all fetched again for backward, then any. */
    for (int64_t e = 0; e < o->experts; e++)
      shadows[e] = turn < 4 ? turn >= 2 && (turn == 3 || e == 0) : uniform(&dice) < 0.4;
    fmoe_plan_options plan = {.struct_size = sizeof plan, .shadowing = turn == 4 || turn == 5 ? 4 : 2, .shadows = shadows,
                              .schedule = turn % 2 ? 2 : (int32_t)(uniform(&dice) * 3),
                              .group_size = (int32_t)(uniform(&dice) * (c->ranks + 1))};
    batch b = batch_of(o, layer);
    EXPECT(FMOE_OK, fmoe_layer_zero_gradients(layer));
    begin(&b, layer);
    EXPECT(FMOE_OK, fmoe_plan(b.pass, &plan, NULL));
    forward(&b), backward(&b);
    EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
    read_gradients(&b, layer);
    check_batch("any plan", &b, o);
    CHECK(!o->tokens || !memcmp(b.y, unplanned.y, (size_t)(o->tokens * o->model) * sizeof *b.y),
          "outputs change with schedule %d, groups of %d, turn %d", plan.schedule, plan.group_size, turn);
    batch_free(&b);
  }
  batch_free(&unplanned);
}

static void test_any_plan(void) {
  static const int64_t even[8] = {20, 20, 20, 20, 20, 20, 20, 20}, uneven[8] = {90, 0, 31, 1, 7, 0, 15, 64};
  for (int32_t ranks = 1; ranks <= (small ? 2 : 8); ranks *= 2)
    for (int way = 0; way < WAYS; way++)
      for (int routing = 0; routing < ROUTINGS; routing++)
        for (int gated = 0; gated < 2; gated++) {
          const shape shape = {.k = 2, .E = 8, .d = 36, .h = 20, .activation = gated ? FMOE_SWIGLU : FMOE_GELU};
          crew *c = crew_of(ranks, way);
          scene at = {.all.s = spread_create(ranks, routing % 2 ? uneven : even, routing, shape, seed)};
          crew_run(c, run_any_plan, &at);
          layers_destroy(&at.all, ranks);
          spread_destroy(at.all.s);
          check_ended(c), crew_destroy(c);
        }
}

/* A report, for which links must have been measured; the plan can be made without it. */
static void run_report(crew *c, int32_t rank, void *context) {
  scene *at = context;
  fmoe_plan_report report = {.struct_size = sizeof report};
  batch b = batch_of(at->all.s->part[rank], at->all.layer[rank]);
  begin(&b, at->all.layer[rank]);
  if (c->mail) {
    EXPECT(FMOE_ERROR_UNSUPPORTED, fmoe_plan(b.pass, NULL, &report));
    EXPECT(FMOE_OK, fmoe_plan(b.pass, NULL, NULL));
  } else if (EXPECT(FMOE_OK, fmoe_plan(b.pass, NULL, &report))) {
    CHECK(report.shadows == 0 && report.seconds_planned > 0 && report.seconds_planned <= report.seconds_plain &&
              report.seconds_ideal <= report.seconds_planned && report.flops_per_worker > 0,
          "a report: %d shadows, %g of %g s, ideally %g, %g flop/s", report.shadows, report.seconds_planned,
          report.seconds_plain, report.seconds_ideal, report.flops_per_worker);
  }
  forward(&b);
  check_close("after a report", "y", b.y, b.o->y, b.o->tokens * b.o->model);
  batch_free(&b);
}

static void test_plans(void) {
  static const int64_t tokens[2] = {20, 31};
  const shape shape = {.k = 2, .E = 4, .d = 12, .h = 20, .activation = FMOE_GELU};
  for (int way = 0; way < WAYS; way++) {
    crew *c = crew_of(2, way);
    scene at = {.all.s = spread_create(2, tokens, GATED, shape, seed)};
    crew_run(c, run_plans, &at);
    if (!small) crew_run(c, run_report, &at); /* measures speeds, for which valgrind is too slow */
    layers_destroy(&at.all, 2);
    spread_destroy(at.all.s);
    check_ended(c), crew_destroy(c);
  }
}

int main(int count, char **arguments) {
  scene_begin("plans", count, arguments);
  RUN("plans", test_plans);
  RUN("plans", test_any_plan);
  return summary();
}
