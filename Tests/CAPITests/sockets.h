/* sockets.h: a transport for tests that joins processes, which may die. */
#ifndef SOCKETS_H
#define SOCKETS_H
#include "mailbox.h" /* MOST_RANKS, of both */

typedef struct sockets sockets;
sockets *sockets_create(int32_t ranks); /* before the ranks fork */
fmoe_transport sockets_transport(sockets *s, int32_t rank); /* in the rank's own process; release closes and frees */
void sockets_close(sockets *s);                             /* in a process that is no rank */
void sockets_die(sockets *s, int64_t starts); /* this process kills itself at that start from now: 1 is the next */

#endif
