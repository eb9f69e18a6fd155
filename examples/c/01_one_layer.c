/* 01_one_layer.c: one mixture-of-experts layer, one step: gate, plan, forward, backward.
 *
 * A token is a row of d numbers.  The gate scores it against E experts and sends it to the best k; each of those, two
 * matrices and a GELU between them, makes d numbers of it; the layer returns their sum, weighted by the gate. */
#include <fastermoe.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                \
  do {                                                             \
    if ((call) != FMOE_OK) {                                       \
      fprintf(stderr, "%s: %s\n", #call, fmoe_last_error());       \
      exit(1);                                                     \
    }                                                              \
  } while (0)

enum { TOKENS = 1024, MODEL = 256, HIDDEN = 512, EXPERTS = 8, TOP_K = 2 }; /* n d h E k */

static double norm(const float *values, size_t size) {
  double sum = 0;
  for (size_t i = 0; i < size; i++) sum += (double)values[i] * values[i];
  return sqrt(sum);
}

int main(void) {
  /* A group of one worker, which is this process with all its cores. */
  fmoe_group *group;
  CHECK(fmoe_group_create_local(1, NULL, &group));

  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = MODEL;
  options.d_hidden = HIDDEN;
  options.experts = EXPERTS;
  options.top_k = TOP_K;
  options.gate = FMOE_GATE_TOPK;
  options.balance_loss = 0.01; /* a push towards equal loads, added to the gradients by backward */
  options.seed = 1;
  fmoe_layer *layer;
  CHECK(fmoe_layer_create(group, &options, &layer));

  size_t size = (size_t)TOKENS * MODEL; /* all four arrays are [n, d] and ours */
  float *tokens = malloc(size * sizeof(float)), *output = malloc(size * sizeof(float));
  float *grad_output = malloc(size * sizeof(float)), *grad_tokens = malloc(size * sizeof(float));
  if (!tokens || !output || !grad_output || !grad_tokens) return 1;
  for (size_t i = 0; i < size; i++) tokens[i] = sinf(0.37f * (float)i) + sinf(0.00011f * (float)i * (float)(i % MODEL));

  /* A pass is one batch on its way through the layer: each of these calls once, in this order. */
  fmoe_pass *pass;
  CHECK(fmoe_gate(layer, tokens, TOKENS, &pass));
  fmoe_plan_report report = {.struct_size = sizeof report};
  CHECK(fmoe_plan(pass, NULL, &report)); /* forward would plan by itself; here we want to see the plan */
  printf("plan: %d steps, %d experts shadowed, %.2f ms predicted for forward and backward at %.0f GFLOP/s\n",
         report.steps, report.shadows, 1e3 * report.seconds_planned, 1e-9 * report.flops_per_worker);

  CHECK(fmoe_forward(pass, output));
  fmoe_routing routing = {.struct_size = sizeof routing};
  CHECK(fmoe_pass_routing(pass, &routing));
  printf("tokens of each expert:");
  for (int e = 0; e < EXPERTS; e++) printf(" %lld", (long long)routing.counts[e]);
  printf(", together %d x %d; balance loss %.4f\n", TOKENS, TOP_K, routing.balance_loss);
  printf("norm of the output: %.4f\n", norm(output, size));

  /* The loss is half the mean square of the output, so its gradient is the output over its size. */
  for (size_t i = 0; i < size; i++) grad_output[i] = output[i] / (float)size;
  CHECK(fmoe_backward(pass, grad_output, grad_tokens, NULL));
  CHECK(fmoe_layer_reduce_gradients(layer)); /* with more workers: the mean over them */

  fmoe_tensors gradients = {.struct_size = sizeof gradients};
  CHECK(fmoe_layer_gradients(layer, &gradients)); /* borrowed: [E, d], [E, h, d], [E, h], [E, d, h], [E, d] */
  printf("norms of the gradients: tokens %.3e, gate %.3e, w1 %.3e, b1 %.3e, w2 %.3e, b2 %.3e\n",
         norm(grad_tokens, size), norm(gradients.gate, EXPERTS * MODEL), norm(gradients.w1, EXPERTS * HIDDEN * MODEL),
         norm(gradients.b1, EXPERTS * HIDDEN), norm(gradients.w2, EXPERTS * MODEL * HIDDEN),
         norm(gradients.b2, EXPERTS * MODEL));

  free(grad_tokens);
  free(grad_output);
  free(output);
  free(tokens);
  fmoe_pass_destroy(pass);
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group);
  return 0;
}
