/* measure.h: what the benchmarks share.  After fastermoe.h, and after mpi.h where there is MPI. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Ends the program, under MPI all of its processes. */
static inline void give_up(const char *call) {
  fprintf(stderr, "%s: %s\n", call, fmoe_last_error());
#ifdef MPI_VERSION
  MPI_Abort(MPI_COMM_WORLD, 1);
#endif
  exit(1);
}

#define CHECK(call)                        \
  do {                                     \
    if ((call) != FMOE_OK) give_up(#call); \
  } while (0)

static inline double now(void) { /* seconds */
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int by_size(const void *a, const void *b) { /* of doubles, for qsort */
  return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static inline double median(double *values, int count) { /* sorts them */
  qsort(values, (size_t)count, sizeof *values, by_size);
  return values[count / 2];
}
