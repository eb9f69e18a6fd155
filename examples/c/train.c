/* train.c: trains a GPT with mixture-of-experts layers on plain text and lets it write.
 *
 * All workers take the same steps with the same numbers; gpt.h shares the work out.  What one of them alone knows, the
 * time and whether it was interrupted, decides nothing before all have heard of it. */
#define _POSIX_C_SOURCE 200809L
#include "train.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "diary.h"
#include "flags.h"
#include "gpt.h"
#include "routing.h"
#include "text.h"

/* ---- signals ------------------------------------------------------------------------------------- */
static volatile sig_atomic_t interrupted;

static void interrupt(int signal) {
  (void)signal;
  interrupted = 1;
}

static void listen(void) { /* the first signal asks, the second ends the program as if nobody listened */
  struct sigaction action = {.sa_handler = interrupt, .sa_flags = (int)SA_RESETHAND};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}

/* ---- training -------------------------------------------------------------------------------------- */
#define TRY(call)                                     \
  do {                                                \
    fmoe_status status_ = (call);                     \
    if (status_ != FMOE_OK) return status_;           \
  } while (0)

static text learnt; /* by all workers of this process */

/* What one worker's training needs, and how far it is. */
typedef struct training {
  const peers *peers;
  gpt *model;
  int32_t *tokens, *targets; /* [B, T] */
  int32_t *line;             /* the prompt, and room for the sample behind it */
  int prompt;                /* characters of the prompt */
  int speaks;                /* rank 0 does */
  diary diary;               /* rank 0's */
  routing_file record, replay; /* rank 0's */
  float *routing;              /* of the replayed step: 1 if it failed, then for each layer choices and weights [n, k] of all */
  int32_t *choices;            /* [layers, n, k] */
  int end;                     /* the replayed step behind the last */
  uint64_t random;
  double start;
  int step;
  float spent;     /* of --seconds, 0 to 1, or 2 and more: somebody was interrupted; all workers agree */
  double held_out; /* the latest held-out loss; NAN before the first */
  const char *why; /* it failed; NULL: gpt_last_error() knows */
} training;

static void draw_batch(training *t) { /* B places in the training text */
  int64_t T = flags.context, places = learnt.train_size - T;
  for (int b = 0; b < flags.batch; b++) {
    const int32_t *from = learnt.train + (int64_t)(gpt_random(&t->random) * (double)places);
    memcpy(t->tokens + b * T, from, (size_t)T * sizeof from[0]);
    memcpy(t->targets + b * T, from + 1, (size_t)T * sizeof from[0]);
  }
}

/* The mean loss over the held-out text, in windows of T characters that overlap by half: but for the beginning, every
 * character is guessed once, from T/2 or more before it. */
static fmoe_status evaluate(training *t) {
  int64_t size = learnt.held_out_size - 1, T = flags.context < size ? flags.context : size, done = 0;
  double sum = 0;
  TRY(gpt_set_training(t->model, 0));
  while (done < size) {
    int64_t before = done;
    int B = 0;
    for (; B < flags.batch && done < size; B++) {
      int64_t first = done == 0 ? 0 : done - T / 2;
      if (first > size - T) first = size - T;
      memcpy(t->tokens + B * T, learnt.held_out + first, (size_t)T * sizeof t->tokens[0]);
      for (int64_t i = 0; i < T; i++) t->targets[B * T + i] = first + i < done ? -1 : learnt.held_out[first + i + 1];
      done = first + T;
    }
    gpt_loss loss;
    TRY(gpt_forward(t->model, t->tokens, t->targets, B, (int)T, &loss));
    sum += loss.mean * (double)(done - before);
  }
  t->held_out = sum / (double)size;
  return gpt_set_training(t->model, 1);
}

/* Workers on several hosts could have read several texts. */
static fmoe_status compare_texts(training *t) {
  uint32_t hash = 0;
  for (int64_t i = 0; i < learnt.train_size; i++) hash = hash * 31 + (uint32_t)learnt.train[i];
  for (int64_t i = 0; i < learnt.held_out_size; i++) hash = hash * 31 + (uint32_t)learnt.held_out[i];
  float mine = (float)(hash >> 20), all = mine; /* 12 bits: sums are exact */
  TRY(gpt_sum(t->model, &all, 1));
  if (all == mine * (float)t->peers->size) return FMOE_OK;
  t->why = "the workers have read different texts";
  return FMOE_ERROR_DISAGREE;
}

/* Rank 0 has the clock, anybody may have been interrupted. */
static fmoe_status agree_on_time(training *t) {
  t->spent = t->speaks && flags.seconds > 0 ? (float)fmin((now() - t->start) / flags.seconds, 1) : 0;
  if (interrupted) t->spent = 2;
  return gpt_sum(t->model, &t->spent, 1);
}

static double progress(const training *t) { /* 0 to 1 */
  double steps = flags.steps > 0 ? (double)t->step / flags.steps : 0;
  return steps > t->spent ? steps : t->spent;
}

static double learning_rate(int step, double progress) {
  double warm = step < flags.warmup ? (step + 1.0) / flags.warmup : 1;
  return flags.rate * warm * (0.05 + 0.95 * 0.5 * (1 + cos(3.141592653589793 * progress)));
}

static const double DECAY = 1; /* strong: a short text is read a dozen times, and is not to be known by heart */

/* ---- routing to a file and back: rank 0 has the file, the others hear of it by sums with zeros ---------------------- */
static int64_t slots(const training *t) { return (int64_t)flags.batch * flags.context * gpt_top_k(t->model); }

static fmoe_status say(training *t, routing_file *of) {
  t->why = of->error;
  return FMOE_ERROR_FILE;
}

static fmoe_status open_routing(training *t) {
  if (!flags.record && !flags.replay) return FMOE_OK;
  const routing_shape shape = {flags.layers, flags.experts, gpt_top_k(t->model), flags.batch * flags.context};
  float told[2] = {0, 0}; /* rank 0's steps, and whether it failed */
  if (t->speaks && flags.record) told[1] = routing_create(&t->record, flags.record, shape) != 0;
  if (t->speaks && flags.replay) {
    told[1] = routing_open(&t->replay, flags.replay) != 0;
    const routing_shape *its = &t->replay.shape;
    if (!told[1] && memcmp(its, &shape, sizeof shape) != 0) {
      snprintf(t->replay.error, ROUTING_ERROR, "%s is of %d layers, %d experts, top-k %d and %d characters a step, not of %d, %d, %d and %d",
               flags.replay, its->layers, its->experts, its->top_k, its->tokens, shape.layers, shape.experts,
               shape.top_k, shape.tokens);
      told[1] = 1;
    }
    told[0] = (float)(t->replay.steps < 1000000 ? t->replay.steps : 1000000);
  }
  const int mine = told[1] != 0;
  TRY(gpt_sum(t->model, told, 2));
  if (mine) return say(t, flags.replay ? &t->replay : &t->record);
  if (told[1] != 0) return t->why = "worker 0 has no routing", FMOE_ERROR_PEER;
  t->end = (int)told[0];
  if (flags.replay && t->step >= t->end) return t->why = "the recorded routing ends before this step", FMOE_ERROR_FILE;
  if (t->speaks && flags.replay && routing_seek(&t->replay, t->step) != 0) return say(t, &t->replay);
  t->routing = malloc((size_t)(1 + 2 * flags.layers * slots(t)) * sizeof t->routing[0]);
  t->choices = malloc((size_t)(flags.layers * slots(t)) * sizeof t->choices[0]);
  if (!t->routing || !t->choices) return t->why = "no memory for the routing of a step", FMOE_ERROR_MEMORY;
  return FMOE_OK;
}

/* The next step goes as the file says. */
static fmoe_status replay(training *t) {
  const int64_t each = slots(t);
  int failed = 0;
  memset(t->routing, 0, (size_t)(1 + 2 * flags.layers * each) * sizeof t->routing[0]);
  for (int layer = 0; t->speaks && layer < flags.layers && !failed; layer++) {
    float *choices = t->routing + 1 + 2 * layer * each;
    failed = routing_read(&t->replay, t->choices, choices + each) != 0;
    for (int64_t slot = 0; slot < each; slot++) choices[slot] = (float)t->choices[slot]; /* exact: a million at most */
  }
  t->routing[0] = (float)failed;
  TRY(gpt_sum(t->model, t->routing, 1 + 2 * flags.layers * each));
  if (failed) return say(t, &t->replay);
  if (t->routing[0] != 0) return t->why = "worker 0 has no routing", FMOE_ERROR_PEER;
  for (int layer = 0; layer < flags.layers; layer++) {
    const float *choices = t->routing + 1 + 2 * layer * each;
    for (int64_t slot = 0; slot < each; slot++) t->choices[layer * each + slot] = (int32_t)choices[slot];
    gpt_route(t->model, layer, t->choices + layer * each, choices + each);
  }
  return FMOE_OK;
}

/* What the latest forward did. */
static fmoe_status record(training *t) {
  const int64_t each = slots(t), first = each / t->peers->size * t->peers->rank;
  int failed = 0;
  for (int layer = 0; layer < flags.layers; layer++) {
    fmoe_routing routing;
    TRY(gpt_routing(t->model, layer, &routing));
    float *choices = t->routing + 1, *weights = choices + each;
    memset(choices, 0, (size_t)(2 * each) * sizeof choices[0]);
    for (int64_t slot = 0; slot < routing.tokens * routing.top_k; slot++)
      choices[first + slot] = (float)routing.choices[slot], weights[first + slot] = routing.weights[slot];
    TRY(gpt_sum(t->model, choices, 2 * each));
    for (int64_t slot = 0; slot < each; slot++) t->choices[slot] = (int32_t)choices[slot];
    if (t->speaks && !failed) failed = routing_write(&t->record, t->choices, weights) != 0;
  }
  t->routing[0] = (float)failed;
  TRY(gpt_sum(t->model, t->routing, 1));
  if (failed) return say(t, &t->record);
  return t->routing[0] != 0 ? (t->why = "worker 0 cannot record", FMOE_ERROR_PEER) : FMOE_OK;
}

static fmoe_status learn(training *t) {
  t->start = now();
  diary_start(&t->diary, t->model, t->peers->size, t->start);
  for (int last = 0; !last;) {
    gpt_loss loss;
    adamw how = {.beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .decay = DECAY, .clip = 1};
    how.rate = learning_rate(t->step, progress(t));
    draw_batch(t);
    if (flags.replay) TRY(replay(t));
    TRY(gpt_forward(t->model, t->tokens, t->targets, flags.batch, flags.context, &loss));
    if (flags.record) TRY(record(t));
    TRY(gpt_backward(t->model));
    diary_plans(&t->diary, t->model, t->step + 1);
    TRY(gpt_update(t->model, &how, NULL));
    t->step++;

    TRY(agree_on_time(t));
    last = progress(t) >= 1 || t->step == flags.until || t->step == t->end;
    int looks = last || (flags.eval_every > 0 && t->step % flags.eval_every == 0);
    double time = now(); /* of a step, without looking at the held-out text */
    int evaluates = looks && !flags.replay;
    if (evaluates) TRY(evaluate(t));
    if (t->speaks) diary_step(&t->diary, t->step, time, &loss, t->held_out, looks, evaluates);
    if (looks && flags.save) TRY(gpt_save(t->model, flags.save, (gpt_place){t->step, t->random}));
  }
  return FMOE_OK;
}

/* ---- before and after -------------------------------------------------------------------------------- */
static fmoe_status write_sample(training *t) {
  int length = t->prompt;
  if (t->speaks) printf("\n--- the prompt, and after the bar what the model makes of it ---\n");
  for (int i = 0; t->speaks && i < length; i++) putchar(learnt.byte_of[t->line[i]]);
  if (t->speaks) putchar('|');
  for (int i = 0; i < flags.sample; i++, length++) {
    int seen = length < flags.context ? length : flags.context;
    TRY(gpt_sample(t->model, t->line + length - seen, seen, flags.temperature, &t->random, &t->line[length]));
    if (!t->speaks) continue;
    putchar(learnt.byte_of[t->line[length]]);
    fflush(stdout);
  }
  if (t->speaks) printf("\n---\n");
  return FMOE_OK;
}

static fmoe_status run(training *t, int threads) {
  gpt_config config = {.vocab = learnt.vocab, .context = flags.context, .batch = flags.batch, .layers = flags.layers,
                       .heads = flags.heads, .width = flags.width, .hidden = flags.hidden, .experts = flags.experts,
                       .top_k = flags.top_k, .gate = flags.gate, .activation = flags.activation,
                       .balance_loss = flags.balance_loss, .z_loss = flags.z_loss, .bias_step = flags.bias_step,
                       .input_jitter = flags.input_jitter, .remote_share = flags.remote_share, .seed = flags.seed,
                       .threads = threads, .peers = t->peers};
  TRY(gpt_create(&config, &t->model));
  TRY(compare_texts(t));
  if (flags.resume) {
    gpt_place place;
    TRY(gpt_load(t->model, flags.resume, &place));
    t->step = place.step, t->random = place.random;
  }
  TRY(open_routing(t));
  if (flags.plan_log) TRY(gpt_calibrate(t->model, 1));
  if (t->speaks) diary_introduce(t->model, &learnt);
  if (t->speaks && t->step > 0) printf("resumed after step %d\n", t->step);
  TRY(learn(t));
  if (t->speaks && routing_close(&t->record) != 0) return say(t, &t->record);
  if (flags.replay) {
    if (t->speaks) printf("\nreplayed up to step %d in %.0f s\n", t->step, now() - t->start);
    return FMOE_OK;
  }
  if (t->speaks)
    printf("\n%s after %d steps and %.0f s: held-out loss %.3f nats per character; frequencies alone give %.3f\n",
           t->spent >= 2 ? "interrupted" : "done", t->step, now() - t->start, t->held_out,
           text_unigram_entropy(&learnt));
  return flags.sample > 0 ? write_sample(t) : FMOE_OK;
}

/* Memory, prompt and diary. */
static fmoe_status prepare(training *t, char *error) {
  size_t batch = (size_t)flags.batch * (size_t)flags.context * sizeof(int32_t);
  enum { BEGINNING = 64 }; /* so much of the held-out text is the prompt, if there is no other */
  t->prompt = flags.prompt ? (int)strlen(flags.prompt) : BEGINNING;
  if (!flags.prompt && t->prompt > learnt.held_out_size) t->prompt = (int)learnt.held_out_size;
  t->tokens = malloc(batch);
  t->targets = malloc(batch);
  t->line = malloc(((size_t)t->prompt + (size_t)flags.sample) * sizeof t->line[0]);
  if (!t->tokens || !t->targets || !t->line)
    return refuse(FMOE_ERROR_MEMORY, error, "no memory for %d times %d characters", flags.batch, flags.context);
  for (int i = 0; i < t->prompt; i++)
    t->line[i] = flags.prompt ? learnt.symbol_of[(unsigned char)flags.prompt[i]] : learnt.held_out[i];
  while (!flags.prompt && t->prompt > 1 && learnt.byte_of[t->line[t->prompt - 1]] != ' ') t->prompt--; /* whole words */
  if (t->speaks && flags.save && mkdir(flags.save, 0777) != 0 && errno != EEXIST)
    return refuse(FMOE_ERROR_FILE, error, "%s cannot be made", flags.save);
  return t->speaks ? diary_open(&t->diary, error) : FMOE_OK;
}

fmoe_status train(const peers *with, int threads, char *error) {
  training t = {.peers = with, .speaks = with->rank == 0, .random = flags.seed, .held_out = NAN};
  fmoe_status status = prepare(&t, error);
  if (status == FMOE_OK && (status = run(&t, threads)) != FMOE_OK)
    refuse(status, error, "%s", t.why ? t.why : gpt_last_error());
  routing_close(&t.record), routing_close(&t.replay);
  free(t.routing), free(t.choices);
  diary_close(&t.diary);
  gpt_destroy(t.model);
  free(t.line);
  free(t.targets);
  free(t.tokens);
  return status;
}

/* ---- the process ------------------------------------------------------------------------------------- */
static const char *const FOLDER = "/usr/share/common-licenses";

/* Returns -1, or what main shall return, with the reason in error. */
static int read_text(char *error) {
  char **paths = flags.text;
  int count = flags.texts;
  if (!paths && text_list(FOLDER, &paths, &count, error, TRAIN_ERROR) != 0) return 1;
  int read = text_read(&learnt, paths, count, error, TRAIN_ERROR);
  if (!flags.text) text_free_paths(paths, count);
  if (read != 0) return 1;
  if (learnt.train_size <= flags.context || learnt.held_out_size < 2)
    return refuse(1, error, "%lld characters to learn are too few for a context of %d", (long long)learnt.train_size,
                  flags.context);
  for (int i = 0; flags.prompt && flags.prompt[i]; i++)
    if (learnt.symbol_of[(unsigned char)flags.prompt[i]] < 0)
      return refuse(1, error, "byte %d of the prompt occurs nowhere in the text", i);
  return -1;
}

int train_prepare(int count, char **arguments, int *workers, int *threads, char *error) {
  int launched = *workers;
  if (launched > 0) flags.workers = launched;
  int code = flags_read(count, arguments, error);
  if (code < 0 && launched > 0 && flags.workers != launched)
    code = refuse(2, error, "--workers %d, but %d processes were started", flags.workers, launched);
  if (code < 0) code = read_text(error);
  *workers = flags.workers;
  *threads = flags.threads;
  listen();
  return code;
}

void train_excuse(int code, const char *error) {
  if (code != 0)
    fprintf(stderr, "train_gpt: %s%s\n", error, code == 2 ? " (--help lists the flags)" : "");
  else
    flags_explain();
}

const char *train_topology(void) { return flags.topology; }

void train_end(void) { text_free(&learnt); }
