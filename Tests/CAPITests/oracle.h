/* oracle.h: one mixture-of-experts layer in Double, token by token: no ranks, no permutation, no blocks.
 *
 * The tests compare the library with it.  It is itself held to golden vectors and to finite differences (layer.c). */
#ifndef ORACLE_H
#define ORACLE_H
#include <stdint.h>

enum { GATE, W1, B1, W2, B2, W3, TENSORS }; /* the parameters, in the order of fmoe_tensors */

typedef struct oracle {
  /* In.  Shapes: tokens n, choices k, experts E, model d, hidden h. */
  int64_t tokens, choices, experts, model, hidden;
  int32_t activation;        /* FMOE_GELU ... */
  int32_t routed;            /* 0: the layer's gate fills choice and weight; 1: they are given */
  double balance, z;         /* coefficients of the losses, used with the layer's gate only */
  int64_t *everyone;         /* [E] choices of all workers together for each expert; NULL: counts, of one alone */
  double *x, *grad_y;        /* [n, d] */
  double *values[TENSORS];   /* those of SwiGLU or those of the others are present, sizes[] says which */
  int64_t sizes[TENSORS];
  /* In when routed, else out. */
  int32_t *choice;           /* [n, k] */
  double *weight;            /* [n, k] */
  /* Out. */
  double *logits;            /* [n, E] */
  double *y, *grad_x;        /* [n, d] */
  double *grad_weight;       /* [n, k] */
  double *gradients[TENSORS];
  int64_t *counts;           /* [E] */
  double balance_loss, z_loss;
} oracle;

/* Zeroed arrays for these shapes; the rest of the fields is the caller's to set. */
oracle *oracle_create(int64_t tokens, int64_t choices, int64_t experts, int64_t model, int64_t hidden,
                      int32_t activation);
void oracle_destroy(oracle *o);

void oracle_gate(oracle *o); /* logits, choice, weight, counts, losses; a routed one only counts */
void oracle_run(oracle *o);  /* everything, given choice and weight; gradients start from zero */

/* The generator of the golden vectors: uniform in [0, 1). */
double uniform(uint64_t *state);
void fill(double *values, int64_t count, double scale, uint64_t *state); /* uniform in [-scale, scale) */

/* Of bits: equal if the values are, for all that tests need.  Goes on with a hash; the first is any number. */
uint64_t hash_floats(uint64_t hash, const float *floats, int64_t count);

#endif
