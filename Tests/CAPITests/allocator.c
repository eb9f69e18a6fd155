#include "allocator.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static const size_t large = 64 << 10; /* bytes */
atomic_llong allocations, live_bytes;
atomic_int refusing, granted, refused;
atomic_llong only = -1;
enum manner manner;

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

/* The system maps no more than it has by now. */
static void dry_up(void) {
  char text[100] = {0};
  const int file = open("/proc/self/statm", O_RDONLY);
  if (file < 0 || read(file, text, sizeof text - 1) < 1 || close(file)) abort();
  const rlim_t mapped = strtoull(text, NULL, 10) * (rlim_t)sysconf(_SC_PAGESIZE);
  if (setrlimit(RLIMIT_AS, &(struct rlimit){mapped, mapped})) abort();
  refused = 1;
}

static int is_from_library(const void *caller) {
  Dl_info from;
  return dladdr(caller, &from) && from.dli_fname && strstr(from.dli_fname, "libfastermoe");
}

static int is_refused(long long number, const void *caller) {
  if (only < 0 || number < only || (number > only && manner != LASTING)) return 0;
  if (manner == DRY) return dry_up(), 0;
  return manner == ONE || is_from_library(caller);
}

static int refuse(size_t size, const void *caller) {
  const int is_large = size >= large && refusing && atomic_fetch_sub(&granted, 1) <= 0;
  if (!is_refused(atomic_fetch_add(&allocations, 1), caller) && !is_large) return 0;
  atomic_fetch_add(&refused, 1);
  return errno = ENOMEM, 1;
}
#define REFUSE(size) refuse(size, __builtin_return_address(0))

static void *count_live(void *block) {
  if (block) atomic_fetch_add(&live_bytes, (long long)malloc_usable_size(block));
  return block;
}

void *malloc(size_t size) { return REFUSE(size) ? NULL : count_live(__libc_malloc(size)); }
void *memalign(size_t alignment, size_t size) {
  return REFUSE(size) ? NULL : count_live(__libc_memalign(alignment, size));
}
void *aligned_alloc(size_t alignment, size_t size) {
  return REFUSE(size) ? NULL : count_live(__libc_memalign(alignment, size));
}
void *valloc(size_t size) { return REFUSE(size) ? NULL : count_live(__libc_memalign(4096, size)); }

void *calloc(size_t count, size_t size) {
  size_t total = count > SIZE_MAX / (size + !size) ? SIZE_MAX : count * size;
  return REFUSE(total) ? NULL : count_live(__libc_calloc(count, size));
}

void free(void *block) {
  if (block) atomic_fetch_sub(&live_bytes, (long long)malloc_usable_size(block));
  __libc_free(block);
}

void *realloc(void *block, size_t size) {
  if (REFUSE(size)) return NULL;
  long long before = block ? (long long)malloc_usable_size(block) : 0;
  void *moved = __libc_realloc(block, size);
  if (moved || !size) atomic_fetch_sub(&live_bytes, before);
  return count_live(moved);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  void *block = REFUSE(size) ? NULL : count_live(__libc_memalign(alignment, size));
  return block ? *out = block, 0 : ENOMEM;
}

static void *map(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  void *block = (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
  if (block != MAP_FAILED) atomic_fetch_add(&live_bytes, (long long)size);
  return block;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  return REFUSE(size) ? MAP_FAILED : map(address, size, protection, flags, file, offset);
}

void *mmap64(void *address, size_t size, int protection, int flags, int file, off64_t offset) {
  return REFUSE(size) ? MAP_FAILED : map(address, size, protection, flags, file, offset);
}

int munmap(void *address, size_t size) {
  int status = (int)syscall(SYS_munmap, address, size);
  if (!status) atomic_fetch_sub(&live_bytes, (long long)size);
  return status;
}
