/* check.h: count what holds and what does not, say what does not, go on. */
#ifndef CHECK_H
#define CHECK_H
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

#include "fastermoe.h"

__attribute__((weak)) atomic_int passed, failed; /* weak: one of each for all files of a program */

__attribute__((format(printf, 5, 6))) static inline int check(int holds, const char *file, int line, const char *rule,
                                                              const char *format, ...) {
  if (holds) return atomic_fetch_add(&passed, 1), 1;
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  atomic_fetch_add(&failed, 1);
  printf("%s:%d: failed: %s: %s\n", file, line, rule, text);
  fflush(stdout); /* the next call may be the one that crashes */
  return 0;
}

static inline int expect(fmoe_status expected, fmoe_status other, fmoe_status got, const char *call, const char *file,
                         int line) {
  const char *words = got == FMOE_OK ? "" : fmoe_last_error();
  if (got != FMOE_OK && !*words) return check(0, file, line, call, "%s without words", fmoe_status_name(got));
  return check(got == expected || got == other, file, line, call, "expected %s, got %s \"%s\"",
               fmoe_status_name(expected), fmoe_status_name(got), words);
}

/* Both give 1 when it holds.  EXPECT: the call's status is the expected one, or the other one where two are fair. */
#define CHECK(condition, ...) check(!!(condition), __FILE__, __LINE__, #condition, __VA_ARGS__)
#define EXPECT(expected, call) expect(expected, expected, call, #call, __FILE__, __LINE__)
#define EXPECT_EITHER(expected, other, call) expect(expected, other, call, #call, __FILE__, __LINE__)

/* For the table of a fault campaign (Tests/faults.sh): what was injected and how often, and what was seen each time but
 * for what failed since the last such line. */
static inline void injected(const char *what, long long times, const char *seen) {
  static int before;
  printf("injected | %s | %lld | %s | %d\n", what, times, seen, failed - before);
  before = failed;
}

static inline int summary(void) {
  printf("%d passed, %d failed\n", passed, failed);
  fflush(stdout); /* a sanitizer may end the process before the C library does it */
  return failed != 0;
}

#endif
