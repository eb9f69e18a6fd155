/* adamw.h: parameters with their gradients, and a step of AdamW on them. */
#ifndef ADAMW_H
#define ADAMW_H
#include <stdint.h>

#include "matmul.h"

typedef struct tensor {
  char name[32];
  int64_t size;
  int decays;           /* a matrix, which weight decay may shrink */
  int per_expert;       /* [E/W, ...]: this worker's part of E experts, of which a token visits k */
  float *value, *gradient;
  float *mean, *square; /* running averages of the gradient and of its square, both from 0; NULL: the library has them */
} tensor;

typedef struct adamw {
  double rate, beta1, beta2, epsilon, decay;
  double clip; /* the gradient of all tensors together is shortened to this norm; 0: never */
} adamw;

double gradient_squares(team *crew, const tensor *of); /* their sum */

/* Of the tensors whose averages are here.  Uses the gradients up: they are 0 afterwards.  norm is that of all gradients together, step counts from 1. */
void adamw_step(team *crew, tensor *tensors, int count, const adamw *how, double norm, int step);
#endif
