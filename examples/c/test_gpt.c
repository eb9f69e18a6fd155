/* test_gpt.c: are the gradients of the whole model, experts included, those of its loss?
 *
 * Moves the parameters of a tiny model along a direction and compares the slope of the loss with what backward says.
 * The loss is made in float32: steps are long, and their error is cancelled by Richardson's extrapolation.  The choice
 * of experts is no smooth function: directions along which a token changes its mind are skipped, and few may be. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpt.h"

static int passed, failed;
static uint64_t generator;

static void expect(int holds, const char *what) {
  if (holds)
    passed++;
  else
    failed++, printf("failed: %s\n", what);
}

#define MUST(call)                                                     \
  do {                                                                 \
    if ((call) != FMOE_OK) {                                           \
      printf("%s: %s\n", #call, gpt_last_error());                     \
      exit(1);                                                         \
    }                                                                  \
  } while (0)

enum { VOCAB = 11, CONTEXT = 6, BATCH = 2, LAYERS = 2, EXPERTS = 4, TOKENS = BATCH * CONTEXT };
static int32_t tokens[TOKENS], targets[TOKENS];

static gpt_config tiny(int top_k, int activation) {
  return (gpt_config){.vocab = VOCAB, .context = CONTEXT, .batch = BATCH, .layers = LAYERS, .heads = 2, .width = 8,
                      .hidden = 12, .experts = EXPERTS, .top_k = top_k, .activation = activation, .balance_loss = 0.05,
                      .z_loss = 0.02, .seed = (uint64_t)(gpt_random(&generator) * 1e9), .threads = 2};
}

/* ---- slopes ---------------------------------------------------------------------------------- */
static const double STEP = 0.005;       /* of the norm of a direction; parameters are of the order of 0.1 to 0.4 */
static const double RELATIVE = 0.001;  /* float32 in backward */
static const double CURVED = 0.1;      /* of what halving the step changed: extrapolation should leave less */
static const double ABSOLUTE = 1.5e-4; /* three units in the last place of a loss near 2.5, divided by the step */

/* Sum of the losses; *same tells whether all tokens chose as in `choices` [LAYERS, n, k], which is filled if it begins
 * with -2. */
static double loss_of(gpt *model, int32_t *choices, int *same) {
  gpt_loss loss;
  MUST(gpt_forward(model, tokens, targets, BATCH, CONTEXT, &loss));
  for (int i = 0; i < LAYERS; i++) {
    fmoe_routing routing;
    MUST(gpt_routing(model, i, &routing));
    int32_t size = TOKENS * routing.top_k, *mine = choices + i * size;
    if (mine[0] == -2) memcpy(mine, routing.choices, (size_t)size * sizeof mine[0]);
    if (memcmp(mine, routing.choices, (size_t)size * sizeof mine[0]) != 0) *same = 0;
  }
  return loss.mean + loss.balance + loss.z;
}

typedef struct tally {
  int checked, skipped;
  double worst; /* difference over what is tolerated */
} tally;

/* The slope along direction [size], of norm 1, as the loss shows it, and how much halving the step changed it.  Returns
 * whether all tokens kept their experts. */
static int measure(gpt *model, const tensor *t, const float *direction, double step, int32_t *choices, double *slope,
                   double *change) {
  double slopes[2];
  int same = 1;
  float *before = malloc((size_t)t->size * sizeof before[0]);
  memcpy(before, t->value, (size_t)t->size * sizeof before[0]);
  for (int half = 0; half < 2; half++, step /= 2) {
    double loss[2];
    for (int side = 0; side < 2; side++) {
      for (int64_t i = 0; i < t->size; i++) t->value[i] = before[i] + (float)(side ? step : -step) * direction[i];
      loss[side] = loss_of(model, choices, &same);
    }
    slopes[half] = (loss[1] - loss[0]) / (2 * step);
  }
  memcpy(t->value, before, (size_t)t->size * sizeof before[0]);
  free(before);
  *slope = (4 * slopes[1] - slopes[0]) / 3;
  *change = fabs(slopes[1] - slopes[0]);
  return same;
}

/* gradient [size] is what backward said. */
static void check_slope(gpt *model, const tensor *t, const float *gradient, const float *direction, const char *kind,
                        int32_t *choices, tally *count) {
  double said = 0, shown, change, factor = 1; /* a shorter step changes fewer minds, and float32 blurs it more */
  for (int64_t i = 0; i < t->size; i++) said += (double)gradient[i] * direction[i];
  while (factor <= 4 && !measure(model, t, direction, STEP / factor, choices, &shown, &change)) factor *= 4;
  if (factor > 4) {
    count->skipped++;
    return;
  }
  double difference = fabs(said - shown) / (ABSOLUTE * factor + RELATIVE * fabs(shown) + CURVED * change);
  if (!(difference <= count->worst)) count->worst = difference;
  count->checked++;
  if (difference <= 1) {
    passed++;
  } else {
    failed++;
    printf("failed: %s, %s: backward says %.6f, the loss %.6f\n", t->name, kind, said, shown);
  }
}

static void check_tensor(gpt *model, const tensor *t, const float *gradient, int32_t *choices, tally *count) {
  float *direction = calloc((size_t)t->size, sizeof direction[0]);
  double norm = 0;
  int64_t largest = 0;
  for (int64_t i = 0; i < t->size; i++) {
    norm += (double)gradient[i] * gradient[i];
    if (fabsf(gradient[i]) > fabsf(gradient[largest])) largest = i;
  }
  norm = sqrt(norm);
  for (int64_t i = 0; norm > 0 && i < t->size; i++) direction[i] = (float)(gradient[i] / norm);
  if (norm > 0) check_slope(model, t, gradient, direction, "along the gradient", choices, count);
  for (int trial = 0; trial < 3; trial++) {
    for (int64_t i = 0; i < t->size; i++)
      direction[i] = (gpt_random(&generator) < 0.5 ? -1 : 1) / sqrtf((float)t->size);
    check_slope(model, t, gradient, direction, "along random signs", choices, count);
  }
  for (int trial = 0; trial < 4; trial++) {
    int64_t entry = trial == 0 ? largest : (int64_t)(gpt_random(&generator) * (double)t->size);
    memset(direction, 0, (size_t)t->size * sizeof direction[0]);
    direction[entry] = 1;
    check_slope(model, t, gradient, direction, trial == 0 ? "largest entry" : "random entry", choices, count);
  }
  free(direction);
}

/* A fresh model hardly prefers any symbol or expert; larger values here make all gradients large enough to measure. */
static void make_decided(const tensor *t) {
  int is_gate = strstr(t->name, "gate") != NULL, is_head = strcmp(t->name, "head") == 0;
  float factor = is_gate ? 3 : is_head ? 20 : t->decays && !t->per_expert && !strstr(t->name, "layer") ? 4 : 1;
  for (int64_t i = 0; i < t->size; i++) t->value[i] *= factor;
}

static void check_gradients(const char *name, int top_k, int activation) {
  gpt_config config = tiny(top_k, activation);
  gpt *model;
  MUST(gpt_create(&config, &model));
  int32_t choices[LAYERS * TOKENS * EXPERTS];
  for (int i = 0; i < LAYERS * TOKENS * EXPERTS; i++) choices[i] = -2;
  int same = 1, count;
  const tensor *tensors = gpt_tensors(model, &count);
  for (int t = 0; t < count; t++) make_decided(&tensors[t]);
  loss_of(model, choices, &same);
  MUST(gpt_backward(model));
  tally slopes = {0, 0, 0};
  for (int t = 0; t < count; t++) {
    float *gradient = malloc((size_t)tensors[t].size * sizeof gradient[0]);
    memcpy(gradient, tensors[t].gradient, (size_t)tensors[t].size * sizeof gradient[0]);
    check_tensor(model, &tensors[t], gradient, choices, &slopes);
    free(gradient);
  }
  printf("%s: %d slopes, %d skipped, worst difference %.2f of what is tolerated\n", name, slopes.checked,
         slopes.skipped, slopes.worst);
  expect(slopes.skipped <= slopes.checked, "at least half of the directions are checked");
  gpt_destroy(model);
}

/* ---- the rest -------------------------------------------------------------------------------- */
static const adamw OPTIMISER = {.rate = 0.01, .beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .decay = 0.01, .clip = 1};

static double train(gpt_config config, int threads, int steps, double *first) {
  gpt *model;
  gpt_loss loss;
  config.threads = threads;
  MUST(gpt_create(&config, &model));
  for (int step = 0; step <= steps; step++) {
    MUST(gpt_forward(model, tokens, targets, BATCH, CONTEXT, &loss));
    if (step == 0) *first = loss.mean;
    MUST(gpt_backward(model));
    MUST(gpt_update(model, &OPTIMISER, NULL));
  }
  gpt_destroy(model);
  return loss.mean;
}

static void check_training(void) {
  gpt_config config = tiny(2, FMOE_GELU);
  double first, again, last = train(config, 1, 100, &first);
  printf("training on one batch: %.3f -> %.3f\n", first, last);
  expect(fabs(first - log(VOCAB)) < 0.2, "an untrained model guesses");
  expect(last < 0.3 * first, "a hundred steps learn two sequences by heart");
  expect(train(config, 1, 100, &again) == last && again == first, "the same bits again");
  expect(train(config, 2, 100, &again) == last && again == first, "the same bits with two threads");
  expect(train(config, 3, 100, &again) == last && again == first, "the same bits with three threads");
}

static void check_sums(void) { /* gradients of two batches add up */
  gpt_config config = tiny(2, FMOE_GELU);
  gpt *model;
  gpt_loss loss;
  int count, equal = 1;
  float first[4 * 1024];
  MUST(gpt_create(&config, &model));
  const tensor *tensors = gpt_tensors(model, &count);
  for (int t = 0; t < count; t++) {
    gpt_zero_gradients(model);
    for (int pass = 0; pass < 2; pass++) {
      MUST(gpt_forward(model, tokens, targets, BATCH, CONTEXT, &loss));
      MUST(gpt_backward(model));
      for (int64_t i = 0; i < tensors[t].size && i < 4 * 1024; i++) {
        if (pass == 0) first[i] = tensors[t].gradient[i];
        if (fabsf(tensors[t].gradient[i] - (float)(1 + pass) * first[i]) > 1e-6f) equal = 0;
      }
    }
  }
  expect(equal, "backward adds to the gradients");
  gpt_destroy(model);
}

static void check_calls(void) {
  gpt_config config = tiny(2, FMOE_SWIGLU);
  gpt *model;
  gpt_loss whole, part;
  uint64_t random = 1;
  int32_t next, wrong[TOKENS] = {VOCAB};
  MUST(gpt_create(&config, &model));
  expect(gpt_backward(model) == FMOE_ERROR_STAGE, "backward without forward is refused");
  expect(gpt_forward(model, wrong, targets, BATCH, CONTEXT, &whole) == FMOE_ERROR_ARGUMENT, "unknown tokens fail");
  expect(gpt_forward(model, tokens, targets, BATCH + 1, CONTEXT, &whole) == FMOE_ERROR_ARGUMENT, "so do long batches");
  MUST(gpt_forward(model, tokens, targets, BATCH, CONTEXT, &whole));
  MUST(gpt_forward(model, tokens, targets, BATCH, CONTEXT, &part));
  expect(whole.mean == part.mean, "a forward may be forgotten");

  double mean = 0; /* sequences do not see each other, positions do not see what follows */
  for (int b = 0; b < BATCH; b++) {
    MUST(gpt_forward(model, tokens + b * CONTEXT, targets + b * CONTEXT, 1, CONTEXT, &part));
    mean += part.mean / BATCH;
  }
  expect(fabs(mean - whole.mean) < 1e-5, "a batch is its sequences");
  int32_t some[TOKENS]; /* the same mean from the first positions of each sequence, and then from the others */
  gpt_loss ends;
  for (int i = 0; i < TOKENS; i++) some[i] = i % CONTEXT < CONTEXT / 2 ? targets[i] : -1;
  MUST(gpt_forward(model, tokens, some, BATCH, CONTEXT, &part));
  for (int i = 0; i < TOKENS; i++) some[i] = i % CONTEXT < CONTEXT / 2 ? -1 : targets[i];
  MUST(gpt_forward(model, tokens, some, BATCH, CONTEXT, &ends));
  expect(fabs((part.mean + ends.mean) / 2 - whole.mean) < 1e-5, "targets of -1 do not count");

  MUST(gpt_sample(model, tokens, 1, 0, &random, &next));
  MUST(gpt_forward(model, tokens, &next, 1, 1, &part));
  expect(part.mean < log(VOCAB), "at temperature 0 the likeliest symbol is drawn");
  gpt_destroy(model);

  config.heads = 3;
  expect(gpt_create(&config, &model) == FMOE_ERROR_ARGUMENT, "heads must divide the width");
}

int main(int count, char **arguments) {
  uint64_t seed = count > 1 ? strtoull(arguments[1], NULL, 10) : 20220404;
  printf("seed %llu\n", (unsigned long long)seed);
  generator = seed;
  for (int i = 0; i < TOKENS; i++) {
    tokens[i] = (int32_t)(gpt_random(&generator) * VOCAB);
    targets[i] = (int32_t)(gpt_random(&generator) * VOCAB);
  }
  check_gradients("k = 2, GELU", 2, FMOE_GELU);
  check_gradients("k = 1, GELU", 1, FMOE_GELU);
  check_gradients("k = 2, SwiGLU", 2, FMOE_SWIGLU);
  check_gradients("k = 3, SiLU", 3, FMOE_SILU);
  check_training();
  check_sums();
  check_calls();
  printf("%d passed, %d failed\n", passed, failed);
  return failed > 0;
}
