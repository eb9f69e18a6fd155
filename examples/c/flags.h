/* flags.h: what the command line says of a training, or leaves as it is. */
#ifndef FLAGS_H
#define FLAGS_H
#include <stdint.h>

extern struct flags {
  char **text;
  int texts;
  int steps, batch, context, layers, heads, width, hidden, experts, top_k, gate, activation;
  int warmup, workers, threads, eval_every, sample;
  double seconds, balance_loss, z_loss, bias_step, input_jitter, remote_share, rate, temperature;
  uint64_t seed;
  int until;
  char *prompt, *log, *plan_log, *save, *resume, *record, *replay, *topology;
} flags; /* of the process */

/* Returns -1, or what main shall return, with the reason in error [TRAIN_ERROR]; 0: --help. */
int flags_read(int count, char **arguments, char *error);
void flags_explain(void); /* --help */

int refuse(int code, char *error /* [TRAIN_ERROR] */, const char *format, ...); /* returns code */
#endif
