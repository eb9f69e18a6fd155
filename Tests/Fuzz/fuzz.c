#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

void end_run(void) {
  static atomic_flag given = ATOMIC_FLAG_INIT;
  if (!atomic_flag_test_and_set(&given)) abort();
  for (;;) pause();
}

fmoe_status fair(fmoe_status status, const char *call) {
  const char *name = fmoe_status_name((int32_t)status);
  DEMAND(strcmp(name, "unknown status"), "%s gives %d", call, (int)status);
  DEMAND(status != FMOE_ERROR_INTERNAL, "%s: %s", call, fmoe_last_error());
  DEMAND(status == FMOE_OK || *fmoe_last_error(), "%s: %s without words", call, name);
  return status;
}

uint8_t take(input *in) {
  if (!in->left) return 0;
  in->left--;
  return *in->at++;
}

uint32_t below(input *in, uint32_t bound) { return take(in) % bound; }

uint64_t any(input *in) {
  uint64_t bits = 0;
  uint8_t kind = take(in);
  if (kind < 224) return kind;
  for (int i = 0; i < 8; i++) bits = bits << 8 | take(in);
  return kind < 240 ? bits >> 32 : bits;
}

double any_double(input *in) {
  uint8_t kind = take(in);
  if (kind < 200) return (double)kind / 16;
  uint64_t bits = any(in);
  double value;
  memcpy(&value, &bits, sizeof value);
  return kind < 216 ? -(double)bits : kind < 232 ? (double)bits * 1e-9 : value;
}

void spit(const char *path, const void *data, size_t size) {
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || write(file, data, size) != (ssize_t)size || close(file)) abort();
}

void *slurp(const char *path, size_t *size) {
  struct stat s;
  int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &s)) abort();
  void *data = malloc((size_t)s.st_size + 1);
  if (!data || read(file, data, (size_t)s.st_size) != (ssize_t)s.st_size || close(file)) abort();
  *size = (size_t)s.st_size;
  return data;
}

/* In front of the system's: large regions are refused, as the sanitizer refuses large blocks (max_allocation_size_mb), so
 * that sizes without a meaning meet FMOE_ERROR_MEMORY instead of all of the machine's memory. */
void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  static const size_t most = 64 << 20;
  if (size > most && !address) return errno = ENOMEM, MAP_FAILED;
  return (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}
