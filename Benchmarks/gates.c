/* gates: what choosing costs.
 *
 *   make bench                              or: build/gates [--threads N]
 *
 * For every gate, at n 4096, d 1024, h 2048, E 64 and the top_k it is known for, with a balance and a z-loss where it has
 * them: the median of fmoe_gate, and its share of fmoe_gate and fmoe_forward together. */
#include <fastermoe.h>
#include <string.h>

#include "measure.h"

enum { N = 4096, D = 1024, H = 2048, E = 64, REPEATS = 9 };
static const char *names[] = {"TOPK", "NOISY", "SWITCH", "GSHARD", "BASE", "TOPOLOGY", "HIERARCHICAL"};
static float tokens[N * D], output[N * D];

int main(int argc, char **argv) {
  fmoe_group_options threads = {.struct_size = sizeof threads};
  if (argc == 3 && !strcmp(argv[1], "--threads")) threads.threads = atoi(argv[2]);
  fmoe_group *group;
  CHECK(fmoe_group_create_local(1, &threads, &group));
  for (int i = 0; i < N * D; i++) tokens[i] = (float)((int64_t)i * 7919 % 100003) / 50000 - 1;
  printf("\ngates, n %d, d %d, h %d, E %d:\n", N, D, H, E);
  for (int32_t gate = FMOE_GATE_TOPK; gate <= FMOE_GATE_HIERARCHICAL; gate++) {
    fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
    options.d_model = D, options.d_hidden = H, options.experts = E, options.gate = gate, options.seed = 1;
    options.balance_loss = gate == FMOE_GATE_BASE ? 0 : 0.01, options.z_loss = gate == FMOE_GATE_BASE ? 0 : 0.001;
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
    printf("%-13s %6.2f ms, %4.1f %% of gate and forward\n", names[gate], mine * 1e3, 100 * mine / (mine + rest));
    fflush(stdout);
  }
  fmoe_group_destroy(group);
  return 0;
}
