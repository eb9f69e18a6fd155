/* train.h: what train_gpt and train_gpt_mpi have in common: flags, texts, and the training of one worker. */
#ifndef TRAIN_H
#define TRAIN_H
#include "peers.h"

enum { TRAIN_ERROR = 512 };

/* Reads flags and texts, once in a process and before all else.  Returns -1 to go on, or else what main shall return,
 * after train_excuse has said why.  *workers: as many as were started, or 0, to be told what --workers says.  *threads:
 * of each worker, as --threads says, or 0. */
int train_prepare(int count, char **arguments, int *workers, int *threads, char *error /* [TRAIN_ERROR] */);
void train_excuse(int code, const char *error); /* 0: --help */
const char *train_topology(void);                /* what --topology says; NULL: this machine */
void train_end(void);                           /* gives back what train_prepare took */

/* Trains and lets the model write: each worker on a thread of its own; rank 0 prints and keeps the log.  Whoever fails
 * must leave its peers, who may be waiting. */
fmoe_status train(const peers *with, int threads, char *error /* [TRAIN_ERROR] */);
#endif
