/* 03_threads_as_ranks.c: several workers, here as threads of one process: 03_threads_as_ranks [W].
 *
 * Each worker has E/W of the experts and tokens of its own.  The library sends each token's row to the workers whose
 * experts it chose, and their answers back: no output tells how many workers there were. */
#include <fastermoe.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(call)                           \
  do {                                      \
    fmoe_status status_ = (call);           \
    if (status_ != FMOE_OK) return status_; \
  } while (0)

enum { TOKENS = 1024, MODEL = 128, HIDDEN = 256, EXPERTS = 8, TOP_K = 2 }; /* of all workers: n d h E k */
enum { W1 = HIDDEN * MODEL };                                              /* floats in an expert's first matrix */

static float tokens[TOKENS * MODEL];
typedef struct results { /* of all workers: each fills its part */
  float output[TOKENS * MODEL], grad_output[TOKENS * MODEL], grad_tokens[TOKENS * MODEL], grad_w1[EXPERTS * W1];
} results;
static results alone, together;

typedef struct worker {
  int rank, size;
  fmoe_group *group;
  results *out;
  int64_t counts[EXPERTS]; /* its tokens for each expert */
  fmoe_status status;
  char error[256];
  pthread_t thread;
} worker;

static fmoe_status step(worker *me, fmoe_layer **layer, fmoe_pass **pass) {
  fmoe_layer_options options = {.struct_size = sizeof options, .d_model = MODEL, .d_hidden = HIDDEN,
                                .experts = EXPERTS, .top_k = TOP_K, .seed = 1};
  TRY(fmoe_layer_create(me->group, &options, layer)); /* in these calls, which all make, they wait for each other */

  int n = TOKENS / me->size, first = me->rank * n * MODEL;
  float *output = me->out->output + first, *grad_output = me->out->grad_output + first;
  TRY(fmoe_gate(*layer, tokens + first, n, pass));
  TRY(fmoe_forward(*pass, output));
  fmoe_routing routing = {.struct_size = sizeof routing};
  TRY(fmoe_pass_routing(*pass, &routing));
  memcpy(me->counts, routing.counts, sizeof me->counts);

  /* Its loss is half the mean square of its own outputs, as in 01; that of all is the mean over workers. */
  for (int i = 0; i < n * MODEL; i++) grad_output[i] = output[i] / (float)(n * MODEL);
  TRY(fmoe_backward(*pass, grad_output, me->out->grad_tokens + first, NULL)); /* of its own loss */
  TRY(fmoe_layer_reduce_gradients(*layer));                                   /* of the loss of all */

  fmoe_tensors gradients = {.struct_size = sizeof gradients};
  TRY(fmoe_layer_gradients(*layer, &gradients));
  memcpy(me->out->grad_w1 + gradients.first_expert * W1, gradients.w1,
         (size_t)gradients.local_experts * W1 * sizeof(float));
  return FMOE_OK;
}

static void *work(void *argument) {
  worker *me = argument;
  fmoe_layer *layer = NULL;
  fmoe_pass *pass = NULL;
  me->status = step(me, &layer, &pass);
  if (me->status != FMOE_OK) snprintf(me->error, sizeof me->error, "%s", fmoe_last_error());
  fmoe_pass_destroy(pass);
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(me->group); /* to those who still wait for it, this worker is then lost: nobody hangs */
  return NULL;
}

static int run(int W, results *out, worker *workers /* [W] */) { /* 0, or 1 after saying why not */
  fmoe_group *groups[EXPERTS];
  int started = 0;
  if (fmoe_group_create_local(W, NULL, groups) != FMOE_OK) return fprintf(stderr, "%s\n", fmoe_last_error()), 1;
  for (int r = 0; r < W; r++) workers[r] = (worker){.rank = r, .size = W, .group = groups[r], .out = out};
  while (started < W && pthread_create(&workers[started].thread, NULL, work, &workers[started]) == 0) started++;
  int failed = started < W;
  if (failed) fprintf(stderr, "no thread for rank %d\n", started);
  for (int r = started; r < W; r++) fmoe_group_destroy(groups[r]);
  for (int r = 0; r < started; r++) pthread_join(workers[r].thread, NULL);
  for (int r = 0; r < started; r++)
    if (workers[r].status != FMOE_OK) failed = 1, fprintf(stderr, "rank %d: %s\n", r, workers[r].error);
  return failed;
}

static double difference(const float *a, const float *b, int size) { /* the largest, over the largest value */
  double most = 0, largest = 0;
  for (int i = 0; i < size; i++) most = fmax(most, fabs((double)a[i] - b[i])), largest = fmax(largest, fabs(b[i]));
  return most / largest;
}

int main(int count, char **arguments) {
  worker workers[EXPERTS], one;
  int W = count > 1 ? atoi(arguments[1]) : 2;
  if (W < 1 || EXPERTS % W != 0) return fprintf(stderr, "workers: a divisor of %d, not %d\n", EXPERTS, W), 2;
  for (int i = 0; i < TOKENS * MODEL; i++) tokens[i] = sinf(0.37f * (float)i) + sinf(1e-4f * (float)(i * (i % MODEL)));
  if (run(W, &together, workers) != 0 || run(1, &alone, &one) != 0) return 1;

  for (int r = 0; r < W; r++) {
    int64_t all = 0, own = 0;
    int first = r * EXPERTS / W, end = (r + 1) * EXPERTS / W;
    for (int i = 0; i < W; i++)
      for (int e = first; e < end; e++) all += workers[i].counts[e], own += i == r ? workers[i].counts[e] : 0;
    printf("rank %d: %lld rows came to experts %d to %d, %lld of them from other ranks\n", r, (long long)all, first,
           end - 1, (long long)(all - own));
  }
  printf("largest relative difference to one worker: outputs %.1e, gradients of w1 %.1e\n",
         difference(together.output, alone.output, TOKENS * MODEL),
         difference(together.grad_w1, alone.grad_w1, EXPERTS * W1));
  return 0;
}
