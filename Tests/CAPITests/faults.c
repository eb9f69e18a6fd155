/* faults.c: several workers when one of them is wrong: it passes what it may not pass, or calls what the others do not.
 * Every rank gets a status, and the group goes on to the right results.  Ranks that are lost are in losses.c and deaths.c. */
#include <stddef.h>

#include "seat.h"

static char untouched; /* its address: an out-parameter nobody has written to */

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

/* One rank's options for its group, or its transport's, are wrong: there is no group, and nothing keeps the transports,
 * which try again. */
static void run_wrong_join(crew *c, int32_t rank, void *context) {
  const int variant = *(int *)context, is_wrong = rank == 1;
  fmoe_transport transport = mailbox_transport(c->mail, rank);
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .bind = 1, .timeout_seconds = 20};
  fmoe_group *group = (fmoe_group *)(void *)&untouched;
  if (is_wrong && variant == 0) o.threads = -1;
  if (is_wrong && variant == 1) o.topology = "/no/such/folder/machine.xml";
  if (is_wrong && variant == 2) o.struct_size = 0;
  if (is_wrong && variant == 3) transport.message_bytes = 2048;
  EXPECT_EITHER(variant == 3 ? FMOE_ERROR_DISAGREE : !is_wrong ? FMOE_ERROR_PEER : variant == 0 ? FMOE_ERROR_ARGUMENT
                             : variant == 1 ? FMOE_ERROR_FILE : FMOE_ERROR_OPTIONS,
                is_wrong && variant == 1 ? FMOE_ERROR_TOPOLOGY : FMOE_ERROR_PEER,
                fmoe_group_create(&transport, &o, &group));
  CHECK((void *)group == &untouched && mailbox_released(c->mail, rank) == 0, "there is no group that keeps anything");
  EXPECT(FMOE_OK, crew_join(c, rank));
}

static void test_wrong_joins(void) {
  spread *s = small_spread(3, GATED);
  for (int variant = 0; variant < 4; variant++) {
    crew *c = crew_without_groups((crew_options){.ranks = 3, .over_mailbox = 1, .timeout = 20});
    crew_run(c, run_wrong_join, &variant);
    crew_run(c, run_step, s);
    crew_destroy(c);
  }
  spread_destroy(s);
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
  static const int64_t wrong_bytes[] = {-1, 1, 1023, 1025, 1060, (1 << 20) + 64, INT64_MAX};
  for (size_t i = 0; i < sizeof wrong_bytes / sizeof *wrong_bytes; i++)
    t = good, t.message_bytes = wrong_bytes[i], refuse(argument, argument, &t, NULL);
  for (uint32_t size = 0; size < offsetof(fmoe_transport, release); size++)
    t = good, t.struct_size = size, refuse(options_status, options_status, &t, NULL);
  newer.known.struct_size = sizeof newer;
  refuse(options_status, options_status, &newer.known, NULL);
  refuse(argument, argument, &good, &bad_options);
  EXPECT(argument, fmoe_group_create(&good, NULL, NULL));
  t = good, t.size = 2; /* a good one whose first call fails */
  refuse(FMOE_ERROR_PEER, FMOE_ERROR_PEER, &t, NULL);

  /* Whole, newer with nothing new, of nobody to tell, the shortest and longest messages, and older than message_bytes. */
  for (int turn = 0; turn < 6; turn++) {
    t = good, newer.known = good, newer.known.struct_size = sizeof newer, newer.future = 0;
    if (turn == 2) t.release = NULL;
    if (turn == 3 || turn == 4) t.message_bytes = turn == 3 ? 1024 : 1 << 20;
    if (turn == 5) t.struct_size = offsetof(fmoe_transport, message_bytes), t.message_bytes = -1;
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
  RUN(test_wrong_calls);
  RUN(test_wrong_stages);
  RUN(test_wrong_joins);
  RUN(test_bad_transports);
  check_life_goes_on();
  return summary();
}
