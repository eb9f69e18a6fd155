/* gpt_create.c: a gpt from its configuration: the memory it takes, its experts, the values it begins with; and its end. */
#define _POSIX_C_SOURCE 200809L
#include "gpt_inside.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
  return added;
}

static tensor *add_dense(gpt *model, const char *name, int layer, int64_t size) { /* arrange gives it a gradient */
  tensor *added = add_tensor(model, name, layer, size);
  added->mean = take(model, size);
  added->square = take(model, size);
  added->value = take(model, size);
  return added;
}

static fmoe_status add_experts(gpt *model, int layer) { /* all they have stays where the library has it */
  int64_t d = model->config.width, h = model->config.hidden;
  fmoe_tensors value = {.struct_size = sizeof value}, gradient = {.struct_size = sizeof gradient};
  TRY(fmoe_layer_values(model->blocks[layer].experts, &value));
  TRY(fmoe_layer_gradients(model->blocks[layer].experts, &gradient));
  int64_t E = model->config.experts, mine = value.local_experts;
  const struct {
    const char *name;
    int64_t size;
    int decays, per_expert;
    float *value, *gradient;
  } list[] = {{"gate", E * d, 1, 0, value.gate, gradient.gate},  {"w1", mine * h * d, 1, 1, value.w1, gradient.w1},
              {"b1", mine * h, 0, 1, value.b1, gradient.b1},     {"w2", mine * d * h, 1, 1, value.w2, gradient.w2},
              {"b2", mine * d, 0, 1, value.b2, gradient.b2},     {"w3", mine * h * d, 1, 1, value.w3, gradient.w3}};
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
  int64_t n = (int64_t)gpt_first_of(model, c->batch, 1) * c->context, d = c->width, V = c->vocab;
  int64_t shares = n * c->heads * c->context;
  model->taken = 0;
  model->tensor_count = 0;
  model->symbols = add_dense(model, "symbols", -1, V * d);
  model->places = add_dense(model, "places", -1, c->context * d);
  model->head = add_dense(model, "head", -1, V * d);
  for (int i = 0; i < c->layers; i++) {
    model->blocks[i].triple = add_dense(model, "qkv", i, 3 * d * d);
    model->blocks[i].project = add_dense(model, "project", i, d * d);
  }
  int64_t before = model->taken;
  for (int i = 0; i < model->tensor_count; i++) model->tensors[i].gradient = take(model, model->tensors[i].size);
  model->dense_gradients = model->symbols->gradient;
  model->dense_size = model->taken - before;
  for (int i = 0; i < c->layers; i++) {
    block *b = &model->blocks[i];
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
  model->counts = take(model, (int64_t)c->layers * c->experts);
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
  options.balance_loss = c->gate == FMOE_GATE_BASE ? 0 : c->balance_loss; /* it balances by itself */
  options.z_loss = c->z_loss;
  options.bias_step = c->bias_step;
  options.input_jitter = c->input_jitter;
  options.remote_share = c->remote_share;
  TRY(fmoe_layer_create(model->peers.group, &options, &model->blocks[layer].experts));
  return FMOE_OK;
}

static fmoe_status ask_top_k(gpt *model) { /* which k the library chose: a pass without tokens tells */
  float nothing = 0;
  fmoe_routing routing = {.struct_size = sizeof routing};
  TRY(fmoe_gate(model->blocks[0].experts, &nothing, 0, &model->blocks[0].pass));
  TRY(fmoe_pass_routing(model->blocks[0].pass, &routing));
  model->config.top_k = routing.top_k;
  gpt_forget(model);
  return FMOE_OK;
}

/* All that takes no other worker.  The crew is not pinned: only the scheduler sees what else is awake, such as crews of
 * other workers; the group's threads are asleep while the crew has work. */
static fmoe_status create_alone(gpt *model) {
  gpt_config *c = &model->config;
  if (c->threads < 1) c->threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
  model->crew = team_create(c->threads);
  model->blocks = calloc((size_t)c->layers, sizeof model->blocks[0]);
  model->tensors = calloc((size_t)c->layers * 8 + 3, sizeof model->tensors[0]);
  if (!model->crew || !model->blocks || !model->tensors) return gpt_fail(FMOE_ERROR_MEMORY, "no memory or no threads");
  fmoe_group_options options = {.struct_size = sizeof options, .threads = c->threads};
  if (!c->peers) TRY(fmoe_group_create_local(1, &options, &model->peers.group));
  return FMOE_OK;
}

static fmoe_status reserve(gpt *model) {
  fmoe_status status = arrange(model);
  if (status != FMOE_OK) return status;
  void *memory;
  size_t size = (size_t)model->taken * sizeof(float);
  if (posix_memalign(&memory, 64, size) != 0) return gpt_fail(FMOE_ERROR_MEMORY, "no memory: %.0f MB", (double)size / 1e6);
  model->memory = memset(memory, 0, size);
  return arrange(model);
}

static fmoe_status build(gpt *model) {
  gpt_config *c = &model->config;
  if (c->vocab < 1 || c->context < 1 || c->batch < 1 || c->layers < 1 || c->heads < 1 || c->width < 1)
    return gpt_fail(FMOE_ERROR_ARGUMENT, "vocab, context, batch, layers, heads and width start at 1");
  if ((int64_t)c->batch * c->context > 1 << 30)
    return gpt_fail(FMOE_ERROR_ARGUMENT, "a batch of %d times %d tokens is too large", c->batch, c->context);
  if (c->width % c->heads != 0)
    return gpt_fail(FMOE_ERROR_ARGUMENT, "%d heads do not divide a width of %d", c->heads, c->width);

  fmoe_status status = gpt_agree(model, create_alone(model));
  uint64_t random = c->seed;
  for (int i = 0; i < c->layers && status == FMOE_OK; i++)
    status = create_experts(model, i, (uint64_t)(gpt_random(&random) * 9007199254740992.0));
  if (status == FMOE_OK && c->top_k == 0) status = ask_top_k(model);
  if (status == FMOE_OK) status = gpt_agree(model, reserve(model));
  if (status != FMOE_OK) return status;

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
  if (!model) return gpt_fail(FMOE_ERROR_MEMORY, "no memory");
  model->config = *config;
  model->peers = config->peers ? *config->peers : (peers){.size = 1};
  fmoe_status status = build(model);
  if (status == FMOE_OK)
    *out = model;
  else
    gpt_destroy(model);
  return status;
}

void gpt_destroy(gpt *model) {
  if (!model) return;
  if (model->blocks) gpt_forget(model);
  for (int i = 0; model->blocks && i < model->config.layers; i++) fmoe_layer_destroy(model->blocks[i].experts);
  if (!model->config.peers) fmoe_group_destroy(model->peers.group);
  team_destroy(model->crew);
  free(model->tensors);
  free(model->blocks);
  free(model->memory);
  free(model);
}
