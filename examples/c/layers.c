/* layers.c: each layer is a pair of tasks on some rows, columns or heads, and two functions that share them out. */
#include "layers.h"

#include <math.h>
#include <string.h>

enum { ROWS = 32, COLUMNS = 16, PIECE = 8192 }; /* so many rows or columns of a matrix, or floats, make a task */

static int parts(int64_t whole, int part) { return (int)((whole + part - 1) / part); }
static int smaller(int a, int b) { return a < b ? a : b; }

/* Sums run in sixteen lanes and a tail: compilers may then use vectors without changing the order. */
static float dot(const float *x, const float *y, int size) {
  float lane[16] = {0}, sum = 0;
  int i = 0;
  for (; i + 16 <= size; i += 16)
    for (int l = 0; l < 16; l++) lane[l] += x[i + l] * y[i + l];
  for (; i < size; i++) sum += x[i] * y[i];
  for (int l = 0; l < 16; l++) sum += lane[l];
  return sum;
}

static float total(const float *x, int size) {
  float lane[16] = {0}, sum = 0;
  int i = 0;
  for (; i + 16 <= size; i += 16)
    for (int l = 0; l < 16; l++) lane[l] += x[i + l];
  for (; i < size; i++) sum += x[i];
  for (int l = 0; l < 16; l++) sum += lane[l];
  return sum;
}

/* e^x for x <= 0: e^x = 2^z e^r with z whole and |r| <= log(2) / 2.  The relative error is below 2e-7.  There is no
 * branch and no call, so that loops around it become vector code. */
static inline float exponential(float x) {
  x = x < -87 ? -87 : x;
  float shifted = x * 1.442695041f + 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
  float z = shifted - 12582912.0f, r = x - z * 0.693359375f + z * 2.12194440e-4f; /* log(2) in two parts */
  float series = 1 / 720.f + r * (1 / 5040.f);
  series = 1 / 24.f + r * (1 / 120.f + r * series);
  series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * series)));
  uint32_t bits; /* the low bits of shifted are z: moved to where a float keeps its exponent, they make 2^z */
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power * series;
}

/* Turns scores [size] into e^(factor (score - largest)) and returns their sum. */
static float exponentials(float *scores, int size, float factor, float *largest) {
  float most = scores[0];
  for (int i = 1; i < size; i++) most = scores[i] > most ? scores[i] : most;
  for (int i = 0; i < size; i++) scores[i] = exponential(factor * (scores[i] - most));
  *largest = most;
  return total(scores, size);
}

/* ---- embed --------------------------------------------------------------------------------- */
typedef struct embed_job {
  int n, T, d;
  const int32_t *tokens;
  const float *symbols, *places;
  float *x;
  const float *grad_x;
  float *grad_symbols, *grad_places;
} embed_job;

static void embed_rows(const void *job, int index) {
  const embed_job *e = job;
  for (int i = index * ROWS; i < smaller((index + 1) * ROWS, e->n); i++) {
    const float *symbol = e->symbols + (int64_t)e->tokens[i] * e->d, *place = e->places + (int64_t)(i % e->T) * e->d;
    float *x = e->x + (int64_t)i * e->d;
    for (int j = 0; j < e->d; j++) x[j] = symbol[j] + place[j];
  }
}

static void embed_backward_columns(const void *job, int index) { /* many rows fall on one symbol: so split by columns */
  const embed_job *e = job;
  for (int i = 0; i < e->n; i++) {
    float *symbol = e->grad_symbols + (int64_t)e->tokens[i] * e->d;
    float *place = e->grad_places + (int64_t)(i % e->T) * e->d;
    const float *grad_x = e->grad_x + (int64_t)i * e->d;
    for (int j = index * COLUMNS; j < smaller((index + 1) * COLUMNS, e->d); j++) {
      symbol[j] += grad_x[j];
      place[j] += grad_x[j];
    }
  }
}

void embed_forward(team *crew, int n, int T, int d, const int32_t *tokens, const float *symbols, const float *places,
                   float *x) {
  embed_job job = {n, T, d, tokens, symbols, places, x, NULL, NULL, NULL};
  team_run(crew, parts(n, ROWS), embed_rows, &job);
}

void embed_backward(team *crew, int n, int T, int d, const int32_t *tokens, const float *grad_x, float *grad_symbols,
                    float *grad_places) {
  embed_job job = {n, T, d, tokens, NULL, NULL, NULL, grad_x, grad_symbols, grad_places};
  team_run(crew, parts(d, COLUMNS), embed_backward_columns, &job);
}

/* ---- norm ---------------------------------------------------------------------------------- */
typedef struct norm_job {
  int n, d;
  const float *x;
  float *y, *scale;
  const float *normal, *scaled, *grad_y; /* backward: forward's y and scale */
  float *grad_x;
} norm_job;

static void norm_rows(const void *job, int index) {
  const norm_job *norm = job;
  int d = norm->d;
  for (int i = index * ROWS; i < smaller((index + 1) * ROWS, norm->n); i++) {
    const float *x = norm->x + (int64_t)i * d;
    float *y = norm->y + (int64_t)i * d, mean = total(x, d) / (float)d;
    for (int j = 0; j < d; j++) y[j] = x[j] - mean;
    float scale = norm->scale[i] = 1 / sqrtf(dot(y, y, d) / (float)d + 1e-5f);
    for (int j = 0; j < d; j++) y[j] *= scale;
  }
}

static void norm_backward_rows(const void *job, int index) {
  const norm_job *norm = job;
  int d = norm->d;
  for (int i = index * ROWS; i < smaller((index + 1) * ROWS, norm->n); i++) {
    const float *y = norm->normal + (int64_t)i * d, *grad_y = norm->grad_y + (int64_t)i * d;
    float *grad_x = norm->grad_x + (int64_t)i * d, scale = norm->scaled[i];
    float mean = total(grad_y, d) / (float)d, along = dot(grad_y, y, d) / (float)d;
    for (int j = 0; j < d; j++) grad_x[j] += scale * (grad_y[j] - mean - along * y[j]);
  }
}

void norm_forward(team *crew, int n, int d, const float *x, float *y, float *scale) {
  norm_job job = {n, d, x, y, scale, NULL, NULL, NULL, NULL};
  team_run(crew, parts(n, ROWS), norm_rows, &job);
}

void norm_backward(team *crew, int n, int d, const float *y, const float *scale, const float *grad_y, float *grad_x) {
  norm_job job = {n, d, NULL, NULL, NULL, y, scale, grad_y, grad_x};
  team_run(crew, parts(n, ROWS), norm_backward_rows, &job);
}

/* ---- linear -------------------------------------------------------------------------------- */
void linear_forward(team *crew, int n, int in, int out, const float *x, const float *w, int how, float *y) {
  matmul(crew, n, out, in, rows(x, in), turned(rows(w, in)), how, y, out);
}

void linear_backward(team *crew, int n, int in, int out, const float *x, const float *w, const float *grad_y,
                     float *grad_x, float *grad_w) {
  matmul(crew, n, in, out, rows(grad_y, out), rows(w, in), SET, grad_x, in);
  matmul(crew, out, in, n, turned(rows(grad_y, out)), rows(x, in), ADD, grad_w, in);
}

/* ---- attention: a task is one head of one sequence ------------------------------------------- */
typedef struct attention_job {
  int T, d, H;
  const float *qkv;
  float *shares, *y;
  const float *mixing, *grad_y; /* backward: forward's shares */
  float *grad_shares, *grad_qkv;
} attention_job;

static void attention_head(const void *job, int index) {
  const attention_job *a = job;
  int T = a->T, d = a->d, wide = d / a->H, sequence = index / a->H, column = index % a->H * wide;
  const float *q = a->qkv + (int64_t)sequence * T * 3 * d + column, *k = q + d, *v = k + d;
  float *shares = a->shares + (int64_t)index * T * T, factor = 1 / sqrtf((float)wide), largest;
  matmul(NULL, T, T, wide, rows(q, 3 * d), turned(rows(k, 3 * d)), SET, shares, T);
  for (int t = 0; t < T; t++) {
    float *share = shares + (int64_t)t * T, part = 1 / exponentials(share, t + 1, factor, &largest);
    for (int s = 0; s <= t; s++) share[s] *= part;
    for (int s = t + 1; s < T; s++) share[s] = 0; /* no look ahead */
  }
  matmul(NULL, T, wide, T, rows(shares, T), rows(v, 3 * d), SET, a->y + (int64_t)sequence * T * d + column, d);
}

static void attention_backward_head(const void *job, int index) {
  const attention_job *a = job;
  int T = a->T, d = a->d, wide = d / a->H, sequence = index / a->H, column = index % a->H * wide;
  const float *q = a->qkv + (int64_t)sequence * T * 3 * d + column, *k = q + d, *v = k + d;
  const float *grad_y = a->grad_y + (int64_t)sequence * T * d + column, *shares = a->mixing + (int64_t)index * T * T;
  float *grad_q = a->grad_qkv + (int64_t)sequence * T * 3 * d + column, *grad_k = grad_q + d, *grad_v = grad_k + d;
  float *grads = a->grad_shares + (int64_t)index * T * T, factor = 1 / sqrtf((float)wide);
  matmul(NULL, T, wide, T, turned(rows(shares, T)), rows(grad_y, d), SET, grad_v, 3 * d);
  matmul(NULL, T, T, wide, rows(grad_y, d), turned(rows(v, 3 * d)), SET, grads, T);
  for (int t = 0; t < T; t++) { /* in place, from the gradient of the shares to that of q kᵀ */
    const float *share = shares + (int64_t)t * T;
    float *grad = grads + (int64_t)t * T, along = dot(share, grad, t + 1);
    for (int s = 0; s <= t; s++) grad[s] = factor * share[s] * (grad[s] - along);
    for (int s = t + 1; s < T; s++) grad[s] = 0;
  }
  matmul(NULL, T, wide, T, rows(grads, T), rows(k, 3 * d), SET, grad_q, 3 * d);
  matmul(NULL, T, wide, T, turned(rows(grads, T)), rows(q, 3 * d), SET, grad_k, 3 * d);
}

void attention_forward(team *crew, int B, int T, int d, int H, const float *qkv, float *shares, float *y) {
  attention_job job = {T, d, H, qkv, shares, y, NULL, NULL, NULL, NULL};
  team_run(crew, B * H, attention_head, &job);
}

void attention_backward(team *crew, int B, int T, int d, int H, const float *qkv, const float *shares,
                        const float *grad_y, float *grad_shares, float *grad_qkv) {
  attention_job job = {T, d, H, qkv, NULL, NULL, shares, grad_y, grad_shares, grad_qkv};
  team_run(crew, B * H, attention_backward_head, &job);
}

/* ---- cross-entropy --------------------------------------------------------------------------- */
typedef struct entropy_job {
  int n, V;
  float counted;
  const int32_t *targets;
  float *logits, *losses;
} entropy_job;

static void entropy_rows(const void *job, int index) {
  const entropy_job *e = job;
  for (int i = index * ROWS; i < smaller((index + 1) * ROWS, e->n); i++) {
    float *logit = e->logits + (int64_t)i * e->V, largest;
    int32_t target = e->targets[i];
    e->losses[i] = 0;
    if (target < 0) {
      memset(logit, 0, (size_t)e->V * sizeof logit[0]);
      continue;
    }
    float right = logit[target], sum = exponentials(logit, e->V, 1, &largest), part = 1 / (sum * e->counted);
    e->losses[i] = logf(sum) + (largest - right);
    for (int j = 0; j < e->V; j++) logit[j] *= part;
    logit[target] -= 1 / e->counted;
  }
}

double cross_entropy(team *crew, int n, int V, const int32_t *targets, double counted, float *logits, float *losses) {
  entropy_job job = {n, V, (float)counted, targets, logits, losses};
  team_run(crew, parts(n, ROWS), entropy_rows, &job);
  double sum = 0;
  for (int i = 0; i < n; i++) sum += losses[i];
  return counted > 0 ? sum / counted : 0;
}

/* ---- add ----------------------------------------------------------------------------------- */
typedef struct add_job {
  int64_t size;
  const float *x;
  float *y;
} add_job;

static void add_piece(const void *job, int index) {
  const add_job *a = job;
  int64_t first = (int64_t)index * PIECE, end = first + PIECE < a->size ? first + PIECE : a->size;
  for (int64_t i = first; i < end; i++) a->y[i] += a->x[i];
}

void add(team *crew, int64_t size, const float *x, float *y) {
  add_job job = {size, x, y};
  team_run(crew, parts(size, PIECE), add_piece, &job);
}
