/* gpt.h: a GPT whose feed-forward blocks are FasterMoE layers, with everything it takes to train it.
 *
 *   tokens - embed -+- norm - attention -(+)-+- norm - experts -(+)- ... - norm - head - cross-entropy
 *                   |_____________________|  |___________________|
 *
 * Letters of the shapes: B sequences of T tokens, n = B T; V symbols; d width; H heads; h hidden width of an expert;
 * E experts, of which each token visits k.  All matrices are dense row-major float32.
 *
 * W workers train one model when all make the same calls with the same arguments; they get the same answers.  Each has
 * all dense parameters, E/W experts of every layer, and computes B/W of the sequences.  Calls that compute wait for the
 * other workers, and fail on all or on none. */
#ifndef GPT_H
#define GPT_H
#include <fastermoe.h>
#include <stdint.h>

#include "adamw.h"
#include "peers.h"

typedef struct gpt gpt;

typedef struct gpt_config {
  int vocab, context, batch;   /* V; the longest T and the largest B that a forward will see */
  int layers, heads, width;    /* H divides d */
  int hidden, experts, top_k;  /* h, E, k; k 0: what the gate is known for */
  int gate, activation;        /* FMOE_GATE_TOPK ..., FMOE_GELU ... */
  double balance_loss, z_loss; /* coefficients of the experts' two extra losses */
  double bias_step, input_jitter, remote_share; /* of gates that have them; 0: the gate's own, or none */
  uint64_t seed;               /* of all initial values */
  int threads;                 /* of this worker, for the dense layers; 0: one per core */
  const peers *peers;          /* its context and group are kept; NULL: alone, with as many threads for the experts */
} gpt_config;

/* Calls that can fail return FMOE_OK, or say why not in gpt_last_error(): this thread's latest failure, in words. */
fmoe_status gpt_create(const gpt_config *config, gpt **out);
void gpt_destroy(gpt *model); /* NULL is fine */
const char *gpt_last_error(void);

typedef struct gpt_loss {
  double mean;       /* cross-entropy in nats, averaged over the tokens with a target, of all workers */
  double balance, z; /* the experts' extra losses, coefficients included; gradients are those of the sum of all three */
  double load;       /* tokens of the fullest expert over those of the average one, averaged over layers; even is 1 */
} gpt_loss;

/* tokens and targets are [B, T], of 0..V-1; a target may also be -1: nothing to guess there.  After gpt_forward comes
 * gpt_backward, which adds to the gradients, or nothing at all: the next forward forgets this one.  W should divide the
 * B that is learnt from: else tokens of a worker with fewer weigh more in the balance and z losses. */
fmoe_status gpt_forward(gpt *model, const int32_t *tokens, const int32_t *targets, int B, int T, gpt_loss *loss);
fmoe_status gpt_backward(gpt *model);

/* 1, as a new model does: it trains; 0: it evaluates, and its gates leave nothing to chance (fmoe_layer_set_training). */
fmoe_status gpt_set_training(gpt *model, int training);

/* Averages the gradients over the workers and makes a step of AdamW; zeroes the gradients. */
fmoe_status gpt_update(gpt *model, const adamw *how, double *norm /* before clipping; may be NULL */);
void gpt_zero_gradients(gpt *model);

/* Measures the workers for about so many seconds; from then on every layer's experts are planned by prediction. */
fmoe_status gpt_calibrate(gpt *model, double seconds);
typedef struct gpt_plan { /* of a layer's experts, forward and backward of the latest batch */
  int shadows, group_size;
  double predicted, measured; /* seconds; measured are this worker's own */
} gpt_plan;
gpt_plan gpt_plan_of(const gpt *model, int layer); /* after gpt_calibrate and gpt_backward */

/* Where a training is. */
typedef struct gpt_place {
  int step;
  uint64_t random;
} gpt_place;

/* Parameters, AdamW's averages and the place, in a folder.  It has a file for each step that was saved of each layer's
 * experts, which the library writes, and of the rest; the file `latest` comes last and says which step counts, so whoever is
 * killed in between leaves the one before.  Worker 0 reads and writes for all; any number of workers can go on. */
fmoe_status gpt_save(gpt *model, const char *folder, gpt_place place);
fmoe_status gpt_load(gpt *model, const char *folder, gpt_place *place);

/* Replaces values [count] by their sums over the workers. */
fmoe_status gpt_sum(const gpt *model, float *values, int64_t count);

/* Draws what follows tokens [T] from softmax(logits / temperature); temperature 0 takes the likeliest symbol.  The gates evaluate. */
fmoe_status gpt_sample(gpt *model, const int32_t *tokens, int T, double temperature, uint64_t *random, int32_t *next);

/* ---- what the model is made of; borrowed until gpt_destroy ----------------------------------- */
const tensor *gpt_tensors(const gpt *model, int *count);
double gpt_parameters(const gpt *model, double *active /* by one token; may be NULL */);
double gpt_flops_per_token(const gpt *model, int T); /* forward and backward, useful ones only: see gpt.c */
/* Of this worker's tokens in the latest forward, until its backward. */
fmoe_status gpt_routing(const gpt *model, int layer, fmoe_routing *out);
/* What all workers' tokens [n, k] do in the layer's next forward, instead of what its gate would choose; kept until then.
 * Weights are then no part of what is learnt, and neither is the gate. */
void gpt_route(gpt *model, int layer, const int32_t *choices, const float *weights);
int gpt_top_k(const gpt *model); /* k, also where the gate chose it */

double gpt_random(uint64_t *state); /* the next of a sequence of numbers in [0, 1) that the first state decides */
#endif
