/* train_gpt.c: trains a GPT with mixture-of-experts layers, with one worker or several threads as workers.
 *
 *   train_gpt                                    about two minutes on the licence texts of this computer
 *   train_gpt --text a.txt b.txt --steps 5000    on your own; train_gpt --help tells the rest
 *
 * With --steps, the same command prints the same losses bit for bit; with --seconds, the clock has a say. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "train.h"

typedef struct worker {
  peers *peers;
  int threads;
  pthread_t thread;
  fmoe_status status;
  char error[TRAIN_ERROR];
} worker;

static void leave(peers *one) { /* whoever waits for it learns that it is gone */
  peers_leave(one);
  fmoe_group_destroy(one->group);
  one->group = NULL;
}

static void *work(void *argument) {
  worker *w = argument;
  w->status = train(w->peers, w->threads, w->error);
  if (w->status != FMOE_OK) leave(w->peers);
  return NULL;
}

/* Rank 0 is this thread.  Returns what main shall return, with the reason in error. */
static int work_all(worker *workers, int W, char *error) {
  int started = 1;
  while (started < W && pthread_create(&workers[started].thread, NULL, work, &workers[started]) == 0) started++;
  for (int r = started; r < W; r++) leave(workers[r].peers);
  work(&workers[0]);
  for (int r = 1; r < started; r++) pthread_join(workers[r].thread, NULL);

  const worker *failed = NULL; /* one that has more to say than that another one failed, if there is one */
  for (int r = 0; r < started; r++)
    if (workers[r].status != FMOE_OK && (!failed || failed->status == FMOE_ERROR_PEER)) failed = &workers[r];
  if (failed) snprintf(error, TRAIN_ERROR, "%s", started < W ? "no thread for a worker" : failed->error);
  return failed != NULL;
}

static int cores(void) { /* that this process may use */
  cpu_set_t mine;
  return sched_getaffinity(0, sizeof mine, &mine) == 0 ? CPU_COUNT(&mine) : 1;
}

static int train_all(int W, int threads, char *error) {
  if (threads == 0) threads = cores() > W ? cores() / W : 1;
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads,
                                .topology = train_topology()};
  peers *all = peers_create(W);
  worker *workers = calloc((size_t)W, sizeof workers[0]);
  fmoe_group **groups = calloc((size_t)W, sizeof groups[0]);
  int code = 1;
  if (!all || !workers || !groups) {
    snprintf(error, TRAIN_ERROR, "no memory for %d workers", W);
  } else if (fmoe_group_create_local(W, &options, groups) != FMOE_OK) {
    snprintf(error, TRAIN_ERROR, "%s", fmoe_last_error());
  } else {
    for (int r = 0; r < W; r++) {
      all[r].group = groups[r];
      workers[r] = (worker){.peers = &all[r], .threads = threads};
    }
    code = work_all(workers, W, error);
    for (int r = 0; r < W; r++) fmoe_group_destroy(all[r].group);
  }
  free(groups);
  free(workers);
  peers_destroy(all);
  return code;
}

int main(int count, char **arguments) {
  char error[TRAIN_ERROR];
  int W = 0, threads, code = train_prepare(count, arguments, &W, &threads, error);
  if (code >= 0)
    train_excuse(code, error);
  else if ((code = train_all(W, threads, error)) != 0)
    train_excuse(code, error);
  train_end();
  return code;
}
