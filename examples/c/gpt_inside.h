/* gpt_inside.h: what a gpt is made of, for the files that know it: gpt.c computes with it, gpt_create.c makes it, gpt_save.c
 * keeps it.
 *
 * Letters of the shapes as in gpt.h: n = B T, V d H h E k. */
#ifndef GPT_INSIDE_H
#define GPT_INSIDE_H
#include "gpt.h"
#include "layers.h"

typedef struct block {          /* attention, then experts, each behind a norm and beside a residual */
  fmoe_layer *experts;
  fmoe_pass *pass;              /* of the latest forward, until its backward; else NULL */
  gpt_plan plan;                /* if the model is calibrated */
  const int32_t *choices;       /* [n, k] of all workers, for the next forward; NULL: the gate chooses */
  const float *weights;
  tensor *triple, *project; /* [3d, d] for queries, keys and values   [d, d] */
  float *normal1, *normal2;     /* [n, d] what attention and experts read */
  float *scale1, *scale2;       /* [n] */
  float *qkv;                   /* [n, 3d] */
  float *shares;                /* [B, H, T, T] */
  float *mixed;                 /* [n, d] */
} block;

struct gpt {
  gpt_config config;
  peers peers; /* alone: of size 1, with a group of its own */
  team *crew;
  block *blocks;
  tensor *tensors;
  int tensor_count;
  tensor *symbols, *places, *head; /* [V, d]  [T, d]  [V, d] */

  int first, B, T; /* of the latest forward: this worker computes B of its sequences, from the first on */
  int has_targets; /* gpt_backward may follow */
  int updates;     /* steps of AdamW so far */
  int predicts;    /* passes are planned by prediction */
  int evaluates;   /* gates do, too */

  float *memory; /* dense parameters, AdamW's averages, activations: one allocation */
  int64_t taken; /* floats of it handed out */
  float *dense_gradients; /* [dense_size] those of all dense tensors, side by side */
  int64_t dense_size;
  float *counts;                                                      /* [layers, E] tokens of the latest forward */
  int32_t *tokens, *targets;                                          /* [n] */
  float *stream;                                                      /* [n, d] every block adds to it */
  float *outcome;                                                     /* [n, d] of the experts */
  float *normal, *scale, *logits, *losses;                            /* [n, d]  [n]  [n, V]  [n] */
  float *grad_stream, *grad_normal, *grad_mixed, *grad_qkv, *grad_shares; /* shared by all blocks */
};

/* Returns status; gpt_last_error() is then these words. */
fmoe_status gpt_fail(fmoe_status status, const char *format, ...);

#define TRY(call)                                                              \
  do {                                                                         \
    fmoe_status status_ = (call);                                              \
    if (status_ != FMOE_OK) return gpt_fail(status_, "%s", fmoe_last_error()); \
  } while (0)

/* What a worker does alone may fail alone: after this, all go on or none. */
fmoe_status gpt_agree(const gpt *model, fmoe_status status);
int gpt_first_of(const gpt *model, int B, int rank); /* the sequences of B that are this rank's begin here */
void gpt_forget(gpt *model);                         /* the latest forward */
#endif
