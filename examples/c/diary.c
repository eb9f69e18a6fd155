/* diary.c: lines and rows of numbers that others have found. */
#define _POSIX_C_SOURCE 200809L
#include "diary.h"

#include <math.h>
#include <time.h>
#include <unistd.h>

#include "flags.h"

double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static fmoe_status open_one(FILE **out, const char *path, const char *columns, char *error) {
  if (!path) return FMOE_OK;
  if (!(*out = fopen(path, "w"))) return refuse(FMOE_ERROR_FILE, error, "%s cannot be written", path);
  fprintf(*out, "%s\n", columns);
  return FMOE_OK;
}

fmoe_status diary_open(diary *d, char *error) {
  fmoe_status status = open_one(&d->curve, flags.log, "step,seconds,tokens,loss,held_out_loss,balance", error);
  if (status != FMOE_OK) return status;
  return open_one(&d->plans, flags.plan_log, "step,layer,shadows,group_size,predicted_seconds,measured_seconds", error);
}

void diary_close(diary *d) {
  if (d->curve) fclose(d->curve);
  if (d->plans) fclose(d->plans);
}

void diary_introduce(const gpt *model, const text *learnt) {
  double active, all = gpt_parameters(model, &active);
  printf("text: %lld characters to learn, %lld held out, %lld left out as quotations; %d symbols\n",
         (long long)learnt->train_size, (long long)learnt->held_out_size, (long long)learnt->left_out, learnt->vocab);
  printf("model: %d layers of width %d with %d heads and %d experts of hidden width %d, context %d\n", flags.layers,
         flags.width, flags.heads, flags.experts, flags.hidden, flags.context);
  printf("parameters: %.2f million, %.2f million of them active for a character; %.1f Mflop per character\n", all / 1e6,
         active / 1e6, gpt_flops_per_token(model, flags.context) / 1e6);
  printf("to beat: %.3f nats per held-out character, its unigram entropy under the training part's frequencies\n\n",
         text_unigram_entropy(learnt));
  fflush(stdout);
}

void diary_start(diary *d, const gpt *model, int workers, double time) {
  d->terminal = isatty(STDOUT_FILENO);
  d->flops = gpt_flops_per_token(model, flags.context);
  d->tokens = (double)flags.batch * flags.context;
  d->start = d->shown = time;
  if (workers > 1) snprintf(d->workers, sizeof d->workers, "  %d workers", workers);
}

void diary_plans(diary *d, const gpt *model, int step) {
  for (int layer = 0; d->plans && layer < flags.layers; layer++) {
    gpt_plan plan = gpt_plan_of(model, layer);
    fprintf(d->plans, "%d,%d,%d,%d,%.6g,%.6g\n", step, layer, plan.shadows, plan.group_size, plan.predicted, plan.measured);
  }
}

void diary_step(diary *d, int step, double time, const gpt_loss *loss, double held_out, int looks, int evaluates) {
  d->since++;
  d->sum += loss->mean;
  d->load += loss->load;
  if (looks || time - d->shown > (d->terminal ? 1 : 5)) {
    double rate = d->since * d->tokens / (time - d->shown);
    char known[16] = "  -  ";
    if (!isnan(held_out)) snprintf(known, sizeof known, "%.3f", held_out);
    printf("%sstep %5d  loss %.3f  held out %s  %5.1f k tokens/s  %4.0f GFLOP/s  balance %.2f%s  %4.0f s%s",
           d->terminal ? "\r" : "", step, d->sum / d->since, known, rate / 1e3, rate * d->flops / 1e9, d->load / d->since,
           d->workers, time - d->start, d->terminal && !looks ? "" : "\n");
    fflush(stdout);
    d->shown = now();
    d->sum = d->load = d->since = 0;
  }
  if (d->curve) {
    fprintf(d->curve, "%d,%.3f,%.0f,%.6f,", step, time - d->start, step * d->tokens, loss->mean);
    if (evaluates) fprintf(d->curve, "%.6f", held_out);
    fprintf(d->curve, ",%.4f\n", loss->load);
  }
}
