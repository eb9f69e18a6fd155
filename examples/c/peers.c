/* peers.c: threads of one process meet at a board, where each shows the others its numbers. */
#include "peers.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct board {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int size, here;  /* how many there are, and how many have come to this meeting */
  unsigned meeting;
  int left;        /* somebody has: no further meeting takes place */
  float *shown[];  /* [size] */
} board;

typedef struct seat {
  board *at;
  int rank;
} seat;

/* Returns 0 once all have come: then nobody has left.  Else -1. */
static int meet(board *b) {
  pthread_mutex_lock(&b->lock);
  unsigned mine = b->meeting;
  if (!b->left && ++b->here == b->size) {
    b->here = 0;
    b->meeting++;
    pthread_cond_broadcast(&b->changed);
  }
  while (b->meeting == mine && !b->left) pthread_cond_wait(&b->changed, &b->lock);
  int result = b->meeting == mine ? -1 : 0;
  pthread_mutex_unlock(&b->lock);
  return result;
}

/* Each thread sums one slice of all arrays, into that of rank 0, and hands the sums out.  Between the two meetings all
 * are in here, so that no array can go away. */
static int sum(void *context, float *values, int64_t count) {
  const seat *s = context;
  board *b = s->at;
  b->shown[s->rank] = values;
  if (meet(b) != 0) return -1;
  int64_t first = count * s->rank / b->size, end = count * (s->rank + 1) / b->size;
  float *total = b->shown[0];
  for (int r = 1; r < b->size; r++) {
    const float *more = b->shown[r];
    for (int64_t i = first; i < end; i++) total[i] += more[i];
  }
  for (int r = 1; r < b->size; r++)
    memcpy(b->shown[r] + first, total + first, (size_t)(end - first) * sizeof total[0]);
  return meet(b);
}

peers *peers_create(int size) {
  peers *all = calloc((size_t)size, sizeof all[0]);
  seat *seats = calloc((size_t)size, sizeof seats[0]);
  board *b = calloc(1, sizeof *b + (size_t)size * sizeof b->shown[0]);
  if (!all || !seats || !b) {
    free(b);
    free(seats);
    free(all);
    return NULL;
  }
  pthread_mutex_init(&b->lock, NULL);
  pthread_cond_init(&b->changed, NULL);
  b->size = size;
  for (int r = 0; r < size; r++) {
    seats[r] = (seat){b, r};
    all[r] = (peers){.rank = r, .size = size, .context = &seats[r], .sum = sum};
  }
  return all;
}

void peers_leave(const peers *one) {
  board *b = ((seat *)one->context)->at;
  pthread_mutex_lock(&b->lock);
  b->left = 1;
  pthread_cond_broadcast(&b->changed);
  pthread_mutex_unlock(&b->lock);
}

void peers_destroy(peers *all) {
  if (!all) return;
  seat *seats = all[0].context;
  pthread_cond_destroy(&seats->at->changed);
  pthread_mutex_destroy(&seats->at->lock);
  free(seats->at);
  free(seats);
  free(all);
}
