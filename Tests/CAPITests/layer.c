/* layer.c: what a layer computes, against the oracle; and that it computes the same bits again.
 * `layer small` keeps the sizes small enough for valgrind. */
#include <math.h>
#include <string.h>

#include "alone.h"

/* Of the oracle with the twelve printed digits of the golden vectors, relative. */
static const double printed = 1e-11;
/* Of the library with the golden vectors, relative: checksums add values of both signs, weighted up to 7. */
static const double golden = 1e-5;
/* Central differences with step 1e-5 in Double: 1e-10 of truncation, 1e-11 / 1e-5 of cancellation, some room. */
static const double differences = 2e-6;
static int small;

/* The caller's own routing: any expert, also twice for one token, every seventh slot dropped. */
static void route_by_hand(oracle *o) {
  uint64_t state = seed;
  o->routed = 1;
  fill_float(o->weight, o->tokens * o->choices, 1, &state);
  for (int64_t s = 0; s < o->tokens * o->choices; s++)
    o->choice[s] = s % 7 == 3 ? -1 : (int32_t)(uniform(&state) * (double)o->experts);
}

/* ---- the oracle itself --------------------------------------------------------------------- */

/* Published checksums of algorithms on one fixed batch: rows are softmax over two chosen, and Switch (one of all). */
static const double golden_sums[2][7] = {
    {-9.218071691735, 1.169076965364, -0.271115105869, 2.033827716246, -6.999052579643, 6.902470413495,
     31.579437328750},
    {-6.129518739962, 2.635138558968, 0.562486319135, -2.757109261603, -1.536037321517, 0.987745036269,
     13.953283377093}};
static const int32_t golden_choices[2][24] = {
    {0, 3, 2, 0, 0, 2, 2, 0, 0, 2, 0, 2, 0, 1, 1, 2, 1, 3, 0, 2, 2, 0, 2, 0}, {0, 2, 0, 2, 0, 0, 0, 1, 1, 0, 2, 2}};

static oracle *golden_problem(int64_t k) {
  uint64_t state = seed;
  oracle *o = oracle_create(12, k, 4, 6, 10, FMOE_GELU);
  fill(o->x, 12 * 6, 1, &state);
  for (int t = 0; t < W3; t++)
    fill(o->values[t], o->sizes[t], t == GATE ? 1 : t == B1 || t == B2 ? 0.1 : 0.5, &state);
  fill(o->grad_y, 12 * 6, 1, &state);
  oracle_gate(o), oracle_run(o);
  return o;
}

#define CHECKSUM(values, count, sum) \
  for (int64_t i = (sum = 0, 0); i < (count); i++) sum += (double)(values)[i] * (double)(1 + i % 7)

static void check_sum(const char *what, int part, double sum, double wanted, double tolerance) {
  CHECK(fabs(sum - wanted) <= tolerance * fabs(wanted), "%s, checksum %d: %.12f, not %.12f", what, part, sum, wanted);
}

static void test_golden_vectors(void) {
  for (int row = 0; row < 2; row++) {
    oracle *o = golden_problem(2 - row);
    const double *wanted = golden_sums[row];
    double sum;
    batch b = run_alone(o, 1);
    CHECK(!memcmp(o->choice, golden_choices[row], (size_t)(24 >> row) * sizeof(int32_t)), "choices of row %d", row);
    CHECKSUM(o->y, 72, sum);
    check_sum("oracle", 0, sum, wanted[0], printed);
    CHECKSUM(b.y, 72, sum);
    check_sum("library", 0, sum, wanted[0], golden);
    CHECKSUM(o->grad_x, 72, sum);
    check_sum("oracle", 1, sum, wanted[1], printed);
    CHECKSUM(b.grad_x, 72, sum);
    check_sum("library", 1, sum, wanted[1], golden);
    for (int t = 0; t < W3; t++) {
      CHECKSUM(o->gradients[t], o->sizes[t], sum);
      check_sum("oracle", 2 + t, sum, wanted[2 + t], printed);
      CHECKSUM(b.gradients[t], o->sizes[t], sum);
      check_sum("library", 2 + t, sum, wanted[2 + t], golden);
    }
    check_batch("golden", &b, o), check_gradients("golden", &b, o);
    batch_free(&b), oracle_destroy(o);
  }
}

static double loss_of(oracle *o) {
  double sum = 0;
  oracle_gate(o), oracle_run(o);
  for (int64_t i = 0; i < o->tokens * o->model; i++) sum += o->y[i] * o->grad_y[i];
  return sum + o->balance_loss + o->z_loss;
}

/* The loss by central differences against the oracle's gradient, for a few elements of an array. */
static void check_differences(oracle *o, const char *name, double *values, const double *gradient, int64_t count) {
  const double step = 1e-5;
  for (int64_t i = count / 3; i < count; i += 1 + count / 5) {
    double kept = values[i], before, after, slope;
    values[i] = kept - step, before = loss_of(o);
    values[i] = kept + step, after = loss_of(o);
    values[i] = kept, loss_of(o);
    slope = (after - before) / (2 * step);
    CHECK(fabs(slope - gradient[i]) <= differences, "oracle, activation %d, k %d: %s[%d] %.9g, not %.9g", o->activation,
          (int)o->choices, name, (int)i, gradient[i], slope);
  }
}

static void test_oracle(void) {
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++)
    for (int64_t k = 1; k <= 4; k++)
      for (int routed = 0; routed < 2; routed++) {
        oracle *o = problem(4, k, 5, 6, 7, activation);
        o->balance = 0.3, o->z = 0.2;
        if (routed) route_by_hand(o);
        loss_of(o);
        check_differences(o, "x", o->x, o->grad_x, 4 * 6);
        if (routed) check_differences(o, "weight", o->weight, o->grad_weight, 3); /* slot 3 is dropped */
        for (int t = 0; t < TENSORS; t++)
          check_differences(o, tensor_names[t], o->values[t], o->gradients[t], o->sizes[t]);
        oracle_destroy(o);
      }
}

/* ---- the library against the oracle -------------------------------------------------------- */

static void compare(fmoe_group *group, oracle *o, const char *kind) {
  char what[200];
  fmoe_layer *layer = layer_of(group, o);
  snprintf(what, sizeof what, "activation %d, n %d, k %d, E %d, d %d, h %d, %s", o->activation, (int)o->tokens,
           (int)o->choices, (int)o->experts, (int)o->model, (int)o->hidden, kind);
  oracle_gate(o), oracle_run(o);
  batch b = run(layer, o);
  check_routing(what, &b, o), check_batch(what, &b, o), check_gradients(what, &b, o);
  batch_free(&b);
  fmoe_layer_destroy(layer);
}

static void test_against_oracle(void) {
  /* n, E, d, h */
  static const int64_t shapes[][4] = {{0, 5, 37, 53},   {1, 5, 37, 53},    {29, 5, 37, 53},
                                     {40, 16, 16, 32}, {20, 33, 130, 301}};
  static const int64_t small_shapes[][4] = {{0, 4, 3, 5}, {1, 4, 3, 5}, {6, 5, 7, 9}};
  fmoe_group *group = group_with(2);
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++)
    for (int64_t k = 1; k <= 4; k *= 2)
      for (int shape = 0; shape < (small ? 3 : 5); shape++)
        for (int kind = 0; kind < 3; kind++) {
          const int64_t *s = small ? small_shapes[shape] : shapes[shape];
          oracle *o = problem(s[0], k, s[1], s[2], s[3], activation);
          if (kind == 1) o->balance = 0.7, o->z = 0.4;
          if (kind == 2) route_by_hand(o);
          compare(group, o, kind == 0 ? "gate" : kind == 1 ? "gate with losses" : "routed");
          oracle_destroy(o);
        }
  for (int64_t k = 1; k <= 2; k++) { /* the smallest layer; every expert chosen */
    oracle *o = problem(3, k, k, 1, 1, FMOE_SILU);
    compare(group, o, "smallest");
    oracle_destroy(o);
  }
  fmoe_group_destroy(group);
}

static void test_crowded_expert(void) {
  fmoe_group *group = group_with(2);
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++) {
    const int64_t n = small ? 20 : activation == FMOE_GELU ? 1100 : 300;
    oracle *o = crowded_problem(n, 2, small ? 6 : 64, small ? 5 : 96, activation);
    compare(group, o, "crowded");
    oracle_destroy(o);
  }
  fmoe_group_destroy(group);
}

static void test_accumulation(void) {
  fmoe_group *group = group_with(2);
  oracle *first = problem(13, 2, 5, 9, 11, FMOE_GELU), *second = problem(7, 2, 5, 9, 11, FMOE_GELU);
  for (int t = 0; t < TENSORS; t++)
    memcpy(second->values[t], first->values[t], (size_t)first->sizes[t] * sizeof(double));
  oracle_gate(first), oracle_run(first), oracle_gate(second), oracle_run(second);
  fmoe_layer *layer = layer_of(group, first);
  batch a = run(layer, first), b = batch_of(second, layer);
  begin(&b, layer), forward(&b), backward(&b), read_gradients(&b, layer);
  for (int t = 0; t < TENSORS; t++) {
    for (int64_t i = 0; i < first->sizes[t]; i++) second->gradients[t][i] += first->gradients[t][i];
    check_close("two passes", tensor_names[t], b.gradients[t], second->gradients[t], second->sizes[t]);
  }
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer)); /* of one worker: the mean is what it has */
  batch kept = batch_of(second, layer);
  read_gradients(&kept, layer);
  for (int t = 0; t < TENSORS; t++)
    CHECK(!memcmp(kept.gradients[t], b.gradients[t], (size_t)first->sizes[t] * sizeof(float)), "%s", tensor_names[t]);
  EXPECT(FMOE_OK, fmoe_layer_zero_gradients(layer));
  read_gradients(&kept, layer);
  for (int t = 0; t < TENSORS; t++)
    for (int64_t i = 0; i < first->sizes[t]; i++)
      if (kept.gradients[t][i] != 0) i = kept.sizes[t], CHECK(0, "%s is not zero after zeroing", tensor_names[t]);
  batch_free(&a), batch_free(&b), batch_free(&kept);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  oracle_destroy(first), oracle_destroy(second);
}

/* Three passes of one layer at once, each finished in its own time; the second is given up after forward. */
static void test_passes_in_flight(void) {
  static const int64_t tokens[3] = {17, 30, 5};
  fmoe_group *group = group_with(2);
  oracle *o[3];
  batch b[3];
  fmoe_layer *layer = NULL;
  for (int p = 0; p < 3; p++) {
    o[p] = problem(tokens[p], 2, 5, 12, 20, FMOE_SWIGLU);
    for (int t = 0; t < TENSORS; t++) memcpy(o[p]->values[t], o[0]->values[t], (size_t)o[0]->sizes[t] * sizeof(double));
    oracle_gate(o[p]), oracle_run(o[p]);
    if (!p) layer = layer_of(group, o[0]);
    b[p] = batch_of(o[p], layer);
    begin(&b[p], layer);
  }
  forward(&b[2]), forward(&b[0]), forward(&b[1]);
  fmoe_pass_destroy(b[1].pass), b[1].pass = NULL;
  backward(&b[0]), backward(&b[2]);
  for (int p = 0; p < 3; p += 2) check_routing("in flight", &b[p], o[p]), check_batch("in flight", &b[p], o[p]);
  check_close("given up", "y", b[1].y, o[1]->y, o[1]->tokens * o[1]->model);
  read_gradients(&b[0], layer);
  for (int t = 0; t < TENSORS; t++) {
    for (int64_t i = 0; i < o[0]->sizes[t]; i++) o[0]->gradients[t][i] += o[2]->gradients[t][i];
    check_close("in flight", tensor_names[t], b[0].gradients[t], o[0]->gradients[t], o[0]->sizes[t]);
  }
  for (int p = 0; p < 3; p++) batch_free(&b[p]), oracle_destroy(o[p]);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- the same bits again ------------------------------------------------------------------- */

static void test_same_bits(void) {
  for (int kind = 0; kind < 2; kind++) {
    oracle *o = crowded_problem(small ? 20 : 700, 2, small ? 6 : 64, small ? 5 : 96, kind ? FMOE_GELU : FMOE_SWIGLU);
    if (kind) route_by_hand(o);
    batch one = run_alone(o, 1);
    for (int32_t threads = 1; threads <= 3; threads++) {
      fmoe_group *group = group_with(threads);
      fmoe_layer *layer = layer_of(group, o);
      batch first = run(layer, o), again = run(layer, o);
      check_bits("the number of threads does not change bits", &first, &one);
      check_bits("a second run does not change bits", &again, &one);
      batch_free(&first), batch_free(&again);
      fmoe_layer_destroy(layer), fmoe_group_destroy(group);
    }
    batch_free(&one), oracle_destroy(o);
  }
}

/* A gate's own choices and weights, given to route, are the same layer. */
static void test_route_is_gate(void) {
  oracle *o = problem(29, 2, 5, 37, 53, FMOE_GELU);
  fmoe_group *group = group_with(2);
  fmoe_layer *layer = layer_of(group, o);
  fmoe_routing r = {.struct_size = sizeof r};
  batch gated = run(layer, o), routed = batch_of(o, layer);
  EXPECT(FMOE_OK, fmoe_pass_routing(gated.pass, &r));
  EXPECT(FMOE_OK, fmoe_route(layer, routed.x, o->tokens, r.choices, r.weights, &routed.pass));
  forward(&routed);
  CHECK(!memcmp(gated.y, routed.y, 29 * 37 * sizeof(float)), "same routing, same bits");
  EXPECT(FMOE_OK, fmoe_backward(routed.pass, routed.grad_y, routed.grad_x, NULL)); /* no need of those of the weights */
  batch_free(&gated), batch_free(&routed);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group), oracle_destroy(o);
}

/* ---- the gate's fine print, initial values ------------------------------------------------- */

static void check_choices(const char *what, oracle *o, const int32_t *wanted) {
  fmoe_group *group = group_with(1);
  fmoe_layer *layer = layer_of(group, o);
  fmoe_routing r = {.struct_size = sizeof r};
  batch b = batch_of(o, layer);
  begin(&b, layer);
  if (EXPECT(FMOE_OK, fmoe_pass_routing(b.pass, &r)))
    for (int64_t i = 0; i < o->tokens; i++)
      CHECK(!memcmp(r.choices + i * o->choices, wanted, (size_t)o->choices * sizeof *wanted), "%s: %d", what, (int)i);
  batch_free(&b);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group), oracle_destroy(o);
}

static void test_ties_and_nan_logits(void) {
  oracle *o = problem(9, 4, 6, 5, 3, FMOE_RELU); /* every logit 0 */
  memset(o->values[GATE], 0, (size_t)o->sizes[GATE] * sizeof(double));
  check_choices("ties go to the lower index", o, (const int32_t[]){0, 1, 2, 3});
  for (int worst = 0; worst < 2; worst++) { /* logits 1 1 nan 2 1 1, then the same with -infinity for 2 */
    static const double gate[6] = {1, 1, NAN, 2, 1, 1};
    o = problem(9, 4, 6, 1, 3, FMOE_RELU);
    for (int64_t i = 0; i < o->tokens; i++) o->x[i] = 1;
    memcpy(o->values[GATE], gate, sizeof gate);
    if (worst) o->values[GATE][3] = -INFINITY;
    check_choices("NaN ranks lowest", o, worst ? (const int32_t[]){0, 1, 4, 5} : (const int32_t[]){3, 0, 1, 4});
  }
}

static void test_initial_values(void) {
  fmoe_group *group = group_with(2);
  fmoe_layer *layers[3];
  float *values[3][TENSORS];
  const int64_t d = 12, h = 20, E = 3, sizes[TENSORS] = {E * d, E * h * d, E * h, E * d * h, E * d, 0};
  for (int i = 0; i < 3; i++) {
    fmoe_layer_options options = {.struct_size = sizeof options, .d_model = d, .d_hidden = h, .experts = E,
                                  .seed = i == 2 ? 8 : 7};
    fmoe_tensors tensors = {.struct_size = sizeof tensors};
    EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layers[i]));
    EXPECT(FMOE_OK, fmoe_layer_values(layers[i], &tensors));
    tensors_of(&tensors, values[i]);
  }
  for (int t = 0; t < W3; t++) {
    double bound = 1 / sqrt((double)(t == W2 || t == B2 ? h : d)), largest = 0;
    CHECK(!memcmp(values[0][t], values[1][t], (size_t)sizes[t] * sizeof(float)), "%s: one seed, one start",
          tensor_names[t]);
    if (t == GATE || t == W1 || t == W2)
      CHECK(memcmp(values[0][t], values[2][t], (size_t)sizes[t] * sizeof(float)), "%s: two seeds", tensor_names[t]);
    for (int64_t i = 0; i < sizes[t]; i++) largest = fmax(largest, fabs((double)values[0][t][i]));
    CHECK(largest <= bound * (1 + rounding), "%s starts within 1/sqrt(in): %g", tensor_names[t], largest);
  }
  for (int i = 0; i < 3; i++) fmoe_layer_destroy(layers[i]);
  fmoe_group_destroy(group);
}

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  printf("layer: seed %llu\n", (unsigned long long)seed);
  test_oracle();
  test_golden_vectors();
  test_against_oracle();
  test_crowded_expert();
  test_accumulation();
  test_passes_in_flight();
  test_same_bits();
  test_route_is_gate();
  test_ties_and_nan_logits();
  test_initial_values();
  return summary();
}
