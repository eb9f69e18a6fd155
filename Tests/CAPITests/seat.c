#include "seat.h"

const char *const place_names[PLACES] = {"layer_create", "gate or route", "plan",
                                         "forward",      "backward",      "reduce_gradients"};
const uint64_t seed = 17320508;
const double slack = 3;
static char untouched; /* its address: an out-parameter nobody has written to */

seat seat_of(crew *c, int32_t rank, const spread *s) {
  return (seat){.group = c->groups[rank], .o = s->part[rank]};
}

fmoe_status create(seat *at, const fmoe_layer_options *options) {
  fmoe_layer *layer = (fmoe_layer *)(void *)&untouched;
  fmoe_status status = fmoe_layer_create(at->group, options, &layer);
  if (status != FMOE_OK) return CHECK((void *)layer == &untouched, "layer_create wrote to its out"), status;
  at->layer = layer;
  set_values(layer, at->o);
  at->b = batch_of(at->o, layer);
  return status;
}

fmoe_status start_pass(seat *at, int routed) {
  fmoe_pass *pass = (fmoe_pass *)(void *)&untouched;
  fmoe_status status = routed ? fmoe_route(at->layer, at->b.x, at->o->tokens, at->b.choice, at->b.weight, &pass)
                              : fmoe_gate(at->layer, at->b.x, at->o->tokens, &pass);
  if (status != FMOE_OK) return CHECK((void *)pass == &untouched, "the call wrote to its out"), status;
  at->b.pass = pass;
  return status;
}

fmoe_status call(seat *at, int place) {
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

void leave_seat(seat *at) {
  batch_free(&at->b);
  fmoe_layer_destroy(at->layer);
}

void check_step(const char *what, seat *at) {
  read_gradients(&at->b, at->layer);
  check_batch(what, &at->b, at->o), check_gradients(what, &at->b, at->o);
}

void run_step(crew *c, int32_t rank, void *context) {
  seat at = seat_of(c, rank, context);
  for (int place = CREATE; place < PLACES; place++) EXPECT(FMOE_OK, call(&at, place));
  check_step("a step", &at);
  leave_seat(&at);
}

int is_lost(fmoe_status status) { return status == FMOE_ERROR_PEER || status == FMOE_ERROR_TIMEOUT; }

int is_broken(const char *what, seat *at, double at_once) {
  int waits = 0;
  for (int turn = 0; turn < 4; turn++) {
    double start = seconds();
    fmoe_status status = turn == 0 || !at->layer ? call(at, CREATE) : turn == 1 ? start_pass(at, 0)
                         : turn == 2                                ? start_pass(at, 1)
                                                                    : call(at, REDUCE);
    if (seconds() - start >= at_once) waits = 1;
    CHECK(is_lost(status), "%s: call %d of a broken group: %s", what, turn, fmoe_status_name(status));
  }
  return !waits;
}

spread *small_spread(int32_t ranks, int routing) {
  static const int64_t tokens[MOST_RANKS] = {5, 3, 4, 7};
  const shape shape = {.k = 2, .E = 2 * ranks, .d = 6, .h = 7, .activation = FMOE_GELU, .balance = 0.1};
  return spread_create(ranks, tokens, routing, shape, seed);
}

void check_life_goes_on(void) {
  spread *s = small_spread(1, GATED);
  crew *c = crew_create((crew_options){.ranks = 1});
  run_step(c, 0, s);
  crew_destroy(c);
  spread_destroy(s);
}
