/* mpi_layer.c: experts spread over the ranks of mpirun must compute what one worker computes that has all of them.
 *
 * Every rank runs the whole batch alone, too, with the same seed, and compares its share.  The workers' gradients are
 * those of the mean of their losses: who is alone divides grad_output by W, and gets 1/W of their grad_tokens. */
#include <fastermoe_mpi.h>
#include <math.h>

#include "check.h"

/* Largest difference allowed, relative to the largest value of the same tensor: both sum in float32, 2^-24 for each
 * rounding, in orders that differ. */
static const double rounding = 2e-5;
static const uint64_t seed = 20220402;
static int rank, ranks;

enum { EVEN, SKEWED, EMPTY, LOADS }; /* equal n; and most tokens to expert 0; unequal n, the last rank without any */
static const char *load_names[LOADS] = {"even", "skewed", "a rank without tokens"};

typedef struct trial {
  int k, E, activation, load, routed, n, d, h; /* n: tokens of a rank, about */
  char name[120];
} trial;

static int tokens_of(const trial *t, int r) { return t->load != EMPTY ? t->n : r == ranks - 1 ? 0 : t->n + 7 * r; }
static int tokens_before(const trial *t, int r) { return r == 0 ? 0 : tokens_before(t, r - 1) + tokens_of(t, r - 1); }

static double uniform(void) { /* in [0, 1), the same numbers on all ranks */
  static uint64_t state = seed;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 11) / 9007199254740992.0;
}
static float *noise(size_t count) {
  float *values = malloc((count + 1) * sizeof *values);
  if (!values) abort();
  for (size_t i = 0; i < count; i++) values[i] = (float)(2 * uniform() - 1);
  return values;
}

/* ---- one batch, or a worker's part of it, through a layer ---------------------------------- */

typedef struct batch {
  float *x, *grad_y, *weights, *y, *grad_x, *grad_weights;
  int32_t *choices;
} batch;

static batch whole_batch(const trial *t) {
  int n = tokens_before(t, ranks);
  size_t rows = (size_t)n * t->d, slots = (size_t)n * t->k;
  batch b = {noise(rows), noise(rows), noise(slots), noise(rows), noise(rows), noise(slots),
             malloc((slots + 1) * sizeof(int32_t))};
  if (!b.choices) abort();
  for (int i = 0; i < n && t->load == SKEWED; i++) b.x[i * t->d] = 1; /* what the gate sends to expert 0 */
  for (size_t s = 0; s < slots; s++) {
    int any = (int)(uniform() * t->E), crowd = t->load == SKEWED && s % 4;
    b.choices[s] = s % 7 == 3 ? -1 : crowd ? 0 : any;
  }
  return b;
}

static void batch_free(batch *b) {
  free(b->x), free(b->grad_y), free(b->weights), free(b->y), free(b->grad_x), free(b->grad_weights), free(b->choices);
}

static fmoe_layer *layer_of(fmoe_group *group, const trial *t) {
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = t->d, options.d_hidden = t->h, options.experts = t->E, options.top_k = t->k, options.seed = seed;
  options.activation = t->activation;
  if (t->load != EMPTY) options.balance_loss = 0.5, options.z_loss = 0.2; /* means over tokens: n must be equal */
  fmoe_layer *layer = NULL;
  fmoe_tensors values = {.struct_size = sizeof values};
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer)) ||
      !EXPECT(FMOE_OK, fmoe_layer_values(layer, &values)))
    MPI_Abort(MPI_COMM_WORLD, 1);
  if (t->load == SKEWED) values.gate[0] += 2;
  return layer;
}

/* Of n tokens, from the first on.  WRONG_HERE: forward is first called with NULL; then others have WRONG_ELSEWHERE. */
enum { RIGHT, WRONG_HERE, WRONG_ELSEWHERE };
static fmoe_pass *run(fmoe_layer *layer, const trial *t, batch *b, int first, int n, int wrong) {
  size_t row = (size_t)first * t->d, slot = (size_t)first * t->k;
  fmoe_pass *pass = NULL;
  if (t->routed) EXPECT(FMOE_OK, fmoe_route(layer, b->x + row, n, b->choices + slot, b->weights + slot, &pass));
  else EXPECT(FMOE_OK, fmoe_gate(layer, b->x + row, n, &pass));
  if (wrong == WRONG_HERE) EXPECT(FMOE_ERROR_ARGUMENT, fmoe_forward(pass, NULL));
  if (wrong == WRONG_ELSEWHERE) EXPECT(FMOE_ERROR_PEER, fmoe_forward(pass, b->y + row));
  EXPECT(FMOE_OK, fmoe_forward(pass, b->y + row));
  EXPECT(FMOE_OK, fmoe_backward(pass, b->grad_y + row, b->grad_x + row, t->routed ? b->grad_weights + slot : NULL));
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  return pass;
}

/* ---- the comparison ------------------------------------------------------------------------ */

/* got [count] against times * wanted from element `first` of its `all` on. */
static void compare(const trial *t, const char *what, const float *got, const float *wanted, size_t first, size_t count,
                    size_t all, double times) {
  double largest = 0, worst = 0;
  for (size_t i = 0; i < all; i++) largest = fmax(largest, fabs(times * wanted[i]));
  for (size_t i = 0; i < count; i++) {
    double difference = fabs(got[i] - times * wanted[first + i]);
    if (!(difference <= worst)) worst = difference; /* a NaN stays */
  }
  CHECK(worst <= rounding * largest, "%s: %s differs by %g, largest is %g", t->name, what, worst, largest);
}

static void compare_routing(const trial *t, fmoe_pass *mine, fmoe_pass *whole, size_t slot, size_t slots) {
  fmoe_routing m = {.struct_size = sizeof m}, w = {.struct_size = sizeof w};
  EXPECT(FMOE_OK, fmoe_pass_routing(mine, &m)), EXPECT(FMOE_OK, fmoe_pass_routing(whole, &w));
  CHECK(!slots || !memcmp(m.choices, w.choices + slot, slots * sizeof *m.choices), "%s: choices", t->name);
  double losses[2] = {m.balance_loss, m.z_loss}, sums[2];
  MPI_Allreduce(losses, sums, 2, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  CHECK(fabs(sums[0] / ranks - w.balance_loss) <= rounding * w.balance_loss, "%s: balance loss", t->name);
  CHECK(fabs(sums[1] / ranks - w.z_loss) <= rounding * w.z_loss, "%s: z-loss", t->name);
}

static void compare_gradients(const trial *t, fmoe_layer *mine, fmoe_layer *whole) {
  fmoe_tensors m = {.struct_size = sizeof m}, w = {.struct_size = sizeof w};
  EXPECT(FMOE_OK, fmoe_layer_gradients(mine, &m)), EXPECT(FMOE_OK, fmoe_layer_gradients(whole, &w));
  CHECK(m.local_experts == t->E / ranks && m.first_expert == rank * m.local_experts, "%s: experts from %d on", t->name,
        (int)m.first_expert);
  size_t d = (size_t)t->d, h = (size_t)t->h, E = (size_t)t->E, first = (size_t)m.first_expert;
  compare(t, "gate's gradient", m.gate, w.gate, 0, E * d, E * d, 1);
  struct { const char *name; float *mine, *whole; size_t size; } tensors[] = {
      {"w1's gradient", m.w1, w.w1, h * d}, {"b1's gradient", m.b1, w.b1, h}, {"w2's gradient", m.w2, w.w2, d * h},
      {"b2's gradient", m.b2, w.b2, d},     {"w3's gradient", m.w3, w.w3, h * d}};
  for (int i = 0; i < 5; i++) {
    size_t size = tensors[i].size;
    CHECK(!tensors[i].mine == !tensors[i].whole, "%s: %s", t->name, tensors[i].name);
    if (!tensors[i].mine) continue;
    compare(t, tensors[i].name, tensors[i].mine, tensors[i].whole, first * size, E / (size_t)ranks * size, E * size, 1);
  }
}

static void test(fmoe_group *together, fmoe_group *alone, trial t, int wrong) {
  snprintf(t.name, sizeof t.name, "k %d, E %d, activation %d, n %d, d %d, %s, %s", t.k, t.E, t.activation, t.n, t.d,
           load_names[t.load], t.routed ? "routed" : "gated");
  int first = tokens_before(&t, rank), n = tokens_of(&t, rank), all = tokens_before(&t, ranks);
  size_t rows = (size_t)n * t.d, row = (size_t)first * t.d, slots = (size_t)n * t.k, slot = (size_t)first * t.k;
  batch b = whole_batch(&t);
  batch own = b; /* the inputs are shared, the outputs are not */
  own.y = noise((size_t)all * t.d), own.grad_x = noise((size_t)all * t.d), own.grad_weights = noise((size_t)all * t.k);
  fmoe_layer *mine = layer_of(together, &t), *whole = layer_of(alone, &t);
  fmoe_pass *my_pass = run(mine, &t, &own, first, n, wrong);
  for (size_t i = 0; i < (size_t)all * t.d; i++) b.grad_y[i] /= (float)ranks;
  fmoe_pass *whole_pass = run(whole, &t, &b, 0, all, RIGHT);

  compare(&t, "y", own.y + row, b.y, row, rows, (size_t)all * t.d, 1);
  compare(&t, "grad_tokens", own.grad_x + row, b.grad_x, row, rows, (size_t)all * t.d, ranks);
  if (!t.routed) compare_routing(&t, my_pass, whole_pass, slot, slots);
  else compare(&t, "grad_weights", own.grad_weights + slot, b.grad_weights, slot, slots, (size_t)all * t.k, ranks);
  compare_gradients(&t, mine, whole);

  fmoe_pass_destroy(my_pass), fmoe_pass_destroy(whole_pass);
  fmoe_layer_destroy(mine), fmoe_layer_destroy(whole);
  free(own.y), free(own.grad_x), free(own.grad_weights), batch_free(&b);
}

/* A group with one rank's options different from the others' has no layer, but may go on. */
static void test_disagreement(fmoe_group *together) {
  for (int odd = 0; odd < 4 && ranks > 1; odd++) {
    fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
    options.d_model = 8, options.d_hidden = 8, options.experts = ranks * 2, options.top_k = 1, options.seed = seed;
    if (rank == ranks - 1 && odd == 0) options.d_hidden = 9;
    if (rank == 0 && odd == 1) options.seed++;
    if (rank == 0 && odd == 2) options.experts *= 2;
    if (rank == 0 && odd == 3) options.balance_loss = 1;
    fmoe_layer *layer = NULL;
    EXPECT(FMOE_ERROR_DISAGREE, fmoe_layer_create(together, &options, &layer));
    CHECK(!layer, "out is only written on success");
  }
}

int main(int count, char **arguments) {
  int level, sums[2];
  MPI_Init_thread(&count, &arguments, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (rank == 0) printf("mpi_layer: %d ranks, seed %llu\n", ranks, (unsigned long long)seed);
  fmoe_group_options limited = {.struct_size = sizeof limited, .timeout_seconds = 60};
  fmoe_group_options single = {.struct_size = sizeof single, .threads = 1, .bind = 1};
  fmoe_group *together, *alone;
  if (!EXPECT(FMOE_OK, fmoe_group_create_mpi(MPI_COMM_WORLD, &limited, &together)) ||
      !EXPECT(FMOE_OK, fmoe_group_create_local(1, &single, &alone)))
    MPI_Abort(MPI_COMM_WORLD, 1);

  for (int k = 1; k <= 2; k++)
    for (int each = 1; each <= 4; each += 3)
      for (int load = 0; load < LOADS; load++)
        for (int routed = 0; routed < 2; routed++)
          for (int unit = FMOE_GELU; unit <= FMOE_SWIGLU && k <= each * ranks; unit += FMOE_SWIGLU - FMOE_GELU)
            test(together, alone, (trial){k, each * ranks, unit, load, routed, 19, 13, 21, ""}, RIGHT);
  /* Volumes that go in several messages. */
  test(together, alone, (trial){2, 4 * ranks, FMOE_GELU, EVEN, 0, 700, 256, 40, ""}, RIGHT);
  test(together, alone, (trial){1, 2 * ranks, FMOE_SILU, SKEWED, 1, 700, 256, 40, ""}, RIGHT);
  for (int routed = 0; routed < 2; routed++)
    test(together, alone, (trial){1, 2 * ranks, FMOE_RELU, EVEN, routed, 23, 8, 9, ""},
         rank == ranks - 1 ? WRONG_HERE : WRONG_ELSEWHERE);
  test_disagreement(together);
  test(together, alone, (trial){2, 2 * ranks, FMOE_GELU_TANH, EVEN, 0, 23, 8, 9, ""}, RIGHT);

  fmoe_group_destroy(alone), fmoe_group_destroy(together);
  MPI_Allreduce((int[]){passed, failed}, sums, 2, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  if (rank == 0) printf("%d passed, %d failed\n", sums[0], sums[1]), fflush(stdout);
  MPI_Finalize();
  return sums[1] != 0;
}
