/* gates: what choosing costs.
 *
 *   make bench                              or: build/gates [--threads N]
 *
 * For every gate, at n 4096, d 1024, h 2048, E 64 and the top_k it is known for, with a balance and a z-loss where it has
 * them: the median of fmoe_gate, and its share of fmoe_gate and fmoe_forward together.  Then TOPK balanced by a bias instead
 * of a loss, and SWITCH with jitter.  Then, of two workers of one thread that are places of their own and have half of the
 * tokens each, those gates whose rule is about workers, and SWITCH with all ways to drop. */
#include <fastermoe.h>
#include <pthread.h>
#include <string.h>

#include "measure.h"

enum { N = 4096, D = 1024, H = 2048, E = 64, REPEATS = 9, MOST_WORKERS = 2 };
typedef struct kind {
  const char *name;
  int workers;
  int32_t gate;
  double balance, bias, jitter;
  int32_t drop;
} kind;
static const kind kinds[] = {
  {"TOPK", 1, FMOE_GATE_TOPK, 0.01, 0, 0, 0}, {"NOISY", 1, FMOE_GATE_NOISY, 0.01, 0, 0, 0},
  {"SWITCH", 1, FMOE_GATE_SWITCH, 0.01, 0, 0, 0}, {"GSHARD", 1, FMOE_GATE_GSHARD, 0.01, 0, 0, 0},
  {"BASE", 1, FMOE_GATE_BASE, 0, 0, 0, 0}, {"TOPOLOGY", 1, FMOE_GATE_TOPOLOGY, 0.01, 0, 0, 0},
  {"HIERARCHICAL", 1, FMOE_GATE_HIERARCHICAL, 0.01, 0, 0, 0}, {"SWIPE", 1, FMOE_GATE_SWIPE, 0.01, 0, 0, 0},
  {"TOPK, bias", 1, FMOE_GATE_TOPK, 0, 0.001, 0, 0}, {"SWITCH, jitter", 1, FMOE_GATE_SWITCH, 0.01, 0, 0.01, 0},
  {"TOPK", 2, FMOE_GATE_TOPK, 0.01, 0, 0, 0}, {"TOPOLOGY", 2, FMOE_GATE_TOPOLOGY, 0.01, 0, 0, 0},
  {"HIERARCHICAL", 2, FMOE_GATE_HIERARCHICAL, 0.01, 0, 0, 0}, {"SWIPE", 2, FMOE_GATE_SWIPE, 0.01, 0, 0, 0},
  {"SWITCH", 2, FMOE_GATE_SWITCH, 0.01, 0, 0, FMOE_DROP_LAST}, {"SWITCH, lightest", 2, FMOE_GATE_SWITCH, 0.01, 0, 0, FMOE_DROP_LIGHTEST},
  {"SWITCH, random", 2, FMOE_GATE_SWITCH, 0.01, 0, 0, FMOE_DROP_RANDOM},
  {"SWITCH, unimportant", 2, FMOE_GATE_SWITCH, 0.01, 0, 0, FMOE_DROP_UNIMPORTANT},
};
static float tokens[N * D], output[N * D];
static pthread_barrier_t ready;

typedef struct seat {
  const kind *kind;
  fmoe_group *group;
  int rank;
  double gates[REPEATS], forwards[REPEATS];
} seat;

static void *measure(void *of) {
  seat *s = of;
  const int64_t n = N / s->kind->workers;
  const float *mine = tokens + s->rank * n * D;
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = D, options.d_hidden = H, options.experts = E, options.gate = s->kind->gate, options.seed = 1;
  options.balance_loss = s->kind->balance, options.z_loss = s->kind->balance / 10;
  options.bias_step = s->kind->bias, options.input_jitter = s->kind->jitter, options.drop = s->kind->drop;
  fmoe_layer *layer;
  CHECK(fmoe_layer_create(s->group, &options, &layer));
  for (int r = -1; r < REPEATS; r++) {
    fmoe_pass *pass;
    pthread_barrier_wait(&ready);
    double start = now();
    CHECK(fmoe_gate(layer, mine, n, &pass));
    double between = now();
    CHECK(fmoe_forward(pass, output + s->rank * n * D));
    if (r >= 0) s->gates[r] = between - start, s->forwards[r] = now() - between;
    fmoe_pass_destroy(pass);
  }
  fmoe_layer_destroy(layer);
  return NULL;
}

int main(int argc, char **argv) {
  /* Tokens without a pattern: all experts get about as many, so that limits drop few and forward is as long as it should be. */
  uint64_t state = 1;
  for (int i = 0; i < N * D; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    tokens[i] = (float)(state >> 40) * 0x1p-23f - 1;
  }
  for (int workers = 1; workers <= MOST_WORKERS; workers++) {
    fmoe_group_options threads = {.struct_size = sizeof threads};
    if (argc == 3 && !strcmp(argv[1], "--threads")) threads.threads = atoi(argv[2]);
    if (workers > 1) threads.threads = 1, threads.topology = "pack:2 core:1 pu:1";
    fmoe_group *groups[MOST_WORKERS];
    CHECK(fmoe_group_create_local(workers, &threads, groups));
    if (pthread_barrier_init(&ready, NULL, (unsigned)workers)) return 1;
    printf("\ngates, n %d, d %d, h %d, E %d, %d worker%s:\n", N, D, H, E, workers, workers > 1 ? "s" : "");
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
      if (kinds[kind].workers != workers) continue;
      seat seats[MOST_WORKERS];
      pthread_t sitting[MOST_WORKERS];
      for (int rank = 0; rank < workers; rank++) {
        seats[rank].kind = &kinds[kind], seats[rank].group = groups[rank], seats[rank].rank = rank;
        if (pthread_create(&sitting[rank], NULL, measure, &seats[rank])) return 1;
      }
      for (int rank = 0; rank < workers; rank++) pthread_join(sitting[rank], NULL);
      double mine = median(seats[0].gates, REPEATS), rest = median(seats[0].forwards, REPEATS);
      printf("%-19s %6.2f ms, %4.1f %% of gate and forward\n", kinds[kind].name, mine * 1e3, 100 * mine / (mine + rest));
      fflush(stdout);
    }
    pthread_barrier_destroy(&ready);
    for (int rank = 0; rank < workers; rank++) fmoe_group_destroy(groups[rank]);
  }
  return 0;
}
