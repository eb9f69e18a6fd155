/* train_gpt.c: trains a GPT with mixture-of-experts layers on plain text and lets it write.
 *
 *   train_gpt                                    about two minutes on the licence texts of this computer
 *   train_gpt --text a.txt b.txt --steps 5000    on your own; train_gpt --help tells the rest
 *
 * With --steps, the same command prints the same losses bit for bit; with --seconds, the clock has a say. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "gpt.h"
#include "text.h"

/* ---- flags ------------------------------------------------------------------------------------- */
static const char *const GATES[] = {"topk", "noisy", "switch", "gshard", "base", "topology", "hierarchical", NULL};
static const char *const ACTIVATIONS[] = {"gelu", "gelu-tanh", "relu", "silu", "swiglu", NULL};
static const char *const FOLDER = "/usr/share/common-licenses";

static struct {
  char **text;
  int texts;
  int steps, batch, context, layers, heads, width, hidden, experts, top_k, gate, activation;
  int warmup, threads, eval_every, sample;
  double seconds, balance_loss, z_loss, rate, temperature;
  uint64_t seed;
  char *prompt, *log;
} flags = {.batch = 8, .context = 128, .layers = 3, .heads = 4, .width = 128, .hidden = 256, .experts = 8,
           .warmup = 30, .eval_every = 250, .sample = 400, .balance_loss = 0.01, .z_loss = 0.001,
           .rate = 0.003, .temperature = 0.8, .seed = 1};

enum kind { TEXTS, WHOLE, NUMBER, SEED, WORDS, GATE, ACTIVATION };
static const struct flag {
  const char *name;
  enum kind kind;
  void *value;
  double least; /* of a WHOLE or NUMBER */
  const char *help;
} LIST[] = {
    {"text", TEXTS, &flags.text, 0, "FILE...     what to learn; default: the files in /usr/share/common-licenses"},
    {"steps", WHOLE, &flags.steps, 0, "N          stop after N steps, a million at most; 0: no limit"},
    {"seconds", NUMBER, &flags.seconds, 0, "S        stop after S seconds; 0: no limit, or 140 if --steps is 0 too"},
    {"batch", WHOLE, &flags.batch, 1, "N          sequences in a step"},
    {"context", WHOLE, &flags.context, 1, "N        characters in a sequence"},
    {"layers", WHOLE, &flags.layers, 1, "N         blocks of attention and experts"},
    {"heads", WHOLE, &flags.heads, 1, "N          of the attention; they divide the width"},
    {"width", WHOLE, &flags.width, 1, "N          of the model"},
    {"hidden", WHOLE, &flags.hidden, 1, "N         hidden width of an expert"},
    {"experts", WHOLE, &flags.experts, 1, "N        in each layer"},
    {"top-k", WHOLE, &flags.top_k, 0, "N          experts for each character; 0: what the gate is known for"},
    {"gate", GATE, &flags.gate, 0, "NAME        topk noisy switch gshard base topology hierarchical"},
    {"activation", ACTIVATION, &flags.activation, 0, "NAME  gelu gelu-tanh relu silu swiglu"},
    {"balance-loss", NUMBER, &flags.balance_loss, 0, "X   coefficient of the experts' load-balancing loss"},
    {"z-loss", NUMBER, &flags.z_loss, 0, "X         coefficient of the gate's z-loss"},
    {"learning-rate", NUMBER, &flags.rate, 0, "X  its highest; it falls to a twentieth along half a cosine"},
    {"warmup", WHOLE, &flags.warmup, 0, "N         steps in which it rises from zero"},
    {"seed", SEED, &flags.seed, 0, "N           of initial weights, batches and the sample"},
    {"threads", WHOLE, &flags.threads, 0, "N        0: one per core"},
    {"eval-every", WHOLE, &flags.eval_every, 0, "N     steps between looks at the held-out text; 0: only at the end"},
    {"sample", WHOLE, &flags.sample, 0, "N         characters to write at the end"},
    {"prompt", WORDS, &flags.prompt, 0, "TEXT      to continue; default: the beginning of the held-out text"},
    {"temperature", NUMBER, &flags.temperature, 0, "X    of the writing; 0: always the likeliest character"},
    {"save-log", WORDS, &flags.log, 0, "FILE.csv  where the curve goes, see below"},
};
enum { FLAGS = sizeof LIST / sizeof LIST[0] };

static void help(void) {
  printf("Trains a GPT with mixture-of-experts layers on text, character by character.\n\n");
  for (int i = 0; i < FLAGS; i++) {
    printf("  --%s %s", LIST[i].name, LIST[i].help);
    if (LIST[i].kind == WHOLE) printf(" [%d]", *(int *)LIST[i].value);
    if (LIST[i].kind == NUMBER) printf(" [%g]", *(double *)LIST[i].value);
    if (LIST[i].kind == SEED) printf(" [%llu]", (unsigned long long)flags.seed);
    if (LIST[i].kind == GATE) printf(" [%s]", GATES[flags.gate]);
    if (LIST[i].kind == ACTIVATION) printf(" [%s]", ACTIVATIONS[flags.activation]);
    printf("\n");
  }
  printf("\nHeld out is the last tenth of every file; see text.h for what is done about quotations.  Ctrl-C ends\n"
         "training early and cleanly.  The log has the columns step,seconds,tokens,loss,held_out_loss,balance and a\n"
         "row for each step: tokens counts from the start, losses are in nats per character, held_out_loss is empty\n"
         "where none was taken, balance is the load of the fullest expert over the mean load, averaged over layers.\n");
}

static void misuse(const char *format, const char *a, const char *b) { /* does not return */
  fprintf(stderr, "train_gpt: ");
  fprintf(stderr, format, a, b);
  fprintf(stderr, " (--help lists the flags)\n");
  exit(2);
}

static int find(const char *const *names, const char *name) {
  for (int i = 0; names[i]; i++)
    if (strcmp(names[i], name) == 0) return i;
  return -1;
}

static void set(const struct flag *flag, char *argument) {
  char *end = argument;
  if (flag->kind == WORDS) {
    *(char **)flag->value = argument;
  } else if (flag->kind == GATE || flag->kind == ACTIVATION) {
    int index = find(flag->kind == GATE ? GATES : ACTIVATIONS, argument);
    if (index < 0) misuse("--%s does not know %s", flag->name, argument);
    *(int *)flag->value = index;
  } else if (flag->kind == SEED) {
    *(uint64_t *)flag->value = strtoull(argument, &end, 10);
    if (end == argument || *end || *argument == '-') misuse("--%s takes a whole number, not %s", flag->name, argument);
  } else {
    double number = strtod(argument, &end), most = flag->kind == WHOLE ? 1e6 : 1e300;
    if (end == argument || *end || !(number >= flag->least && number <= most) ||
        (flag->kind == WHOLE && number != floor(number)))
      misuse(flag->kind == WHOLE ? "--%s takes a whole number of its range, not %s" : "--%s takes 0 or more, not %s",
             flag->name, argument);
    if (flag->kind == WHOLE)
      *(int *)flag->value = (int)number;
    else
      *(double *)flag->value = number;
  }
}

static void read_flags(int count, char **arguments) {
  for (int i = 1; i < count; i++) {
    if (strcmp(arguments[i], "--help") == 0) {
      help();
      exit(0);
    }
    const struct flag *flag = NULL;
    for (int f = 0; f < FLAGS && strncmp(arguments[i], "--", 2) == 0; f++)
      if (strcmp(arguments[i] + 2, LIST[f].name) == 0) flag = &LIST[f];
    if (!flag) misuse("%s is no flag%s", arguments[i], "");
    if (i + 1 == count) misuse("--%s needs a value%s", flag->name, "");
    if (flag->kind != TEXTS) {
      set(flag, arguments[++i]);
      continue;
    }
    flags.text = arguments + i + 1;
    for (flags.texts = 0; i + 1 < count && strncmp(arguments[i + 1], "--", 2) != 0; i++) flags.texts++;
    if (flags.texts == 0) misuse("--%s needs a value%s", flag->name, "");
  }
  if (flags.prompt && !*flags.prompt) misuse("--%s needs a character%s", "prompt", "");
  if (flags.steps == 0 && flags.seconds == 0) flags.seconds = 140;
}

/* ---- time and signals ---------------------------------------------------------------------------- */
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

static double now(void) { /* seconds */
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* ---- training -------------------------------------------------------------------------------------- */
#define TRY(call)                                     \
  do {                                                \
    fmoe_status status_ = (call);                     \
    if (status_ != FMOE_OK) return status_;           \
  } while (0)

/* All that training needs, and how far it is. */
typedef struct training {
  text text;
  gpt *model;
  int32_t *tokens, *targets; /* [B, T] */
  int32_t *line;             /* the prompt, and room for the sample behind it */
  int prompt;                /* characters of the prompt */
  FILE *log;
  uint64_t random;
  double start;
  int step;
  double held_out; /* the latest held-out loss; NAN before the first */
} training;

static void draw_batch(training *t) { /* B places in the training text */
  int64_t T = flags.context, places = t->text.train_size - T;
  for (int b = 0; b < flags.batch; b++) {
    const int32_t *from = t->text.train + (int64_t)(gpt_random(&t->random) * (double)places);
    memcpy(t->tokens + b * T, from, (size_t)T * sizeof from[0]);
    memcpy(t->targets + b * T, from + 1, (size_t)T * sizeof from[0]);
  }
}

/* The mean loss over the held-out text, in windows of T characters that overlap by half: but for the beginning, every
 * character is guessed once, from T/2 or more before it. */
static fmoe_status evaluate(training *t) {
  int64_t size = t->text.held_out_size - 1, T = flags.context < size ? flags.context : size, done = 0;
  double sum = 0;
  while (done < size) {
    int64_t before = done;
    int B = 0;
    for (; B < flags.batch && done < size; B++) {
      int64_t first = done == 0 ? 0 : done - T / 2;
      if (first > size - T) first = size - T;
      memcpy(t->tokens + B * T, t->text.held_out + first, (size_t)T * sizeof t->tokens[0]);
      for (int64_t i = 0; i < T; i++) t->targets[B * T + i] = first + i < done ? -1 : t->text.held_out[first + i + 1];
      done = first + T;
    }
    gpt_loss loss;
    TRY(gpt_forward(t->model, t->tokens, t->targets, B, (int)T, &loss));
    sum += loss.mean * (double)(done - before);
  }
  t->held_out = sum / (double)size;
  return FMOE_OK;
}

static double progress(const training *t) { /* 0 to 1 */
  double steps = flags.steps > 0 ? (double)t->step / flags.steps : 0;
  double seconds = flags.seconds > 0 ? (now() - t->start) / flags.seconds : 0;
  return steps > seconds ? steps : seconds;
}

static double learning_rate(int step, double progress) {
  double warm = step < flags.warmup ? (step + 1.0) / flags.warmup : 1;
  return flags.rate * warm * (0.05 + 0.95 * 0.5 * (1 + cos(3.141592653589793 * progress)));
}

static const double DECAY = 1; /* strong: a short text is read a dozen times, and is not to be known by heart */

static fmoe_status train(training *t) {
  int terminal = isatty(STDOUT_FILENO);
  double flops = gpt_flops_per_token(t->model, flags.context), tokens = (double)flags.batch * flags.context;
  double shown = t->start = now(), sum = 0, load = 0;
  int since = 0; /* steps since the last line was shown */
  for (int last = 0; !last;) {
    gpt_loss loss;
    adamw how = {.beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .decay = DECAY, .clip = 1};
    how.rate = learning_rate(t->step, progress(t));
    draw_batch(t);
    TRY(gpt_forward(t->model, t->tokens, t->targets, flags.batch, flags.context, &loss));
    TRY(gpt_backward(t->model));
    TRY(gpt_update(t->model, &how, NULL));
    t->step++;
    since++;
    sum += loss.mean;
    load += loss.load;

    last = interrupted || progress(t) >= 1;
    int looks = last || (flags.eval_every > 0 && t->step % flags.eval_every == 0);
    double time = now(); /* of a step, without looking at the held-out text */
    if (looks || time - shown > (terminal ? 1 : 5)) {
      double rate = since * tokens / (time - shown);
      if (looks) TRY(evaluate(t));
      char held_out[16] = "  -  ";
      if (!isnan(t->held_out)) snprintf(held_out, sizeof held_out, "%.3f", t->held_out);
      printf("%sstep %5d  loss %.3f  held out %s  %5.1f k tokens/s  %4.0f GFLOP/s  balance %.2f  %4.0f s%s",
             terminal ? "\r" : "", t->step, sum / since, held_out, rate / 1e3, rate * flops / 1e9, load / since,
             time - t->start, terminal && !looks ? "" : "\n");
      fflush(stdout);
      shown = now();
      sum = load = since = 0;
    }
    if (t->log) {
      fprintf(t->log, "%d,%.3f,%.0f,%.6f,", t->step, time - t->start, t->step * tokens, loss.mean);
      if (looks) fprintf(t->log, "%.6f", t->held_out);
      fprintf(t->log, ",%.4f\n", loss.load);
    }
  }
  return FMOE_OK;
}

/* ---- before and after -------------------------------------------------------------------------------- */
static void introduce(const training *t) {
  double active, all = gpt_parameters(t->model, &active);
  printf("text: %lld characters to learn, %lld held out, %lld left out as quotations; %d symbols\n",
         (long long)t->text.train_size, (long long)t->text.held_out_size, (long long)t->text.left_out, t->text.vocab);
  printf("model: %d layers of width %d with %d heads and %d experts of hidden width %d, context %d\n", flags.layers,
         flags.width, flags.heads, flags.experts, flags.hidden, flags.context);
  printf("parameters: %.2f million, %.2f million of them active for a character; %.1f Mflop per character\n", all / 1e6,
         active / 1e6, gpt_flops_per_token(t->model, flags.context) / 1e6);
  printf("to beat: %.3f nats per held-out character, its unigram entropy under the training part's frequencies\n\n",
         text_unigram_entropy(&t->text));
  fflush(stdout);
}

static fmoe_status write_sample(training *t) {
  int length = t->prompt;
  printf("\n--- the prompt, and after the bar what the model makes of it ---\n");
  for (int i = 0; i < length; i++) putchar(t->text.byte_of[t->line[i]]);
  putchar('|');
  for (int i = 0; i < flags.sample; i++) {
    int seen = length < flags.context ? length : flags.context;
    TRY(gpt_sample(t->model, t->line + length - seen, seen, flags.temperature, &t->random, &t->line[length]));
    putchar(t->text.byte_of[t->line[length++]]);
    fflush(stdout);
  }
  printf("\n---\n");
  return FMOE_OK;
}

static fmoe_status run(training *t) {
  gpt_config config = {.vocab = t->text.vocab, .context = flags.context, .batch = flags.batch, .layers = flags.layers,
                       .heads = flags.heads, .width = flags.width, .hidden = flags.hidden, .experts = flags.experts,
                       .top_k = flags.top_k, .gate = flags.gate, .activation = flags.activation,
                       .balance_loss = flags.balance_loss, .z_loss = flags.z_loss, .seed = flags.seed,
                       .threads = flags.threads};
  TRY(gpt_create(&config, &t->model));
  introduce(t);
  listen();
  TRY(train(t));
  printf("\n%s after %d steps and %.0f s: held-out loss %.3f nats per character; frequencies alone give %.3f\n",
         interrupted ? "interrupted" : "done", t->step, now() - t->start, t->held_out, text_unigram_entropy(&t->text));
  return flags.sample > 0 ? write_sample(t) : FMOE_OK;
}

/* Text, memory and log; returns 0, or -1 with the reason in error [size]. */
static int prepare(training *t, char *error, size_t size) {
  char **paths = flags.text;
  int count = flags.texts;
  if (!paths && text_list(FOLDER, &paths, &count, error, (int)size) != 0) return -1;
  int read = text_read(&t->text, paths, count, error, (int)size);
  if (!flags.text) text_free_paths(paths, count);
  if (read != 0) return -1;
  if (t->text.train_size <= flags.context || t->text.held_out_size < 2) {
    snprintf(error, size, "%lld characters to learn are too few for a context of %d", (long long)t->text.train_size,
             flags.context);
    return -1;
  }

  size_t batch = (size_t)flags.batch * (size_t)flags.context * sizeof(int32_t);
  enum { BEGINNING = 64 }; /* so much of the held-out text is the prompt, if there is no other */
  t->prompt = flags.prompt ? (int)strlen(flags.prompt) : BEGINNING;
  if (!flags.prompt && t->prompt > t->text.held_out_size) t->prompt = (int)t->text.held_out_size;
  t->tokens = malloc(batch);
  t->targets = malloc(batch);
  t->line = malloc(((size_t)t->prompt + (size_t)flags.sample) * sizeof t->line[0]);
  if (!t->tokens || !t->targets || !t->line) {
    snprintf(error, size, "no memory for a batch of %d times %d characters", flags.batch, flags.context);
    return -1;
  }
  for (int i = 0; i < t->prompt; i++) {
    t->line[i] = flags.prompt ? t->text.symbol_of[(unsigned char)flags.prompt[i]] : t->text.held_out[i];
    if (t->line[i] < 0) {
      snprintf(error, size, "byte %d of the prompt occurs nowhere in the text", i);
      return -1;
    }
  }
  while (!flags.prompt && t->prompt > 1 && t->text.byte_of[t->line[t->prompt - 1]] != ' ') t->prompt--; /* whole words */
  if (flags.log && !(t->log = fopen(flags.log, "w"))) {
    snprintf(error, size, "%s cannot be written", flags.log);
    return -1;
  }
  if (t->log) fprintf(t->log, "step,seconds,tokens,loss,held_out_loss,balance\n");
  return 0;
}

int main(int count, char **arguments) {
  char error[512];
  read_flags(count, arguments);
  training t = {.random = flags.seed, .held_out = NAN};
  int failed = prepare(&t, error, sizeof error) != 0;
  if (!failed && run(&t) != FMOE_OK) {
    snprintf(error, sizeof error, "%s", gpt_last_error());
    failed = 1;
  }
  if (failed) fprintf(stderr, "train_gpt: %s\n", error);
  if (t.log) fclose(t.log);
  gpt_destroy(t.model);
  text_free(&t.text);
  free(t.line);
  free(t.targets);
  free(t.tokens);
  return failed;
}
