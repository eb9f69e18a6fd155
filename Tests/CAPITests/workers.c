/* workers.c: several workers compute what one worker alone does on the whole batch, and what the oracle says.
 *
 * Ranks are threads, over the library's own memory (fmoe_group_create_local) and over a mailbox.  `workers small` is
 * for valgrind.  plans.c has passes with plans, wire.c what goes over a transport. */
#include <string.h>

#include "scene.h"

static const char *const ways[WAYS] = {"local", "mailbox"};

/* ---- against the oracle and against one worker alone --------------------------------------- */

enum { COUNTS = 5, CASES = COUNTS * ROUTINGS };
static const char *const count_names[COUNTS] = {"equal", "unequal", "some without", "all without", "one token in all"};

static void count_tokens(int kind, int32_t ranks, int64_t *tokens) {
  static const int64_t unequal[MOST_RANKS] = {9, 2, 14, 1, 6, 11, 3, 5};
  for (int32_t r = 0; r < ranks; r++) {
    switch (kind) {
      case 0: tokens[r] = small ? 4 : 10; break;
      case 1: tokens[r] = unequal[r]; break;
      case 2: tokens[r] = r % 2 ? 8 : 0; break;
      case 3: tokens[r] = 0; break;
      default: tokens[r] = r == ranks - 1; break;
    }
  }
}

/* All cases of one layer, on one crew. */
typedef struct trial {
  spread *s[CASES];
  batch alone[CASES], got[CASES][MOST_RANKS], again[CASES][MOST_RANKS];
  seats all;
} trial;

static void run_cases(crew *c, int32_t rank, void *context) {
  trial *t = context;
  make_layer(c, rank, &t->all);
  for (int i = 0; i < CASES; i++) {
    t->got[i][rank] = run(t->all.layer[rank], t->s[i]->part[rank]);
    t->again[i][rank] = run(t->all.layer[rank], t->s[i]->part[rank]);
  }
}

static void name_case(char *what, size_t room, const crew *c, shape s, int i) {
  snprintf(what, room, "%s, W %d, E %d, k %d, activation %d, %s, tokens %s", ways[c->mail != NULL], c->ranks, (int)s.E,
           (int)s.k, s.activation, routing_names[i / COUNTS], count_names[i % COUNTS]);
}

static void check_case(crew *c, const trial *t, shape shape, int i) {
  const spread *s = t->s[i];
  const int gated = i / COUNTS == GATED, equal = i % COUNTS == 0;
  char what[300];
  name_case(what, sizeof what, c, shape, i);
  for (int32_t r = 0; r < c->ranks; r++) {
    const batch *b = &t->got[i][r];
    check_routing(what, b, s->part[r]), check_batch(what, b, s->part[r]), check_gradients(what, b, s->part[r]);
    check_bits("the same calls give the same bits", b, &t->again[i][r]);
    for (int32_t other = 0; other < r; other++)
      CHECK(!memcmp(b->gradients[GATE], t->got[i][other].gradients[GATE], (size_t)b->sizes[GATE] * sizeof(float)),
            "%s: the gate's gradients of ranks %d and %d", what, other, r);
    /* Losses are means over each rank's own tokens: only of equal numbers they make the mean over all. */
    if (!gated || equal || (shape.balance == 0 && shape.z == 0))
      check_alone(what, s, r, b, &t->alone[i], !gated && !c->mail);
  }
}

/* The whole batches on one worker, then spread over each kind of group. */
static void run_trial(crew *const crews[WAYS], crew *lone, int32_t ranks, shape shape) {
  static trial t;
  for (int i = 0; i < CASES; i++) {
    int64_t tokens[MOST_RANKS];
    count_tokens(i % COUNTS, ranks, tokens);
    t.s[i] = spread_create(ranks, tokens, i / COUNTS, shape, seed + (uint64_t)i);
  }
  fmoe_layer *layer = layer_of(lone->groups[0], t.s[0]->whole);
  for (int i = 0; i < CASES; i++) t.alone[i] = run(layer, t.s[i]->whole);
  t.all.s = t.s[0];
  for (int way = 0; way < WAYS; way++) {
    crew_run(crews[way], run_cases, &t);
    for (int i = 0; i < CASES; i++) {
      check_case(crews[way], &t, shape, i);
      for (int32_t r = 0; r < ranks; r++) batch_free(&t.got[i][r]), batch_free(&t.again[i][r]);
    }
    layers_destroy(&t.all, ranks);
    check_ended(crews[way]);
  }
  for (int i = 0; i < CASES; i++) batch_free(&t.alone[i]), spread_destroy(t.s[i]);
  fmoe_layer_destroy(layer);
}

static void test_against_oracle_and_alone(void) {
  crew *lone = crew_of(1, 0);
  for (int32_t ranks = small ? 2 : 1; ranks <= (small ? 2 : 8); ranks *= 2) {
    crew *crews[WAYS] = {crew_of(ranks, 0), crew_of(ranks, 1)};
    for (int64_t E = ranks; E <= 4 * ranks; E *= 4)
      for (int64_t k = 1; k <= 4 && k <= E; k *= 2)
        for (int glu = 0; glu < 2; glu++) {
          int losses = k != 2; /* both with and without losses; k = 1 has a softmax of its own */
          shape s = {.k = k, .E = E, .d = small ? 3 : 13, .h = small ? 5 : 21,
                     .activation = glu ? FMOE_SWIGLU : FMOE_GELU, .balance = losses ? 0.7 : 0, .z = losses ? 0.4 : 0};
          if (!small || (k == 2 - glu && E == 8)) run_trial(crews, lone, ranks, s);
        }
    for (int way = 0; way < WAYS; way++) crew_destroy(crews[way]);
  }
  crew_destroy(lone);
}

/* ---- one layer, one batch, in many ways ---------------------------------------------------- */

/* More rows than an expert's block holds, more bytes between two ranks than a message does; two threads each. */
static void test_large(void) {
  crew *lone = crew_create((crew_options){.ranks = 1, .threads = 2});
  for (int32_t ranks = 2; ranks <= 4; ranks *= 2)
    for (int routing = GATED; routing <= ONE_EXPERT; routing++) {
      const int64_t tokens[4] = {1000 / ranks, 1300 / ranks, 900 / ranks, 400};
      shape shape = {.k = 2, .E = 8, .d = 96, .h = 40, .activation = routing % 2 ? FMOE_SWIGLU : FMOE_GELU_TANH};
      scene at = {.all.s = spread_create(ranks, tokens, routing, shape, seed)};
      fmoe_layer *layer = layer_of(lone->groups[0], at.all.s->whole);
      batch alone = run(layer, at.all.s->whole);
      for (int way = 0; way < WAYS; way++) {
        crew *c = crew_create((crew_options){.ranks = ranks, .threads = 2, .over_mailbox = way});
        crew_run(c, run_scene, &at);
        check_scene("large", c, &at, &alone, routing != GATED && way == LOCAL);
        end_scene(c, &at);
        crew_destroy(c);
      }
      batch_free(&alone);
      fmoe_layer_destroy(layer);
      spread_destroy(at.all.s);
    }
  crew_destroy(lone);
}

/* Late, overtaking, and eager messages, a different luck each turn. */
static void test_unruly_transports(void) {
  static const int64_t tokens[4] = {150, 40, 0, 90};
  static const int64_t message_bytes[] = {1024, 0, 1 << 20, 4160};
  for (int turn = 0; turn < (small ? 2 : 16); turn++) {
    shape shape = {.k = 2, .E = 8, .d = small ? 6 : 70, .h = 12, .activation = FMOE_GELU, .balance = 0.1, .z = 0.1};
    const int32_t ranks = small ? 2 : 2 + 2 * (turn % 2);
    const mailbox_options mail = {.seed = seed + (uint64_t)turn, .reorder = turn / 2 % 2, .eager = turn / 4 % 2,
                                  .message_bytes = message_bytes[(turn + turn / 4) % 4],
                                  .delay_tests = turn % 3 ? 5 : 0, .delay_microseconds = turn % 3 == 1 ? 0 : 150};
    crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = 1, .mail = mail});
    scene at = {.all.s = spread_create(ranks, tokens, turn % 5, shape, seed)};
    char what[120];
    snprintf(what, sizeof what, "turn %d: reorder %d, eager %d, messages of %lld bytes, delays of %d tests, %d us", turn,
             mail.reorder, mail.eager, (long long)mail.message_bytes, mail.delay_tests, mail.delay_microseconds);
    crew_run(c, run_scene, &at);
    check_scene(what, c, &at, NULL, 0);
    end_scene(c, &at);
    spread_destroy(at.all.s);
    crew_destroy(c);
  }
}

/* ---- gradients that add up ----------------------------------------------------------------- */

static void add_gradients(const char *what, const batch *b, const spread *first, const spread *second, int32_t rank) {
  oracle *o = first->part[rank], *other = second->part[rank];
  for (int t = 0; t < TENSORS; t++)
    for (int64_t i = 0; i < o->sizes[t]; i++) o->gradients[t][i] += other->gradients[t][i];
  for (int64_t e = 0; e < o->experts; e++) o->everyone[e] += other->everyone[e];
  check_gradients(what, b, o);
}

/* Two passes, then one reduce; a reduce more; a pass and a reduce more. */
static void run_accumulation(crew *c, int32_t rank, void *context) {
  scene *at = context;
  make_layer(c, rank, &at->all);
  fmoe_layer *layer = at->all.layer[rank];
  batch a = batch_of(at->all.s->part[rank], layer), b = batch_of(at->second->part[rank], layer);
  begin(&a, layer), forward(&a), backward(&a);
  begin(&b, layer), forward(&b), backward(&b);
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b, layer);
  add_gradients("two passes, one reduce", &b, at->all.s, at->second, rank);
  read_gradients(&a, layer);
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b, layer);
  for (int t = 0; t < TENSORS; t++)
    CHECK(!memcmp(a.gradients[t], b.gradients[t], (size_t)a.sizes[t] * sizeof(float)), "reducing twice changes %s",
          tensor_names[t]);
  fmoe_pass_destroy(b.pass), b.pass = NULL;
  begin(&b, layer), forward(&b), backward(&b);
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b, layer);
  add_gradients("a pass after the reduce, and a reduce", &b, at->all.s, at->second, rank);
  EXPECT(FMOE_OK, fmoe_layer_zero_gradients(layer));
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b, layer);
  for (int t = 0; t < TENSORS; t++)
    for (int64_t i = 0; i < b.sizes[t]; i++)
      if (b.gradients[t][i] != 0) i = b.sizes[t], CHECK(0, "%s is not zero after zero_gradients", tensor_names[t]);
  batch_free(&a), batch_free(&b);
}

static void test_accumulation(void) {
  static const int64_t tokens[4] = {13, 7, 4, 9}, others[4] = {5, 0, 12, 8};
  const shape shape = {.k = 2, .E = 8, .d = 9, .h = 11, .activation = FMOE_GELU, .balance = 0.3, .z = 0.2};
  for (int32_t ranks = 2; ranks <= (small ? 2 : 4); ranks *= 2) /* powers of two: the mean of equals is exact */
    for (int way = 0; way < WAYS; way++) {
      crew *c = crew_of(ranks, way);
      scene at = {.all.s = spread_create(ranks, tokens, GATED, shape, seed),
                  .second = spread_create(ranks, others, GATED, shape, seed + 1)};
      crew_run(c, run_accumulation, &at);
      layers_destroy(&at.all, ranks);
      spread_destroy(at.all.s), spread_destroy(at.second);
      check_ended(c), crew_destroy(c);
    }
}

/* ---- several passes, several layers -------------------------------------------------------- */

enum { FLIGHTS = 3 };

typedef struct flights {
  spread *s[FLIGHTS];
  seats all;
} flights;

/* Three passes at once, each finished in its own time; the second is given up after forward. */
static void run_flights(crew *c, int32_t rank, void *context) {
  flights *f = context;
  batch b[FLIGHTS];
  make_layer(c, rank, &f->all);
  fmoe_layer *layer = f->all.layer[rank];
  for (int p = 0; p < FLIGHTS; p++) b[p] = batch_of(f->s[p]->part[rank], layer), begin(&b[p], layer);
  forward(&b[2]), forward(&b[0]), forward(&b[1]);
  fmoe_pass_destroy(b[1].pass), b[1].pass = NULL;
  backward(&b[0]), backward(&b[2]);
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b[0], layer);
  for (int p = 0; p < FLIGHTS; p += 2) {
    check_routing("in flight", &b[p], f->s[p]->part[rank]);
    check_batch("in flight", &b[p], f->s[p]->part[rank]);
  }
  check_close("given up", "y", b[1].y, f->s[1]->part[rank]->y, b[1].o->tokens * b[1].o->model);
  add_gradients("in flight", &b[0], f->s[0], f->s[2], rank);
  for (int p = 0; p < FLIGHTS; p++) batch_free(&b[p]);
}

static void test_passes_in_flight(void) {
  static const int64_t tokens[FLIGHTS][4] = {{17, 3, 8, 0}, {30, 21, 0, 5}, {5, 9, 1, 12}};
  const shape shape = {.k = 2, .E = 8, .d = 12, .h = 20, .activation = FMOE_SWIGLU};
  for (int32_t ranks = 2; ranks <= (small ? 2 : 4); ranks *= 2)
    for (int way = 0; way < WAYS; way++) {
      crew *c = crew_of(ranks, way);
      flights f;
      for (int p = 0; p < FLIGHTS; p++)
        f.s[p] = spread_create(ranks, tokens[p], p == 1 ? SKEWED : GATED, shape, seed + (uint64_t)p);
      f.all.s = f.s[0];
      crew_run(c, run_flights, &f);
      layers_destroy(&f.all, ranks);
      for (int p = 0; p < FLIGHTS; p++) spread_destroy(f.s[p]);
      check_ended(c), crew_destroy(c);
    }
}

/* A model's two layers of different shapes: forward through both, then backward the other way. */
static void run_two_layers(crew *c, int32_t rank, void *context) {
  flights *f = context;
  batch b[2];
  fmoe_layer *layers[2];
  for (int l = 0; l < 2; l++)
    layers[l] = layer_of(c->groups[rank], f->s[l]->part[rank]), b[l] = batch_of(f->s[l]->part[rank], layers[l]);
  for (int l = 0; l < 2; l++) begin(&b[l], layers[l]), forward(&b[l]);
  for (int l = 1; l >= 0; l--) backward(&b[l]);
  for (int l = 0; l < 2; l++) {
    EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layers[l]));
    read_gradients(&b[l], layers[l]);
    check_batch("two layers", &b[l], b[l].o), check_gradients("two layers", &b[l], b[l].o);
    batch_free(&b[l]);
  }
  for (int l = 0; l < 2; l++) fmoe_layer_destroy(layers[l]);
}

static void test_two_layers(void) {
  static const int64_t tokens[4] = {17, 3, 8, 0}, others[4] = {6, 0, 25, 2};
  const shape first = {.k = 2, .E = 4, .d = 12, .h = 20, .activation = FMOE_SWIGLU},
              second = {.k = 1, .E = 8, .d = 7, .h = 5, .activation = FMOE_RELU, .balance = 0.5};
  for (int way = 0; way < WAYS; way++) {
    const int32_t ranks = small ? 2 : 4;
    crew *c = crew_of(ranks, way);
    flights f = {.s = {spread_create(ranks, tokens, GATED, first, seed),
                       spread_create(ranks, others, GATED, second, seed)}};
    crew_run(c, run_two_layers, &f);
    spread_destroy(f.s[0]), spread_destroy(f.s[1]);
    check_ended(c), crew_destroy(c);
  }
}

/* ---- initial values ------------------------------------------------------------------------ */

enum { VALUES_E = 8, VALUES_D = 12, VALUES_H = 20 };

static fmoe_tensors fresh_values(fmoe_group *group, int32_t activation, fmoe_layer **layer) {
  const fmoe_layer_options options = {.struct_size = sizeof options, .d_model = VALUES_D, .d_hidden = VALUES_H,
                                      .experts = VALUES_E, .activation = activation, .seed = 7};
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  EXPECT(FMOE_OK, fmoe_layer_create(group, &options, layer));
  EXPECT(FMOE_OK, fmoe_layer_values(*layer, &tensors));
  return tensors;
}

static void compare_values(crew *c, int32_t rank, void *context) {
  static const int64_t each[TENSORS] = {VALUES_E * VALUES_D, VALUES_H * VALUES_D, VALUES_H, VALUES_D * VALUES_H,
                                        VALUES_D, VALUES_H * VALUES_D}; /* the gate's is not of one expert but of all */
  const fmoe_tensors *alone = context;
  fmoe_layer *layer;
  float *whole[TENSORS], *slice[TENSORS];
  fmoe_tensors here = fresh_values(c->groups[rank], alone->w3 ? FMOE_SWIGLU : FMOE_GELU, &layer);
  tensors_of(alone, whole), tensors_of(&here, slice);
  CHECK(here.local_experts == VALUES_E / c->ranks && here.first_expert == rank * here.local_experts, "rank %d", rank);
  for (int t = 0; t < TENSORS; t++) {
    if (!CHECK(!whole[t] == !slice[t], "%s is there as on one worker", tensor_names[t]) || !whole[t]) continue;
    const float *from = t == GATE ? whole[t] : whole[t] + here.first_expert * each[t];
    size_t count = (size_t)(t == GATE ? each[t] : here.local_experts * each[t]);
    CHECK(!memcmp(from, slice[t], count * sizeof(float)), "%s of rank %d of %d starts as on one worker",
          tensor_names[t], rank, c->ranks);
  }
  fmoe_layer_destroy(layer);
}

static void test_initial_values(void) {
  crew *lone = crew_of(1, 0);
  for (int glu = 0; glu < 2; glu++) {
    fmoe_layer *layer;
    fmoe_tensors alone = fresh_values(lone->groups[0], glu ? FMOE_SWIGLU : FMOE_GELU, &layer);
    for (int32_t ranks = 1; ranks <= (small ? 2 : 8); ranks *= 2)
      for (int way = 0; way < WAYS; way++) {
        crew *c = crew_of(ranks, way);
        crew_run(c, compare_values, &alone);
        crew_destroy(c);
      }
    fmoe_layer_destroy(layer);
  }
  crew_destroy(lone);
}

int main(int count, char **arguments) {
  scene_begin("workers", count, arguments);
  RUN("workers", test_against_oracle_and_alone);
  if (!small) RUN("workers", test_large);
  RUN("workers", test_unruly_transports);
  RUN("workers", test_accumulation);
  RUN("workers", test_passes_in_flight);
  RUN("workers", test_two_layers);
  RUN("workers", test_initial_values);
  return summary();
}
