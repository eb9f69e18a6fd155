#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fastermoe.h"

double uniform(uint64_t *state) {
  *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (double)(*state >> 33) / 2147483648.0;
}

void fill(double *values, int64_t count, double scale, uint64_t *state) {
  for (int64_t i = 0; i < count; i++) values[i] = (2 * uniform(state) - 1) * scale;
}

static void *zeros(int64_t count, size_t size) {
  void *block = calloc((size_t)count + 1, size); /* + 1: an array of none is an array too */
  if (!block) abort();
  return block;
}

oracle *oracle_create(int64_t tokens, int64_t choices, int64_t experts, int64_t model, int64_t hidden,
                      int32_t activation) {
  oracle *o = zeros(1, sizeof *o);
  int glu = activation == FMOE_SWIGLU;
  int64_t matrix = experts * hidden * model;
  int64_t sizes[TENSORS] = {experts * model,          matrix, glu ? 0 : experts * hidden, matrix,
                            glu ? 0 : experts * model, glu ? matrix : 0};
  o->tokens = tokens, o->choices = choices, o->experts = experts, o->model = model, o->hidden = hidden;
  o->activation = activation;
  for (int t = 0; t < TENSORS; t++) {
    o->sizes[t] = sizes[t];
    o->values[t] = zeros(sizes[t], sizeof(double));
    o->gradients[t] = zeros(sizes[t], sizeof(double));
  }
  double **of_tokens[] = {&o->x, &o->grad_y, &o->y, &o->grad_x};
  for (int i = 0; i < 4; i++) *of_tokens[i] = zeros(tokens * model, sizeof(double));
  o->choice = zeros(tokens * choices, sizeof(int32_t));
  o->weight = zeros(tokens * choices, sizeof(double));
  o->grad_weight = zeros(tokens * choices, sizeof(double));
  o->logits = zeros(tokens * experts, sizeof(double));
  o->counts = zeros(experts, sizeof(int64_t));
  return o;
}

void oracle_destroy(oracle *o) {
  for (int t = 0; t < TENSORS; t++) free(o->values[t]), free(o->gradients[t]);
  free(o->x), free(o->grad_y), free(o->y), free(o->grad_x);
  free(o->choice), free(o->weight), free(o->grad_weight), free(o->logits), free(o->counts), free(o->everyone), free(o);
}

static double dot(const double *a, const double *b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

static void add(double *to, double factor, const double *from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += factor * from[i];
}

/* act(u), and its derivative in *slope. */
static double act(int32_t activation, double u, double *slope) {
  const double pi = 3.14159265358979323846, c = sqrt(2 / pi);
  double phi = 0.5 * (1 + erf(u / sqrt(2))), t = tanh(c * (u + 0.044715 * u * u * u)), s = 1 / (1 + exp(-u));
  switch (activation) {
    case FMOE_GELU: return *slope = phi + u * exp(-u * u / 2) / sqrt(2 * pi), u * phi;
    case FMOE_GELU_TANH:
      return *slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * 0.044715 * u * u), 0.5 * u * (1 + t);
    case FMOE_RELU: return *slope = u > 0, u > 0 ? u : 0;
    default: return *slope = s * (1 + u * (1 - s)), u * s;
  }
}

/* softmax of logits[0..count) -> p; log of the sum of exponentials. */
static double softmax(const double *logits, int64_t count, double *p) {
  double top = -INFINITY, sum = 0;
  for (int64_t e = 0; e < count; e++) top = fmax(top, logits[e]);
  for (int64_t e = 0; e < count; e++) sum += p[e] = exp(logits[e] - top);
  for (int64_t e = 0; e < count; e++) p[e] /= sum;
  return top + log(sum);
}

/* f_e of the balance loss: each expert's share of all choices. */
static void shares_of(const oracle *o, double *shares) {
  const int64_t *counts = o->everyone ? o->everyone : o->counts;
  int64_t all = 0;
  for (int64_t e = 0; e < o->experts; e++) all += counts[e];
  for (int64_t e = 0; e < o->experts; e++) shares[e] = all ? (double)counts[e] / (double)all : 0;
}

void oracle_gate(oracle *o) {
  int64_t n = o->tokens, k = o->choices, E = o->experts, d = o->model;
  double *p = zeros(E, sizeof(double)), *mean = zeros(E, sizeof(double)), *chosen = zeros(k, sizeof(double));
  double *shares = zeros(E, sizeof(double));
  o->balance_loss = o->z_loss = 0;
  memset(o->counts, 0, (size_t)E * sizeof *o->counts);
  for (int64_t i = 0; i < n && !o->routed; i++) {
    double *logits = o->logits + i * E;
    for (int64_t e = 0; e < E; e++) logits[e] = dot(o->x + i * d, o->values[GATE] + e * d, d);
    double lse = softmax(logits, E, p);
    add(mean, 1.0 / (double)n, p, E);
    o->z_loss += o->z * lse * lse / (double)n;
    for (int64_t j = 0; j < k; j++) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; e++) {
        int taken = 0;
        for (int64_t q = 0; q < j; q++) taken |= o->choice[i * k + q] == e;
        int better = best < 0 || logits[e] > logits[best] || (isnan(logits[best]) && !isnan(logits[e]));
        if (!taken && better) best = e;
      }
      o->choice[i * k + j] = (int32_t)best;
      chosen[j] = logits[best];
    }
    if (k == 1) o->weight[i] = p[o->choice[i]];
    else softmax(chosen, k, o->weight + i * k);
  }
  for (int64_t s = 0; s < n * k; s++)
    if (o->choice[s] >= 0) o->counts[o->choice[s]]++;
  shares_of(o, shares);
  for (int64_t e = 0; e < E && !o->routed; e++) o->balance_loss += o->balance * (double)E * shares[e] * mean[e];
  free(p), free(mean), free(chosen), free(shares);
}

/* Forward and backward of slot (i, j): token i through its j-th expert. */
static void run_slot(oracle *o, int64_t i, int64_t j, double *a, double *slope, double *linear, double *out) {
  int64_t d = o->model, h = o->hidden, e = o->choice[i * o->choices + j];
  int glu = o->activation == FMOE_SWIGLU;
  double s = o->weight[i * o->choices + j], *x = o->x + i * d, *dy = o->grad_y + i * d, *dx = o->grad_x + i * d;
  double *w1 = o->values[W1] + e * h * d, *w2 = o->values[W2] + e * d * h, *w3 = o->values[W3] + (glu ? e * h * d : 0);
  for (int64_t r = 0; r < h; r++) {
    a[r] = act(o->activation, dot(x, w1 + r * d, d) + (glu ? 0 : o->values[B1][e * h + r]), &slope[r]);
    linear[r] = glu ? dot(x, w3 + r * d, d) : 1;
  }
  for (int64_t c = 0; c < d; c++) {
    out[c] = glu ? 0 : o->values[B2][e * d + c];
    for (int64_t r = 0; r < h; r++) out[c] += w2[c * h + r] * a[r] * linear[r];
  }
  add(o->y + i * d, s, out, d);
  o->grad_weight[i * o->choices + j] = dot(dy, out, d);
  if (!glu) add(o->gradients[B2] + e * d, s, dy, d);
  for (int64_t r = 0; r < h; r++) {
    double da = 0;
    for (int64_t c = 0; c < d; c++) {
      da += s * dy[c] * w2[c * h + r];
      o->gradients[W2][(e * d + c) * h + r] += s * dy[c] * a[r] * linear[r];
    }
    double du = da * linear[r] * slope[r];
    add(dx, du, w1 + r * d, d);
    add(o->gradients[W1] + (e * h + r) * d, du, x, d);
    if (!glu) o->gradients[B1][e * h + r] += du;
    if (glu) add(dx, da * a[r], w3 + r * d, d), add(o->gradients[W3] + (e * h + r) * d, da * a[r], x, d);
  }
}

/* From the gradients of the weights and the losses to those of the gate and the tokens. */
static void run_gate_backward(oracle *o) {
  int64_t n = o->tokens, k = o->choices, E = o->experts, d = o->model;
  double *p = zeros(E, sizeof(double)), *dg = zeros(E, sizeof(double)), *shares = zeros(E, sizeof(double));
  shares_of(o, shares);
  for (int64_t i = 0; i < n; i++) {
    const int32_t *choice = o->choice + i * k;
    const double *s = o->weight + i * k, *ds = o->grad_weight + i * k;
    double lse = softmax(o->logits + i * E, E, p), expected = 0;
    for (int64_t e = 0; e < E; e++) expected += shares[e] * p[e];
    for (int64_t e = 0; e < E; e++) {
      dg[e] = o->balance * (double)E / (double)n * p[e] * (shares[e] - expected) + o->z * 2 / (double)n * lse * p[e];
      if (k == 1) dg[e] += p[e] * ((choice[0] == e) - p[choice[0]]) * ds[0]; /* softmax over all experts */
    }
    for (int64_t j = 0; j < k && k > 1; j++) dg[choice[j]] += s[j] * (ds[j] - dot(ds, s, k)); /* over the chosen */
    for (int64_t e = 0; e < E; e++) {
      add(o->grad_x + i * d, dg[e], o->values[GATE] + e * d, d);
      add(o->gradients[GATE] + e * d, dg[e], o->x + i * d, d);
    }
  }
  free(p), free(dg), free(shares);
}

void oracle_run(oracle *o) {
  int64_t n = o->tokens, d = o->model, h = o->hidden;
  double *room = zeros(3 * h + d, sizeof(double));
  for (int t = 0; t < TENSORS; t++) memset(o->gradients[t], 0, (size_t)o->sizes[t] * sizeof(double));
  memset(o->y, 0, (size_t)(n * d) * sizeof(double));
  memset(o->grad_x, 0, (size_t)(n * d) * sizeof(double));
  memset(o->grad_weight, 0, (size_t)(n * o->choices) * sizeof(double));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < o->choices; j++)
      if (o->choice[i * o->choices + j] >= 0) run_slot(o, i, j, room, room + h, room + 2 * h, room + 3 * h);
  if (!o->routed) run_gate_backward(o);
  free(room);
}

uint64_t hash_floats(uint64_t hash, const float *floats, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, floats + i, sizeof bits);
    hash = (hash ^ bits) * UINT64_C(1099511628211);
  }
  return hash;
}
