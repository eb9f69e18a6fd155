/* adamw.c: fmoe_layer_adamw against the formula in Double, over its options; the same bits for any number of threads and
 * workers. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "crew.h"

static const uint64_t seed = 16180339;
/* A step adds a number of up to learning_rate·(a few units) in size to a parameter of up to 1, in float32: half a unit in
 * the last place of the parameter for each of its two roundings, and some ten roundings of the small number itself, m and
 * v included, which steps add up as slowly as they add up these.  Per step, relative to 1: */
static const double rounding_of_step = 1.3e-7;

enum { E = 4, D = 13, H = 11, STEPS = 200 };

typedef struct reference {
  int64_t sizes[TENSORS];
  double *p[TENSORS], *m[TENSORS], *v[TENSORS];
} reference;

static float gradient(int tensor, int64_t index, int step) { /* of very different sizes, some 0 */
  uint64_t state = (uint64_t)index * 1000003 + (uint64_t)tensor * 101 + (uint64_t)step * 7919 + seed;
  double size = exp(20 * uniform(&state) - 18);
  return index % 17 == 5 ? 0 : (float)((uniform(&state) - 0.3) * size);
}

static void step_in_double(reference *r, const fmoe_adamw_options *o, int t) {
  double beta1 = o->beta1 != 0 ? o->beta1 : 0.9, beta2 = o->beta2 != 0 ? o->beta2 : 0.999;
  double epsilon = o->epsilon != 0 ? o->epsilon : 1e-8, scale = o->gradient_scale != 0 ? o->gradient_scale : 1;
  for (int i = 0; i < TENSORS; i++)
    for (int64_t at = 0; at < r->sizes[i]; at++) {
      double *p = r->p[i] + at, *m = r->m[i] + at, *v = r->v[i] + at, g = scale * (double)gradient(i, at, t);
      double decay = (i == B1 || i == B2) && !o->decay_biases ? 0 : o->weight_decay;
      *m = beta1 * *m + (1 - beta1) * g;
      *v = beta2 * *v + (1 - beta2) * g * g;
      *p -= o->learning_rate * decay * *p;
      *p -= o->learning_rate * (*m / (1 - pow(beta1, t))) / (sqrt(*v / (1 - pow(beta2, t))) + epsilon);
    }
}

static void fill_gradients(fmoe_layer *layer, int step) {
  fmoe_tensors g = {.struct_size = sizeof g};
  float *list[TENSORS];
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  tensors_of(&g, list);
  const int64_t e = g.local_experts, each[TENSORS] = {D, H * D, H, D * H, D, H * D};
  for (int i = 0; i < TENSORS; i++)
    for (int64_t at = 0, first = i == GATE ? 0 : g.first_expert * each[i]; list[i] && at < (i == GATE ? E : e) * each[i]; at++)
      list[i][at] = gradient(i, first + at, step);
}

static fmoe_layer *layer_in(fmoe_group *group, int32_t activation) {
  const fmoe_layer_options o = {.struct_size = sizeof o, .d_model = D, .d_hidden = H, .experts = E, .seed = 3,
                                .activation = activation};
  fmoe_layer *layer;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &o, &layer))) exit(summary());
  return layer;
}

static void test_against_double(int32_t activation, fmoe_adamw_options o) {
  fmoe_group *group;
  EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &group));
  fmoe_layer *layer = layer_in(group, activation);
  fmoe_tensors t = {.struct_size = sizeof t}, g = t;
  float *values[TENSORS], *gradients[TENSORS];
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t)), EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  tensors_of(&t, values), tensors_of(&g, gradients);
  const int64_t each[TENSORS] = {D, H * D, H, D * H, D, H * D};
  reference r = {0};
  for (int i = 0; i < TENSORS; i++) {
    r.sizes[i] = values[i] ? E * each[i] : 0;
    for (int k = 0; k < 3; k++)
      if (!(*(k == 0 ? &r.p[i] : k == 1 ? &r.m[i] : &r.v[i]) = calloc((size_t)r.sizes[i] + 1, sizeof(double)))) abort();
    for (int64_t at = 0; at < r.sizes[i]; at++) r.p[i][at] = (double)values[i][at];
  }
  double worst = 0;
  fmoe_tensors asked = {.struct_size = sizeof asked};
  o.struct_size = sizeof o;
  for (int step = 1; step <= STEPS; step++) {
    fill_gradients(layer, step);
    EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &o));
    step_in_double(&r, &o, step);
    if (o.zero_gradients == 2) EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &asked));
    for (int i = 0; i < TENSORS; i++)
      for (int64_t at = 0; at < r.sizes[i]; at++) {
        double apart = fabs((double)values[i][at] - r.p[i][at]) / fmax(1, fabs(r.p[i][at])) / step;
        if (!(apart <= worst)) worst = apart;
        float left = o.zero_gradients ? 0 : gradient(i, at, step);
        if (memcmp(&gradients[i][at], &left, sizeof left)) CHECK(0, "gradient %d %lld is %g", i, (long long)at, (double)gradients[i][at]);
      }
  }
  CHECK(worst <= rounding_of_step, "%g a step", worst);
  printf("adamw: activation %d, %d steps, off by %.2g a step at most, %.2g allowed\n", activation, STEPS, worst, rounding_of_step);
  for (int i = 0; i < TENSORS; i++) free(r.p[i]), free(r.m[i]), free(r.v[i]);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- the same bits for any threads and workers ------------------------------------------------- */

static float results[6 * E * H * D];

static void several_steps(crew *c, int32_t rank, void *context) {
  fmoe_layer *layer = layer_in(c->groups[rank], FMOE_GELU);
  const fmoe_adamw_options o = {.struct_size = sizeof o, .learning_rate = 0.01, .weight_decay = 0.1, .decay_biases = 1};
  for (int step = 1; step <= 5; step++) fill_gradients(layer, step), EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &o));
  fmoe_tensors t = {.struct_size = sizeof t};
  float *list[TENSORS], *to = context;
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  tensors_of(&t, list);
  const int64_t each[TENSORS] = {D, H * D, H, D * H, D, H * D};
  for (int i = 0; i < TENSORS; to += E * each[i++])
    if (list[i]) memcpy(to + (i == GATE ? 0 : t.first_expert * each[i]), list[i],
                        (size_t)((i == GATE ? E : t.local_experts) * each[i]) * sizeof(float));
  fmoe_layer_destroy(layer);
}

static void test_same_bits(void) {
  static float alone[sizeof results / sizeof *results];
  crew *one = crew_create((crew_options){.ranks = 1, .threads = 1});
  crew_run(one, several_steps, alone), crew_destroy(one);
  for (int32_t ranks = 1; ranks <= E; ranks *= 2)
    for (int32_t threads = 1; threads <= 3; threads++)
      for (int over = 0; over < 2; over++) {
        crew *c = crew_create((crew_options){.ranks = ranks, .threads = threads, .over_mailbox = over, .mail = {.seed = seed}});
        memset(results, 0, sizeof results);
        crew_run(c, several_steps, results), crew_destroy(c);
        CHECK(!memcmp(results, alone, sizeof alone), "%d workers of %d threads", ranks, threads);
      }
}

/* ---- a noisy gate --------------------------------------------------------------------------------- */

/* Given the gate's values and gradients, the noise's matrix must go as the gate does, to the last bit. */
static void steps_of_noise(crew *c, int32_t rank, void *unused) {
  (void)unused;
  const fmoe_layer_options of_layer = {.struct_size = sizeof of_layer, .d_model = D, .d_hidden = H, .experts = E, .seed = 3,
                                       .gate = FMOE_GATE_NOISY};
  const fmoe_adamw_options o = {.struct_size = sizeof o, .learning_rate = 0.01, .weight_decay = 0.1, .zero_gradients = 1};
  fmoe_layer *layer, *plain = layer_in(c->groups[rank], FMOE_GELU);
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &of_layer, &layer))) exit(summary());
  fmoe_tensors t = {.struct_size = sizeof t}, g = t, other = t;
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t)), EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  EXPECT(FMOE_OK, fmoe_layer_values(plain, &other));
  const size_t size = E * D * sizeof(float);
  CHECK(!memcmp(t.gate, other.gate, size) && memcmp(t.gate, t.noise, size), "the noise begins with values of its own");
  memcpy(t.noise, t.gate, size);
  for (int step = 1; step <= 5; step++) {
    float left = 0;
    fill_gradients(layer, step), fill_gradients(plain, step);
    memcpy(g.noise, g.gate, size);
    EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &o)), EXPECT(FMOE_OK, fmoe_layer_adamw(plain, &o));
    for (int i = 0; i < E * D; i++) left += fabsf(g.noise[i]);
    CHECK(left == 0, "gradients become 0");
    CHECK(!memcmp(t.noise, t.gate, size), "rank %d of %d, step %d", rank, c->ranks, step);
    CHECK(!memcmp(t.gate, other.gate, size) &&
          !memcmp(t.w1, other.w1, (size_t)t.local_experts * H * D * sizeof(float)), "and the rest as without noise");
  }
  fmoe_layer_destroy(layer), fmoe_layer_destroy(plain);
}

static void test_noise(void) {
  for (int32_t ranks = 1; ranks <= E; ranks *= 2) {
    crew *c = crew_create((crew_options){.ranks = ranks, .threads = 3});
    crew_run(c, steps_of_noise, NULL), crew_destroy(c);
  }
}

/* Tensors of several tasks, cut anywhere. */
static void test_large(void) {
  static float *once;
  const fmoe_layer_options o = {.struct_size = sizeof o, .d_model = 301, .d_hidden = 307, .experts = 3, .seed = 3};
  const fmoe_adamw_options how = {.struct_size = sizeof how, .learning_rate = 0.5, .beta1 = 0.5, .beta2 = 0.5};
  for (int32_t threads = 1; threads <= 4; threads++) {
    const fmoe_group_options of_group = {.struct_size = sizeof of_group, .threads = threads, .bind = 1};
    fmoe_group *group;
    fmoe_layer *layer;
    EXPECT(FMOE_OK, fmoe_group_create_local(1, &of_group, &group));
    EXPECT(FMOE_OK, fmoe_layer_create(group, &o, &layer));
    fmoe_tensors t = {.struct_size = sizeof t}, g = t;
    EXPECT(FMOE_OK, fmoe_layer_values(layer, &t)), EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
    const int64_t count = 3 * 301 * 307;
    float *before = malloc((size_t)count * sizeof(float));
    if (!before) abort();
    memcpy(before, t.w2, (size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++) g.w2[i] = i % 2 ? 1 : -1;
    EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &how)); /* the first step goes by the gradient's sign alone */
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; i++) wrong += fabsf(t.w2[i] - before[i] + (i % 2 ? 0.5f : -0.5f)) > 1e-6f;
    CHECK(wrong == 0, "%lld of %lld with %d threads", (long long)wrong, (long long)count, threads);
    if (once) CHECK(!memcmp(once, t.w2, (size_t)count * sizeof(float)), "%d threads", threads);
    else if ((once = malloc((size_t)count * sizeof(float)))) memcpy(once, t.w2, (size_t)count * sizeof(float));
    free(before), fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  }
  free(once);
}

/* ---- options -------------------------------------------------------------------------------------- */

static void refuse(fmoe_layer *layer, fmoe_status status, fmoe_adamw_options o, const char *words) {
  if (!o.struct_size) o.struct_size = sizeof o;
  EXPECT(status, fmoe_layer_adamw(layer, &o));
  CHECK(strstr(fmoe_last_error(), words), "\"%s\" without \"%s\"", fmoe_last_error(), words);
}

static void test_options(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options = FMOE_ERROR_OPTIONS;
  fmoe_group *group;
  EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &group));
  fmoe_layer *layer = layer_in(group, FMOE_GELU);
  fmoe_tensors t = {.struct_size = sizeof t};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  float before[E * D];
  memcpy(before, t.gate, sizeof before);
  fill_gradients(layer, 1);
  EXPECT(argument, fmoe_layer_adamw(layer, NULL));
  const double wrong[] = {-1, NAN, INFINITY};
  for (int i = 0; i < 3; i++) {
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = wrong[i]}, "learning_rate");
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .epsilon = wrong[i]}, "epsilon");
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .weight_decay = wrong[i]}, "weight_decay");
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .gradient_scale = wrong[i]}, "gradient_scale");
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .beta1 = wrong[i]}, "beta1");
    refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .beta2 = wrong[i]}, "beta2");
  }
  refuse(layer, argument, (fmoe_adamw_options){.learning_rate = 1, .beta2 = 1}, "beta2 must be 0 or more and less than 1");
  refuse(layer, options, (fmoe_adamw_options){.learning_rate = 1, .zero_gradients = 3}, "zero_gradients");
  refuse(layer, options, (fmoe_adamw_options){.learning_rate = 1, .decay_biases = -1}, "decay_biases");
  refuse(layer, options, (fmoe_adamw_options){.learning_rate = 1, .reserved = 1}, "reserved");
  refuse(layer, options, (fmoe_adamw_options){.learning_rate = 1, .struct_size = 8}, "struct_size");
  struct { fmoe_adamw_options known; double later; } newer = {{.struct_size = sizeof newer, .learning_rate = 1}, 1};
  EXPECT(options, fmoe_layer_adamw(layer, &newer.known));
  CHECK(!memcmp(before, t.gate, sizeof before), "what is refused changes nothing");
  fmoe_adamw_options shortest = {.struct_size = 16, .learning_rate = 0, .beta1 = NAN}; /* beta1 is beyond its end */
  EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &shortest));
  CHECK(!memcmp(before, t.gate, sizeof before), "a rate of 0 moves nothing");
  newer.later = 0;
  EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &newer.known));
  CHECK(memcmp(before, t.gate, sizeof before), "another one does");
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

int main(void) {
  printf("adamw: seed %llu\n", (unsigned long long)seed);
  begin_test("adamw", 120);
  test_against_double(FMOE_GELU, (fmoe_adamw_options){.learning_rate = 1e-3});
  test_against_double(FMOE_SWIGLU, (fmoe_adamw_options){.learning_rate = 1e-3, .weight_decay = 0.1, .zero_gradients = 1});
  test_against_double(FMOE_RELU, (fmoe_adamw_options){.learning_rate = 1e-3, .zero_gradients = 2});
  test_against_double(FMOE_RELU, (fmoe_adamw_options){.learning_rate = 3e-2, .beta1 = 0.8, .beta2 = 0.95, .epsilon = 1e-6,
                                                      .weight_decay = 0.5, .gradient_scale = 0.125, .decay_biases = 1});
  test_same_bits();
  test_noise();
  test_large();
  test_options();
  return summary();
}
