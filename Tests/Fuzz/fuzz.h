/* fuzz.h: what the fuzzers share.  Each reads any bytes as something to do with the library and demands that every call
 * gives OK or an error in words, that results keep their rules, and, by the sanitizers and the driver, that nothing
 * crashes, hangs, touches memory that is not its own or leaks. */
#ifndef FUZZ_H
#define FUZZ_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastermoe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the run; the driver keeps the input.  Once: what other ranks find then would end the driver before it has. */
_Noreturn void end_run(void);

/* A rule that does not hold. */
#define DEMAND(condition, ...)                                                     \
  do {                                                                             \
    if (!(condition)) {                                                            \
      fprintf(stderr, "%s:%d: does not hold: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__), fputc('\n', stderr);                           \
      end_run();                                                                   \
    }                                                                              \
  } while (0)

/* The status, known and with words where it is an error.  One that reports a defect is one. */
fmoe_status fair(fmoe_status status, const char *call);
#define FAIR(call) fair(call, #call)

typedef struct input { /* what is left of it; once it has ended, zeros follow */
  const uint8_t *at;
  size_t left;
} input;

uint8_t take(input *in);
uint32_t below(input *in, uint32_t bound);
uint64_t any(input *in);     /* mostly small, now and then any 64 bits */
double any_double(input *in); /* mostly a plain one, now and then any bits */

/* Files are in the current folder, which the runner makes for each run. */
void spit(const char *path, const void *data, size_t size);
void *slurp(const char *path, size_t *size); /* to be freed */

#endif
