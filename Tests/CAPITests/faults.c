/* faults.c: several workers when one of them is wrong, late, silent or dead.  Every rank gets a status, nobody waits
 * longer than it asked to, and where only an argument was wrong the group goes on to the right results. */
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "crew.h"

static const uint64_t seed = 17320508;
/* Seconds beyond timeout_seconds, and for what happens "at once": a loaded machine may leave a thread out that long. */
static const double slack = 3;

/* ---- a step, call by call ------------------------------------------------------------------ */

enum { CREATE, BEGIN, PLAN, FORWARD, BACKWARD, REDUCE, PLACES };
static const char *const place_names[PLACES] = {"layer_create", "gate or route", "plan",
                                                "forward",      "backward",      "reduce_gradients"};
static char untouched; /* its address: an out-parameter nobody has written to */

/* A rank with its part of a problem. */
typedef struct seat {
  fmoe_group *group;
  const oracle *o;
  fmoe_layer *layer;
  batch b; /* once there is a layer */
} seat;

static seat seat_of(crew *c, int32_t rank, const spread *s) {
  return (seat){.group = c->groups[rank], .o = s->part[rank]};
}

/* A layer for the seat, with the oracle's values. */
static fmoe_status create(seat *at, const fmoe_layer_options *options) {
  fmoe_layer *layer = (fmoe_layer *)(void *)&untouched;
  fmoe_status status = fmoe_layer_create(at->group, options, &layer);
  if (status != FMOE_OK) return CHECK((void *)layer == &untouched, "layer_create wrote to its out"), status;
  at->layer = layer;
  set_values(layer, at->o);
  at->b = batch_of(at->o, layer);
  return status;
}

static fmoe_status start_pass(seat *at, int routed) {
  fmoe_pass *pass = (fmoe_pass *)(void *)&untouched;
  fmoe_status status = routed ? fmoe_route(at->layer, at->b.x, at->o->tokens, at->b.choice, at->b.weight, &pass)
                              : fmoe_gate(at->layer, at->b.x, at->o->tokens, &pass);
  if (status != FMOE_OK) return CHECK((void *)pass == &untouched, "the call wrote to its out"), status;
  at->b.pass = pass;
  return status;
}

/* The right call at this place of a step. */
static fmoe_status call(seat *at, int place) {
  fmoe_layer_options options = options_of(at->o);
  switch (place) {
    case CREATE: return create(at, &options);
    case BEGIN: return start_pass(at, at->o->routed);
    case PLAN: return fmoe_plan(at->b.pass, NULL, NULL);
    case FORWARD: return fmoe_forward(at->b.pass, at->b.y);
    case BACKWARD:
      return fmoe_backward(at->b.pass, at->b.grad_y, at->b.grad_x, at->o->routed ? at->b.grad_weight : NULL);
    default: return fmoe_layer_reduce_gradients(at->layer);
  }
}

static void leave_seat(seat *at) {
  batch_free(&at->b);
  fmoe_layer_destroy(at->layer);
}

static void check_step(const char *what, seat *at) {
  read_gradients(&at->b, at->layer);
  check_batch(what, &at->b, at->o), check_gradients(what, &at->b, at->o);
}

static void run_step(crew *c, int32_t rank, void *context) {
  seat at = seat_of(c, rank, context);
  for (int place = CREATE; place < PLACES; place++) EXPECT(FMOE_OK, call(&at, place));
  check_step("a step", &at);
  leave_seat(&at);
}

static spread *small_spread(int32_t ranks, int routing) {
  static const int64_t tokens[MOST_RANKS] = {5, 3, 4, 7};
  const shape shape = {.k = 2, .E = 2 * ranks, .d = 6, .h = 7, .activation = FMOE_GELU, .balance = 0.1};
  return spread_create(ranks, tokens, routing, shape, seed);
}

/* Alone again: a group of one in this process computes a step. */
static void check_life_goes_on(void) {
  spread *s = small_spread(1, GATED);
  crew *c = crew_create((crew_options){.ranks = 1});
  run_step(c, 0, s);
  crew_destroy(c);
  spread_destroy(s);
}

/* ---- one rank's call is wrong -------------------------------------------------------------- */

typedef fmoe_status wrong_call(seat *at, int variant);

static fmoe_status create_without_options(seat *at, int variant) {
  fmoe_layer_options options = options_of(at->o);
  fmoe_layer *layer;
  return variant ? fmoe_layer_create(at->group, &options, NULL) : fmoe_layer_create(at->group, NULL, &layer);
}

static fmoe_status create_changed(seat *at, int variant) {
  fmoe_layer_options o = options_of(at->o);
  switch (variant) {
    case -3: o.struct_size = 4; break; /* the negative ones are wrong by themselves */
    case -2: o.d_hidden = -1; break;
    case -1: o.experts++; break; /* no multiple of W */
    case 0: o.d_hidden++; break; /* the others would be fine if all passed them */
    case 1: o.d_model++; break;
    case 2: o.top_k--; break;
    case 3: o.activation = FMOE_SWIGLU; break;
    case 4: o.seed++; break;
    case 5: o.balance_loss += 1; break;
    case 6: o.z_loss += 1; break;
    case 8: o.gate = FMOE_GATE_NOISY; break;
    case 9: o.input_jitter += 0.25; break;
    case 10: o.bias_step += 0.25; break;
    default: o.experts *= 2; break;
  }
  return create(at, &o);
}

static fmoe_status begin_wrongly(seat *at, int variant) {
  const float *x = at->b.x, *weight = at->b.weight;
  const int32_t *choice = at->b.choice;
  fmoe_pass *pass = (fmoe_pass *)(void *)&untouched;
  int64_t n = at->o->tokens;
  fmoe_status status;
  switch (variant) {
    case 0: status = fmoe_gate(at->layer, x, -1, &pass); break;
    case 1: status = fmoe_gate(at->layer, NULL, n, &pass); break;
    case 2: return fmoe_gate(at->layer, x, n, NULL);
    case 3: status = fmoe_gate(at->layer, x, INT64_C(1) << 50, &pass); break; /* for which no machine has memory */
    case 4: status = fmoe_route(at->layer, x, -1, choice, weight, &pass); break;
    case 5: status = fmoe_route(at->layer, NULL, n, choice, weight, &pass); break;
    case 6: status = fmoe_route(at->layer, x, n, NULL, weight, &pass); break;
    case 7: status = fmoe_route(at->layer, x, n, choice, NULL, &pass); break;
    case 8: return fmoe_route(at->layer, x, n, choice, weight, NULL);
    default: { /* the last choice is out of range, by one to either side */
      int32_t last = at->b.choice[n * at->o->choices - 1];
      at->b.choice[n * at->o->choices - 1] = variant == 9 ? -2 : (int32_t)at->o->experts;
      status = fmoe_route(at->layer, x, n, choice, weight, &pass);
      at->b.choice[n * at->o->choices - 1] = last;
    }
  }
  CHECK((void *)pass == &untouched, "the call wrote to its out");
  return status;
}

static fmoe_status evaluate_alone(seat *at, int variant) {
  fmoe_pass *pass = NULL;
  EXPECT(FMOE_OK, fmoe_layer_set_training(at->layer, variant));
  fmoe_status status = fmoe_gate(at->layer, at->b.x, at->o->tokens, &pass);
  EXPECT(FMOE_OK, fmoe_layer_set_training(at->layer, 1));
  return status;
}

static fmoe_status plan_wrongly(seat *at, int variant) {
  fmoe_plan_options o = {.struct_size = sizeof o};
  fmoe_plan_report report = {.struct_size = 0};
  switch (variant) {
    case 0: o.struct_size = 0; break;
    case 1: o.group_size = -1; break;
    case 2: o.shadowing = 77; break;
    case 3: o.schedule = -1; break;
    case 4: return fmoe_plan(at->b.pass, NULL, &report);
    default: o.shadowing = 1; break; /* fine, but not what the others plan */
  }
  return fmoe_plan(at->b.pass, &o, NULL);
}

static fmoe_status forward_without_output(seat *at, int variant) {
  return (void)variant, fmoe_forward(at->b.pass, NULL);
}

static fmoe_status backward_wrongly(seat *at, int variant) {
  const batch *b = &at->b;
  float unasked[64];
  if (variant == 2) return fmoe_backward(b->pass, b->grad_y, b->grad_x, unasked); /* the gate takes that gradient */
  return variant ? fmoe_backward(b->pass, b->grad_y, NULL, NULL) : fmoe_backward(b->pass, NULL, b->grad_x, NULL);
}

/* A call that is right by itself, while the others are in another one. */
static fmoe_status call_elsewhere(seat *at, int place) {
  fmoe_layer *layer = at->layer;
  fmoe_layer_options options = options_of(at->o);
  if (place == CREATE) return fmoe_layer_create(at->group, &options, &layer);
  return call(at, place);
}

/* A pass of the layer's gate where the others route, or the other way round. */
static fmoe_status begin_elsewhere(seat *at, int variant) { return (void)variant, start_pass(at, !at->o->routed); }

static const struct fault {
  const char *name;
  int place, routed;
  wrong_call *call;
  int variant;
  fmoe_status own, other, peers; /* what the rank may answer, what the others do */
} faults[] = {
#define OWN(status) FMOE_ERROR_##status, FMOE_ERROR_##status, FMOE_ERROR_PEER
#define EITHER(a, b) FMOE_ERROR_##a, FMOE_ERROR_##b, FMOE_ERROR_PEER
#define ALL_DISAGREE FMOE_ERROR_DISAGREE, FMOE_ERROR_DISAGREE, FMOE_ERROR_DISAGREE
    {"no options", CREATE, 0, create_without_options, 0, OWN(ARGUMENT)},
    {"no out", CREATE, 0, create_without_options, 1, OWN(ARGUMENT)},
    {"short options", CREATE, 0, create_changed, -3, OWN(OPTIONS)},
    {"negative width", CREATE, 0, create_changed, -2, OWN(ARGUMENT)},
    {"experts no multiple of W", CREATE, 0, create_changed, -1, OWN(ARGUMENT)},
    {"other d_hidden", CREATE, 0, create_changed, 0, ALL_DISAGREE},
    {"other d_model", CREATE, 0, create_changed, 1, ALL_DISAGREE},
    {"other top_k", CREATE, 0, create_changed, 2, ALL_DISAGREE},
    {"other activation", CREATE, 0, create_changed, 3, ALL_DISAGREE},
    {"other seed", CREATE, 0, create_changed, 4, ALL_DISAGREE},
    {"other balance_loss", CREATE, 0, create_changed, 5, ALL_DISAGREE},
    {"other z_loss", CREATE, 0, create_changed, 6, ALL_DISAGREE},
    {"other experts", CREATE, 0, create_changed, 7, ALL_DISAGREE},
    {"other gate", CREATE, 0, create_changed, 8, ALL_DISAGREE},
    {"evaluating, the others train", BEGIN, 0, evaluate_alone, 0, ALL_DISAGREE},
    {"negative n", BEGIN, 0, begin_wrongly, 0, OWN(ARGUMENT)},
    {"no tokens", BEGIN, 0, begin_wrongly, 1, OWN(ARGUMENT)},
    {"no out", BEGIN, 0, begin_wrongly, 2, OWN(ARGUMENT)},
    {"huge n", BEGIN, 0, begin_wrongly, 3, EITHER(ARGUMENT, MEMORY)},
    {"negative n", BEGIN, 1, begin_wrongly, 4, OWN(ARGUMENT)},
    {"no tokens", BEGIN, 1, begin_wrongly, 5, OWN(ARGUMENT)},
    {"no choices", BEGIN, 1, begin_wrongly, 6, OWN(ARGUMENT)},
    {"no weights", BEGIN, 1, begin_wrongly, 7, OWN(ARGUMENT)},
    {"no out", BEGIN, 1, begin_wrongly, 8, OWN(ARGUMENT)},
    {"choice -2", BEGIN, 1, begin_wrongly, 9, OWN(ARGUMENT)},
    {"choice E", BEGIN, 1, begin_wrongly, 10, OWN(ARGUMENT)},
    {"short options", PLAN, 0, plan_wrongly, 0, OWN(OPTIONS)},
    {"negative group_size", PLAN, 0, plan_wrongly, 1, OWN(ARGUMENT)},
    {"shadowing 77", PLAN, 0, plan_wrongly, 2, EITHER(ARGUMENT, OPTIONS)},
    {"schedule -1", PLAN, 0, plan_wrongly, 3, EITHER(ARGUMENT, OPTIONS)},
    {"report without room", PLAN, 0, plan_wrongly, 4, OWN(OPTIONS)},
    {"other plan", PLAN, 0, plan_wrongly, 5, ALL_DISAGREE},
    {"no output", FORWARD, 0, forward_without_output, 0, OWN(ARGUMENT)},
    {"no grad_output", BACKWARD, 0, backward_wrongly, 0, OWN(ARGUMENT)},
    {"no grad_tokens", BACKWARD, 1, backward_wrongly, 1, OWN(ARGUMENT)},
    {"grad_weights after gate", BACKWARD, 0, backward_wrongly, 2, OWN(ARGUMENT)},
    {"gate, the others route", BEGIN, 1, begin_elsewhere, 0, ALL_DISAGREE},
    {"route, the others gate", BEGIN, 0, begin_elsewhere, 0, ALL_DISAGREE},
    {"a layer, the others gate", BEGIN, 0, call_elsewhere, CREATE, ALL_DISAGREE},
    {"forward, the others plan", PLAN, 0, call_elsewhere, FORWARD, ALL_DISAGREE},
    {"reduce, the others go forward", FORWARD, 0, call_elsewhere, REDUCE, ALL_DISAGREE},
    {"reduce, the others go backward", BACKWARD, 1, call_elsewhere, REDUCE, ALL_DISAGREE},
    {"a layer, the others reduce", REDUCE, 0, call_elsewhere, CREATE, ALL_DISAGREE},
};

typedef struct wrong_step {
  const struct fault *fault;
  int32_t culprit; /* or -1: everybody */
  spread *s;
} wrong_step;

static void run_wrong_step(crew *c, int32_t rank, void *context) {
  const wrong_step *w = context;
  const struct fault *f = w->fault;
  const int is_wrong = w->culprit < 0 || w->culprit == rank;
  char what[200];
  seat at = seat_of(c, rank, w->s);
  snprintf(what, sizeof what, "%s: %s by %s%d", place_names[f->place], f->name, w->culprit < 0 ? "all " : "rank ",
           w->culprit < 0 ? c->ranks : w->culprit);
  for (int place = CREATE; place < PLACES; place++) {
    if (place == f->place) {
      fmoe_status status = is_wrong ? f->call(&at, f->variant) : call(&at, place);
      int fits = is_wrong ? status == f->own || status == f->other : status == f->peers;
      CHECK(fits && *fmoe_last_error(), "%s: rank %d of %d got %s \"%s\"", what, rank, c->ranks,
            fmoe_status_name(status), fmoe_last_error());
    }
    if (!EXPECT(FMOE_OK, call(&at, place))) break; /* the group goes on */
  }
  check_step(what, &at);
  leave_seat(&at);
}

static crew *patient_crew(int32_t ranks, int over_mailbox) {
  return crew_create((crew_options){.ranks = ranks, .over_mailbox = over_mailbox, .timeout = 20});
}

/* One group lives through all of it. */
static void test_wrong_calls(void) {
  const int32_t ranks = 3;
  spread *spreads[2] = {small_spread(ranks, GATED), small_spread(ranks, BALANCED)};
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    crew *c = patient_crew(ranks, over_mailbox);
    for (int32_t i = 0; i < (int32_t)(sizeof faults / sizeof *faults); i++) {
      wrong_step w = {.fault = &faults[i], .culprit = i % ranks, .s = spreads[faults[i].routed]};
      crew_run(c, run_wrong_step, &w);
      w.culprit = -1;
      if (faults[i].peers == FMOE_ERROR_PEER) crew_run(c, run_wrong_step, &w); /* all who disagree agree */
    }
    crew_destroy(c);
  }
  spread_destroy(spreads[0]), spread_destroy(spreads[1]);
}

/* A rank takes the wrong one of its two passes: its stage does not fit, and the others' pass stays where it was. */
static void run_wrong_stages(crew *c, int32_t rank, void *context) {
  const int is_wrong = rank == 1;
  const fmoe_status expected = is_wrong ? FMOE_ERROR_STAGE : FMOE_ERROR_PEER;
  seat at = seat_of(c, rank, context);
  EXPECT(FMOE_OK, call(&at, CREATE));
  batch first = batch_of(at.o, at.layer), *second = &at.b;
  begin(&first, at.layer), forward(&first);
  begin(second, at.layer);
  EXPECT(expected, fmoe_plan(is_wrong ? first.pass : second->pass, NULL, NULL));
  EXPECT(FMOE_OK, call(&at, PLAN));
  EXPECT(expected, fmoe_forward(is_wrong ? first.pass : second->pass, second->y));
  EXPECT(expected, fmoe_backward(is_wrong ? second->pass : first.pass, first.grad_y, first.grad_x, NULL));
  forward(second);
  backward(&first);
  EXPECT(FMOE_OK, fmoe_layer_zero_gradients(at.layer));
  EXPECT(expected, fmoe_backward(is_wrong ? first.pass : second->pass, second->grad_y, second->grad_x, NULL));
  EXPECT(FMOE_OK, call(&at, BACKWARD));
  EXPECT(FMOE_OK, call(&at, REDUCE));
  check_step("after wrong stages", &at);
  check_batch("after wrong stages", &first, at.o);
  batch_free(&first);
  leave_seat(&at);
}

static void test_wrong_stages(void) {
  spread *s = small_spread(3, GATED);
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    crew *c = patient_crew(3, over_mailbox);
    crew_run(c, run_wrong_stages, s);
    crew_destroy(c);
  }
  spread_destroy(s);
}

/* One rank's options for its group are wrong: there is no group, and nothing keeps the transports, which try again. */
static void run_wrong_join(crew *c, int32_t rank, void *context) {
  const int variant = *(int *)context, is_wrong = rank == 1;
  fmoe_transport transport = mailbox_transport(c->mail, rank);
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .bind = 1, .timeout_seconds = 20};
  fmoe_group *group = (fmoe_group *)(void *)&untouched;
  if (is_wrong && variant == 0) o.threads = -1;
  if (is_wrong && variant == 1) o.topology = "/no/such/folder/machine.xml";
  if (is_wrong && variant == 2) o.struct_size = 0;
  EXPECT_EITHER(!is_wrong ? FMOE_ERROR_PEER : variant == 0 ? FMOE_ERROR_ARGUMENT : variant == 1 ? FMOE_ERROR_FILE
                                                                                                 : FMOE_ERROR_OPTIONS,
                is_wrong && variant == 1 ? FMOE_ERROR_TOPOLOGY : FMOE_ERROR_PEER,
                fmoe_group_create(&transport, &o, &group));
  CHECK((void *)group == &untouched && mailbox_released(c->mail, rank) == 0, "there is no group that keeps anything");
  EXPECT(FMOE_OK, crew_join(c, rank));
}

static void test_wrong_joins(void) {
  spread *s = small_spread(3, GATED);
  for (int variant = 0; variant < 3; variant++) {
    crew *c = crew_without_groups((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 20});
    crew_run(c, run_wrong_join, &variant);
    crew_run(c, run_step, s);
    crew_destroy(c);
  }
  spread_destroy(s);
}

/* ---- one rank is lost ---------------------------------------------------------------------- */

static int is_lost(fmoe_status status) { return status == FMOE_ERROR_PEER || status == FMOE_ERROR_TIMEOUT; }

/* In a broken group every collective call fails, and does not wait for it. */
static void check_broken(const char *what, seat *at, double at_once) {
  for (int turn = 0; turn < 4; turn++) {
    double start = seconds();
    fmoe_status status = turn == 0 || !at->layer ? call(at, CREATE) : turn == 1 ? start_pass(at, 0)
                         : turn == 2                                ? start_pass(at, 1)
                                                                    : call(at, REDUCE);
    double took = seconds() - start;
    CHECK(is_lost(status) && took < at_once, "%s: call %d of a broken group: %s after %.3f s", what, turn,
          fmoe_status_name(status), took);
  }
}

enum { POISON = 0xa5 };

static void poison(seat *at) {
  size_t bytes = (size_t)(at->o->tokens * at->o->model) * sizeof(float);
  if (at->layer) memset(at->b.y, POISON, bytes), memset(at->b.grad_x, POISON, bytes);
}

static void check_poison(const char *what, const seat *at) {
  const unsigned char *y = (const unsigned char *)at->b.y, *grad_x = (const unsigned char *)at->b.grad_x;
  int64_t bytes = at->layer ? at->o->tokens * at->o->model * (int64_t)sizeof(float) : 0;
  for (int64_t i = 0; i < bytes; i++)
    if (y[i] != POISON || grad_x[i] != POISON) i = bytes, CHECK(0, "%s: written to after the call had returned", what);
}

typedef struct silence {
  spread *s;
  int place;
  int32_t absent;
  double timeout;
  atomic_int timeouts;
  pthread_barrier_t given_up, came;
} silence;

/* A rank does not call.  The others give up; then it calls after all, into memory that is no longer theirs to give. */
static void run_silence(crew *c, int32_t rank, void *context) {
  silence *q = context;
  const int is_absent = rank == q->absent;
  char what[200];
  seat at = seat_of(c, rank, q->s);
  snprintf(what, sizeof what, "%s: rank %d of %d, where %d does not call %s", c->mail ? "mailbox" : "local", rank,
           c->ranks, q->absent, place_names[q->place]);
  for (int place = CREATE; place < q->place; place++) EXPECT(FMOE_OK, call(&at, place));
  if (!is_absent) {
    double start = seconds();
    fmoe_status status = call(&at, q->place);
    double took = seconds() - start;
    if (status == FMOE_ERROR_TIMEOUT) q->timeouts++;
    CHECK(is_lost(status) && took < q->timeout + slack, "%s: %s after %.3f s", what, fmoe_status_name(status), took);
    CHECK(status != FMOE_ERROR_TIMEOUT || took > 0.9 * q->timeout, "%s: given up after %.3f s", what, took);
    poison(&at);
  }
  pthread_barrier_wait(&q->given_up);
  if (is_absent) {
    /* Over a transport it may find its peers' messages of that call and even succeed, but not in the next. */
    fmoe_status status = FMOE_OK;
    for (int turn = 0; status == FMOE_OK && turn < (c->mail ? 3 : 1); turn++) {
      double start = seconds();
      status = call(&at, !turn ? q->place : at.layer && turn == 2 ? REDUCE : CREATE);
      double took = seconds() - start;
      CHECK(took < (c->mail ? q->timeout + slack : q->timeout), "%s: late, took %.3f s", what, took);
    }
    CHECK(is_lost(status), "%s: late, got %s", what, fmoe_status_name(status));
  }
  pthread_barrier_wait(&q->came);
  if (!is_absent) check_poison(what, &at);
  check_broken(what, &at, q->timeout);
  leave_seat(&at);
}

static void test_silent_rank(void) {
  const int32_t ranks = 3;
  spread *s = small_spread(ranks, GATED);
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++)
    for (int place = CREATE; place < PLACES; place++) {
      silence q = {.s = s, .place = place, .absent = place % ranks, .timeout = 0.4};
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = over_mailbox, .timeout = q.timeout});
      if (pthread_barrier_init(&q.given_up, NULL, ranks) || pthread_barrier_init(&q.came, NULL, ranks)) abort();
      crew_run(c, run_silence, &q);
      CHECK(q.timeouts > 0, "who waits longest says TIMEOUT");
      pthread_barrier_destroy(&q.given_up), pthread_barrier_destroy(&q.came);
      crew_destroy(c);
    }
  spread_destroy(s);
  check_life_goes_on();
  injected("a rank that does not call, in every call of a step, and calls too late", 2 * PLACES,
           "FMOE_ERROR_TIMEOUT; nothing is written after a call has returned");
}

/* A rank never comes to the group. */
static void run_absence(crew *c, int32_t rank, void *context) {
  const double start = seconds();
  (void)context;
  if (rank == 1) return;
  fmoe_status status = crew_join(c, rank);
  CHECK(is_lost(status) && seconds() - start < c->options.timeout + slack, "%s after %.3f s", fmoe_status_name(status),
        seconds() - start);
}

static void test_absent_rank(void) {
  crew *c = crew_without_groups((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 0.4});
  crew_run(c, run_absence, NULL);
  for (int32_t r = 0; r < 3; r++)
    CHECK(!c->groups[r] && mailbox_released(c->mail, r) == 0, "rank %d: no group, nothing to release", r);
  crew_destroy(c);
}

typedef struct departure {
  spread *s;
  int place;
} departure;

/* The last rank destroys all it has while the others wait for it, without any timeout. */
static void run_departure(crew *c, int32_t rank, void *context) {
  const departure *d = context;
  char what[100];
  seat at = seat_of(c, rank, d->s);
  snprintf(what, sizeof what, "rank %d, left alone in %s", rank, place_names[d->place]);
  for (int place = CREATE; place < d->place; place++) EXPECT(FMOE_OK, call(&at, place));
  if (rank == c->ranks - 1) {
    usleep(30000); /* by then the others most likely wait; if not, they find it gone */
    fmoe_group_destroy(c->groups[rank]), c->groups[rank] = NULL;
    leave_seat(&at);
    return;
  }
  double start = seconds();
  fmoe_status status = call(&at, d->place);
  CHECK(status == FMOE_ERROR_PEER && seconds() - start < slack, "%s: %s after %.3f s", what, fmoe_status_name(status),
        seconds() - start);
  check_broken(what, &at, slack);
  leave_seat(&at);
}

static void test_leaving_rank(void) {
  departure d = {.s = small_spread(3, GATED)};
  for (d.place = CREATE; d.place < PLACES; d.place++) {
    crew *c = crew_create((crew_options){.ranks = 3});
    crew_run(c, run_departure, &d);
    crew_destroy(c);
  }
  spread_destroy(d.s);
  injected("a rank of threads that destroys its group while others wait", PLACES, "FMOE_ERROR_PEER at once");
}

/* From one call on, a rank's messages do not arrive, nor do messages to it; it does not know. */
static void run_dropped(crew *c, int32_t rank, void *context) {
  const departure *d = context;
  char what[100];
  seat at = seat_of(c, rank, d->s);
  snprintf(what, sizeof what, "rank %d, where rank 1 is cut off in %s", rank, place_names[d->place]);
  for (int place = CREATE; place < d->place; place++) EXPECT(FMOE_OK, call(&at, place));
  if (rank == 1) mailbox_drop(c->mail, 1);
  double start = seconds();
  fmoe_status status = call(&at, d->place);
  if (status == FMOE_OK && rank != 1) status = call(&at, REDUCE); /* had it before the cut: not the next time */
  CHECK(is_lost(status) && seconds() - start < 2 * (c->options.timeout + slack), "%s: %s after %.3f s", what,
        fmoe_status_name(status), seconds() - start);
  check_broken(what, &at, c->options.timeout);
  leave_seat(&at);
}

static void test_dropped_messages(void) {
  departure d = {.s = small_spread(3, GATED)};
  for (d.place = CREATE; d.place < PLACES; d.place++) {
    crew *c = crew_create((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 0.3});
    crew_run(c, run_dropped, &d);
    crew_destroy(c);
  }
  spread_destroy(d.s);
  injected("a rank cut off from the others, in every call of a step", PLACES, "FMOE_ERROR_TIMEOUT or FMOE_ERROR_PEER");
}

/* ---- the transport fails ------------------------------------------------------------------- */

typedef struct failure {
  spread *s;
  int32_t rank;               /* whose transport */
  int64_t starts, ends;       /* at which of its calls, see mailbox_fail */
  int loud, after_join;       /* whether the count begins once there are groups */
  mailbox_traffic clean;      /* out: of that rank, up to the end of the step */
  fmoe_status status[MOST_RANKS]; /* out */
} failure;

/* A step and two calls more, in which at the latest all ranks notice. */
static void run_failure(crew *c, int32_t rank, void *context) {
  failure *f = context;
  if (rank == f->rank && !f->after_join) mailbox_fail(c->mail, rank, f->starts, f->ends, f->loud);
  f->status[rank] = crew_join(c, rank);
  if (f->status[rank] != FMOE_OK) return;
  const mailbox_traffic joined = mailbox_sent(c->mail, rank);
  if (rank == f->rank && f->after_join) mailbox_fail(c->mail, rank, f->starts, f->ends, f->loud);
  seat at = seat_of(c, rank, f->s);
  for (int place = CREATE; f->status[rank] == FMOE_OK && place < PLACES + 2; place++) {
    if (place == PLACES && rank == f->rank) {
      f->clean = mailbox_sent(c->mail, rank);
      if (f->after_join) f->clean.starts -= joined.starts, f->clean.ends -= joined.ends;
    }
    f->status[rank] = call(&at, place < PLACES ? place : REDUCE);
  }
  if (f->status[rank] != FMOE_OK) check_broken("a transport failed", &at, slack);
  leave_seat(&at);
}

static long long failures; /* that check_failure has made */

static void check_failure(failure f, int32_t ranks, double timeout) {
  crew *c = crew_without_groups((crew_options){.ranks = ranks, .over_mailbox = 1, .timeout = timeout});
  double start = seconds();
  failures++;
  crew_run(c, run_failure, &f);
  double took = seconds() - start;
  const int happened = mailbox_failed(c->mail, f.rank);
  for (int32_t r = 0; r < ranks; r++) {
    const int had_group = c->groups[r] != NULL;
    CHECK(happened ? is_lost(f.status[r]) : f.status[r] == FMOE_OK,
          "%d ranks, %s: rank %d fails at start %lld, end %lld%s: rank %d got %s", ranks, f.loud ? "loud" : "silent",
          f.rank, (long long)f.starts, (long long)f.ends, f.after_join ? " with a group" : "", r,
          fmoe_status_name(f.status[r]));
    fmoe_group_destroy(c->groups[r]), c->groups[r] = NULL;
    CHECK(mailbox_released(c->mail, r) == had_group, "rank %d: released %d times", r, mailbox_released(c->mail, r));
  }
  CHECK(took < 4 * timeout + slack, "%s failure took %.3f s", f.loud ? "a loud" : "a silent", took);
  crew_destroy(c);
}

/* At every start and at the end of every request, loudly; at some of them silently, since each takes a timeout. */
static void test_failing_transport(void) {
  enum { SILENT_POINTS = 6 };
  static const double loud_timeout = 20, silent_timeout = 0.2;
  for (int32_t ranks = 2; ranks <= 3; ranks++) {
    failure f = {.s = small_spread(ranks, GATED), .after_join = ranks == 3};
    crew *c = crew_without_groups((crew_options){.ranks = ranks, .over_mailbox = 1, .timeout = loud_timeout});
    crew_run(c, run_failure, &f); /* without any failure, to count */
    crew_destroy(c);
    const int64_t starts = f.clean.starts, ends = f.clean.ends;
    CHECK(f.status[0] == FMOE_OK && starts > 0 && ends == starts, "a clean run: %lld starts, %lld ends",
          (long long)starts, (long long)ends);
    for (f.rank = 0; f.rank < ranks; f.rank++) {
      f.loud = 1, f.ends = 0;
      for (f.starts = 1; f.starts <= starts; f.starts++) check_failure(f, ranks, loud_timeout);
      f.starts = 0;
      for (f.ends = 1; f.ends <= ends; f.ends++) check_failure(f, ranks, loud_timeout);
    }
    f.rank = 1, f.loud = 0, f.ends = 0;
    for (f.starts = 1; f.starts <= starts; f.starts += 1 + starts / SILENT_POINTS)
      check_failure(f, ranks, silent_timeout);
    f.starts = 0;
    for (f.ends = 1; f.ends <= ends; f.ends += 1 + ends / SILENT_POINTS) check_failure(f, ranks, silent_timeout);
    spread_destroy(f.s);
  }
  injected("a transport that fails at its i-th call, all i, from joining to reduce, 2 and 3 ranks", failures,
           "FMOE_ERROR_PEER or FMOE_ERROR_TIMEOUT on every rank, in time");
}

/* ---- a process dies ------------------------------------------------------------------------ */

typedef struct death {
  spread *s;
  int32_t victim;
  int place;      /* the call in which it dies */
  int64_t starts; /* at which start of its transport; 0: before the call */
} death;

static const double socket_timeout = 5;

/* One rank's process; returns its exit code, if it lives. */
static int run_process(sockets *wire, int32_t rank, const death *d) {
  const int is_victim = rank == d->victim;
  fmoe_transport transport = sockets_transport(wire, rank);
  fmoe_group_options options = {.struct_size = sizeof options, .threads = 1, .bind = 1,
                                .timeout_seconds = socket_timeout};
  seat at = {.o = d->s->part[rank]};
  fmoe_status status = FMOE_OK;
  EXPECT(FMOE_OK, fmoe_group_create(&transport, &options, &at.group));
  for (int place = CREATE; place <= PLACES && status == FMOE_OK; place++) {
    if (is_victim && place == d->place && !d->starts) raise(SIGKILL);
    if (is_victim && place == d->place) sockets_die(wire, d->starts);
    double start = seconds();
    status = call(&at, place < PLACES ? place : REDUCE);
    if (is_victim && place == d->place) raise(SIGKILL); /* fewer starts than that */
    CHECK(seconds() - start < socket_timeout + slack, "rank %d: %s took %.3f s", rank,
          place < PLACES ? place_names[place] : "the last call", seconds() - start);
    /* In the call of the death a rank may have had all it needed; in the next it has not. */
    CHECK(place < d->place ? status == FMOE_OK : is_lost(status) || (place == d->place && status == FMOE_OK),
          "rank %d, where %d dies in %s: call %d: %s", rank, d->victim, place_names[d->place], place,
          fmoe_status_name(status));
  }
  check_broken("a peer died", &at, socket_timeout);
  leave_seat(&at), fmoe_group_destroy(at.group);
  check_life_goes_on();
  return failed != 0;
}

static void check_death(death d) {
  enum { RANKS = 3 };
  sockets *wire = sockets_create(RANKS);
  pid_t children[RANKS];
  fflush(stdout);
  for (int32_t r = 0; r < RANKS; r++) {
    if ((children[r] = fork()) < 0) abort();
    if (children[r]) continue;
    begin_test("faults: a process whose peer dies", 100);
    int code = run_process(wire, r, &d);
    fflush(stdout);
    _exit(code);
  }
  sockets_close(wire);
  for (int32_t r = 0; r < RANKS; r++) {
    int status;
    if (waitpid(children[r], &status, 0) != children[r]) abort();
    CHECK(r == d.victim ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL
                        : WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "rank %d of %d, where rank %d dies in %s at start %lld: %s %d", r, RANKS, d.victim, place_names[d.place],
          (long long)d.starts, WIFSIGNALED(status) ? "signal" : "exit",
          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
}

static void test_dying_process(void) {
  death d = {.s = small_spread(3, GATED)};
  int deaths = 1;
  check_death((death){.s = d.s, .place = CREATE, .victim = 1});
  for (d.place = FORWARD; d.place <= REDUCE; d.place++)
    for (d.starts = 0; d.starts <= 3; d.starts++) d.victim = (int32_t)(d.place + d.starts) % 3, check_death(d), deaths++;
  injected("a rank's process killed, in every call of a step", deaths,
           "FMOE_ERROR_PEER or FMOE_ERROR_TIMEOUT on the others, in time");
  spread_destroy(d.s);
}

/* ---- transports that are none -------------------------------------------------------------- */

static int32_t count_release; /* by the transports below */
static void release(void *context) { (void)context, count_release++; }
static int32_t never_start(void *context, const fmoe_message *messages, int32_t count, void **request) {
  return (void)context, (void)messages, (void)count, (void)request, 1;
}
static int32_t never_test(void *context, void *request, int32_t *done) {
  return (void)context, (void)request, (void)done, 1;
}

static void refuse(fmoe_status expected, fmoe_status other, const fmoe_transport *transport,
                   const fmoe_group_options *options) {
  fmoe_group *group = (fmoe_group *)(void *)&untouched;
  EXPECT_EITHER(expected, other, fmoe_group_create(transport, options, &group));
  CHECK((void *)group == &untouched, "group_create wrote to its out");
  CHECK(count_release == 0, "what was not taken is not released");
}

static void test_bad_transports(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options_status = FMOE_ERROR_OPTIONS;
  const fmoe_transport good = {.struct_size = sizeof good, .size = 1, .start = never_start, .test = never_test,
                               .release = release};
  const fmoe_group_options bad_options = {.struct_size = sizeof bad_options, .threads = -1};
  struct { fmoe_transport known; uint64_t future; } newer = {good, 1};
  fmoe_transport t;
  fmoe_group *group = NULL;
  count_release = 0;
  refuse(argument, argument, NULL, NULL);
  t = good, t.start = NULL, refuse(argument, argument, &t, NULL);
  t = good, t.test = NULL, refuse(argument, argument, &t, NULL);
  t = good, t.size = 0, refuse(argument, argument, &t, NULL);
  t = good, t.size = INT32_MIN, refuse(argument, argument, &t, NULL);
  t = good, t.size = INT32_MAX, refuse(argument, argument, &t, NULL);
  t = good, t.rank = -1, refuse(argument, argument, &t, NULL);
  t = good, t.rank = 1, refuse(argument, argument, &t, NULL);
  t = good, t.size = 3, t.rank = 3, refuse(argument, argument, &t, NULL);
  t = good, t.reserved = 1, refuse(options_status, argument, &t, NULL);
  for (uint32_t size = 0; size < offsetof(fmoe_transport, release); size++)
    t = good, t.struct_size = size, refuse(options_status, options_status, &t, NULL);
  newer.known.struct_size = sizeof newer;
  refuse(options_status, options_status, &newer.known, NULL);
  refuse(argument, argument, &good, &bad_options);
  EXPECT(argument, fmoe_group_create(&good, NULL, NULL));
  t = good, t.size = 2; /* a good one whose first call fails */
  refuse(FMOE_ERROR_PEER, FMOE_ERROR_PEER, &t, NULL);

  for (int turn = 0; turn < 3; turn++) { /* whole, newer with nothing new, and of nobody to tell */
    t = good, newer.known = good, newer.known.struct_size = sizeof newer, newer.future = 0;
    if (turn == 2) t.release = NULL;
    count_release = 0;
    if (!EXPECT(FMOE_OK, fmoe_group_create(turn == 1 ? &newer.known : &t, NULL, &group))) continue;
    CHECK(count_release == 0, "released while there is a group");
    fmoe_group_destroy(group);
    CHECK(count_release == (turn != 2), "released %d times", count_release);
  }
}

#define RUN(test) (begin_test("faults: " #test, 200), test())

int main(void) {
  printf("faults: seed %llu\n", (unsigned long long)seed);
  RUN(test_dying_process); /* first: it forks, which is best done before there were threads */
  RUN(test_wrong_calls);
  RUN(test_wrong_stages);
  RUN(test_wrong_joins);
  RUN(test_silent_rank);
  RUN(test_absent_rank);
  RUN(test_leaving_rank);
  RUN(test_dropped_messages);
  RUN(test_failing_transport);
  RUN(test_bad_transports);
  check_life_goes_on();
  return summary();
}
