/* subject.h: a small layer and a batch for it, to be misused, in a process where what is huge does not fit and where the
 * library must not print. */
#ifndef SUBJECT_H
#define SUBJECT_H
#include "check.h"
#include "oracle.h"

static const uint64_t seed = 16180339;

/* The process, from the arguments of its main: with `small` it is for valgrind, which needs the address space for itself and
 * is slow at measuring speeds.  The latter gives what main returns. */
void subject_begin(const char *program, int count, char **arguments);
int subject_end(void);
extern int small;
extern int limited; /* the address space is, so that no size is too expensive to be refused */

enum { N = 11, K = 2, E = 3, D = 4, H = 6 }; /* tokens, choices, experts, model, hidden of most layers here */
extern float tokens[N * D], output[N * D], grad_output[N * D], grad_tokens[N * D], grad_weights[N * K];
extern int32_t choices[N * K];
extern float weights[N * K];
extern char untouched; /* its address: an out-parameter nobody has written to */

/* The call, which fills `type *out` by &out, fails with one of two statuses and leaves `out` alone. */
#define REFUSED(expected, other, type, call)                               \
  do {                                                                     \
    type *out = (type *)(void *)&untouched;                                \
    EXPECT_EITHER(expected, other, call);                                  \
    CHECK(out == (type *)(void *)&untouched, "%s wrote to its out", #call); \
  } while (0)

fmoe_group_options group_options(void);
fmoe_layer_options layer_options(void);

/* They end the program where they fail. */
fmoe_group *alone(void);
fmoe_layer *layer_with(fmoe_group *group, fmoe_layer_options options);
fmoe_pass *gated(fmoe_layer *layer);

void check_works(fmoe_layer *layer); /* the object still does its work */
void check_group(const fmoe_group_options *options);

#endif
