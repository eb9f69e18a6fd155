/* flags.c: the flags of train_gpt, from one list: their values, their help, and what they take. */
#include "flags.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "train.h"

static const char *const GATES[] = {"topk", "noisy", "switch", "gshard", "base", "topology", "hierarchical", "swipe", NULL};
static const char *const ACTIVATIONS[] = {"gelu", "gelu-tanh", "relu", "silu", "swiglu", NULL};

struct flags flags = {.batch = 8, .context = 128, .layers = 3, .heads = 4, .width = 128, .hidden = 256, .experts = 8,
                      .warmup = 30, .workers = 1, .eval_every = 250, .sample = 400, .balance_loss = 0.01, .z_loss = 0.001,
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
    {"gate", GATE, &flags.gate, 0, "NAME        topk noisy switch gshard base topology hierarchical swipe"},
    {"activation", ACTIVATION, &flags.activation, 0, "NAME  gelu gelu-tanh relu silu swiglu"},
    {"balance-loss", NUMBER, &flags.balance_loss, 0, "X   coefficient of the experts' load-balancing loss"},
    {"z-loss", NUMBER, &flags.z_loss, 0, "X         coefficient of the gate's z-loss"},
    {"bias-step", NUMBER, &flags.bias_step, 0, "X      balances by a bias that moves so far after each step; 0: none"},
    {"input-jitter", NUMBER, &flags.input_jitter, 0, "X   of what the gate reads, below 1; 0: none"},
    {"remote-share", NUMBER, &flags.remote_share, 0, "X   of the choices may leave a place; 0: the gate's own"},
    {"learning-rate", NUMBER, &flags.rate, 0, "X  its highest; it falls to a twentieth along half a cosine"},
    {"warmup", WHOLE, &flags.warmup, 0, "N         steps in which it rises from zero"},
    {"seed", SEED, &flags.seed, 0, "N           of initial weights, batches and the sample"},
    {"workers", WHOLE, &flags.workers, 1, "N        share out --batch and --experts evenly among themselves"},
    {"threads", WHOLE, &flags.threads, 0, "N        of each worker; 0: its share of the cores"},
    {"topology", WORDS, &flags.topology, 0, "TEXT    train_gpt: the machine to be on, an XML file or as hwloc writes them: \"pack:4 core:1 pu:1\""},
    {"eval-every", WHOLE, &flags.eval_every, 0, "N     steps between looks at the held-out text; 0: only at the end"},
    {"sample", WHOLE, &flags.sample, 0, "N         characters to write at the end"},
    {"prompt", WORDS, &flags.prompt, 0, "TEXT      to continue; default: the beginning of the held-out text"},
    {"temperature", NUMBER, &flags.temperature, 0, "X    of the writing; 0: always the likeliest character"},
    {"save", WORDS, &flags.save, 0, "FOLDER        where the training goes, at the end and at each look at the held-out text"},
    {"resume", WORDS, &flags.resume, 0, "FOLDER      a training to go on with; the other flags as before"},
    {"until", WHOLE, &flags.until, 0, "N          stop after step N of --steps, to be resumed; 0: go on to the end"},
    {"record", WORDS, &flags.record, 0, "FILE        where it goes which character visited which experts, as routing.h says"},
    {"replay", WORDS, &flags.replay, 0, "FILE        such a file to do again: gates are not asked and learn nothing"},
    {"save-log", WORDS, &flags.log, 0, "FILE.csv  where the curve goes, see below"},
    {"plan-log", WORDS, &flags.plan_log, 0, "FILE.csv  where the experts' plans go, see below; measures the workers first"},
};
enum { FLAGS = sizeof LIST / sizeof LIST[0] };

void flags_explain(void) {
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
         "where none was taken, as in a replay, balance is the load of the fullest expert over the mean load, averaged over layers.\n"
         "The plans' log has step,layer,shadows,group_size,predicted_seconds,measured_seconds and a row for each layer\n"
         "of each step: seconds are of its experts, forward and backward, measured on worker 0.\n");
}

int refuse(int code, char *error, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error, TRAIN_ERROR, format, values);
  va_end(values);
  return code;
}

static int find(const char *const *names, const char *name) {
  for (int i = 0; names[i]; i++)
    if (strcmp(names[i], name) == 0) return i;
  return -1;
}

/* -1, or what main shall return, with the reason in error. */
static int set(const struct flag *flag, char *argument, char *error) {
  char *end = argument;
  if (flag->kind == WORDS) {
    *(char **)flag->value = argument;
  } else if (flag->kind == GATE || flag->kind == ACTIVATION) {
    int index = find(flag->kind == GATE ? GATES : ACTIVATIONS, argument);
    if (index < 0) return refuse(2, error, "--%s does not know %s", flag->name, argument);
    *(int *)flag->value = index;
  } else if (flag->kind == SEED) {
    *(uint64_t *)flag->value = strtoull(argument, &end, 10);
    if (end == argument || *end || *argument == '-')
      return refuse(2, error, "--%s takes a whole number, not %s", flag->name, argument);
  } else {
    double number = strtod(argument, &end), most = flag->kind == WHOLE ? 1e6 : 1e300;
    if (end == argument || *end || !(number >= flag->least && number <= most) ||
        (flag->kind == WHOLE && number != floor(number)))
      return refuse(2, error, flag->kind == WHOLE ? "--%s takes a whole number of its range, not %s"
                                                  : "--%s takes 0 or more, not %s", flag->name, argument);
    if (flag->kind == WHOLE)
      *(int *)flag->value = (int)number;
    else
      *(double *)flag->value = number;
  }
  return -1;
}

int flags_read(int count, char **arguments, char *error) {
  for (int i = 1; i < count; i++) {
    if (strcmp(arguments[i], "--help") == 0) return 0;
    const struct flag *flag = NULL;
    for (int f = 0; f < FLAGS && strncmp(arguments[i], "--", 2) == 0; f++)
      if (strcmp(arguments[i] + 2, LIST[f].name) == 0) flag = &LIST[f];
    if (!flag) return refuse(2, error, "%s is no flag", arguments[i]);
    if (i + 1 == count) return refuse(2, error, "--%s needs a value", flag->name);
    if (flag->kind != TEXTS) {
      int code = set(flag, arguments[++i], error);
      if (code >= 0) return code;
      continue;
    }
    flags.text = arguments + i + 1;
    for (flags.texts = 0; i + 1 < count && strncmp(arguments[i + 1], "--", 2) != 0; i++) flags.texts++;
    if (flags.texts == 0) return refuse(2, error, "--%s needs a value", flag->name);
  }
  if (flags.prompt && !*flags.prompt) return refuse(2, error, "--prompt needs a character");
  if (flags.batch % flags.workers != 0)
    return refuse(2, error, "--batch: %d sequences cannot be shared out evenly among %d workers", flags.batch,
                  flags.workers);
  if (flags.experts % flags.workers != 0)
    return refuse(2, error, "--experts: %d of them cannot be shared out evenly among %d workers", flags.experts,
                  flags.workers);
  if (flags.record && (flags.replay || flags.resume)) return refuse(2, error, "--record goes with neither --replay nor --resume");
  if (flags.steps == 0 && flags.seconds == 0) flags.seconds = 140;
  return -1;
}
