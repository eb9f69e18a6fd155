#include "alone.h"

#include <stdlib.h>

oracle *problem(int64_t n, int64_t k, int64_t E, int64_t d, int64_t h, int32_t activation) {
  uint64_t state = seed + (uint64_t)(n + 1000 * k + 10000 * activation);
  oracle *o = oracle_create(n, k, E, d, h, activation);
  fill_float(o->x, n * d, 1, &state);
  fill_float(o->grad_y, n * d, 1, &state);
  fill_values(o, &state);
  return o;
}

oracle *crowded_problem(int64_t n, int64_t k, int64_t d, int64_t h, int32_t activation) {
  oracle *o = problem(n, k, 8, d, h, activation);
  for (int64_t i = 0; i < n; i++) o->x[i * o->model] = 1;
  o->values[GATE][2 * o->model] = 4, o->values[GATE][0] = -8;
  o->balance = 0.01, o->z = 0.001;
  oracle_gate(o);
  CHECK(o->counts[2] == n && o->counts[0] == 0, "expert 2 is crowded, expert 0 idle");
  return o;
}

static fmoe_group *group_of(int32_t threads, int32_t bind) {
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads, .bind = bind};
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, &options, &group))) exit(summary());
  return group;
}

fmoe_group *group_with(int32_t threads) { return group_of(threads, 1); }
fmoe_group *pinned_group_with(int32_t threads) { return group_of(threads, 0); }

batch run_alone(const oracle *o, int32_t threads) {
  fmoe_group *group = group_with(threads);
  fmoe_layer *layer = layer_of(group, o);
  batch b = run(layer, o);
  fmoe_pass_destroy(b.pass);
  b.pass = NULL;
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group);
  return b;
}
