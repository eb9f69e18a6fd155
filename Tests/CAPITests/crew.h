/* crew.h: ranks as threads of this process, and a problem spread over them. */
#ifndef CREW_H
#define CREW_H
#include "batch.h"
#include "mailbox.h"

/* ---- the ranks ----------------------------------------------------------------------------- */

typedef struct crew_options {
  int32_t ranks;
  int32_t threads;            /* of each; 0: one */
  double timeout;             /* seconds; 0: forever */
  const char *profile;        /* NULL: none */
  const char *topology;       /* of the group options */
  int32_t over_mailbox;       /* else fmoe_group_create_local */
  mailbox_options mail;
} crew_options;

typedef struct crew {
  int32_t ranks;
  crew_options options;
  mailbox *mail;              /* NULL: a local group */
  fmoe_group *groups[MOST_RANKS];
} crew;

typedef void crew_work(crew *c, int32_t rank, void *context);

crew *crew_without_groups(crew_options options);
crew *crew_create(crew_options options); /* ends the program where it fails */
fmoe_status crew_join(crew *c, int32_t rank); /* over a mailbox: this rank's part of creating the group; collective */
void crew_run(crew *c, crew_work *work, void *context); /* on all ranks at once, a thread for each */
void crew_destroy(crew *c); /* the groups too, those that are left */

double seconds(void); /* of a clock that only goes forward */

/* A test that hangs has failed: ends the program, naming the test, if it takes longer than that. */
void begin_test(const char *name, unsigned seconds_at_most);

/* ---- a problem spread over them ------------------------------------------------------------ */

typedef struct shape {
  int64_t k, E, d, h;
  int32_t activation;
  double balance, z;
} shape;

/* By the layer's gate, or by fmoe_route: slots in turn; half of the tokens to one expert; all to one; a third dropped,
 * and all of the last rank. */
enum { GATED, BALANCED, SKEWED, ONE_EXPERT, DROPPED, ROUTINGS };
extern const char *const routing_names[ROUTINGS];

typedef struct spread {
  int32_t ranks;
  oracle *part[MOST_RANKS]; /* each rank's tokens and results; gradients of the mean over ranks of their losses */
  oracle *whole;            /* the same tokens on one worker, grad_y over W: what its gradients are then the mean's */
} spread;

/* Equal for equal shapes: parameters.  Equal for equal arguments: everything. */
spread *spread_create(int32_t ranks, const int64_t *tokens, int routing, shape s, uint64_t seed);
void spread_destroy(spread *s);

/* One rank's results against those of the whole batch on one worker: the same bits, or to rounding. */
void check_alone(const char *what, const spread *s, int32_t rank, const batch *b, const batch *alone, int same_bits);

#endif
