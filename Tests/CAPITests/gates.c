/* gates.c: every gate of the library against its rule in Double, forward and gradients, on one worker and on several.
 *
 * The rule says which experts a token chooses; with these held, the loss of the whole model is computed in Double from
 * tokens and parameters, and its central differences are what the library's gradients must be.  `gates small` is for
 * valgrind. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "rules.h"

static int small;

/* ---- the library ------------------------------------------------------------------------------ */

typedef struct trial {
  world *w;
  double *of_noise;        /* [E, d] its gradient */
  batch got[MOST_RANKS], again[MOST_RANKS];
} trial;

static fmoe_layer *gated_layer(fmoe_group *group, const world *w, const oracle *o) {
  fmoe_layer_options options = options_of(o);
  fmoe_layer *layer = NULL;
  options.gate = w->rule.gate, options.drop = w->rule.drop, options.capacity_factor = w->rule.factor;
  options.remote_share = w->rule.remote, options.seed = w->layer_seed;
  options.input_jitter = w->rule.jitter, options.bias_step = w->rule.step;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer))) exit(summary());
  set_values(layer, o);
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &tensors));
  CHECK((tensors.noise != NULL) == (w->rule.gate == FMOE_GATE_NOISY), "noise is there where the gate has some");
  for (int64_t i = 0; tensors.noise && i < o->sizes[GATE]; i++) tensors.noise[i] = (float)w->noise[i];
  CHECK((tensors.gate_bias != NULL) == (w->rule.step > 0), "a bias is there where the gate has one");
  for (int64_t e = 0; tensors.gate_bias && e < o->experts; e++) tensors.gate_bias[e] = (float)w->bias[e];
  if (w->rule.evaluates) EXPECT(FMOE_OK, fmoe_layer_set_training(layer, 0));
  if (w->rule.shadows) {
    uint8_t shadows[64] = {0};
    for (int64_t e = 0; e < o->experts; e++) shadows[e] = w->rule.shadows >> e & 1;
    EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, shadows));
  }
  return layer;
}

static void describe(char *what, size_t room, const world *w, const char *way) {
  snprintf(what, room, "gate %d, %s, W %d, n %d, E %d, k %d, factor %g, drop %d, jitter %g, bias %g, shadows %x, %s, pass %d",
           w->rule.gate, way, w->ranks, (int)w->s->whole->tokens, (int)w->shape.E, (int)w->shape.k, w->rule.factor,
           w->rule.drop, w->rule.jitter, w->rule.step, (unsigned)w->rule.shadows,
           w->rule.evaluates ? "evaluating" : "training", (int)w->pass);
}

/* The load moves the bias after backward, in training alone; on all ranks alike. */
static void check_bias(const char *what, const world *w, fmoe_layer *layer) {
  fmoe_tensors values = {.struct_size = sizeof values}, gradients = {.struct_size = sizeof gradients};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &values));
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &gradients));
  CHECK(!gradients.gate_bias, "%s: a bias has no gradient", what);
  double mean = 0;
  for (int64_t e = 0; e < w->shape.E; e++) mean += w->share[e] / (double)w->shape.E;
  for (int64_t e = 0; values.gate_bias && e < w->shape.E; e++) {
    const double off = mean - w->share[e]; /* shares are of 23 tokens: equal to the mean, or off by far more than rounding */
    const float step = w->rule.evaluates || fabs(off) < 1e-9 ? 0 : (float)(off > 0 ? w->rule.step : -w->rule.step);
    CHECK(values.gate_bias[e] == (float)w->bias[e] + step, "%s: bias of expert %d is %g, was %g, load off by %g", what, (int)e,
          values.gate_bias[e], w->bias[e], off);
  }
}

static void run_trial(crew *c, int32_t rank, void *context) {
  trial *t = context;
  for (int again = 0; again < 2; again++) {
    fmoe_layer *layer = gated_layer(c->groups[rank], t->w, t->w->s->part[rank]);
    for (int64_t pass = 1; pass < t->w->pass; pass++) {
      fmoe_pass *unused;
      EXPECT(FMOE_OK, fmoe_gate(layer, NULL, 0, &unused));
      fmoe_pass_destroy(unused);
    }
    *(again ? &t->again[rank] : &t->got[rank]) = run(layer, t->w->s->part[rank]);
    fmoe_tensors tensors = {.struct_size = sizeof tensors};
    EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &tensors));
    char what[300];
    describe(what, sizeof what, t->w, "");
    check_bias(what, t->w, layer);
    if (tensors.noise) {
      check_close(what, "noise", tensors.noise, t->of_noise, t->w->s->whole->sizes[GATE]);
    }
    fmoe_layer_destroy(layer);
  }
}

/* BASE's sharing out has its own tests; here the library's choices are taken as they are, if they share out. */
static void ask_base(crew *c, int32_t rank, void *context) {
  trial *t = context;
  const oracle *o = t->w->s->part[rank];
  fmoe_layer *layer = gated_layer(c->groups[rank], t->w, o);
  fmoe_routing r = {.struct_size = sizeof r};
  batch b = batch_of(o, layer);
  int64_t first = 0;
  for (int32_t before = 0; before < rank; before++) first += t->w->s->part[before]->tokens;
  begin(&b, layer);
  EXPECT(FMOE_OK, fmoe_pass_routing(b.pass, &r));
  for (int64_t i = 0; i < o->tokens; i++) t->w->candidate[first + i] = t->w->s->whole->choice[first + i] = r.choices[i];
  for (int64_t e = 0; e < o->experts; e++)
    CHECK(r.counts[e] <= (o->tokens + o->experts - 1) / o->experts, "expert %d gets %d of %d tokens", (int)e,
          (int)r.counts[e], (int)o->tokens);
  batch_free(&b), fmoe_layer_destroy(layer);
}

static void check_room(const char *what, const world *w) {
  const oracle *o = w->s->whole;
  for (int32_t r = 0; r < w->ranks && is_near(w); r++) {
    const oracle *part = w->s->part[r];
    const int64_t all = part->tokens * part->choices;
    int64_t over[3] = {0}; /* choices that cross so many levels and more */
    for (int64_t slot = 0; slot < all; slot++)
      for (int32_t c = 0; part->choice[slot] >= 0 && c <= crossed(w, r, part->choice[slot]); c++) over[c]++;
    for (int32_t level = 0; level < levels_of(w); level++)
      if (level == 0 || w->rule.gate == FMOE_GATE_HIERARCHICAL)
        CHECK(over[levels_of(w) - level] <= budget(w, level, all), "%s: rank %d: %d cross level %d", what, r,
              (int)over[levels_of(w) - level], level);
  }
  for (int32_t owner = 0; owner < w->ranks && w->rule.gate == FMOE_GATE_SWIPE && !w->rule.evaluates; owner++) {
    const int64_t each = o->experts / w->ranks, all = o->tokens * o->choices;
    int64_t rows = 0;
    for (int64_t e = owner * each; e < (owner + 1) * each; e++) rows += w->s->part[0]->everyone[e];
    CHECK(rows == all / w->ranks + (owner < all % w->ranks), "%s: rank %d takes %d", what, owner, (int)rows);
  }
  for (int64_t e = 0; e < o->experts; e++) {
    int64_t all = 0;
    for (int32_t r = 0; r < w->ranks; r++) {
      const oracle *part = w->s->part[r];
      all += part->counts[e];
      if (w->rule.gate == FMOE_GATE_GSHARD)
        CHECK(part->counts[e] <= capacity(w, part->tokens), "%s: rank %d, expert %d", what, r, (int)e);
    }
    if (w->rule.gate == FMOE_GATE_SWITCH)
      CHECK(all <= capacity(w, o->tokens), "%s: expert %d takes %d", what, (int)e, (int)all);
  }
}

static int64_t drops, moves; /* that the rules made, so that the tests say whether they have met any */

static void check_world(const char *way, crew *c, world *w) {
  char what[300];
  trial t = {.w = w, .of_noise = zeros(w->s->whole->sizes[GATE], sizeof(double))};
  describe(what, sizeof what, w, way);
  if (w->rule.gate == FMOE_GATE_BASE && !w->rule.evaluates) crew_run(c, ask_base, &t);
  fill_parts(w, t.of_noise);
  crew_run(c, run_trial, &t);
  check_room(what, w);
  for (int32_t r = 0; r < w->ranks; r++) {
    const oracle *o = w->s->part[r];
    fmoe_routing routing = {.struct_size = sizeof routing};
    check_routing(what, &t.got[r], o), check_batch(what, &t.got[r], o), check_gradients(what, &t.got[r], o);
    check_bits(what, &t.got[r], &t.again[r]);
    EXPECT(FMOE_OK, fmoe_pass_routing(t.got[r].pass, &routing));
    int64_t dropped = 0;
    for (int64_t slot = 0; slot < o->tokens * o->choices; slot++) dropped += o->choice[slot] < 0;
    CHECK(routing.dropped == dropped, "%s: %d dropped, not %d", what, (int)routing.dropped, (int)dropped);
    if (is_near(w) || w->rule.gate == FMOE_GATE_SWIPE)
      CHECK(routing.moved == w->moved[r], "%s: %d moved", what, (int)routing.moved);
    drops += dropped, moves += routing.moved;
    batch_free(&t.got[r]), batch_free(&t.again[r]);
  }
  free(t.of_noise);
}

/* The same tokens on 1, 2 and 4 workers, over each kind of group. */
static void test_rule(rule rule, shape shape) {
  static const int64_t tokens[3][4] = {{23, 0, 0, 0}, {9, 14, 0, 0}, {9, 5, 0, 9}};
  for (int split = 0; split < (small ? 2 : 3); split++)
    for (int way = 0; way < 2; way++) {
      const int32_t ranks = 1 << split;
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      world *w = world_create(rule, shape, ranks, tokens[split], 1 + split);
      check_world(way ? "mailbox" : "local", c, w);
      world_destroy(w), crew_destroy(c);
    }
}

static void test_capacities(void) {
  drops = 0;
  for (int32_t gate = FMOE_GATE_SWITCH; gate <= FMOE_GATE_GSHARD; gate++)
    for (int64_t k = 1; k <= 3; k++)
      for (int kind = 0; kind < 8; kind++) {
        /* Kinds 4 to 7: by chance, in training and not, what is least important, and the lightest where room is short. */
        rule rule = {.gate = gate, .drop = kind == 1 ? FMOE_DROP_LIGHTEST : kind < 4 ? FMOE_DROP_LAST : kind < 6
                     ? FMOE_DROP_RANDOM : kind == 6 ? FMOE_DROP_UNIMPORTANT : FMOE_DROP_LIGHTEST,
                     .evaluates = kind == 2 || kind == 5, .factor = kind > 2 ? 0.4 : 0};
        shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = kind % 2 ? FMOE_SWIGLU : FMOE_GELU,
                       .balance = kind ? 0.7 : 0, .z = kind > 1 ? 0.4 : 0};
        if (!small || (k == 2 && (kind == 3 || kind == 6))) test_rule(rule, shape);
      }
  CHECK(small || drops > 100, "only %d choices were dropped", (int)drops);
}

static void test_noise(void) {
  for (int64_t k = 1; k <= 8; k = k < 3 ? k + 1 : k + 5)
    for (int kind = 0; kind < 4; kind++) {
      rule rule = {.gate = FMOE_GATE_NOISY, .evaluates = kind == 3};
      shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = kind % 2 ? 0.7 : 0,
                     .z = kind > 1 ? 0.4 : 0};
      if (!small || (k == 2 && kind == 1)) test_rule(rule, shape);
    }
}

static void test_base(void) {
  for (int kind = 0; kind < 2; kind++) {
    rule rule = {.gate = FMOE_GATE_BASE, .evaluates = kind};
    test_rule(rule, (shape){.k = 1, .E = 8, .d = 6, .h = 5, .activation = FMOE_SWIGLU, .z = 0.4 * kind});
  }
}

static void test_near(void) {
  drops = moves = 0;
  for (int32_t gate = FMOE_GATE_TOPOLOGY; gate <= FMOE_GATE_HIERARCHICAL; gate++)
    for (int64_t k = 1; k <= 3; k++)
      for (int kind = 0; kind < 3; kind++) {
        rule rule = {.gate = gate, .remote = kind == 1 ? 0.3 : kind == 2 ? 1 : 0};
        shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = kind ? 0.7 : 0,
                       .z = kind > 1 ? 0.4 : 0};
        if (!small || (k == 3 && kind == 0)) test_rule(rule, shape);
      }
  CHECK(small || (moves > 100 && drops > 10), "%d choices moved, %d dropped", (int)moves, (int)drops);
}

static void test_swipe(void) {
  moves = 0;
  for (int64_t k = 1; k <= 3; k++) /* 3 are more than a worker of four has experts */
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = FMOE_GATE_SWIPE, .evaluates = kind == 1};
      shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_SWIGLU, .balance = kind ? 0.7 : 0,
                     .z = kind > 1 ? 0.4 : 0};
      if (!small || (k == 3 && kind == 2)) test_rule(rule, shape);
    }
  CHECK(small || moves > 40, "only %d choices moved", (int)moves);
}

/* What the gate reads is jittered, and so are its gradients; widths that 16 does not divide, and several blocks. */
static void test_jitter(void) {
  static const int32_t gates[] = {FMOE_GATE_SWITCH, FMOE_GATE_TOPK, FMOE_GATE_NOISY, FMOE_GATE_GSHARD};
  for (int gate = 0; gate < 4; gate++)
    for (int kind = 0; kind < 2; kind++) {
      rule rule = {.gate = gates[gate], .jitter = 0.3, .evaluates = kind && gate == 0};
      shape shape = {.k = gate ? 2 : 1, .E = 8, .d = gate ? 6 : 37 + 20 * kind, .h = 5, .activation = FMOE_GELU,
                     .balance = 0.7, .z = 0.4};
      if (!small || (gate == 0 && kind == 0)) test_rule(rule, shape);
    }
}

static void test_bias(void) {
  static const int32_t gates[] = {FMOE_GATE_TOPK, FMOE_GATE_SWITCH, FMOE_GATE_GSHARD, FMOE_GATE_TOPOLOGY,
                                  FMOE_GATE_HIERARCHICAL};
  for (int gate = 0; gate < 5; gate++)
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = gates[gate], .step = 0.01, .evaluates = kind == 1, .remote = gate > 2 ? 0.3 : 0};
      shape shape = {.k = gate == 1 ? 1 : 2, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU,
                     .balance = kind ? 0.7 : 0, .z = kind > 1 ? 0.4 : 0};
      if (!small || (gate == 3 && kind == 2)) test_rule(rule, shape);
    }
}

/* Experts that will be shadowed are inside: the rule, and results, of passes that play these very shadows. */
static void test_expected(void) {
  for (int32_t gate = FMOE_GATE_TOPOLOGY; gate <= FMOE_GATE_HIERARCHICAL; gate++)
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = gate, .remote = 0.1, .shadows = kind == 0 ? 0x04 : kind == 1 ? 0x91 : 0xff,
                   .step = kind == 1 ? 0.01 : 0};
      shape shape = {.k = 2, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = 0.7};
      if (!small || (gate == FMOE_GATE_TOPOLOGY && kind == 1)) test_rule(rule, shape);
    }
}

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  printf("gates: seed %llu\n", (unsigned long long)seed);
  begin_test("capacities", 300);
  test_capacities();
  begin_test("noise", 300);
  test_noise();
  begin_test("base", 300);
  test_base();
  begin_test("near", 300);
  test_near();
  begin_test("swipe", 300);
  test_swipe();
  begin_test("jitter", 300);
  test_jitter();
  begin_test("bias", 300);
  test_bias();
  begin_test("expected shadows", 300);
  test_expected();
  alarm(0);
  return summary();
}
