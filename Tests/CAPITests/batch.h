/* batch.h: one batch in the library, made from an oracle's problem and compared with the oracle's results.
 *
 * The same calls serve one worker and many: of many, the oracle holds one rank's tokens, all experts' values and, once
 * results are compared, gradients of the mean over ranks of their losses. */
#ifndef BATCH_H
#define BATCH_H
#include "check.h"
#include "oracle.h"

/* Largest difference allowed, relative to the largest value of the same tensor.  The library sums in float32: 2^-24 for
 * each rounding, sums of up to a few thousand terms, and the polynomials of its activations; about ten times that. */
static const double rounding = 2e-5;

extern const char *const tensor_names[TENSORS];

/* Values are rounded to float32, so that both sides start from the same numbers. */
void fill_float(double *values, int64_t count, double scale, uint64_t *state);
void fill_values(oracle *o, uint64_t *state); /* parameters whose outputs stay about 1 */

void tensors_of(const fmoe_tensors *t, float *list[TENSORS]);
fmoe_layer_options options_of(const oracle *o);
void set_values(fmoe_layer *layer, const oracle *o);      /* to the oracle's, of this rank's experts and the gate */
fmoe_layer *layer_of(fmoe_group *group, const oracle *o); /* with these values; ends the program where it fails */

/* Its arguments, results and parts, in one block so that runs compare as bits. */
typedef struct batch {
  const oracle *o;
  fmoe_pass *pass;
  int64_t first_expert, local_experts;
  int64_t sizes[TENSORS]; /* of this rank's gradients */
  int32_t *choice;
  float *block, *x, *grad_y, *weight, *y, *grad_x, *grad_weight, *gradients[TENSORS];
  int64_t size;
} batch;

batch batch_of(const oracle *o, fmoe_layer *layer);
void batch_free(batch *b);

/* The steps of a pass, each as expected to succeed.  With several ranks these are collective. */
void begin(batch *b, fmoe_layer *layer);
void forward(batch *b);
void backward(batch *b);
void read_gradients(batch *b, fmoe_layer *layer);
batch run(fmoe_layer *layer, const oracle *o); /* all of them, from gradients of zero */

void check_close(const char *what, const char *name, const float *got, const double *wanted, int64_t count);
void check_bits(const char *what, const batch *a, const batch *b);
void check_routing(const char *what, const batch *b, const oracle *o);
void check_batch(const char *what, const batch *b, const oracle *o);     /* y, grad_tokens, grad_weights */
void check_gradients(const char *what, const batch *b, const oracle *o); /* of this rank's experts and the gate */

#endif
