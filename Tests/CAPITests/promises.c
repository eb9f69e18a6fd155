/* promises.c: what holds of gates, whoever is chosen: shadows that one counted on are played, or a plan without them is
 * refused; choices and losses are sound whatever the scores.  All of it is small enough for valgrind. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "rules.h" /* for its machine */

/* Shadows that leave out what the gate counted as local are refused, on all ranks and without harm; what is left open
 * is these very ones, which the pass' own record shows. */
static void run_kept(crew *c, int32_t rank, void *unused) {
  enum { N = 12, D = 4, E = 8 };
  static const uint8_t expected[E] = {0, 0, 1, 0, 0, 1, 0, 0}, less[E] = {0, 0, 1, 0, 0, 0, 0, 1}, more[E] = {1, 0, 1, 0, 0, 1, 0, 0};
  static const uint8_t wrong[E] = {0, 0, 2, 0, 0, 0, 0, 0};
  static float x[MOST_RANKS][N * D], y[MOST_RANKS][N * D];
  fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = 3, .experts = E,
                                .gate = FMOE_GATE_TOPOLOGY};
  fmoe_plan_options never = {.struct_size = sizeof never, .shadowing = 1}, given = {.struct_size = sizeof given, .shadowing = 2};
  fmoe_layer *layer = NULL, *plain = NULL;
  fmoe_pass *pass = NULL;
  (void)unused;
  for (int i = 0; i < N * D; i++) x[rank][i] = (float)((i * 31 + rank * 7) % 17) / 8 - 1;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &layer))) exit(summary());
  options.gate = FMOE_GATE_TOPK;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &plain))) exit(summary());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(plain, expected));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(NULL, expected));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(layer, wrong));
  if (c->ranks > 1) { /* sets must be equal */
    EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, rank ? expected : more));
    EXPECT(FMOE_ERROR_DISAGREE, fmoe_gate(layer, x[rank], N, &pass));
  }
  EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, expected));
  for (int turn = 0; turn < 4; turn++) { /* NULL, no plan at all, what is expected, and more */
    EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], N, &pass));
    if (c->ranks > 1) {
      EXPECT(FMOE_ERROR_ARGUMENT, fmoe_plan(pass, &never, NULL));
      given.shadows = less;
      EXPECT(FMOE_ERROR_ARGUMENT, fmoe_plan(pass, &given, NULL));
    }
    given.shadows = turn == 2 ? expected : more;
    if (turn != 1) EXPECT(FMOE_OK, fmoe_plan(pass, turn ? &given : NULL, NULL));
    EXPECT(FMOE_OK, fmoe_forward(pass, y[rank]));
    char path[64], text[1 << 16];
    snprintf(path, sizeof path, "kept-%d-%d.json", (int)getpid(), rank);
    EXPECT(FMOE_OK, fmoe_pass_write_timeline(pass, path));
    FILE *file = fopen(path, "r");
    const size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
    text[size] = 0;
    if (file) fclose(file);
    remove(path);
    for (int e = 0; e < E && c->mail; e++) { /* ranks of one process read shadows in place */
      char name[32];
      snprintf(name, sizeof name, "fetch expert %d ", e);
      const int wanted = c->ranks > 1 && (turn == 3 ? more : expected)[e];
      CHECK(!strstr(text, name) == !wanted, "turn %d, rank %d: expert %d %s", turn, rank, e, wanted ? "is missing" : "is shadowed");
    }
    EXPECT(FMOE_OK, fmoe_backward(pass, x[rank], y[rank], NULL));
    fmoe_pass_destroy(pass);
  }
  EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, NULL));
  EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], N, &pass));
  EXPECT(FMOE_OK, fmoe_plan(pass, &never, NULL));
  fmoe_pass_destroy(pass);
  fmoe_layer_destroy(layer), fmoe_layer_destroy(plain);
}

static void test_kept(void) {
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (int way = 0; way < 2; way++) {
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      crew_run(c, run_kept, NULL);
      crew_destroy(c);
    }
}

/* Scores on which rules stumble, by the tokens: all equal, not a number, infinite, a single token. */
typedef struct oddity {
  int32_t gate, kind;
} oddity;

static void run_oddity(crew *c, int32_t rank, void *context) {
  enum { N = 37, D = 4, E = 8 };
  const oddity *odd = context;
  static float x[MOST_RANKS][N * D], y[MOST_RANKS][N * D];
  fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = 3, .experts = E,
                                .gate = odd->gate, .balance_loss = odd->gate == FMOE_GATE_BASE ? 0 : 0.1, .z_loss = 0.1};
  const int64_t n = odd->kind % 4 == 3 ? rank == 0 : N;
  const int more = odd->kind / 4; /* with whatever the gate may have besides */
  if (more) options.input_jitter = 0.5;
  if (more && odd->gate != FMOE_GATE_NOISY && odd->gate != FMOE_GATE_BASE && odd->gate != FMOE_GATE_SWIPE)
    options.bias_step = 0.5;
  if (more && (odd->gate == FMOE_GATE_SWITCH || odd->gate == FMOE_GATE_GSHARD))
    options.drop = FMOE_DROP_RANDOM + (odd->kind % 2), options.capacity_factor = 0.5;
  fmoe_layer *layer = NULL;
  fmoe_routing r = {.struct_size = sizeof r};
  for (int i = 0; i < N * D; i++)
    x[rank][i] = odd->kind % 4 == 0 ? 0 : i / D % 3 ? (float)(i % 7) - 3 : odd->kind % 4 == 1 ? NAN : INFINITY;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &layer))) exit(summary());
  for (int training = 1; training >= 0; training--) {
    fmoe_pass *pass = NULL;
    EXPECT(FMOE_OK, fmoe_layer_set_training(layer, training));
    EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], n, &pass));
    EXPECT(FMOE_OK, fmoe_pass_routing(pass, &r));
    int64_t live = 0, twice = 0, strange = 0, counted = 0;
    for (int64_t s = 0; s < n * r.top_k; s++) {
      strange += r.choices[s] < -1 || r.choices[s] >= E || (r.choices[s] < 0 && r.weights[s] != 0);
      for (int64_t j = s / r.top_k * r.top_k; j < s; j++) twice += r.choices[s] >= 0 && r.choices[j] == r.choices[s];
      live += r.choices[s] >= 0;
    }
    for (int e = 0; e < E; e++) {
      counted += r.counts[e];
      if (odd->gate == FMOE_GATE_BASE && training)
        CHECK(r.counts[e] <= (n + E - 1) / E, "kind %d: expert %d gets %d", odd->kind, e, (int)r.counts[e]);
    }
    /* Scores that are all equal: each loss is its coefficient times what it is where all experts are as likely. */
    if (odd->kind % 4 == 0 && odd->gate != FMOE_GATE_NOISY && training) {
      const double balance = odd->gate == FMOE_GATE_BASE ? 0 : 0.1, z = 0.1 * log(E) * log(E);
      CHECK(fabs(r.balance_loss - balance) < 1e-6 && fabs(r.z_loss - z) < 1e-6, "gate %d, kind %d, %d ranks: losses %g, %g",
            odd->gate, odd->kind, c->ranks, r.balance_loss, r.z_loss);
    }
    CHECK(!strange && !twice && counted == live && r.dropped == n * r.top_k - live, "gate %d, kind %d, %d ranks",
          odd->gate, odd->kind, c->ranks);
    EXPECT(FMOE_OK, fmoe_forward(pass, y[rank]));
    EXPECT(FMOE_OK, fmoe_backward(pass, x[rank], y[rank], NULL));
    fmoe_pass_destroy(pass);
  }
  fmoe_layer_destroy(layer);
}

static void test_oddities(void) {
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (int way = 0; way < 2; way++) {
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      for (int32_t gate = FMOE_GATE_TOPK; gate <= FMOE_GATE_SWIPE; gate++)
        for (int kind = 0; kind < 8; kind++) crew_run(c, run_oddity, &(oddity){gate, kind});
      crew_destroy(c);
    }
}

#define RUN(test) (begin_test("promises: " #test, 300), test())

int main(void) {
  RUN(test_kept);
  RUN(test_oddities);
  alarm(0);
  return summary();
}
