#include "sockets.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport.h"

typedef struct ticket { /* a request */
  struct ticket *next;
  int64_t left;         /* messages that have not moved */
} ticket;

/* One end of a message that is under way.  On the wire: its size, so that both ends can agree on it, then its bytes. */
typedef struct leg {
  struct leg *next;
  ticket *request;
  char *bytes;
  int64_t size, moved; /* of the size and the bytes together */
  int64_t announced;   /* the sender's size, as it comes in or goes out */
} leg;

typedef struct lane {
  leg *first, **end;
} lane;

struct sockets {
  int32_t ranks, rank;
  int lost;
  int64_t starts, die_at;
  int ends[MOST_RANKS][MOST_RANKS]; /* [r][p]: what rank r reads and writes to talk to p, or -1 */
  lane sending[MOST_RANKS], receiving[MOST_RANKS];
  ticket *tickets;
};

sockets *sockets_create(int32_t ranks) {
  sockets *s = zeros(1, sizeof *s);
  s->ranks = ranks, s->rank = -1;
  memset(s->ends, -1, sizeof s->ends);
  for (int32_t r = 0; r < ranks; r++) {
    s->sending[r].end = &s->sending[r].first, s->receiving[r].end = &s->receiving[r].first;
    for (int32_t peer = 0, pair[2]; peer < r; peer++) {
      if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) abort();
      s->ends[r][peer] = pair[0], s->ends[peer][r] = pair[1];
    }
  }
  return s;
}

/* Closes what is not this rank's; of no rank's, everything. */
static void keep_ends(sockets *s, int32_t rank) {
  for (int32_t r = 0; r < s->ranks; r++)
    for (int32_t peer = 0; peer < s->ranks; peer++)
      if (r != rank && s->ends[r][peer] >= 0) close(s->ends[r][peer]), s->ends[r][peer] = -1;
}

static void drop_legs(lane *l) {
  for (leg *p = l->first, *next; p; p = next) next = p->next, free(p);
}

void sockets_close(sockets *s) {
  keep_ends(s, -1);
  for (int32_t r = 0; r < s->ranks; r++) drop_legs(&s->sending[r]), drop_legs(&s->receiving[r]);
  for (ticket *t = s->tickets, *next; t; t = next) next = t->next, free(t);
  free(s);
}

void sockets_die(sockets *s, int64_t starts) { s->die_at = s->starts + starts; }

/* The next bytes of a leg through the socket: how many, 0 if none now, -1 if the peer is gone. */
static int64_t push(int end, leg *p, int receiving) {
  int64_t head = sizeof p->announced, at = p->moved;
  char *bytes = at < head ? (char *)&p->announced + at : p->bytes + (at - head);
  size_t count = (size_t)(at < head ? head - at : head + p->size - at);
  ssize_t moved = receiving ? recv(end, bytes, count, MSG_DONTWAIT)
                            : send(end, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (moved > 0) return moved;
  return moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

static void drive(sockets *s, int32_t peer, lane *l, int receiving) {
  for (leg *p; (p = l->first);) {
    int64_t moved = push(s->ends[s->rank][peer], p, receiving);
    if (moved < 0) s->lost = 1;
    if (moved <= 0) return;
    p->moved += moved;
    if (receiving && p->moved == sizeof p->announced &&
        !DEMAND(p->announced == p->size, "rank %d to rank %d: %lld bytes sent, %lld received", peer, s->rank,
               (long long)p->announced, (long long)p->size)) {
      s->lost = 1;
      return;
    }
    if (p->moved < (int64_t)sizeof p->announced + p->size) continue;
    p->request->left--;
    l->first = p->next;
    if (!l->first) l->end = &l->first;
    free(p);
  }
}

static int32_t sockets_start(void *context, const fmoe_message *messages, int32_t count, void **request) {
  sockets *s = context;
  if (++s->starts == s->die_at) raise(SIGKILL);
  if (s->lost) return 1;
  ticket *t = zeros(1, sizeof *t);
  t->next = s->tickets, s->tickets = t, t->left = count;
  for (int32_t i = 0; i < count; i++) {
    lane *l = messages[i].receiving ? &s->receiving[messages[i].peer] : &s->sending[messages[i].peer];
    leg *p = zeros(1, sizeof *p);
    p->request = t, p->bytes = messages[i].bytes, p->size = messages[i].size;
    p->announced = messages[i].receiving ? 0 : p->size;
    *l->end = p, l->end = &p->next;
  }
  *request = t;
  return 0;
}

static int32_t sockets_test(void *context, void *request, int32_t *done) {
  sockets *s = context;
  ticket *t = request, **at = &s->tickets;
  for (int32_t peer = 0; peer < s->ranks; peer++) {
    if (peer == s->rank) continue;
    drive(s, peer, &s->sending[peer], 0);
    drive(s, peer, &s->receiving[peer], 1);
  }
  *done = t->left == 0;
  if (!*done) return s->lost;
  while (*at != t) at = &(*at)->next;
  *at = t->next;
  free(t);
  return 0;
}

static void sockets_release(void *context) { sockets_close(context); }

fmoe_transport sockets_transport(sockets *s, int32_t rank) {
  keep_ends(s, rank);
  s->rank = rank;
  return (fmoe_transport){.struct_size = sizeof(fmoe_transport), .rank = rank, .size = s->ranks, .context = s,
                          .start = sockets_start, .test = sockets_test, .release = sockets_release};
}
