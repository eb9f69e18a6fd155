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
#include <time.h>
#include <unistd.h>

#include "layers.h"

typedef struct block {          /* attention, then experts, each behind a norm and beside a residual */
  fmoe_layer *experts;
  fmoe_pass *pass;              /* of the latest forward, until its backward; else NULL */
  gpt_plan plan;                /* if the model is calibrated */
  const int32_t *choices;       /* [n, k] of all workers, for the next forward; NULL: the gate chooses */
  const float *weights;
  tensor *triple, *project; /* [3d, d] for queries, keys and values   [d, d] */
  float *normal1, *normal2;     /* [n, d] what attention and experts read */
  float *scale1, *scale2;       /* [n] */
  float *qkv;                   /* [n, 3d] */
  float *shares;                /* [B, H, T, T] */
  float *mixed;                 /* [n, d] */
} block;

struct gpt {
  gpt_config config;
  peers peers; /* alone: of size 1, with a group of its own */
  team *crew;
  block *blocks;
  tensor *tensors;
  int tensor_count;
  tensor *symbols, *places, *head; /* [V, d]  [T, d]  [V, d] */

  int first, B, T; /* of the latest forward: this worker computes B of its sequences, from the first on */
  int has_targets; /* gpt_backward may follow */
  int updates;     /* steps of AdamW so far */
  int predicts;    /* passes are planned by prediction */

  float *memory; /* dense parameters, AdamW's averages, activations: one allocation */
  int64_t taken; /* floats of it handed out */
  float *dense_gradients; /* [dense_size] those of all dense tensors, side by side */
  int64_t dense_size;
  float *counts;                                                      /* [layers, E] tokens of the latest forward */
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

/* ---- workers --------------------------------------------------------------------------------- */
static int sum(const gpt *model, float *values, int64_t count) { /* 0, or not if a worker is lost */
  return model->peers.size > 1 ? model->peers.sum(model->peers.context, values, count) : 0;
}

fmoe_status gpt_sum(const gpt *model, float *values, int64_t count) {
  return sum(model, values, count) == 0 ? FMOE_OK : fail(FMOE_ERROR_PEER, "another worker is lost");
}

/* What a worker does alone may fail alone: after this, all go on or none. */
static fmoe_status agree(const gpt *model, fmoe_status status) {
  float failed = status != FMOE_OK;
  if (sum(model, &failed, 1) != 0) failed = 1;
  return status == FMOE_OK && failed > 0 ? fail(FMOE_ERROR_PEER, "another worker failed") : status;
}

static int first_of(const gpt *model, int B, int rank) { /* the sequences of B that are this rank's begin here */
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
static void forget(gpt *model) { /* the latest forward */
  for (int i = 0; i < model->config.layers; i++) {
    fmoe_pass_destroy(model->blocks[i].pass);
    model->blocks[i].pass = NULL;
  }
  model->has_targets = 0;
}

static fmoe_status check(const char *what, int least, int most, int n, const int32_t *symbols) {
  for (int i = 0; i < n; i++)
    if (symbols[i] < least || symbols[i] > most)
      return fail(FMOE_ERROR_ARGUMENT, "%s %d is %d, not in %d..%d", what, i, (int)symbols[i], least, most);
  return FMOE_OK;
}

/* Forward as far as the logits, with this worker's part of the sequences, which may be none. */
static fmoe_status run(gpt *model, const int32_t *tokens, int B, int T, gpt_loss *loss) {
  const gpt_config *c = &model->config;
  team *crew = model->crew;
  forget(model);
  if (B < 1 || B > c->batch || T < 1 || T > c->context)
    return fail(FMOE_ERROR_ARGUMENT, "%d sequences of %d tokens, but the model was made for 1..%d of 1..%d", B, T,
                c->batch, c->context);
  fmoe_status status = check("token", 0, c->vocab - 1, B * T, tokens);
  if (status != FMOE_OK) return status;
  model->first = first_of(model, B, model->peers.rank);
  model->B = B = first_of(model, B, model->peers.rank + 1) - model->first;
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
    if ((status = fmoe_layer_adamw(model->blocks[i].experts, &experts_too)) != FMOE_OK) fail(status, "%s", fmoe_last_error());
  if (model->updates == 1) status = agree(model, status);
  if (status != FMOE_OK) return status;
  if (norm) *norm = length;
  return FMOE_OK;
}

void gpt_zero_gradients(gpt *model) {
  for (int i = 0; i < model->tensor_count; i++)
    memset(model->tensors[i].gradient, 0, (size_t)model->tensors[i].size * sizeof(float));
}

/* ---- files ------------------------------------------------------------------------------------- */
/* A dense tensor's three arrays follow each other, in the order of gpt_tensors, behind this. */
typedef struct dense_head {
  char format[16]; /* "train_gpt 1" */
  int64_t floats;  /* behind it */
  int64_t step, updates;
  uint64_t random;
} dense_head;

static const char FORMAT[16] = "train_gpt 1";

static void name_file(char *path, const char *folder, const char *what, int step) {
  snprintf(path, FILENAME_MAX, "%s/step%d.%s", folder, step, what);
}

static int64_t dense_floats(const gpt *model) {
  int64_t floats = 0;
  for (int i = 0; i < model->tensor_count; i++) floats += model->tensors[i].mean ? 3 * model->tensors[i].size : 0;
  return floats;
}

/* Writes a file as a whole or not at all. */
static fmoe_status write_file(const char *path, const gpt *model, const void *head, size_t size) {
  char draft[FILENAME_MAX + 8];
  snprintf(draft, sizeof draft, "%s.draft", path);
  FILE *file = fopen(draft, "wb");
  int good = file && fwrite(head, size, 1, file) == 1;
  for (int i = 0; model && good && i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++) good = good && fwrite(parts[p], sizeof(float), (size_t)t->size, file) == (size_t)t->size;
  }
  good = good && fflush(file) == 0 && fsync(fileno(file)) == 0;
  if (file) good = fclose(file) == 0 && good;
  if (good && rename(draft, path) == 0) return FMOE_OK;
  remove(draft);
  return fail(FMOE_ERROR_FILE, "%s cannot be written", path);
}

static int latest_in(const char *folder) { /* the step that counts, or -1 */
  char path[FILENAME_MAX];
  int step = -1;
  snprintf(path, sizeof path, "%s/latest", folder);
  FILE *file = fopen(path, "r");
  if (file && fscanf(file, "%d", &step) != 1) step = -1;
  if (file) fclose(file);
  return step;
}

static void layer_name(char *name, int layer) { snprintf(name, 40, "layer%d.safetensors", layer); }

fmoe_status gpt_save(gpt *model, const char *folder, gpt_place place) {
  char path[FILENAME_MAX], name[40];
  int before = latest_in(folder);
  for (int i = 0; i < model->config.layers; i++) {
    layer_name(name, i), name_file(path, folder, name, place.step);
    TRY(fmoe_layer_save(model->blocks[i].experts, path));
  }
  fmoe_status status = FMOE_OK;
  if (model->peers.rank == 0) {
    dense_head head = {.floats = dense_floats(model), .step = place.step, .updates = model->updates, .random = place.random};
    memcpy(head.format, FORMAT, sizeof FORMAT);
    name_file(path, folder, "dense", place.step);
    status = write_file(path, model, &head, sizeof head);
    char latest[24];
    int length = snprintf(latest, sizeof latest, "%d\n", place.step);
    snprintf(path, sizeof path, "%s/latest", folder);
    if (status == FMOE_OK) status = write_file(path, NULL, latest, (size_t)length);
    for (int i = -1; status == FMOE_OK && before >= 0 && before != place.step && i < model->config.layers; i++) {
      if (i < 0) snprintf(name, sizeof name, "dense");
      else layer_name(name, i);
      name_file(path, folder, name, before);
      remove(path);
    }
  }
  return agree(model, status);
}

/* Worker 0 alone. */
static fmoe_status read_dense(gpt *model, const char *folder, int step, dense_head *head) {
  char path[FILENAME_MAX];
  name_file(path, folder, "dense", step);
  FILE *file = step < 0 ? NULL : fopen(path, "rb");
  if (!file) return fail(FMOE_ERROR_FILE, "%s holds no training", folder);
  int good = fread(head, sizeof *head, 1, file) == 1 && memcmp(head->format, FORMAT, sizeof FORMAT) == 0 &&
             head->floats == dense_floats(model);
  for (int i = 0; good && i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++) good = good && fread(parts[p], sizeof(float), (size_t)t->size, file) == (size_t)t->size;
  }
  good = good && fgetc(file) == EOF;
  fclose(file);
  return good ? FMOE_OK : fail(FMOE_ERROR_FILE, "%s is not of a model of this kind", path);
}

fmoe_status gpt_load(gpt *model, const char *folder, gpt_place *place) {
  dense_head head = {.step = 0};
  float numbers[6] = {0}; /* step, updates, and four times 16 bits: worker 0's for all, as the sum with zeros */
  fmoe_status status = FMOE_OK;
  if (model->peers.rank == 0) {
    status = read_dense(model, folder, latest_in(folder), &head);
    numbers[0] = (float)head.step, numbers[1] = (float)head.updates;
    for (int i = 0; i < 4; i++) numbers[2 + i] = (float)(head.random >> 16 * i & 0xffff);
  } else {
    for (int i = 0; i < model->tensor_count; i++) {
      const tensor *t = &model->tensors[i];
      float *parts[] = {t->value, t->mean, t->square};
      for (int p = 0; t->mean && p < 3; p++) memset(parts[p], 0, (size_t)t->size * sizeof(float));
    }
  }
  if ((status = agree(model, status)) != FMOE_OK || (status = gpt_sum(model, numbers, 6)) != FMOE_OK) return status;
  for (int i = 0; i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++)
      if ((status = gpt_sum(model, parts[p], t->size)) != FMOE_OK) return status;
  }
  *place = (gpt_place){.step = (int)numbers[0]};
  model->updates = (int)numbers[1];
  for (int i = 0; i < 4; i++) place->random |= (uint64_t)numbers[2 + i] << 16 * i;
  for (int i = 0; i < model->config.layers; i++) {
    char path[FILENAME_MAX], name[40];
    layer_name(name, i), name_file(path, folder, name, place->step);
    TRY(fmoe_layer_load(model->blocks[i].experts, path));
  }
  return FMOE_OK;
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
  fmoe_status status = run(model, tokens, 1, T, &unused);
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
  int64_t n = (int64_t)first_of(model, c->batch, 1) * c->context, d = c->width, V = c->vocab;
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
  forget(model);
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
  if (!model->crew || !model->blocks || !model->tensors) return fail(FMOE_ERROR_MEMORY, "no memory or no threads");
  fmoe_group_options options = {.struct_size = sizeof options, .threads = c->threads};
  if (!c->peers) TRY(fmoe_group_create_local(1, &options, &model->peers.group));
  return FMOE_OK;
}

static fmoe_status reserve(gpt *model) {
  fmoe_status status = arrange(model);
  if (status != FMOE_OK) return status;
  void *memory;
  size_t size = (size_t)model->taken * sizeof(float);
  if (posix_memalign(&memory, 64, size) != 0) return fail(FMOE_ERROR_MEMORY, "no memory: %.0f MB", (double)size / 1e6);
  model->memory = memset(memory, 0, size);
  return arrange(model);
}

static fmoe_status build(gpt *model) {
  gpt_config *c = &model->config;
  if (c->vocab < 1 || c->context < 1 || c->batch < 1 || c->layers < 1 || c->heads < 1 || c->width < 1)
    return fail(FMOE_ERROR_ARGUMENT, "vocab, context, batch, layers, heads and width start at 1");
  if ((int64_t)c->batch * c->context > 1 << 30)
    return fail(FMOE_ERROR_ARGUMENT, "a batch of %d times %d tokens is too large", c->batch, c->context);
  if (c->width % c->heads != 0)
    return fail(FMOE_ERROR_ARGUMENT, "%d heads do not divide a width of %d", c->heads, c->width);

  fmoe_status status = agree(model, create_alone(model));
  uint64_t random = c->seed;
  for (int i = 0; i < c->layers && status == FMOE_OK; i++)
    status = create_experts(model, i, (uint64_t)(gpt_random(&random) * 9007199254740992.0));
  if (status == FMOE_OK && c->top_k == 0) status = ask_top_k(model);
  if (status == FMOE_OK) status = agree(model, reserve(model));
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
  if (!model) return fail(FMOE_ERROR_MEMORY, "no memory");
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
  if (model->blocks) forget(model);
  for (int i = 0; model->blocks && i < model->config.layers; i++) fmoe_layer_destroy(model->blocks[i].experts);
  if (!model->config.peers) fmoe_group_destroy(model->peers.group);
  team_destroy(model->crew);
  free(model->tensors);
  free(model->blocks);
  free(model->memory);
  free(model);
}
