/* gates: what choosing costs.
 *
 *   make bench                              or: build/gates [--threads N]
 *
 * For every gate, at n 4096, d 1024, h 2048, E 64 and the top_k it is known for, with a balance and a z-loss where it has
 * them: the median of fmoe_gate, and its share of fmoe_gate and fmoe_forward together.  Then TOPK balanced by a bias instead
 * of a loss, and SWITCH with jitter. */
#include <fastermoe.h>
#include <string.h>

#include "measure.h"

enum { N = 4096, D = 1024, H = 2048, E = 64, REPEATS = 9 };
static const struct { const char *name; int32_t gate; double balance, bias, jitter; } kinds[] = {
  {"TOPK", FMOE_GATE_TOPK, 0.01, 0, 0}, {"NOISY", FMOE_GATE_NOISY, 0.01, 0, 0}, {"SWITCH", FMOE_GATE_SWITCH, 0.01, 0, 0},
  {"GSHARD", FMOE_GATE_GSHARD, 0.01, 0, 0}, {"BASE", FMOE_GATE_BASE, 0, 0, 0}, {"TOPOLOGY", FMOE_GATE_TOPOLOGY, 0.01, 0, 0},
  {"HIERARCHICAL", FMOE_GATE_HIERARCHICAL, 0.01, 0, 0}, {"SWIPE", FMOE_GATE_SWIPE, 0.01, 0, 0},
  {"TOPK, bias", FMOE_GATE_TOPK, 0, 0.001, 0}, {"SWITCH, jitter", FMOE_GATE_SWITCH, 0.01, 0, 0.01},
};
static float tokens[N * D], output[N * D];

int main(int argc, char **argv) {
  fmoe_group_options threads = {.struct_size = sizeof threads};
  if (argc == 3 && !strcmp(argv[1], "--threads")) threads.threads = atoi(argv[2]);
  fmoe_group *group;
  CHECK(fmoe_group_create_local(1, &threads, &group));
  /* Tokens without a pattern: all experts get about as many, so that limits drop few and forward is as long as it should be. */
  uint64_t state = 1;
  for (int i = 0; i < N * D; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    tokens[i] = (float)(state >> 40) * 0x1p-23f - 1;
  }
  printf("\ngates, n %d, d %d, h %d, E %d:\n", N, D, H, E);
  for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
    fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
    options.d_model = D, options.d_hidden = H, options.experts = E, options.gate = kinds[kind].gate, options.seed = 1;
    options.balance_loss = kinds[kind].balance, options.z_loss = kinds[kind].balance / 10;
    options.bias_step = kinds[kind].bias, options.input_jitter = kinds[kind].jitter;
    fmoe_layer *layer;
    CHECK(fmoe_layer_create(group, &options, &layer));
    double gates[REPEATS], forwards[REPEATS];
    for (int r = -1; r < REPEATS; r++) {
      fmoe_pass *pass;
      double start = now();
      CHECK(fmoe_gate(layer, tokens, N, &pass));
      double between = now();
      CHECK(fmoe_forward(pass, output));
      if (r >= 0) gates[r] = between - start, forwards[r] = now() - between;
      fmoe_pass_destroy(pass);
    }
    fmoe_layer_destroy(layer);
    double mine = median(gates, REPEATS), rest = median(forwards, REPEATS);
    printf("%-14s %6.2f ms, %4.1f %% of gate and forward\n", kinds[kind].name, mine * 1e3, 100 * mine / (mine + rest));
    fflush(stdout);
  }
  fmoe_group_destroy(group);
  return 0;
}
