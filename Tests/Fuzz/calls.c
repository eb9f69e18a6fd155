/* calls.c: bytes as calls on one, two or three ranks, threads of this process: in any order, with wrong arguments, and with
 * ranks that leave some out.
 *
 * An instruction is three bytes: what to do, with what, and who deviates.  Without a deviation all ranks do the same: then
 * a collective call succeeds on all or fails on all. */
#include <pthread.h>

#include "../CAPITests/crew.h"
#include "fuzz.h"

enum { MOST = 3, LAYERS = 2, PASSES = 3, N = 6, D = 5, H = 3, E = 6, K = 2, INSTRUCTIONS = 64 };

typedef struct hand { /* what a rank holds */
  fmoe_group *group;
  int is_alone;
  fmoe_layer *layers[LAYERS];
  fmoe_pass *passes[PASSES];
  fmoe_cluster *cluster;
  float *rows[PASSES][4]; /* tokens, output, gradients of output, of tokens; each a block of its own */
} hand;

typedef struct script {
  const uint8_t *at;
  int instructions;
  fmoe_status results[INSTRUCTIONS][MOST];
  uint8_t collective[INSTRUCTIONS][MOST];
} script;

static char untouched;
#define NEW(type) ((type *)(void *)&untouched)
/* An object that a call has made, or nothing of it. */
#define KEEP(place, fresh, status)                                                                       \
  do {                                                                                                   \
    if (status == FMOE_OK) place = fresh;                                                                \
    else DEMAND((void *)fresh == &untouched, "a failing call wrote to its out: %s", fmoe_last_error());  \
  } while (0)

static fmoe_status create(hand *h, uint8_t with, int is_odd) {
  fmoe_layer *fresh = NEW(fmoe_layer);
  fmoe_layer_options o = {.struct_size = sizeof o, .top_k = with & 1 ? 1 : 0, .d_model = D, .d_hidden = H, .experts = E,
                          .activation = with % 5, .gate = with % 7, .seed = 3};
  if (o.gate != FMOE_GATE_BASE && with & 32) o.balance_loss = 0.1;
  if (is_odd) o.d_model += with & 64 && !h->is_alone ? 1 : -D; /* alone, one column more than rows have would be fine */
  fmoe_status status = FAIR(fmoe_layer_create(h->group, &o, &fresh));
  fmoe_layer **place = &h->layers[with >> 7];
  if (status == FMOE_OK) fmoe_layer_destroy(*place);
  KEEP(*place, fresh, status);
  return status;
}

static fmoe_status start_pass(hand *h, uint8_t with, int routed, int is_odd) {
  fmoe_pass *fresh = NEW(fmoe_pass);
  fmoe_layer *layer = h->layers[with >> 7];
  const int p = with % PASSES, n = with / 8 % (N + 1);
  int32_t choices[N * K];
  float weights[N * K];
  for (int i = 0; i < N * K; i++) choices[i] = (with + i) % (E + 1) - 1, weights[i] = (float)i / 8;
  if (is_odd && with & 64) choices[0] = E;
  float *tokens = is_odd && !(with & 64) ? NULL : h->rows[p][0];
  fmoe_status status = routed ? FAIR(fmoe_route(layer, tokens, n, choices, weights, &fresh))
                              : FAIR(fmoe_gate(layer, tokens, is_odd ? -n : n, &fresh));
  if (status == FMOE_OK) fmoe_pass_destroy(h->passes[p]);
  KEEP(h->passes[p], fresh, status);
  return status;
}

static fmoe_status plan(fmoe_pass *pass, uint8_t with, int is_odd) {
  uint8_t shadows[E];
  for (int e = 0; e < E; e++) shadows[e] = with >> e & 1;
  const fmoe_plan_options o = {.struct_size = sizeof o, .shadowing = is_odd ? 3 : with % 3 == 2 ? 4 : with % 3,
                               .schedule = with / 4 % 3, .group_size = with / 16 % 4, .shadows = shadows};
  return FAIR(fmoe_plan(pass, &o, NULL));
}

static int may_break; /* else no rank leaves out a call or its seat: over a transport memory would stay with what is under way */

static fmoe_status give_up(hand *h, int32_t rank, uint8_t with) {
  if (with % 4 == 0) fmoe_layer_destroy(h->layers[with >> 7]), h->layers[with >> 7] = NULL;
  if (with % 4 == 1) fmoe_pass_destroy(h->passes[with / 4 % PASSES]), h->passes[with / 4 % PASSES] = NULL;
  if (may_break && with == 254 + rank % 2) fmoe_group_destroy(h->group), h->group = NULL;
  return FMOE_OK;
}

static fmoe_status look(hand *h, uint8_t with) {
  fmoe_tensors t = {.struct_size = sizeof t};
  fmoe_routing r = {.struct_size = sizeof r};
  if (with & 1) return FAIR(fmoe_layer_values(h->layers[with >> 7], &t));
  fmoe_status status = FAIR(fmoe_pass_routing(h->passes[with / 2 % PASSES], &r));
  int64_t rows = 0;
  for (int e = 0; status == FMOE_OK && e < E; e++) rows += r.counts[e];
  DEMAND(status || (rows == r.tokens * r.top_k - r.dropped), "%lld rows of %lld tokens, %lld dropped", (long long)rows,
         (long long)r.tokens, (long long)r.dropped);
  return status;
}

enum { CREATE, GATE_, ROUTE, PLAN, FORWARD, BACKWARD, REDUCE, ADAMW, SAVE, LOAD, OF_GROUP, COLLECTIVES = OF_GROUP + 1,
       ZERO = COLLECTIVES, LOOK, TRAIN, TIMELINE, GIVE_UP, KINDS };

/* Does it, and says whether it was collective. */
static fmoe_status follow(hand *h, int32_t rank, uint8_t what, uint8_t with, int is_odd) {
  fmoe_layer *layer = h->layers[with >> 7];
  const int p = with % PASSES;
  char path[40];
  switch (what % KINDS) {
    case CREATE: return create(h, with, is_odd);
    case GATE_: return start_pass(h, with, 0, is_odd);
    case ROUTE: return start_pass(h, with, 1, is_odd);
    case PLAN: return plan(h->passes[with / 64 % PASSES], with, is_odd);
    case FORWARD: return FAIR(fmoe_forward(h->passes[p], is_odd ? NULL : h->rows[p][1]));
    case BACKWARD: return FAIR(fmoe_backward(h->passes[p], is_odd ? NULL : h->rows[p][2], h->rows[p][3], NULL));
    case REDUCE: return FAIR(fmoe_layer_reduce_gradients(layer));
    case ADAMW: {
      const fmoe_adamw_options o = {.struct_size = sizeof o, .learning_rate = is_odd ? -1 : 0.01};
      return FAIR(fmoe_layer_adamw(layer, &o));
    }
    case SAVE: return FAIR(fmoe_layer_save(layer, is_odd ? NULL : with & 16 ? "no-such-folder/layer" : "layer"));
    case LOAD: return FAIR(fmoe_layer_load(layer, is_odd ? NULL : with & 16 ? "no-such-file" : "layer"));
    case OF_GROUP: {
      fmoe_cluster *fresh = NEW(fmoe_cluster);
      fmoe_status status = FAIR(fmoe_cluster_of_group(h->group, &fresh));
      if (status == FMOE_OK) fmoe_cluster_destroy(h->cluster);
      KEEP(h->cluster, fresh, status);
      return status;
    }
    case ZERO: return FAIR(fmoe_layer_zero_gradients(layer));
    case LOOK: return look(h, with);
    case TRAIN: return FAIR(fmoe_layer_set_training(layer, is_odd ? 7 : with & 1));
    case TIMELINE:
      snprintf(path, sizeof path, "timeline-%d", (int)rank);
      return FAIR(fmoe_pass_write_timeline(h->passes[p], path));
    default: return give_up(h, rank, with);
  }
}

static void perform(crew *c, int32_t rank, void *context) {
  script *s = context;
  hand h = {.group = c->groups[rank], .is_alone = c->ranks == 1};
  for (int p = 0; p < PASSES; p++)
    for (int i = 0; i < 4; i++) {
      if (!(h.rows[p][i] = malloc(sizeof(float) * N * D))) abort();
      for (int at = 0; at < N * D; at++) h.rows[p][i][at] = (float)((at * 29 + rank * 7 + p + i) % 17) / 8 - 1;
    }
  for (int i = 0; i < s->instructions; i++) {
    const uint8_t *is = s->at + 3 * i;
    const int deviates = (is[2] & 0xc0) == 0xc0 && (is[2] & 7) % c->ranks == rank;
    s->collective[i][rank] = is[0] % KINDS < COLLECTIVES && is[0] % KINDS != ADAMW;
    if (deviates && may_break && (is[2] & 0x30) == 0x30) s->collective[i][rank] = 0, s->results[i][rank] = FMOE_OK;
    else s->results[i][rank] = follow(&h, rank, is[0], is[1], deviates);
  }
  for (int p = 0; p < PASSES; p++) fmoe_pass_destroy(h.passes[p]);
  for (int l = 0; l < LAYERS; l++) fmoe_layer_destroy(h.layers[l]);
  fmoe_cluster_destroy(h.cluster);
  c->groups[rank] = NULL, fmoe_group_destroy(h.group); /* at once: a rank that has left need not be waited for */
  for (int p = 0; p < PASSES; p++)
    for (int i = 0; i < 4; i++) free(h.rows[p][i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static script s;
  if (size < 4) return 0;
  const int ranks = 1 + data[0] % MOST, over_mailbox = data[0] / 4 % 2;
  s.at = data + 1, s.instructions = (int)((size - 1) / 3);
  if (s.instructions > INSTRUCTIONS) s.instructions = INSTRUCTIONS;
  may_break = !over_mailbox;
  crew *c = crew_create((crew_options){.ranks = ranks, .timeout = may_break ? 0.5 : 0, .over_mailbox = over_mailbox,
                                       .mail = {.seed = data[0], .delay_tests = data[0] / 8 % 4, .reorder = data[0] / 32 % 2}});
  crew_run(c, perform, &s);
  crew_destroy(c);
  DEMAND(!atomic_load(&failed), "a transport's contract");
  for (int i = 0, is_whole = 1; is_whole && i < s.instructions; i++) {
    int done = 0, all = 1;
    for (int r = 0; r < ranks; r++) all &= s.collective[i][r], done += s.results[i][r] == FMOE_OK;
    for (int r = 0; r < ranks; r++) {
      /* Ranks that part, or one that is gone, end what can be said. */
      const uint8_t *is = s.at + 3 * i;
      is_whole &= !may_break || (((is[2] & 0xf0) != 0xf0 || ranks == 1) && !(is[0] % KINDS == GIVE_UP && is[1] >= 254));
    }
    DEMAND(!is_whole || !all || done == 0 || done == ranks, "instruction %d, %d: %d of %d ranks succeed", i,
           s.at[3 * i] % KINDS, done, ranks);
  }
  return 0;
}
