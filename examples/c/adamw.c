/* adamw.c: Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), Algorithm 2, with clipped gradients. */
#include "adamw.h"

#include <math.h>

/* A task is one of at most STRIPES parts of a tensor.  Where they are cut depends on its size alone, so that sums have
 * the same bits with any number of threads. */
enum { STRIPES = 64, SHORTEST = 8192 };

typedef struct stripe_job {
  const tensor *tensor;
  int64_t stripe; /* floats in each but the last */
  float *squares; /* [STRIPES] */
  float shrink, beta1, beta2, rate, epsilon, decay, correct1, correct2;
} stripe_job;

static int cut(const tensor *whole, stripe_job *job) { /* returns the number of stripes */
  job->tensor = whole;
  job->stripe = (whole->size + STRIPES - 1) / STRIPES;
  if (job->stripe < SHORTEST) job->stripe = SHORTEST;
  return (int)((whole->size + job->stripe - 1) / job->stripe);
}

static int64_t end_of(const stripe_job *job, int index) {
  int64_t end = (index + 1) * job->stripe;
  return end < job->tensor->size ? end : job->tensor->size;
}

static void square_stripe(const void *job, int index) {
  const stripe_job *s = job;
  float lane[16] = {0}, sum = 0; /* lanes: vectors without a change of order */
  int64_t i = index * s->stripe, end = end_of(s, index);
  for (; i + 16 <= end; i += 16)
    for (int l = 0; l < 16; l++) lane[l] += s->tensor->gradient[i + l] * s->tensor->gradient[i + l];
  for (; i < end; i++) sum += s->tensor->gradient[i] * s->tensor->gradient[i];
  for (int l = 0; l < 16; l++) sum += lane[l];
  s->squares[index] = sum;
}

double gradient_squares(team *crew, const tensor *of) {
  float squares[STRIPES];
  double sum = 0;
  stripe_job job = {.squares = squares};
  int stripes = cut(of, &job);
  team_run(crew, stripes, square_stripe, &job);
  for (int i = 0; i < stripes; i++) sum += squares[i];
  return sum;
}

static void step_stripe(const void *job, int index) {
  const stripe_job s = *(const stripe_job *)job;
  float *restrict value = s.tensor->value, *restrict gradient = s.tensor->gradient;
  float *restrict mean = s.tensor->mean, *restrict square = s.tensor->square;
  for (int64_t i = index * s.stripe, end = end_of(&s, index); i < end; i++) {
    float g = gradient[i] * s.shrink;
    gradient[i] = 0;
    mean[i] += (1 - s.beta1) * (g - mean[i]);
    square[i] += (1 - s.beta2) * (g * g - square[i]);
    value[i] -= s.rate * (s.correct1 * mean[i] / (sqrtf(s.correct2 * square[i]) + s.epsilon) + s.decay * value[i]);
  }
}

void adamw_step(team *crew, tensor *tensors, int count, const adamw *how, double norm, int step) {
  for (int t = 0; t < count; t++) {
    if (!tensors[t].mean) continue;
    stripe_job job = {.shrink = how->clip > 0 && norm > how->clip ? (float)(how->clip / norm) : 1,
                      .beta1 = (float)how->beta1,
                      .beta2 = (float)how->beta2,
                      .rate = (float)how->rate,
                      .epsilon = (float)how->epsilon,
                      .decay = tensors[t].decays ? (float)how->decay : 0,
                      .correct1 = (float)(1 / (1 - pow(how->beta1, step))), /* averages that began at 0 are too small */
                      .correct2 = (float)(1 / (1 - pow(how->beta2, step)))};
    int stripes = cut(&tensors[t], &job);
    team_run(crew, stripes, step_stripe, &job);
  }
}
