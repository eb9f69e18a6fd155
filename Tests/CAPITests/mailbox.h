/* mailbox.h: a transport for tests that joins ranks that are threads of this process.
 *
 * It delays, reorders, fails and counts on demand, and checks that its caller, the library, keeps the contract of
 * fmoe_transport. */
#ifndef MAILBOX_H
#define MAILBOX_H
#include "fastermoe.h"

enum { MOST_RANKS = 8, SMALL_MESSAGE = 1024 /* bytes: up to here a message counts as small */ };

typedef struct mailbox mailbox;
typedef struct mailbox_options {
  uint64_t seed;           /* of all that follows; a message's luck depends on its pair and number, not on timing */
  int32_t delay_tests;     /* a message moves only after up to this many tests of its receiver */
  int32_t delay_microseconds; /* and up to this long after both its ends are there */
  int32_t reorder;         /* 1: a delayed message holds nobody up, and requests end some tests after their messages */
  int32_t eager;           /* 1: a sent message is copied and counts as moved at once, like small ones in MPI */
  int64_t message_bytes;   /* the transport's */
} mailbox_options;

mailbox *mailbox_create(int32_t ranks, mailbox_options options);
void mailbox_destroy(mailbox *m);
fmoe_transport mailbox_transport(mailbox *m, int32_t rank);

/* From now on the calling thread, and no other, makes this rank's collective calls; after `stand`, nobody does. */
void mailbox_sit(mailbox *m, int32_t rank);
void mailbox_stand(mailbox *m, int32_t rank);

/* Faults, from now on: the rank's `starts`-th start, or the `ends`-th test that would end a request, and all its calls
 * after that give an error (0: never).  Its messages no longer move; if `loud`, peers that wait for it get errors. */
void mailbox_fail(mailbox *m, int32_t rank, int64_t starts, int64_t ends, int loud);
void mailbox_drop(mailbox *m, int32_t rank); /* its messages no longer move, and nobody is told */

typedef struct mailbox_traffic { /* of one rank, since the mailbox was made */
  int64_t starts, ends;          /* requests */
  int64_t messages, bytes;       /* sent */
  int64_t small_messages, small_bytes;
} mailbox_traffic;
int mailbox_failed(mailbox *m, int32_t rank); /* whether what mailbox_fail asked for has happened */
mailbox_traffic mailbox_sent(mailbox *m, int32_t rank);
int32_t mailbox_released(mailbox *m, int32_t rank); /* how often */

#endif
