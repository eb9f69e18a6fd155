/* stored.h: a small layer that is saved and loaded, with all that it has to remember. */
#ifndef STORED_H
#define STORED_H
#include "batch.h"

enum { E = 4, D = 6, H = 5 };

extern int32_t gate;     /* of the layers that follow */
extern double bias_step; /* of these, too */
fmoe_layer_options options(int32_t activation, uint64_t of);

extern fmoe_group *one_group; /* of one worker, from the first `one` on */
fmoe_layer *one(fmoe_layer_options o);

/* A few steps of AdamW on gradients that depend on the parameter alone, not on the worker that has it. */
void learn(fmoe_layer *layer, int steps);

/* A hash for each tensor of a rank's values, comparable between layers with as many workers. */
uint64_t values_of_sizes(fmoe_layer *layer, int64_t experts, int64_t d, int64_t h);
uint64_t values_of(fmoe_layer *layer);

#endif
