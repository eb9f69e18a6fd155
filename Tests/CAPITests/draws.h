/* draws.h: the numbers that gates draw, as the library makes them: by a layer's seed, its pass and an index, in any order. */
#ifndef DRAWS_H
#define DRAWS_H
#include <stdint.h>

/* [0, 1) */
double share_of(uint64_t of_layer, int64_t pass, int64_t index);
/* A factor of the gate's input, within `bound` of 1. */
double jitter_of(uint64_t of_layer, int64_t pass, int64_t index, double bound);
/* Of mean 0 and variance 1. */
double normal_of(uint64_t of_layer, int64_t pass, int64_t index);

#endif
