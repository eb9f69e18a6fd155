#include "stored.h"

#include <stdlib.h>
#include <string.h>

int32_t gate = FMOE_GATE_TOPK;
double bias_step;

fmoe_layer_options options(int32_t activation, uint64_t of) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = 2, .d_model = D, .d_hidden = H,
                              .experts = E, .activation = activation, .gate = gate, .seed = of,
                              .bias_step = bias_step};
}

uint64_t values_of_sizes(fmoe_layer *layer, int64_t experts, int64_t d, int64_t h) {
  fmoe_tensors t = {.struct_size = sizeof t};
  float *list[TENSORS + 2];
  uint64_t hash = 1;
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  tensors_of(&t, list), list[TENSORS] = t.noise, list[TENSORS + 1] = t.gate_bias;
  const int64_t e = t.local_experts;
  const int64_t sizes[TENSORS + 2] = {experts * d, e * h * d, e * h, e * d * h, e * d, e * h * d, experts * d, experts};
  for (int i = 0; i <= TENSORS + 1; i++)
    if (list[i]) hash = hash_floats(hash, list[i], sizes[i]);
  return hash;
}

uint64_t values_of(fmoe_layer *layer) { return values_of_sizes(layer, E, D, H); }

void learn(fmoe_layer *layer, int steps) {
  fmoe_tensors g = {.struct_size = sizeof g};
  float *list[TENSORS + 1];
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  tensors_of(&g, list), list[TENSORS] = g.noise;
  const int64_t e = g.local_experts, each[TENSORS + 1] = {E * D, H * D, H, D * H, D, H * D, E * D};
  const fmoe_adamw_options how = {.struct_size = sizeof how, .learning_rate = 0.01, .weight_decay = 0.1};
  for (int s = 0; s < steps; s++) {
    for (int i = 0; i <= TENSORS; i++) {
      const int is_of_all = i == GATE || i == TENSORS;
      int64_t count = is_of_all ? each[i] : e * each[i], first = is_of_all ? 0 : g.first_expert * each[i];
      for (int64_t at = 0; list[i] && at < count; at++) {
        uint64_t state = (uint64_t)(first + at) * 64 + (uint64_t)i * 8 + (uint64_t)s;
        list[i][at] = (float)uniform(&state) - 0.5f;
      }
    }
    EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &how));
    fmoe_tensors t = {.struct_size = sizeof t};
    EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
    for (int expert = 0; t.gate_bias && expert < E; expert++) t.gate_bias[expert] += (float)(expert - s) * 0.01f;
  }
}

fmoe_group *one_group;

fmoe_layer *one(fmoe_layer_options o) {
  fmoe_layer *layer;
  if (!one_group) EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &one_group));
  if (!EXPECT(FMOE_OK, fmoe_layer_create(one_group, &o, &layer))) exit(summary());
  return layer;
}
