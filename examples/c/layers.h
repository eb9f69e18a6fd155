/* layers.h: the dense layers of a GPT, each as a pair x_forward, x_backward on plain arrays.
 *
 * Letters of the shapes: B sequences of T tokens, n = B T; V symbols; d width; H heads.  A weight is [out, in].
 * Backward adds to the gradients of weights and overwrites those of activations, unless its comment says otherwise.
 * All sums run in an order that shapes alone decide: the same call gives the same bits with any number of threads. */
#ifndef LAYERS_H
#define LAYERS_H
#include <stdint.h>

#include "matmul.h"

/* x [n, d] = symbols [V, d] at the token + places [T, d] at the position.  tokens [n]. */
void embed_forward(team *crew, int n, int T, int d, const int32_t *tokens, const float *symbols, const float *places,
                   float *x);
void embed_backward(team *crew, int n, int T, int d, const int32_t *tokens, const float *grad_x, float *grad_symbols,
                    float *grad_places);

/* y [n, d] = (x [n, d] - mean) scale, row by row, with scale [n] = 1 / standard deviation.  There is no gain and no
 * bias: whatever reads y multiplies it by a matrix, which can do the same.  Backward adds to grad_x, where the gradient
 * that went around the block is waiting. */
void norm_forward(team *crew, int n, int d, const float *x, float *y, float *scale);
void norm_backward(team *crew, int n, int d, const float *y, const float *scale, const float *grad_y, float *grad_x);

/* y [n, out] = (SET) or += (ADD) x [n, in] wᵀ, w [out, in]. */
void linear_forward(team *crew, int n, int in, int out, const float *x, const float *w, int how, float *y);
void linear_backward(team *crew, int n, int in, int out, const float *x, const float *w, const float *grad_y,
                     float *grad_x, float *grad_w);

/* y [n, d] = shares v, head by head; shares [B, H, T, T] = softmax over s <= t of q kᵀ / sqrt(d/H).  q, k and v lie
 * side by side in qkv [n, 3d], each d wide.  grad_shares [B, H, T, T] is room to work in. */
void attention_forward(team *crew, int B, int T, int d, int H, const float *qkv, float *shares, float *y);
void attention_backward(team *crew, int B, int T, int d, int H, const float *qkv, const float *shares,
                        const float *grad_y, float *grad_shares, float *grad_qkv);

/* Returns the sum of -log softmax(logits [n, V]) at the target, in nats, over the rows whose target [n] is not -1,
 * divided by `counted`, and turns the logits into its gradient: both are made of the same exponentials.  losses [n]
 * takes the terms. */
double cross_entropy(team *crew, int n, int V, const int32_t *targets, double counted, float *logits, float *losses);

void add(team *crew, int64_t size, const float *x, float *y); /* y += x */
#endif
