#include "batch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const tensor_names[TENSORS] = {"gate", "w1", "b1", "w2", "b2", "w3"};

void fill_float(double *values, int64_t count, double scale, uint64_t *state) {
  fill(values, count, scale, state);
  for (int64_t i = 0; i < count; i++) values[i] = (float)values[i];
}

void fill_values(oracle *o, uint64_t *state) {
  for (int t = 0; t < TENSORS; t++) {
    double scale = t == B1 || t == B2 ? 0.1 : 2 / sqrt((double)(t == W2 ? o->hidden : o->model));
    fill_float(o->values[t], o->sizes[t], scale, state);
  }
}

void tensors_of(const fmoe_tensors *t, float *list[TENSORS]) {
  float *in_order[TENSORS] = {t->gate, t->w1, t->b1, t->w2, t->b2, t->w3};
  memcpy(list, in_order, sizeof in_order);
}

fmoe_layer_options options_of(const oracle *o) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = (int32_t)o->choices,
                              .d_model = o->model, .d_hidden = o->hidden, .experts = o->experts,
                              .activation = o->activation, .balance_loss = o->balance, .z_loss = o->z};
}

/* Of a tensor over all experts, the elements that belong to those of one rank: all of the gate. */
static void slice_of(const oracle *o, int t, int64_t first_expert, int64_t local_experts, int64_t *first,
                     int64_t *count) {
  int64_t each = o->sizes[t] / o->experts;
  *first = t == GATE ? 0 : first_expert * each;
  *count = t == GATE ? o->sizes[t] : local_experts * each;
}

void set_values(fmoe_layer *layer, const oracle *o) {
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  float *values[TENSORS];
  if (!EXPECT(FMOE_OK, fmoe_layer_values(layer, &tensors))) exit(summary());
  tensors_of(&tensors, values);
  for (int t = 0; t < TENSORS; t++) {
    int64_t first, count;
    slice_of(o, t, tensors.first_expert, tensors.local_experts, &first, &count);
    CHECK((values[t] != NULL) == (count > 0), "%s is there exactly if it has elements", tensor_names[t]);
    for (int64_t i = 0; i < count; i++) values[t][i] = (float)o->values[t][first + i];
  }
}

fmoe_layer *layer_of(fmoe_group *group, const oracle *o) {
  fmoe_layer_options options = options_of(o);
  fmoe_layer *layer = NULL;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer))) exit(summary());
  set_values(layer, o);
  return layer;
}

batch batch_of(const oracle *o, fmoe_layer *layer) {
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &tensors));
  batch b = {.o = o, .first_expert = tensors.first_expert, .local_experts = tensors.local_experts};
  int64_t rows = o->tokens * o->model, slots = o->tokens * o->choices, at = 0, first;
  for (int t = 0; t < TENSORS; t++) slice_of(o, t, b.first_expert, b.local_experts, &first, &b.sizes[t]);
  struct { float **part; int64_t size; const double *from; } parts[6 + TENSORS] = {
      {&b.x, rows, o->x}, {&b.grad_y, rows, o->grad_y}, {&b.weight, slots, o->weight},
      {&b.y, rows, NULL}, {&b.grad_x, rows, NULL},      {&b.grad_weight, slots, NULL}};
  for (int t = 0; t < TENSORS; t++) parts[6 + t].part = &b.gradients[t], parts[6 + t].size = b.sizes[t];
  for (int p = 0; p < 6 + TENSORS; p++) b.size += parts[p].size;
  b.block = calloc((size_t)b.size + 1, sizeof(float));
  b.choice = calloc((size_t)slots + 1, sizeof(int32_t));
  if (!b.block || !b.choice) abort();
  memcpy(b.choice, o->choice, (size_t)slots * sizeof(int32_t));
  for (int p = 0; p < 6 + TENSORS; at += parts[p++].size) {
    *parts[p].part = b.block + at;
    for (int64_t i = 0; parts[p].from && i < parts[p].size; i++) b.block[at + i] = (float)parts[p].from[i];
  }
  for (int64_t i = 0; i < rows; i++) b.y[i] = b.grad_x[i] = 7; /* both are overwritten */
  return b;
}

void batch_free(batch *b) {
  fmoe_pass_destroy(b->pass);
  free(b->block), free(b->choice);
}

void begin(batch *b, fmoe_layer *layer) {
  if (b->o->routed) EXPECT(FMOE_OK, fmoe_route(layer, b->x, b->o->tokens, b->choice, b->weight, &b->pass));
  else EXPECT(FMOE_OK, fmoe_gate(layer, b->x, b->o->tokens, &b->pass));
}

void forward(batch *b) { EXPECT(FMOE_OK, fmoe_forward(b->pass, b->y)); }

void backward(batch *b) {
  EXPECT(FMOE_OK, fmoe_backward(b->pass, b->grad_y, b->grad_x, b->o->routed ? b->grad_weight : NULL));
}

void read_gradients(batch *b, fmoe_layer *layer) {
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  float *gradients[TENSORS];
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &tensors));
  tensors_of(&tensors, gradients);
  for (int t = 0; t < TENSORS; t++)
    if (b->sizes[t]) memcpy(b->gradients[t], gradients[t], (size_t)b->sizes[t] * sizeof(float));
}

/* Whatever gradients hold when they begin anew: nothing of it may be left. */
static void spoil_gradients(const batch *b, fmoe_layer *layer) {
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  float *gradients[TENSORS];
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &tensors));
  tensors_of(&tensors, gradients);
  for (int t = 0; t < TENSORS; t++)
    for (int64_t i = 0; i < b->sizes[t]; i++) gradients[t][i] = NAN;
}

batch run(fmoe_layer *layer, const oracle *o) {
  batch b = batch_of(o, layer);
  spoil_gradients(&b, layer);
  EXPECT(FMOE_OK, fmoe_layer_begin_gradients(layer));
  begin(&b, layer), forward(&b), backward(&b);
  EXPECT(FMOE_OK, fmoe_layer_reduce_gradients(layer));
  read_gradients(&b, layer);
  return b;
}

void check_close(const char *what, const char *name, const float *got, const double *wanted, int64_t count) {
  double largest = 0, difference = 0;
  int64_t worst = 0;
  for (int64_t i = 0; i < count; i++) {
    double apart = fabs((double)got[i] - wanted[i]);
    largest = fmax(largest, fabs(wanted[i]));
    if (!(apart <= difference)) difference = isnan(apart) ? INFINITY : apart, worst = i;
  }
  CHECK(difference <= rounding * largest, "%s: %s[%lld] is %.9g, not %.9g", what, name, (long long)worst,
        count ? (double)got[worst] : 0, count ? wanted[worst] : 0);
}

void check_bits(const char *what, const batch *a, const batch *b) {
  CHECK(a->size == b->size && !memcmp(a->block, b->block, (size_t)a->size * sizeof(float)), "%s", what);
}

/* Choices are compared exactly: no problem here has two logits of one token closer than float32 tells apart. */
void check_routing(const char *what, const batch *b, const oracle *o) {
  fmoe_routing r = {.struct_size = sizeof r};
  int64_t slots = o->tokens * o->choices;
  if (!EXPECT(FMOE_OK, fmoe_pass_routing(b->pass, &r))) return;
  CHECK(r.struct_size == sizeof r && r.tokens == o->tokens && r.top_k == o->choices, "%s", what);
  CHECK(!slots || !memcmp(r.choices, o->choice, (size_t)slots * sizeof *o->choice), "%s", what);
  CHECK(!memcmp(r.counts, o->counts, (size_t)o->experts * sizeof *o->counts), "%s", what);
  check_close(what, "weights", r.weights, o->weight, slots);
  CHECK(fabs(r.balance_loss - o->balance_loss) <= rounding * o->balance_loss, "%s: %.9g, not %.9g", what,
        r.balance_loss, o->balance_loss);
  CHECK(fabs(r.z_loss - o->z_loss) <= rounding * o->z_loss, "%s: %.9g, not %.9g", what, r.z_loss, o->z_loss);
}

void check_batch(const char *what, const batch *b, const oracle *o) {
  check_close(what, "y", b->y, o->y, o->tokens * o->model);
  check_close(what, "grad_tokens", b->grad_x, o->grad_x, o->tokens * o->model);
  if (o->routed) check_close(what, "grad_weights", b->grad_weight, o->grad_weight, o->tokens * o->choices);
}

void check_gradients(const char *what, const batch *b, const oracle *o) {
  const int64_t *counts = o->everyone ? o->everyone : o->counts;
  int untouched = 1;
  for (int t = 0; t < TENSORS; t++) {
    int64_t first, count, each = o->sizes[t] / o->experts;
    slice_of(o, t, b->first_expert, b->local_experts, &first, &count);
    check_close(what, tensor_names[t], b->gradients[t], o->gradients[t] + first, count);
    for (int64_t i = 0; t != GATE && i < count; i++) untouched &= counts[(first + i) / each] || b->gradients[t][i] == 0;
  }
  CHECK(untouched, "%s: experts without tokens have gradients of exactly 0", what);
}
