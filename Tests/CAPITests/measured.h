/* measured.h: groups that measure themselves, and files of what they make of it. */
#ifndef MEASURED_H
#define MEASURED_H
#include "crew.h"

static const uint64_t seed = 22360679;
static const double moment = 0.15; /* seconds to measure for */
static const double slack = 60;    /* seconds more, on a loaded machine: less than any hang */

extern char folder[]; /* a template: main makes it by mkdtemp, and removes it when it is empty again */
const char *of_rank(const char *name, int32_t rank); /* a path in it, until the thread's next one */
char *slurp(const char *path); /* a whole text, empty where there is none; the caller frees it */
void spill(const char *path, const char *text); /* ends the program where it fails */

void run_calibrate(crew *c, int32_t rank, void *unused);
void run_write(crew *c, int32_t rank, void *context); /* the group's cluster; the context is a name for of_rank */

#endif
