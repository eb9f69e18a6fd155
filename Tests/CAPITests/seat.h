/* seat.h: a rank's place in a step of a small problem, call by call, for tests of what goes wrong in one of the calls. */
#ifndef SEAT_H
#define SEAT_H
#include "crew.h"

enum { CREATE, BEGIN, PLAN, FORWARD, BACKWARD, REDUCE, PLACES };
extern const char *const place_names[PLACES];

extern const uint64_t seed;
/* Seconds beyond timeout_seconds, and for what happens "at once": a loaded machine may leave a thread out that long. */
extern const double slack;

/* A rank with its part of a problem. */
typedef struct seat {
  fmoe_group *group;
  const oracle *o;
  fmoe_layer *layer;
  batch b; /* once there is a layer */
} seat;

seat seat_of(crew *c, int32_t rank, const spread *s);
void leave_seat(seat *at);

/* A layer for the seat, with the oracle's values. */
fmoe_status create(seat *at, const fmoe_layer_options *options);
fmoe_status start_pass(seat *at, int routed);
/* The right call at this place of a step. */
fmoe_status call(seat *at, int place);

/* That the step has the oracle's results. */
void check_step(const char *what, seat *at);
/* A whole step and that; the context is a spread. */
void run_step(crew *c, int32_t rank, void *context);
/* Whether a call says that a rank is lost. */
int is_lost(fmoe_status status);
/* In a broken group every collective call fails; whether none of them waited for it. */
int is_broken(const char *what, seat *at, double at_once);
/* Alone again: a group of one in this process computes a step. */
void check_life_goes_on(void);

spread *small_spread(int32_t ranks, int routing);

#endif
