/* gpt.c: the dense layers of layers.h and the library's experts, put together to a model.
 *
 * Letters of the shapes as in gpt.h: n = B T, V d H h E k. */
#define _POSIX_C_SOURCE 200809L
#include "gpt_inside.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- failure ------------------------------------------------------------------------------- */
static __thread char words[256];

const char *gpt_last_error(void) { return words; }

fmoe_status gpt_fail(fmoe_status status, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(words, sizeof words, format, values);
  va_end(values);
  return status;
}

/* ---- workers --------------------------------------------------------------------------------- */
static int sum(const gpt *model, float *values, int64_t count) { /* 0, or not if a worker is lost */
  return model->peers.size > 1 ? model->peers.sum(model->peers.context, values, count) : 0;
}

fmoe_status gpt_sum(const gpt *model, float *values, int64_t count) {
  return sum(model, values, count) == 0 ? FMOE_OK : gpt_fail(FMOE_ERROR_PEER, "another worker is lost");
}

fmoe_status gpt_agree(const gpt *model, fmoe_status status) {
  float failed = status != FMOE_OK;
  if (sum(model, &failed, 1) != 0) failed = 1;
  return status == FMOE_OK && failed > 0 ? gpt_fail(FMOE_ERROR_PEER, "another worker failed") : status;
}

int gpt_first_of(const gpt *model, int B, int rank) {
  return (int)(((int64_t)B * rank + model->peers.size - 1) / model->peers.size);
}

/* Makes of this worker's loss and counts those of all. */
static fmoe_status share_loss(gpt *model, gpt_loss *loss) {
  int L = model->config.layers, E = model->config.experts, W = model->peers.size;
  if (W > 1) { /* float32 will do here; a worker alone keeps its doubles */
    float means[3] = {(float)loss->mean, (float)loss->balance, (float)loss->z};
    fmoe_status status = gpt_sum(model, means, 3);
    if (status == FMOE_OK) status = gpt_sum(model, model->counts, (int64_t)L * E);
    if (status != FMOE_OK) return status;
    *loss = (gpt_loss){.mean = (double)means[0] / W, .balance = (double)means[1] / W, .z = (double)means[2] / W};
  }
  for (int i = 0; i < L; i++) {
    double most = 0, all = 0;
    for (int e = 0; e < E; e++) {
      double count = model->counts[i * E + e];
      all += count;
      if (count > most) most = count;
    }
    loss->load += all > 0 ? most * E / all / L : 0;
  }
  return FMOE_OK;
}

static double seconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* ---- experts: stream [n, d] += the MoE layer of normal2 [n, d] ------------------------------- */
static fmoe_status experts_forward(gpt *model, int layer, int n, gpt_loss *loss) {
  const gpt_config *c = &model->config;
  block *b = &model->blocks[layer];
  if (b->choices) {
    const int64_t mine = (int64_t)model->first * model->T * c->top_k;
    TRY(fmoe_route(b->experts, b->normal2, n, b->choices + mine, b->weights + mine, &b->pass));
    b->choices = NULL;
  } else {
    TRY(fmoe_gate(b->experts, b->normal2, n, &b->pass));
  }
  if (model->predicts) {
    fmoe_plan_report report = {.struct_size = sizeof report};
    TRY(fmoe_plan(b->pass, NULL, &report));
    b->plan = (gpt_plan){report.shadows, report.group_size, report.seconds_planned, 0};
  }
  double start = seconds();
  TRY(fmoe_forward(b->pass, model->outcome));
  b->plan.measured = seconds() - start;
  add(model->crew, (int64_t)n * c->width, model->outcome, model->stream);

  fmoe_routing routing = {.struct_size = sizeof routing};
  TRY(fmoe_pass_routing(b->pass, &routing));
  for (int e = 0; e < c->experts; e++) model->counts[layer * c->experts + e] = (float)routing.counts[e];
  loss->balance += routing.balance_loss;
  loss->z += routing.z_loss;
  return FMOE_OK;
}

/* The library adds the gradients of the balance and z losses on its own. */
static fmoe_status experts_backward(block *b, const float *grad_stream, float *grad_normal2) {
  double start = seconds();
  TRY(fmoe_backward(b->pass, grad_stream, grad_normal2, NULL));
  b->plan.measured += seconds() - start;
  fmoe_pass_destroy(b->pass);
  b->pass = NULL;
  return FMOE_OK;
}

/* ---- the whole model ------------------------------------------------------------------------- */
void gpt_forget(gpt *model) {
  for (int i = 0; i < model->config.layers; i++) {
    fmoe_pass_destroy(model->blocks[i].pass);
    model->blocks[i].pass = NULL;
  }
  model->has_targets = 0;
}

static fmoe_status check(const char *what, int least, int most, int n, const int32_t *symbols) {
  for (int i = 0; i < n; i++)
    if (symbols[i] < least || symbols[i] > most)
      return gpt_fail(FMOE_ERROR_ARGUMENT, "%s %d is %d, not in %d..%d", what, i, (int)symbols[i], least, most);
  return FMOE_OK;
}

/* Forward as far as the logits, with this worker's part of the sequences, which may be none. */
static fmoe_status run(gpt *model, const int32_t *tokens, int B, int T, gpt_loss *loss) {
  const gpt_config *c = &model->config;
  team *crew = model->crew;
  gpt_forget(model);
  if (B < 1 || B > c->batch || T < 1 || T > c->context)
    return gpt_fail(FMOE_ERROR_ARGUMENT, "%d sequences of %d tokens, but the model was made for 1..%d of 1..%d", B, T,
                    c->batch, c->context);
  fmoe_status status = check("token", 0, c->vocab - 1, B * T, tokens);
  if (status != FMOE_OK) return status;
  model->first = gpt_first_of(model, B, model->peers.rank);
  model->B = B = gpt_first_of(model, B, model->peers.rank + 1) - model->first;
  model->T = T;
  int n = B * T, d = c->width;
  memcpy(model->tokens, tokens + (int64_t)model->first * T, (size_t)n * sizeof tokens[0]);
  *loss = (gpt_loss){0, 0, 0, 0};

  embed_forward(crew, n, T, d, model->tokens, model->symbols->value, model->places->value, model->stream);
  for (int i = 0; i < c->layers; i++) {
    block *b = &model->blocks[i];
    norm_forward(crew, n, d, model->stream, b->normal1, b->scale1);
    linear_forward(crew, n, d, 3 * d, b->normal1, b->triple->value, SET, b->qkv);
    attention_forward(crew, B, T, d, c->heads, b->qkv, b->shares, b->mixed);
    linear_forward(crew, n, d, d, b->mixed, b->project->value, ADD, model->stream);

    norm_forward(crew, n, d, model->stream, b->normal2, b->scale2);
    if ((status = experts_forward(model, i, n, loss)) != FMOE_OK) return status;
  }
  norm_forward(crew, n, d, model->stream, model->normal, model->scale);
  linear_forward(crew, n, d, c->vocab, model->normal, model->head->value, SET, model->logits);
  return FMOE_OK;
}

fmoe_status gpt_forward(gpt *model, const int32_t *tokens, const int32_t *targets, int B, int T, gpt_loss *loss) {
  fmoe_status status = run(model, tokens, B, T, loss);
  if (status == FMOE_OK) status = check("target", -1, model->config.vocab - 1, B * T, targets);
  if (status != FMOE_OK) return status;
  int n = model->B * T, counted = 0;
  for (int i = 0; i < B * T; i++) counted += targets[i] >= 0;
  memcpy(model->targets, targets + (int64_t)model->first * T, (size_t)n * sizeof targets[0]);
  /* Divided by what is a worker's share on average: the mean over workers is then that over all tokens. */
  loss->mean = cross_entropy(model->crew, n, model->config.vocab, model->targets, (double)counted / model->peers.size,
                             model->logits, model->losses);
  if ((status = share_loss(model, loss)) != FMOE_OK) return status;
  model->has_targets = 1;
  return FMOE_OK;
}

fmoe_status gpt_set_training(gpt *model, int training) {
  model->evaluates = !training;
  for (int l = 0; l < model->config.layers; l++) TRY(fmoe_layer_set_training(model->blocks[l].experts, training));
  return FMOE_OK;
}

fmoe_status gpt_backward(gpt *model) {
  if (!model->has_targets) return gpt_fail(FMOE_ERROR_STAGE, "gpt_backward comes after a gpt_forward, once");
  model->has_targets = 0;
  const gpt_config *c = &model->config;
  team *crew = model->crew;
  int B = model->B, T = model->T, n = B * T, d = c->width;
  float *grad_stream = model->grad_stream, *grad_normal = model->grad_normal, *grad_logits = model->logits;

  linear_backward(crew, n, d, c->vocab, model->normal, model->head->value, grad_logits, grad_normal,
                  model->head->gradient);
  memset(grad_stream, 0, (size_t)n * (size_t)d * sizeof grad_stream[0]);
  norm_backward(crew, n, d, model->normal, model->scale, grad_normal, grad_stream);
  for (int i = c->layers - 1; i >= 0; i--) {
    block *b = &model->blocks[i];
    fmoe_status status = experts_backward(b, grad_stream, grad_normal);
    if (status != FMOE_OK) return status;
    norm_backward(crew, n, d, b->normal2, b->scale2, grad_normal, grad_stream);

    linear_backward(crew, n, d, d, b->mixed, b->project->value, grad_stream, model->grad_mixed, b->project->gradient);
    attention_backward(crew, B, T, d, c->heads, b->qkv, b->shares, model->grad_mixed, model->grad_shares,
                       model->grad_qkv);
    linear_backward(crew, n, d, 3 * d, b->normal1, b->triple->value, model->grad_qkv, grad_normal, b->triple->gradient);
    norm_backward(crew, n, d, b->normal1, b->scale1, grad_normal, grad_stream);
  }
  embed_backward(crew, n, T, d, model->tokens, grad_stream, model->symbols->gradient, model->places->gradient);
  return FMOE_OK;
}

/* ---- update ---------------------------------------------------------------------------------- */
/* Every gradient becomes that of the mean over workers of their losses. */
static fmoe_status share_gradients(gpt *model) {
  for (int i = 0; i < model->config.layers; i++) TRY(fmoe_layer_reduce_gradients(model->blocks[i].experts));
  fmoe_status status = gpt_sum(model, model->dense_gradients, model->dense_size);
  float W = (float)model->peers.size;
  for (int64_t i = 0; W > 1 && i < model->dense_size; i++) model->dense_gradients[i] /= W;
  return status;
}

fmoe_status gpt_update(gpt *model, const adamw *how, double *norm) {
  fmoe_status status = share_gradients(model);
  if (status != FMOE_OK) return status;
  double squares = 0, experts = 0; /* of what every worker has, and of what each has of its own */
  for (int t = 0; t < model->tensor_count; t++) {
    const tensor *one = &model->tensors[t];
    *(one->per_expert ? &experts : &squares) += gradient_squares(model->crew, one);
  }
  if (model->peers.size > 1) {
    float all = (float)experts;
    if ((status = gpt_sum(model, &all, 1)) != FMOE_OK) return status;
    experts = all;
  }
  double length = sqrt(squares + experts);
  adamw_step(model->crew, model->tensors, model->tensor_count, how, length, ++model->updates);
  /* 2: what gradients hold is not needed any more, and the next backward writes them. */
  fmoe_adamw_options experts_too = {.struct_size = sizeof experts_too, .zero_gradients = 2, .learning_rate = how->rate,
                                    .beta1 = how->beta1, .beta2 = how->beta2, .epsilon = how->epsilon,
                                    .weight_decay = how->decay};
  experts_too.gradient_scale = how->clip > 0 && length > how->clip ? how->clip / length : 1;
  status = FMOE_OK; /* the first step takes memory, which one worker may not get */
  for (int i = 0; i < model->config.layers && status == FMOE_OK; i++)
    if ((status = fmoe_layer_adamw(model->blocks[i].experts, &experts_too)) != FMOE_OK)
      gpt_fail(status, "%s", fmoe_last_error());
  if (model->updates == 1) status = gpt_agree(model, status);
  if (status != FMOE_OK) return status;
  if (norm) *norm = length;
  return FMOE_OK;
}

void gpt_zero_gradients(gpt *model) {
  for (int i = 0; i < model->tensor_count; i++)
    memset(model->tensors[i].gradient, 0, (size_t)model->tensors[i].size * sizeof(float));
}

/* ---- sampling -------------------------------------------------------------------------------- */
static int draw(int V, const float *logits, double temperature, double chance /* [0, 1) */) {
  int likeliest = 0;
  for (int j = 1; j < V; j++)
    if (logits[j] > logits[likeliest]) likeliest = j;
  if (temperature <= 0) return likeliest;

  double all = 0;
  for (int j = 0; j < V; j++) all += exp((logits[j] - logits[likeliest]) / temperature);
  double mark = all * chance;
  for (int j = 0; j < V; j++) {
    mark -= exp((logits[j] - logits[likeliest]) / temperature);
    if (mark < 0) return j;
  }
  return likeliest;
}

fmoe_status gpt_sample(gpt *model, const int32_t *tokens, int T, double temperature, uint64_t *random, int32_t *next) {
  gpt_loss unused;
  int evaluated = model->evaluates;
  TRY(gpt_set_training(model, 0));
  fmoe_status status = run(model, tokens, 1, T, &unused);
  TRY(gpt_set_training(model, !evaluated));
  if (status != FMOE_OK) return status;
  int V = model->config.vocab;
  double chance = temperature > 0 ? gpt_random(random) : 0; /* all draw, so that their numbers stay the same */
  float symbol = 0;
  if (model->B > 0) symbol = (float)draw(V, model->logits + (int64_t)(T - 1) * V, temperature, chance);
  status = gpt_sum(model, &symbol, 1);
  if (status == FMOE_OK) *next = (int32_t)symbol;
  return status;
}

double gpt_random(uint64_t *state) { /* splitmix64 */
  uint64_t x = *state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return (double)((x ^ x >> 31) >> 11) / 9007199254740992.0;
}

/* ---- what the model is made of ----------------------------------------------------------------- */
const tensor *gpt_tensors(const gpt *model, int *count) {
  *count = model->tensor_count;
  return model->tensors;
}

double gpt_parameters(const gpt *model, double *active) {
  double all = 0, resting = 0;
  for (int i = 0; i < model->tensor_count; i++) {
    double size = (double)model->tensors[i].size * (model->tensors[i].per_expert ? model->peers.size : 1);
    all += size;
    if (model->tensors[i].per_expert) resting += size * (1 - (double)model->config.top_k / model->config.experts);
  }
  if (active) *active = all - resting;
  return all;
}

/* A multiply and an add count 2, backward counts twice forward, and only what is needed counts: a position attends to
 * (T + 1) / 2 others on average, and a token visits k experts of 2 matrices [h, d] each (SwiGLU: 3). */
double gpt_flops_per_token(const gpt *model, int T) {
  const gpt_config *c = &model->config;
  double d = c->width, matrices = c->activation == FMOE_SWIGLU ? 3 : 2;
  double attention = 4 * d * d + 2 * d * (T + 1) / 2, experts = c->experts * d + c->top_k * matrices * c->hidden * d;
  return (1 + 2) * 2 * (c->layers * (attention + experts) + c->vocab * d);
}

fmoe_status gpt_calibrate(gpt *model, double seconds) {
  TRY(fmoe_group_calibrate(model->peers.group, seconds));
  model->predicts = 1;
  return FMOE_OK;
}

gpt_plan gpt_plan_of(const gpt *model, int layer) { return model->blocks[layer].plan; }

fmoe_status gpt_routing(const gpt *model, int layer, fmoe_routing *out) {
  out->struct_size = sizeof *out;
  TRY(fmoe_pass_routing(model->blocks[layer].pass, out));
  return FMOE_OK;
}

void gpt_route(gpt *model, int layer, const int32_t *choices, const float *weights) {
  model->blocks[layer].choices = choices, model->blocks[layer].weights = weights;
}

int gpt_top_k(const gpt *model) { return model->config.top_k; }
