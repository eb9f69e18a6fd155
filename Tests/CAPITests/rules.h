/* rules.h: every gate's rule in Double, over the tokens of all ranks: who is chosen, by which weights, at which losses. */
#ifndef RULES_H
#define RULES_H
#include "crew.h"

static const uint64_t seed = 31415926;
/* Two packages of two NUMA nodes with a core each: so two workers have a package each, four a node each. */
static const char *const machine = "pack:2 numa:2 core:1 pu:1";

typedef struct rule {
  int32_t gate, drop, evaluates;
  double factor, remote, jitter, step; /* step: of the bias */
  uint32_t shadows;                    /* a bit for each expert that is expected to be shadowed */
} rule;

typedef struct world {
  rule rule;
  shape shape;
  spread *s;               /* its whole is all tokens on one worker; choices and weights here are by the rule */
  int32_t ranks;
  int64_t pass;            /* the how-manieth of the layer */
  uint64_t layer_seed;
  int32_t *candidate;      /* [n, k] what was weighed; whole->choice is what is left of it */
  double *share;           /* [E] f of the balance loss */
  double *balance, *z;     /* [W] losses */
  int64_t *moved;          /* [W] choices */
  double *noise;           /* [E, d] of the noisy gate */
  double *draw, *bar;      /* [n, E] what is drawn; whose score is an expert's bar, or -1 */
  double *clean, *width;   /* [n, E] */
  double bias[64];         /* [E] as the gate finds it */
} world;

void *zeros(int64_t count, size_t size);
int64_t capacity(const world *w, int64_t tokens);
int32_t levels_of(const world *w);
int32_t crossed(const world *w, int32_t rank, int32_t expert);
int is_near(const world *w);
int64_t budget(const world *w, int32_t level, int64_t choices);
void fill_parts(world *w, double *of_noise);
world *world_create(rule rule, shape shape, int32_t ranks, const int64_t *tokens, int64_t pass);
void world_destroy(world *w);
#endif
