/* peers.h: the workers that train one model together, as one of them sees them. */
#ifndef PEERS_H
#define PEERS_H
#include <fastermoe.h>
#include <stdint.h>

typedef struct peers {
  int rank, size;    /* this worker is `rank` of 0..size-1 */
  fmoe_group *group; /* its seat among them, for what the experts send each other */
  void *context;
  /* All workers make this call together.  Replaces values [count] by their sums over the workers, added up in the order
   * of ranks: the same bits for each of them, in every run.  Returns 0, or anything else when a worker is lost. */
  int (*sum)(void *context, float *values, int64_t count);
} peers;

/* Workers as threads of this process.  The groups are the caller's to set and to destroy. */
peers *peers_create(int size);       /* [size], one for each thread; NULL: no memory */
void peers_leave(const peers *one);  /* a worker that cannot go on: sums fail from now on, and nobody waits */
void peers_destroy(peers *all);      /* NULL is fine */
#endif
