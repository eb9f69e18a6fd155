#include <hwloc.h>
#include <stdio.h>

extern char *program_invocation_name; /* of errno.h, for GNU sources */

/* Of an hwloc that is a part of the library (Makefile): what it takes for the system's.  Where it is a library of its own, they
 * are not there. */
extern void *hwloc_stderr __attribute__((weak)), *hwloc_stdout __attribute__((weak));
extern void *hwloc_program_invocation_name __attribute__((weak));
static inline void hwloc_share_variables(void) {
  if (!&hwloc_stderr) return;
  hwloc_stderr = stderr;
  hwloc_stdout = stdout;
  hwloc_program_invocation_name = program_invocation_name;
}
