/* scene.h: one layer and one batch on a crew of either kind, from the layer's making to its end. */
#ifndef SCENE_H
#define SCENE_H
#include "crew.h"

static const uint64_t seed = 14142135;
extern int small; /* for valgrind */

/* Of main's arguments, the first may be `small`. */
void scene_begin(const char *program, int count, char **arguments);
#define RUN(program, test) (begin_test(program ": " #test, small ? 500 : 120), test())

enum { LOCAL, MAILBOX, WAYS }; /* of joining ranks */
crew *crew_of(int32_t ranks, int over_mailbox);

/* Every request that was started has ended: none is forgotten with its memory. */
void check_ended(const crew *c);

/* A layer of each rank, with the values of its part. */
typedef struct seats {
  spread *s;
  fmoe_layer *layer[MOST_RANKS];
} seats;

void make_layer(crew *c, int32_t rank, void *context); /* the context is seats */
void layers_destroy(seats *all, int32_t ranks);

typedef struct scene {
  seats all;      /* with the spread of the batch */
  spread *second; /* where there is another batch */
  batch got[MOST_RANKS];
  int kind;       /* of call, where they come one by one */
} scene;

void run_scene(crew *c, int32_t rank, void *context); /* the whole step; the context is a scene */
/* Against the oracle and, where there is one, against the same on one worker alone. */
void check_scene(const char *what, const crew *c, scene *at, const batch *alone, int same_bits);
void end_scene(crew *c, scene *at); /* the crew is the caller's, and so are the spreads */

#endif
