/* fastermoe_mpi.h: a group whose workers are the ranks of an MPI communicator.  Header only: your mpicc or mpicxx
 * compiles it with your MPI, whichever that is; libfastermoe itself knows no MPI.  C99 or C++11, MPI 2.1 or later.
 *
 * Threads.    Ask for MPI_Init_thread(..., MPI_THREAD_FUNNELED, ...) or more.  Only the thread that is in a collective
 *             fmoe call calls MPI, compute threads never: with FUNNELED, make these calls, and destroy, from the thread
 *             that started MPI.
 * End.        On every rank, destroy the group and all that hangs from it before MPI_Finalize; several groups in the same
 *             order everywhere, since MPI_Comm_free may wait for all ranks.
 * Own space.  Messages go over a duplicate of the communicator and never meet yours.
 * Lost        A killed rank is MPI's business: by default mpirun ends the whole job, within seconds.  One that hangs is
 * ranks.      not noticed by MPI, but by the group's timeout_seconds.  Then save what is worth it and MPI_Abort: with a
 *             rank missing MPI_Finalize may wait forever, and a send that is under way cannot be recalled. */
#ifndef FASTERMOE_MPI_H
#define FASTERMOE_MPI_H
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#include "fastermoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Collective over comm, whose ranks become those of the group.  The library does not keep comm, but a duplicate; until
 * that is made and has been tried, waits for all ranks without a timeout. */
static inline fmoe_status fmoe_group_create_mpi(MPI_Comm comm, const fmoe_group_options *options /* NULL: defaults */,
                                                fmoe_group **out);

/* ---- the rest is how ----------------------------------------------------------------------- */
enum { fmoe_mpi_tag = 1, fmoe_mpi_most = 1 << 30 }; /* MPI counts bytes in an int: longer messages go in parts */

typedef struct fmoe_mpi_request {
  struct fmoe_mpi_request *older, *next_idle;
  int parts, receives, moved, room; /* parts in all, receives first; the first so many have moved.  Idle: none */
  MPI_Request *part;
} fmoe_mpi_request;

typedef struct fmoe_mpi_context {
  MPI_Comm comm;
  fmoe_mpi_request *newest, *idle; /* all requests, to find open ones in the end; those to be used again */
} fmoe_mpi_context;

/* An idle request with room for so many parts, or NULL. */
static inline fmoe_mpi_request *fmoe_mpi_take(fmoe_mpi_context *context, int parts) {
  fmoe_mpi_request *request = context->idle;
  if (!request) {
    request = (fmoe_mpi_request *)calloc(1, sizeof *request);
    if (!request) return NULL;
    request->older = context->newest;
    context->newest = context->idle = request;
  }
  if (request->room < parts) {
    MPI_Request *part = (MPI_Request *)realloc(request->part, (size_t)parts * 2 * sizeof *part);
    if (!part) return NULL;
    request->part = part;
    request->room = parts * 2;
  }
  context->idle = request->next_idle;
  return request;
}

/* Sends are synchronous: one that is done was received, so a slow receiver stores no more than what the library keeps
 * under way. */
static inline int32_t fmoe_mpi_start(void *of, const fmoe_message *messages, int32_t count, void **out) {
  fmoe_mpi_context *context = (fmoe_mpi_context *)of;
  fmoe_mpi_request *request;
  int64_t at, parts = 0;
  int receiving, size, error;
  int32_t i;
  for (i = 0; i < count; i++) parts += (messages[i].size + fmoe_mpi_most - 1) / fmoe_mpi_most;
  request = fmoe_mpi_take(context, (int)parts);
  if (!request) return MPI_ERR_NO_MEM;
  for (receiving = 1; receiving >= 0; receiving--) {
    for (i = 0; i < count; i++) {
      if (!messages[i].receiving != !receiving) continue;
      for (at = 0; at < messages[i].size; at += size) {
        char *bytes = (char *)messages[i].bytes + at;
        MPI_Request *part = &request->part[request->parts];
        size = messages[i].size - at < fmoe_mpi_most ? (int)(messages[i].size - at) : fmoe_mpi_most;
        error = receiving ? MPI_Irecv(bytes, size, MPI_BYTE, messages[i].peer, fmoe_mpi_tag, context->comm, part)
                          : MPI_Issend(bytes, size, MPI_BYTE, messages[i].peer, fmoe_mpi_tag, context->comm, part);
        if (error) return error; /* what has started stays open until release */
        request->parts++;
        request->receives += receiving;
      }
    }
  }
  *out = request;
  return 0;
}

static inline int32_t fmoe_mpi_test(void *of, void *ticket, int32_t *done) {
  fmoe_mpi_context *context = (fmoe_mpi_context *)of;
  fmoe_mpi_request *request = (fmoe_mpi_request *)ticket;
  int error;
  for (*done = 1; request->moved < request->parts; request->moved++) {
    error = MPI_Test(&request->part[request->moved], done, MPI_STATUS_IGNORE);
    if (error || !*done) return error;
  }
  request->parts = request->receives = request->moved = 0;
  request->next_idle = context->idle;
  context->idle = request;
  return 0;
}

/* Gives up what a broken group left open, without waiting for a peer; 1 if MPI keeps nothing of it.  A receive that
 * nothing has come for can be recalled; a send cannot, MPI may still read its bytes. */
static inline int fmoe_mpi_give_up(fmoe_mpi_request *request) {
  int i, tries, done, clean = 1;
  for (i = request->moved; i < request->parts; i++) {
    if (request->part[i] == MPI_REQUEST_NULL) continue; /* it has failed */
    if (i < request->receives) MPI_Cancel(&request->part[i]);
    for (tries = done = 0; !done && tries < 100; tries++) /* a recall may take a few rounds of MPI's progress */
      if (MPI_Test(&request->part[i], &done, MPI_STATUS_IGNORE)) break;
    if (!done && request->part[i] != MPI_REQUEST_NULL) MPI_Request_free(&request->part[i]), clean = 0;
  }
  return clean;
}

static inline void fmoe_mpi_release(void *of) {
  fmoe_mpi_context *context = (fmoe_mpi_context *)of;
  fmoe_mpi_request *request, *older;
  int finalized = 0, clean = 1;
  MPI_Finalized(&finalized);
  for (request = context->newest; request; request = older) {
    if (!finalized) clean &= fmoe_mpi_give_up(request);
    older = request->older;
    free(request->part);
    free(request);
  }
  if (!finalized && clean) MPI_Comm_free(&context->comm); /* with messages open, MPI keeps it anyway */
  free(context);
}

/* Whether rank 0's message of so many bytes leaves before its peer has posted a receive; -1 if MPI fails. */
static inline int fmoe_mpi_leaves(char *bytes, int size, int peer, MPI_Comm comm) {
  MPI_Request request;
  double begin;
  int leaves = 0, tries;
  /* Before the first message MPI connects, which takes long. */
  if (MPI_Send(bytes, 1, MPI_CHAR, peer, fmoe_mpi_tag, comm)) return -1;
  if (MPI_Recv(bytes, 1, MPI_CHAR, peer, fmoe_mpi_tag, comm, MPI_STATUS_IGNORE)) return -1;
  if (MPI_Isend(bytes, size, MPI_CHAR, peer, fmoe_mpi_tag + 1, comm, &request)) return -1;
  for (begin = MPI_Wtime(), tries = 0; !leaves && (tries < 1000 || MPI_Wtime() - begin < 0.02); tries++)
    if (MPI_Test(&request, &leaves, MPI_STATUS_IGNORE)) return -1;
  if (MPI_Send(bytes, 1, MPI_CHAR, peer, fmoe_mpi_tag, comm)) return -1;
  if (!leaves && MPI_Wait(&request, MPI_STATUS_IGNORE)) return -1;
  return leaves;
}

/* Bytes of the longest messages that MPI sends between hosts at once.  Longer ones first ask the receiver, which costs a
 * quarter of a link's rate where rows go both ways: questions and answers wait behind the rows.  Open MPI does so from 64 KiB
 * on over TCP; UCX, which MPICH and Open MPI may use, from some 19 KiB on.  So rank 0 tries it with a rank of another host,
 * which posts no receive before rank 0 has seen whether its message leaves.  0, which stands for 60 KiB, if there is one host,
 * if even short ones ask, or if MPI fails. */
static inline int64_t fmoe_mpi_message_bytes(MPI_Comm comm, int rank, int size) {
  static const int sizes[] = {60 << 10, 16 << 10, 8 << 10};
  static char bytes[60 << 10]; /* a failed MPI may still read them */
  char own[MPI_MAX_PROCESSOR_NAME] = {0}, first[MPI_MAX_PROCESSOR_NAME] = {0};
  int length, far, peer = size, leaves = 0, i;
  MPI_Get_processor_name(own, &length);
  memcpy(first, own, sizeof own);
  if (MPI_Bcast(first, (int)sizeof first, MPI_CHAR, 0, comm)) return 0;
  far = strcmp(own, first) ? rank : size;
  if (MPI_Allreduce(&far, &peer, 1, MPI_INT, MPI_MIN, comm) || peer == size) return 0;
  for (i = 0; i < 3 && !leaves; i++) {
    if (rank == 0) {
      leaves = fmoe_mpi_leaves(bytes, sizes[i], peer, comm);
    } else if (rank == peer) {
      if (MPI_Recv(bytes, 1, MPI_CHAR, 0, fmoe_mpi_tag, comm, MPI_STATUS_IGNORE) ||
          MPI_Send(bytes, 1, MPI_CHAR, 0, fmoe_mpi_tag, comm) ||
          MPI_Recv(bytes, 1, MPI_CHAR, 0, fmoe_mpi_tag, comm, MPI_STATUS_IGNORE) ||
          MPI_Recv(bytes, sizes[i], MPI_CHAR, 0, fmoe_mpi_tag + 1, comm, MPI_STATUS_IGNORE))
        return 0;
    }
    if (MPI_Bcast(&leaves, 1, MPI_INT, 0, comm)) return 0;
  }
  return leaves > 0 ? sizes[i - 1] : 0;
}

static inline fmoe_status fmoe_group_create_mpi(MPI_Comm comm, const fmoe_group_options *options, fmoe_group **out) {
  fmoe_mpi_context *context;
  fmoe_transport transport;
  fmoe_status status;
  int initialized = 0, finalized = 0, level = 0, main_thread = 0, inter = 0, ready, all_ready = 0, error;
  const char *wrong = NULL;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (!initialized || finalized)
    return fmoe_set_last_error(FMOE_ERROR_ARGUMENT, finalized
        ? "MPI is finalized: create the group, and destroy it, before MPI_Finalize"
        : "MPI is not initialized: first call MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided)");
  MPI_Query_thread(&level);
  MPI_Is_thread_main(&main_thread);
  if (comm != MPI_COMM_NULL && level >= MPI_THREAD_FUNNELED) MPI_Comm_test_inter(comm, &inter);
  if (level < MPI_THREAD_FUNNELED)
    wrong = "MPI has no threads, the library computes on some: replace MPI_Init by "
            "MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided)";
  else if (level == MPI_THREAD_FUNNELED && !main_thread)
    wrong = "with MPI_THREAD_FUNNELED, create the group on the thread that called MPI_Init_thread";
  else if (comm == MPI_COMM_NULL)
    wrong = "comm is MPI_COMM_NULL: this rank is not in the communicator and has no seat in its group";
  else if (inter)
    wrong = "comm is an intercommunicator: make one of both sides by MPI_Intercomm_merge";
  if (wrong) return fmoe_set_last_error(FMOE_ERROR_ARGUMENT, wrong);

  /* From here on all ranks succeed or fail together. */
  error = MPI_Comm_dup(comm, &comm);
  if (error) return fmoe_set_last_error(FMOE_ERROR_PEER, "MPI_Comm_dup failed");
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  context = (fmoe_mpi_context *)calloc(1, sizeof *context);
  ready = context && out;
  error = MPI_Allreduce(&ready, &all_ready, 1, MPI_INT, MPI_MIN, comm);
  if (error || !all_ready) {
    MPI_Comm_free(&comm);
    free(context);
    if (!out) return fmoe_set_last_error(FMOE_ERROR_ARGUMENT, "out is NULL");
    if (!ready) return fmoe_set_last_error(FMOE_ERROR_MEMORY, "no memory for the transport over MPI");
    return fmoe_set_last_error(FMOE_ERROR_PEER, error ? "MPI_Allreduce failed" : "the call failed on another rank");
  }
  context->comm = comm;
  memset(&transport, 0, sizeof transport);
  transport.struct_size = (uint32_t)sizeof transport;
  MPI_Comm_rank(comm, &transport.rank);
  MPI_Comm_size(comm, &transport.size);
  transport.context = context;
  transport.start = fmoe_mpi_start;
  transport.test = fmoe_mpi_test;
  transport.release = fmoe_mpi_release;
  transport.message_bytes = fmoe_mpi_message_bytes(comm, transport.rank, transport.size);
  status = fmoe_group_create(&transport, options, out);
  if (status) fmoe_mpi_release(context); /* the library keeps it only when it succeeds */
  return status;
}

#ifdef __cplusplus
}
#endif
#endif
