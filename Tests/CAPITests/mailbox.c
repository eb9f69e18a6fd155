#include "mailbox.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

#include "transport.h"

typedef struct request {
  struct request *next;    /* among the spare ones */
  struct request *sibling; /* among all */
  int32_t rank, live;
  int64_t left;         /* messages that have not moved */
  int64_t hold;         /* tests until it may end */
} request;

/* The i-th message of a pair: one end comes with each rank's start. */
typedef struct message {
  struct message *next;
  request *sending, *receiving;
  int sent, received; /* which ends have come */
  int stuck;          /* one end's memory is gone: it will never move */
  const void *from;
  void *to, *copy;    /* copy: of an eager sender */
  int64_t sent_size, received_size;
  int64_t tests;      /* of the receiver, before it may move */
  int64_t not_before; /* microseconds */
} message;

typedef struct seat {
  mailbox *mail;
  int32_t rank;
  atomic_int inside;           /* a call is under way */
  int sitting, released;
  int failing, silent, loud;    /* its calls give errors; its messages no longer move; its peers get errors */
  int fails_loudly;             /* the next failure will be loud */
  pthread_t owner;
  int64_t fail_start, fail_end; /* in counts of traffic; 0: never */
  mailbox_traffic traffic;
  int64_t number[MOST_RANKS];   /* messages sent to each rank */
} seat;

struct mailbox {
  pthread_mutex_t lock;
  int32_t ranks;
  mailbox_options options;
  seat seats[MOST_RANKS];
  message *pairs[MOST_RANKS][MOST_RANKS]; /* from, to; in order */
  message *spare_messages;
  request *requests; /* all there are */
  request *spare_requests, **spare_requests_end; /* first in, first out: use after the end is likely noticed */
};

static int64_t microseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Luck of message `number` of a pair: 0 ... most. */
static int64_t luck(const mailbox *m, int32_t from, int32_t to, int64_t number, int64_t most) {
  uint64_t x = m->options.seed + (uint64_t)(from * MOST_RANKS + to) * UINT64_C(0x9e3779b97f4a7c15) + (uint64_t)number;
  for (int i = 0; i < 2; i++) x = (x ^ x >> 31) * UINT64_C(0xbf58476d1ce4e5b9);
  return (int64_t)((x >> 33) % (uint64_t)(most + 1));
}

static request *make_request(mailbox *m) {
  request *r = zeros(1, sizeof *r);
  r->sibling = m->requests;
  return m->requests = r;
}

static void spare_request(mailbox *m, request *r) {
  r->live = 0, r->next = NULL;
  *m->spare_requests_end = r;
  m->spare_requests_end = &r->next;
}

static request *take_request(mailbox *m) {
  request *r = m->spare_requests;
  if (!r) return make_request(m);
  m->spare_requests = r->next;
  if (!m->spare_requests) m->spare_requests_end = &m->spare_requests;
  return r;
}

static void spare_message(mailbox *m, message *p) {
  free(p->copy);
  p->copy = NULL, p->next = m->spare_messages, m->spare_messages = p;
}

static message *take_message(mailbox *m) {
  message *p = m->spare_messages;
  if (!p) return zeros(1, sizeof *p);
  m->spare_messages = p->next;
  memset(p, 0, sizeof *p);
  return p;
}

mailbox *mailbox_create(int32_t ranks, mailbox_options options) {
  enum { SPARE = 1024 }; /* from the start, so that steps in their stride allocate nothing */
  mailbox *m = zeros(1, sizeof *m);
  if (ranks < 1 || ranks > MOST_RANKS) abort();
  pthread_mutex_init(&m->lock, NULL);
  m->ranks = ranks, m->options = options, m->spare_requests_end = &m->spare_requests;
  for (int32_t r = 0; r < ranks; r++) m->seats[r].mail = m, m->seats[r].rank = r;
  for (int i = 0; i < SPARE; i++)
    spare_message(m, zeros(1, sizeof(message))), spare_request(m, make_request(m));
  return m;
}

void mailbox_destroy(mailbox *m) {
  for (int32_t from = 0; from < m->ranks; from++)
    for (int32_t to = 0; to < m->ranks; to++)
      for (message *p = m->pairs[from][to], *next; p; p = next) next = p->next, spare_message(m, p);
  for (message *p = m->spare_messages, *next; p; p = next) next = p->next, free(p);
  for (request *r = m->requests, *next; r; r = next) next = r->sibling, free(r);
  pthread_mutex_destroy(&m->lock);
  free(m);
}

/* The first message of a pair that lacks this end, made if none does. */
static message *open_end(mailbox *m, int32_t from, int32_t to, int receiving) {
  message **at = &m->pairs[from][to];
  while (*at && (receiving ? (*at)->received : (*at)->sent)) at = &(*at)->next;
  if (!*at) *at = take_message(m);
  return *at;
}

static void post(seat *s, const fmoe_message *given, request *r) {
  mailbox *m = s->mail;
  int32_t from = given->receiving ? given->peer : s->rank, to = given->receiving ? s->rank : given->peer;
  message *p = open_end(m, from, to, given->receiving);
  if (given->receiving) {
    p->receiving = r, p->to = given->bytes, p->received_size = given->size, p->received = 1;
  } else {
    int64_t number = s->number[to]++;
    p->sending = r, p->from = given->bytes, p->sent_size = given->size, p->sent = 1;
    p->tests = luck(m, from, to, 2 * number, m->options.delay_tests);
    s->traffic.messages++, s->traffic.bytes += given->size;
    if (given->size <= SMALL_MESSAGE) s->traffic.small_messages++, s->traffic.small_bytes += given->size;
    if (m->options.eager) {
      p->from = p->copy = zeros(1, (size_t)given->size);
      memcpy(p->copy, given->bytes, (size_t)given->size);
      p->sending = NULL, r->left--;
    }
    p->not_before = luck(m, from, to, 2 * number + 1, m->options.delay_microseconds); /* once both ends are there */
  }
  if (p->sent && p->received) {
    if (m->options.delay_microseconds) p->not_before += microseconds();
    DEMAND(p->sent_size == p->received_size, "rank %d to rank %d: %lld bytes sent, %lld received", from, to,
           (long long)p->sent_size, (long long)p->received_size);
  }
}

static void break_off(seat *s) { s->failing = s->silent = 1, s->loud = s->fails_loudly; }

/* All that may move to this rank moves. */
static void move(seat *s) {
  mailbox *m = s->mail;
  int64_t now = m->options.delay_microseconds ? microseconds() : 0;
  for (int32_t from = 0; from < m->ranks; from++)
    for (message **at = &m->pairs[from][s->rank], *p; (p = *at) && !m->seats[from].silent && !s->silent;) {
      if (!p->sent || !p->received || p->stuck) break;
      if (p->tests-- > 0 || now < p->not_before) {
        if (!m->options.reorder) break;
        at = &p->next;
        continue;
      }
      if (p->sent_size == p->received_size) memcpy(p->to, p->from, (size_t)p->sent_size);
      if (p->sending) p->sending->left--;
      p->receiving->left--;
      *at = p->next;
      spare_message(m, p);
    }
}

/* Whether this rank has messages with a peer that it knows to be gone. */
static int is_lonely(const seat *s) {
  const mailbox *m = s->mail;
  for (int32_t peer = 0; peer < m->ranks; peer++) {
    if (!m->seats[peer].loud) continue;
    for (message *p = m->pairs[peer][s->rank]; p; p = p->next)
      if (p->received) return 1;
    for (message *p = m->pairs[s->rank][peer]; p; p = p->next)
      if (p->sent) return 1;
  }
  return 0;
}

static void enter(seat *s, const char *call) {
  DEMAND(!atomic_exchange(&s->inside, 1), "rank %d: two calls at once, one of them %s", s->rank, call);
  pthread_mutex_lock(&s->mail->lock);
  DEMAND(!s->released, "rank %d: %s after release", s->rank, call);
  DEMAND(s->sitting && pthread_equal(s->owner, pthread_self()),
         "rank %d: %s from a thread that is in no collective call of its", s->rank, call);
}

static int32_t leave(seat *s, int32_t status) {
  pthread_mutex_unlock(&s->mail->lock);
  atomic_store(&s->inside, 0);
  return status;
}

static int is_fine(const seat *s, const fmoe_message *given) {
  const int64_t most = s->mail->options.message_bytes ? s->mail->options.message_bytes : 60 << 10;
  return DEMAND(given->peer >= 0 && given->peer < s->mail->ranks && given->peer != s->rank,
                "rank %d: a message %s rank %d", s->rank, given->receiving ? "from" : "to", given->peer) &&
         DEMAND(given->receiving == 0 || given->receiving == 1, "rank %d: receiving %d", s->rank, given->receiving) &&
         DEMAND(given->bytes && given->size >= 1 && given->size <= most,
                "rank %d: a message of %lld bytes at %p", s->rank, (long long)given->size, given->bytes);
}

static int32_t mailbox_start(void *context, const fmoe_message *messages, int32_t count, void **out) {
  seat *s = context;
  int fine = 1;
  enter(s, "start");
  if (++s->traffic.starts == s->fail_start) break_off(s);
  if (s->failing) return leave(s, 1);
  for (int32_t i = 0; i < count; i++) fine &= is_fine(s, &messages[i]);
  if (!DEMAND(fine && count >= 0 && out, "rank %d: start", s->rank)) return leave(s, 1);
  request *r = take_request(s->mail);
  r->rank = s->rank, r->live = 1, r->left = count;
  r->hold = s->mail->options.reorder ? luck(s->mail, s->rank, s->rank, s->traffic.starts, 3) : 0;
  for (int32_t i = 0; i < count; i++) post(s, &messages[i], r);
  *out = r;
  return leave(s, 0);
}

static int32_t mailbox_test(void *context, void *given, int32_t *done) {
  seat *s = context;
  request *r = given;
  enter(s, "test");
  if (s->failing) return leave(s, 1);
  if (!DEMAND(r && r->live && r->rank == s->rank && done, "rank %d: a test of no request of its", s->rank))
    return leave(s, 1);
  move(s);
  *done = 0;
  if (r->left > 0) return leave(s, is_lonely(s));
  if (r->hold-- > 0) return leave(s, 0);
  if (s->traffic.ends + 1 == s->fail_end) return break_off(s), leave(s, 1);
  s->traffic.ends++;
  spare_request(s->mail, r);
  *done = 1;
  return leave(s, 0);
}

/* Nothing of this rank's memory may be touched from here on.  What it sent eagerly still arrives. */
static void mailbox_release(void *context) {
  seat *s = context;
  mailbox *m = s->mail;
  pthread_mutex_lock(&m->lock);
  for (int32_t peer = 0; peer < m->ranks; peer++) {
    for (message *p = m->pairs[peer][s->rank]; p; p = p->next) p->stuck |= p->received;
    for (message *p = m->pairs[s->rank][peer]; p; p = p->next) p->stuck |= p->sent && !p->copy;
  }
  s->released++;
  pthread_mutex_unlock(&m->lock);
}

fmoe_transport mailbox_transport(mailbox *m, int32_t rank) {
  return (fmoe_transport){.struct_size = sizeof(fmoe_transport), .rank = rank, .size = m->ranks,
                          .context = &m->seats[rank], .start = mailbox_start, .test = mailbox_test,
                          .release = mailbox_release, .message_bytes = m->options.message_bytes};
}

/* ---- what tests ask of a mailbox ----------------------------------------------------------- */

void mailbox_sit(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  m->seats[rank].sitting = 1, m->seats[rank].owner = pthread_self();
  pthread_mutex_unlock(&m->lock);
}

void mailbox_stand(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  m->seats[rank].sitting = 0;
  pthread_mutex_unlock(&m->lock);
}

void mailbox_fail(mailbox *m, int32_t rank, int64_t starts, int64_t ends, int loud) {
  seat *s = &m->seats[rank];
  pthread_mutex_lock(&m->lock);
  s->fail_start = starts ? s->traffic.starts + starts : 0;
  s->fail_end = ends ? s->traffic.ends + ends : 0;
  s->fails_loudly = loud;
  pthread_mutex_unlock(&m->lock);
}

void mailbox_drop(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  m->seats[rank].silent = 1;
  pthread_mutex_unlock(&m->lock);
}

int mailbox_failed(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  int has_failed = m->seats[rank].failing;
  pthread_mutex_unlock(&m->lock);
  return has_failed;
}

mailbox_traffic mailbox_sent(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  mailbox_traffic traffic = m->seats[rank].traffic;
  pthread_mutex_unlock(&m->lock);
  return traffic;
}

int32_t mailbox_released(mailbox *m, int32_t rank) {
  pthread_mutex_lock(&m->lock);
  int32_t released = m->seats[rank].released;
  pthread_mutex_unlock(&m->lock);
  return released;
}
