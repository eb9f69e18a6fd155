/* 02_own_gate.c: a gate of one's own, in plain C, that learns from the gradients of its weights.
 *
 * fmoe_route takes any choice of experts with any weights, and fmoe_backward tells how the loss depends on each weight.
 * Here a gate scores each expert on its own, with a sigmoid where the library's gate has a softmax, and must find out
 * how another gate of this kind, the teacher, routes the same experts.  It sees only what comes out of the layer. */
#include <fastermoe.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                \
  do {                                                             \
    if ((call) != FMOE_OK) {                                       \
      fprintf(stderr, "%s: %s\n", #call, fmoe_last_error());       \
      exit(1);                                                     \
    }                                                              \
  } while (0)

enum { TOKENS = 1024, MODEL = 16, HIDDEN = 64, EXPERTS = 8, TOP_K = 2, STEPS = 200 }; /* n d h E k */

static float tokens[TOKENS * MODEL], wanted[TOKENS * MODEL], output[TOKENS * MODEL]; /* [n, d] */
static float grad_output[TOKENS * MODEL], grad_tokens[TOKENS * MODEL];               /* [n, d] */
static float grad_weights[TOKENS * TOP_K];                                           /* [n, k] */

typedef struct gate {
  float matrix[EXPERTS * MODEL];    /* [E, d] */
  int32_t choices[TOKENS * TOP_K];  /* [n, k] of the batch it routed last */
  float weights[TOKENS * TOP_K];    /* [n, k] */
} gate;
static gate teacher, pupil;

static float noise(float scale) { /* evenly between -scale and scale, the same numbers in each run */
  static uint64_t state = 42;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return scale * ((float)(state >> 40) / 8388608.0f - 1);
}

/* Each token goes to the experts of its k highest scores; the weight of each is the sigmoid of its score. */
static void gate_forward(gate *g) {
  for (int i = 0; i < TOKENS; i++) {
    float score[EXPERTS] = {0};
    for (int e = 0; e < EXPERTS; e++)
      for (int j = 0; j < MODEL; j++) score[e] += g->matrix[e * MODEL + j] * tokens[i * MODEL + j];
    for (int slot = 0; slot < TOP_K; slot++) {
      int best = 0;
      for (int e = 1; e < EXPERTS; e++)
        if (score[e] > score[best]) best = e;
      g->choices[i * TOP_K + slot] = best;
      g->weights[i * TOP_K + slot] = 1 / (1 + expf(-score[best]));
      score[best] = -INFINITY;
    }
  }
}

/* A step downhill along grad_weights [n, k]: the slope of a sigmoid w is w (1 - w), and the score is linear.  (Tokens
 * that are trained themselves would also get grad_score times the row: grad_tokens has the experts' part alone.) */
static void gate_backward(gate *g, float rate) {
  for (int i = 0; i < TOKENS; i++)
    for (int slot = i * TOP_K; slot < (i + 1) * TOP_K; slot++) {
      float grad_score = grad_weights[slot] * g->weights[slot] * (1 - g->weights[slot]);
      float *row = g->matrix + g->choices[slot] * MODEL;
      for (int j = 0; j < MODEL; j++) row[j] -= rate * grad_score * tokens[i * MODEL + j];
    }
}

/* How many of the pupil's choices the teacher made too, in either slot. */
static double agreement(void) {
  int same = 0;
  for (int i = 0; i < TOKENS * TOP_K; i++)
    for (int slot = 0; slot < TOP_K; slot++) same += pupil.choices[i] == teacher.choices[i / TOP_K * TOP_K + slot];
  return 100.0 * same / (TOKENS * TOP_K);
}

int main(void) {
  fmoe_group *group;
  CHECK(fmoe_group_create_local(1, NULL, &group));
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = MODEL;
  options.d_hidden = HIDDEN;
  options.experts = EXPERTS;
  options.top_k = TOP_K;
  options.seed = 1;
  fmoe_layer *layer;
  CHECK(fmoe_layer_create(group, &options, &layer));

  for (int i = 0; i < EXPERTS * MODEL; i++) teacher.matrix[i] = noise(1), pupil.matrix[i] = noise(0.1f);
  for (int step = 0; step <= STEPS; step++) {
    for (int i = 0; i < TOKENS * MODEL; i++) tokens[i] = noise(2);

    fmoe_pass *pass; /* no backward for the teacher: a pass may be destroyed at any time */
    gate_forward(&teacher);
    CHECK(fmoe_route(layer, tokens, TOKENS, teacher.choices, teacher.weights, &pass));
    CHECK(fmoe_forward(pass, wanted));
    fmoe_pass_destroy(pass);

    gate_forward(&pupil);
    CHECK(fmoe_route(layer, tokens, TOKENS, pupil.choices, pupil.weights, &pass));
    CHECK(fmoe_forward(pass, output));
    double loss = 0, scale = 0; /* squared error in units of the squared answer */
    for (int i = 0; i < TOKENS * MODEL; i++) scale += (double)wanted[i] * wanted[i];
    for (int i = 0; i < TOKENS * MODEL; i++) {
      float error = output[i] - wanted[i];
      loss += error * error / scale;
      grad_output[i] = (float)(2 * error / scale);
    }
    CHECK(fmoe_backward(pass, grad_output, grad_tokens, grad_weights));
    fmoe_pass_destroy(pass);
    if (step % (STEPS / 10) == 0) printf("step %4d  loss %.4f  choices shared %5.1f %%\n", step, loss, agreement());
    gate_backward(&pupil, 4);
  }

  /* The experts stood still: their gradients grew in the library, and nobody used them. */
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group);
  return 0;
}
