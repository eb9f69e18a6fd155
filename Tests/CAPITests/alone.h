/* alone.h: problems for one worker, and groups of one that compute them. */
#ifndef ALONE_H
#define ALONE_H
#include "batch.h"

static const uint64_t seed = 20220404;

oracle *problem(int64_t n, int64_t k, int64_t E, int64_t d, int64_t h, int32_t activation);
/* All tokens share a direction that the gate gives to expert 2, so that it takes all of them; expert 0 gets none. */
oracle *crowded_problem(int64_t n, int64_t k, int64_t d, int64_t h, int32_t activation);

/* They end the program where they fail.  The threads are left to the scheduler, or each has a core. */
fmoe_group *group_with(int32_t threads);
fmoe_group *pinned_group_with(int32_t threads);

/* A whole step in a group of its own; the pass has gone with it. */
batch run_alone(const oracle *o, int32_t threads);

#endif
