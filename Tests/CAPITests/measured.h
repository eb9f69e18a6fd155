/* measured.h: groups that measure themselves, and files of what they make of it. */
#ifndef MEASURED_H
#define MEASURED_H
#include "crew.h"

static const uint64_t seed = 22360679;
static const double moment = 0.15; /* seconds to measure for */
static const double slack = 60;    /* seconds more, on a loaded machine: less than any hang */

const char *of_rank(const char *name, int32_t rank); /* a path in the test's folder, one of eight in turn */

void run_calibrate(crew *c, int32_t rank, void *unused);
void run_write(crew *c, int32_t rank, void *context); /* the group's cluster; the context is a name for of_rank */

#endif
