/* train_gpt_mpi.c: train_gpt with processes as workers, on one host or many.
 *
 *   mpirun -n 4 train_gpt_mpi --steps 5000    one worker for each process; train_gpt_mpi --help tells the rest */
#define _GNU_SOURCE /* sched_getaffinity */
#include <fastermoe_mpi.h>
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "train.h"

typedef struct wire {
  MPI_Comm comm;
  int rank, size;
} wire;

/* MPI_Allreduce may add up in any order, and need not give all ranks the same bits.  So each rank gets one slice from
 * all, sums it in the order of ranks, and gathers the others' slices: no more traffic than a ring would have. */
static int sum(void *context, float *values, int64_t count) {
  enum { PIECE = 1 << 18 };
  static float slices[2 * PIECE]; /* [size, mine] of a piece, with what rounding up adds */
  const wire *w = context;
  int send[w->size], from[w->size], receive[w->size], to[w->size];
  for (int64_t done = 0; done < count; done += PIECE, values += PIECE) {
    int64_t piece = count - done < PIECE ? count - done : PIECE;
    int mine = (int)(piece * (w->rank + 1) / w->size - piece * w->rank / w->size);
    for (int r = 0; r < w->size; r++) {
      from[r] = (int)(piece * r / w->size);
      send[r] = (int)(piece * (r + 1) / w->size) - from[r];
      receive[r] = mine;
      to[r] = r * mine;
    }
    MPI_Alltoallv(values, send, from, MPI_FLOAT, slices, receive, to, MPI_FLOAT, w->comm);
    for (int r = 1; r < w->size; r++)
      for (int i = 0; i < mine; i++) slices[i] += slices[r * mine + i];
    MPI_Allgatherv(slices, mine, MPI_FLOAT, values, send, from, MPI_FLOAT, w->comm);
  }
  return 0; /* MPI ends the program when a rank is lost */
}

/* This rank's part of the cores that the ranks of its host may use together, bound to some of them or not. */
static int share_of_cores(MPI_Comm comm) {
  MPI_Comm host;
  int ranks;
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) CPU_ZERO(&cores);
  MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_size(host, &ranks);
  MPI_Allreduce(MPI_IN_PLACE, &cores, sizeof cores, MPI_BYTE, MPI_BOR, host);
  MPI_Comm_free(&host);
  return CPU_COUNT(&cores) > ranks ? CPU_COUNT(&cores) / ranks : 1;
}

/* Returns what main shall return.  A rank that fails with a reason of its own takes all others along; one that only
 * heard of a failure waits for that. */
static int train_all(wire *w, int threads) {
  char error[TRAIN_ERROR];
  peers all = {.rank = w->rank, .size = w->size, .context = w, .sum = sum};
  if (threads == 0) threads = share_of_cores(w->comm);
  fmoe_group_options options = {.struct_size = sizeof options, .threads = threads};
  fmoe_status status = fmoe_group_create_mpi(w->comm, &options, &all.group);
  if (status == FMOE_OK)
    status = train(&all, threads, error);
  else
    snprintf(error, sizeof error, "%s", fmoe_last_error());
  if (status == FMOE_ERROR_PEER) MPI_Barrier(w->comm);
  if (status != FMOE_OK) {
    train_excuse(1, error);
    MPI_Abort(w->comm, 1);
  }
  fmoe_group_destroy(all.group);
  return 0;
}

int main(int count, char **arguments) {
  char error[TRAIN_ERROR];
  wire w = {.comm = MPI_COMM_WORLD};
  int level, threads;
  MPI_Init_thread(&count, &arguments, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(w.comm, &w.rank);
  MPI_Comm_size(w.comm, &w.size);
  int code = train_prepare(count, arguments, &w.size, &threads, error), first;
  int excused = code >= 0 ? w.rank : w.size;
  MPI_Allreduce(&excused, &first, 1, MPI_INT, MPI_MIN, w.comm);
  if (first == w.rank) train_excuse(code, error);
  if (first == w.size) code = train_all(&w, threads);
  train_end();
  MPI_Finalize();
  return code < 0 ? 1 : code;
}
