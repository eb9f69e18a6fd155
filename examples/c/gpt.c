/* gpt.c: the dense layers of layers.h and the library's experts, put together to a model.
 *
 * Letters of the shapes as in gpt.h: n = B T, V d H h E k. */
#define _POSIX_C_SOURCE 200809L
#include "gpt.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "layers.h"

typedef struct block {          /* attention, then experts, each behind a norm and beside a residual */
  fmoe_layer *experts;
  fmoe_pass *pass;              /* of the latest forward, until its backward; else NULL */
  tensor *triple, *project; /* [3d, d] for queries, keys and values   [d, d] */
  float *normal1, *normal2;     /* [n, d] what attention and experts read */
  float *scale1, *scale2;       /* [n] */
  float *qkv;                   /* [n, 3d] */
  float *shares;                /* [B, H, T, T] */
  float *mixed;                 /* [n, d] */
} block;

struct gpt {
  gpt_config config;
  team *crew;
  fmoe_group *group;
  block *blocks;
  tensor *tensors;
  int tensor_count;
  tensor *symbols, *places, *head; /* [V, d]  [T, d]  [V, d] */

  int B, T;        /* of the latest forward */
  int has_targets; /* gpt_backward may follow */
  int updates;     /* steps of AdamW so far */

  float *memory; /* dense parameters, AdamW's averages, activations: one allocation */
  int64_t taken; /* floats of it handed out */
  int32_t *tokens, *targets;                                          /* [n] */
  float *stream;                                                      /* [n, d] every block adds to it */
  float *outcome;                                                     /* [n, d] of the experts */
  float *normal, *scale, *logits, *losses;                            /* [n, d]  [n]  [n, V]  [n] */
  float *grad_stream, *grad_normal, *grad_mixed, *grad_qkv, *grad_shares; /* shared by all blocks */
};

/* ---- failure ------------------------------------------------------------------------------- */
static __thread char words[256];

const char *gpt_last_error(void) { return words; }

static fmoe_status fail(fmoe_status status, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(words, sizeof words, format, values);
  va_end(values);
  return status;
}

#define TRY(call)                                                           \
  do {                                                                      \
    fmoe_status status_ = (call);                                           \
    if (status_ != FMOE_OK) return fail(status_, "%s", fmoe_last_error());  \
  } while (0)

/* ---- experts: stream [n, d] += the MoE layer of normal2 [n, d] ------------------------------- */
static fmoe_status experts_forward(gpt *model, block *b, int n, gpt_loss *loss) {
  const gpt_config *c = &model->config;
  TRY(fmoe_gate(b->experts, b->normal2, n, &b->pass));
  TRY(fmoe_forward(b->pass, model->outcome));
  add(model->crew, (int64_t)n * c->width, model->outcome, model->stream);

  fmoe_routing routing = {.struct_size = sizeof routing};
  TRY(fmoe_pass_routing(b->pass, &routing));
  int64_t most = 0, all = 0;
  for (int e = 0; e < c->experts; e++) {
    all += routing.counts[e];
    if (routing.counts[e] > most) most = routing.counts[e];
  }
  loss->balance += routing.balance_loss;
  loss->z += routing.z_loss;
  loss->load += all > 0 ? (double)most * c->experts / (double)all / c->layers : 0;
  return FMOE_OK;
}

/* The library adds the gradients of the balance and z losses on its own. */
static fmoe_status experts_backward(block *b, const float *grad_stream, float *grad_normal2) {
  TRY(fmoe_backward(b->pass, grad_stream, grad_normal2, NULL));
  fmoe_pass_destroy(b->pass);
  b->pass = NULL;
  return FMOE_OK;
}

/* ---- the whole model ------------------------------------------------------------------------- */
static void forget(gpt *model) { /* the latest forward */
  for (int i = 0; i < model->config.layers; i++) {
    fmoe_pass_destroy(model->blocks[i].pass);
    model->blocks[i].pass = NULL;
  }
  model->has_targets = 0;
}

static fmoe_status keep(const gpt *model, const char *what, int least, int n, const int32_t *symbols, int32_t *copy) {
  int most = model->config.vocab - 1;
  for (int i = 0; i < n; i++) {
    if (symbols[i] < least || symbols[i] > most)
      return fail(FMOE_ERROR_ARGUMENT, "%s %d is %d, not in %d..%d", what, i, (int)symbols[i], least, most);
    copy[i] = symbols[i];
  }
  return FMOE_OK;
}

/* Forward as far as the logits. */
static fmoe_status run(gpt *model, const int32_t *tokens, int B, int T, gpt_loss *loss) {
  const gpt_config *c = &model->config;
  team *crew = model->crew;
  forget(model);
  if (B < 1 || B > c->batch || T < 1 || T > c->context)
    return fail(FMOE_ERROR_ARGUMENT, "%d sequences of %d tokens, but the model was made for 1..%d of 1..%d", B, T,
                c->batch, c->context);
  int n = B * T, d = c->width;
  fmoe_status status = keep(model, "token", 0, n, tokens, model->tokens);
  if (status != FMOE_OK) return status;
  model->B = B;
  model->T = T;
  *loss = (gpt_loss){0, 0, 0, 0};

  embed_forward(crew, n, T, d, model->tokens, model->symbols->value, model->places->value, model->stream);
  for (int i = 0; i < c->layers; i++) {
    block *b = &model->blocks[i];
    norm_forward(crew, n, d, model->stream, b->normal1, b->scale1);
    linear_forward(crew, n, d, 3 * d, b->normal1, b->triple->value, SET, b->qkv);
    attention_forward(crew, B, T, d, c->heads, b->qkv, b->shares, b->mixed);
    linear_forward(crew, n, d, d, b->mixed, b->project->value, ADD, model->stream);

    norm_forward(crew, n, d, model->stream, b->normal2, b->scale2);
    if ((status = experts_forward(model, b, n, loss)) != FMOE_OK) return status;
  }
  norm_forward(crew, n, d, model->stream, model->normal, model->scale);
  linear_forward(crew, n, d, c->vocab, model->normal, model->head->value, SET, model->logits);
  return FMOE_OK;
}

fmoe_status gpt_forward(gpt *model, const int32_t *tokens, const int32_t *targets, int B, int T, gpt_loss *loss) {
  fmoe_status status = run(model, tokens, B, T, loss);
  if (status == FMOE_OK) status = keep(model, "target", -1, B * T, targets, model->targets);
  if (status != FMOE_OK) return status;
  loss->mean = cross_entropy(model->crew, B * T, model->config.vocab, model->targets, model->logits, model->losses);
  model->has_targets = 1;
  return FMOE_OK;
}

fmoe_status gpt_backward(gpt *model) {
  if (!model->has_targets) return fail(FMOE_ERROR_STAGE, "gpt_backward comes after a gpt_forward, once");
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
fmoe_status gpt_update(gpt *model, const adamw *how, double *norm) {
  for (int i = 0; i < model->config.layers; i++) TRY(fmoe_layer_reduce_gradients(model->blocks[i].experts));
  double length = gradient_norm(model->crew, model->tensors, model->tensor_count);
  adamw_step(model->crew, model->tensors, model->tensor_count, how, length, ++model->updates);
  if (norm) *norm = length;
  return FMOE_OK;
}

void gpt_zero_gradients(gpt *model) {
  for (int i = 0; i < model->tensor_count; i++)
    memset(model->tensors[i].gradient, 0, (size_t)model->tensors[i].size * sizeof(float));
}

/* ---- sampling -------------------------------------------------------------------------------- */
fmoe_status gpt_sample(gpt *model, const int32_t *tokens, int T, double temperature, uint64_t *random, int32_t *next) {
  gpt_loss unused;
  fmoe_status status = run(model, tokens, 1, T, &unused);
  if (status != FMOE_OK) return status;
  int V = model->config.vocab, likeliest = 0;
  const float *logits = model->logits + (int64_t)(T - 1) * V; /* of the last position */
  for (int j = 1; j < V; j++)
    if (logits[j] > logits[likeliest]) likeliest = j;
  *next = likeliest;
  if (temperature <= 0) return FMOE_OK;

  double sum = 0;
  for (int j = 0; j < V; j++) sum += exp((logits[j] - logits[likeliest]) / temperature);
  double mark = sum * gpt_random(random);
  for (int j = 0; j < V; j++) {
    mark -= exp((logits[j] - logits[likeliest]) / temperature);
    if (mark < 0) {
      *next = j;
      break;
    }
  }
  return FMOE_OK;
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
    double size = (double)model->tensors[i].size;
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

fmoe_status gpt_routing(const gpt *model, int layer, fmoe_routing *out) {
  out->struct_size = sizeof *out;
  TRY(fmoe_pass_routing(model->blocks[layer].pass, out));
  return FMOE_OK;
}

/* ---- memory ---------------------------------------------------------------------------------- */
static void *take(gpt *model, int64_t floats) { /* aligned to 64 bytes; NULL while `arrange` only counts */
  float *at = model->memory ? model->memory + model->taken : NULL;
  model->taken += (floats + 15) / 16 * 16;
  return at;
}

static tensor *add_tensor(gpt *model, const char *name, int layer, int64_t size) {
  tensor *added = &model->tensors[model->tensor_count++];
  *added = (tensor){.size = size, .decays = 1};
  if (layer < 0)
    snprintf(added->name, sizeof added->name, "%s", name);
  else
    snprintf(added->name, sizeof added->name, "layer %d %s", layer, name);
  added->mean = take(model, size);
  added->square = take(model, size);
  return added;
}

static tensor *add_dense(gpt *model, const char *name, int layer, int64_t size) {
  tensor *added = add_tensor(model, name, layer, size);
  added->value = take(model, size);
  added->gradient = take(model, size);
  return added;
}

static fmoe_status add_experts(gpt *model, int layer) { /* their values and gradients stay where the library has them */
  int64_t d = model->config.width, h = model->config.hidden, E = model->config.experts;
  fmoe_tensors value = {.struct_size = sizeof value}, gradient = {.struct_size = sizeof gradient};
  TRY(fmoe_layer_values(model->blocks[layer].experts, &value));
  TRY(fmoe_layer_gradients(model->blocks[layer].experts, &gradient));
  const struct {
    const char *name;
    int64_t size;
    int decays, per_expert;
    float *value, *gradient;
  } list[] = {{"gate", E * d, 1, 0, value.gate, gradient.gate}, {"w1", E * h * d, 1, 1, value.w1, gradient.w1},
              {"b1", E * h, 0, 1, value.b1, gradient.b1},       {"w2", E * d * h, 1, 1, value.w2, gradient.w2},
              {"b2", E * d, 0, 1, value.b2, gradient.b2},       {"w3", E * h * d, 1, 1, value.w3, gradient.w3}};
  for (int i = 0; i < 6; i++) {
    if (!list[i].value) continue; /* SwiGLU has no biases, the others no w3 */
    tensor *added = add_tensor(model, list[i].name, layer, list[i].size);
    added->decays = list[i].decays;
    added->per_expert = list[i].per_expert;
    added->value = list[i].value;
    added->gradient = list[i].gradient;
  }
  return FMOE_OK;
}

/* Hands out the memory.  Runs twice: without any, to learn how much it takes, and then in earnest. */
static fmoe_status arrange(gpt *model) {
  const gpt_config *c = &model->config;
  int64_t n = (int64_t)c->batch * c->context, d = c->width, V = c->vocab, shares = n * c->heads * c->context;
  model->taken = 0;
  model->tensor_count = 0;
  model->symbols = add_dense(model, "symbols", -1, V * d);
  model->places = add_dense(model, "places", -1, c->context * d);
  model->head = add_dense(model, "head", -1, V * d);
  for (int i = 0; i < c->layers; i++) {
    block *b = &model->blocks[i];
    b->triple = add_dense(model, "qkv", i, 3 * d * d);
    b->project = add_dense(model, "project", i, d * d);
    fmoe_status status = add_experts(model, i);
    if (status != FMOE_OK) return status;
    b->normal1 = take(model, n * d);
    b->normal2 = take(model, n * d);
    b->scale1 = take(model, n);
    b->scale2 = take(model, n);
    b->qkv = take(model, n * 3 * d);
    b->shares = take(model, shares);
    b->mixed = take(model, n * d);
  }
  model->tokens = take(model, n);
  model->targets = take(model, n);
  model->stream = take(model, n * d);
  model->outcome = take(model, n * d);
  model->normal = take(model, n * d);
  model->scale = take(model, n);
  model->logits = take(model, n * V);
  model->losses = take(model, n);
  model->grad_stream = take(model, n * d);
  model->grad_normal = take(model, n * d);
  model->grad_mixed = take(model, n * d);
  model->grad_qkv = take(model, n * 3 * d);
  model->grad_shares = take(model, shares);
  return FMOE_OK;
}

/* ---- create and destroy ------------------------------------------------------------------------ */
static void fill(tensor *what, double deviation, uint64_t *random) { /* normal numbers, after Box and Muller */
  for (int64_t i = 0; i < what->size; i++) {
    double radius = sqrt(-2 * log(1 - gpt_random(random))), angle = 6.283185307179586 * gpt_random(random);
    what->value[i] = (float)(deviation * radius * cos(angle));
  }
}

/* places [T, d]: pairs of columns hold cosine and sine of the position, at wavelengths from 2 pi to about 2 pi T.  To
 * look a step back is then to turn each pair by an angle: attention learns that much sooner than from random places. */
static void fill_waves(tensor *places, int T, int d) {
  for (int t = 0; t < T; t++)
    for (int j = 0; j < d; j++) {
      double angle = t / pow(T, (double)(j / 2 * 2) / d);
      places->value[(int64_t)t * d + j] = (float)(0.7 * (j % 2 ? sin(angle) : cos(angle)));
    }
}

static fmoe_status create_experts(gpt *model, int layer, uint64_t seed) {
  gpt_config *c = &model->config;
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.top_k = c->top_k;
  options.d_model = c->width;
  options.d_hidden = c->hidden;
  options.experts = c->experts;
  options.activation = c->activation;
  options.gate = c->gate;
  options.seed = seed;
  options.balance_loss = c->balance_loss;
  options.z_loss = c->z_loss;
  TRY(fmoe_layer_create(model->group, &options, &model->blocks[layer].experts));
  return FMOE_OK;
}

static fmoe_status ask_top_k(gpt *model) { /* which k the library chose: a pass without tokens tells */
  float nothing = 0;
  fmoe_routing routing = {.struct_size = sizeof routing};
  TRY(fmoe_gate(model->blocks[0].experts, &nothing, 0, &model->blocks[0].pass));
  TRY(fmoe_pass_routing(model->blocks[0].pass, &routing));
  model->config.top_k = routing.top_k;
  forget(model);
  return FMOE_OK;
}

static fmoe_status build(gpt *model) {
  gpt_config *c = &model->config;
  if (c->vocab < 1 || c->context < 1 || c->batch < 1 || c->layers < 1 || c->heads < 1 || c->width < 1)
    return fail(FMOE_ERROR_ARGUMENT, "vocab, context, batch, layers, heads and width start at 1");
  if ((int64_t)c->batch * c->context > 1 << 30)
    return fail(FMOE_ERROR_ARGUMENT, "a batch of %d times %d tokens is too large", c->batch, c->context);
  if (c->width % c->heads != 0)
    return fail(FMOE_ERROR_ARGUMENT, "%d heads do not divide a width of %d", c->heads, c->width);
  if (c->threads < 1) c->threads = (int)sysconf(_SC_NPROCESSORS_ONLN);

  /* The crew comes before the group: a thread inherits the cores of its maker, and the group may pin its own maker. */
  model->crew = team_create(c->threads);
  model->blocks = calloc((size_t)c->layers, sizeof model->blocks[0]);
  model->tensors = calloc((size_t)c->layers * 8 + 3, sizeof model->tensors[0]);
  if (!model->crew || !model->blocks || !model->tensors) return fail(FMOE_ERROR_MEMORY, "no memory or no threads");
  fmoe_group_options options = {.struct_size = sizeof options, .threads = c->threads};
  TRY(fmoe_group_create_local(1, &options, &model->group));

  uint64_t random = c->seed;
  fmoe_status status = FMOE_OK;
  for (int i = 0; i < c->layers && status == FMOE_OK; i++)
    status = create_experts(model, i, (uint64_t)(gpt_random(&random) * 9007199254740992.0));
  if (status == FMOE_OK && c->top_k == 0) status = ask_top_k(model);
  if (status == FMOE_OK) status = arrange(model);
  if (status != FMOE_OK) return status;
  void *memory;
  size_t size = (size_t)model->taken * sizeof(float);
  if (posix_memalign(&memory, 64, size) != 0) return fail(FMOE_ERROR_MEMORY, "no memory: %.0f MB", (double)size / 1e6);
  model->memory = memset(memory, 0, size);
  if ((status = arrange(model)) != FMOE_OK) return status;

  double deviation = 1 / sqrt(c->width);
  fill(model->symbols, 0.5, &random);
  fill_waves(model->places, c->context, c->width);
  fill(model->head, 0.02, &random); /* small: training starts from almost equal odds, a loss of log V */
  for (int i = 0; i < c->layers; i++) {
    fill(model->blocks[i].triple, deviation, &random);
    fill(model->blocks[i].project, deviation / sqrt(2 * c->layers), &random); /* so many terms meet in the stream */
  }
  return FMOE_OK;
}

fmoe_status gpt_create(const gpt_config *config, gpt **out) {
  gpt *model = calloc(1, sizeof *model);
  if (!model) return fail(FMOE_ERROR_MEMORY, "no memory");
  model->config = *config;
  fmoe_status status = build(model);
  if (status == FMOE_OK)
    *out = model;
  else
    gpt_destroy(model);
  return status;
}

void gpt_destroy(gpt *model) {
  if (!model) return;
  if (model->blocks) forget(model);
  for (int i = 0; model->blocks && i < model->config.layers; i++) fmoe_layer_destroy(model->blocks[i].experts);
  fmoe_group_destroy(model->group);
  team_destroy(model->crew);
  free(model->tensors);
  free(model->blocks);
  free(model->memory);
  free(model);
}
