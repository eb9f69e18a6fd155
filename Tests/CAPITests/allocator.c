#include "allocator.h"

#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static const size_t large = 64 << 10; /* bytes */
atomic_llong allocations, live_bytes;
atomic_int refusing, granted, refused;
atomic_llong only = -1;

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static int refuse(size_t size) {
  if (atomic_fetch_add(&allocations, 1) == only) return atomic_fetch_add(&refused, 1), errno = ENOMEM, 1;
  if (size < large || !refusing || atomic_fetch_sub(&granted, 1) > 0) return 0;
  atomic_fetch_add(&refused, 1);
  return errno = ENOMEM, 1;
}

static void *count_live(void *block) {
  if (block) atomic_fetch_add(&live_bytes, (long long)malloc_usable_size(block));
  return block;
}

void *malloc(size_t size) { return refuse(size) ? NULL : count_live(__libc_malloc(size)); }
void *memalign(size_t alignment, size_t size) {
  return refuse(size) ? NULL : count_live(__libc_memalign(alignment, size));
}
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
void *valloc(size_t size) { return memalign(4096, size); }

void *calloc(size_t count, size_t size) {
  size_t total = count > SIZE_MAX / (size + !size) ? SIZE_MAX : count * size;
  return refuse(total) ? NULL : count_live(__libc_calloc(count, size));
}

void free(void *block) {
  if (block) atomic_fetch_sub(&live_bytes, (long long)malloc_usable_size(block));
  __libc_free(block);
}

void *realloc(void *block, size_t size) {
  if (refuse(size)) return NULL;
  long long before = block ? (long long)malloc_usable_size(block) : 0;
  void *moved = __libc_realloc(block, size);
  if (moved || !size) atomic_fetch_sub(&live_bytes, before);
  return count_live(moved);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  void *block = memalign(alignment, size);
  return block ? *out = block, 0 : ENOMEM;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  if (refuse(size)) return MAP_FAILED;
  void *block = (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
  if (block != MAP_FAILED) atomic_fetch_add(&live_bytes, (long long)size);
  return block;
}

void *mmap64(void *address, size_t size, int protection, int flags, int file, off64_t offset) {
  return mmap(address, size, protection, flags, file, offset);
}

int munmap(void *address, size_t size) {
  int status = (int)syscall(SYS_munmap, address, size);
  if (!status) atomic_fetch_sub(&live_bytes, (long long)size);
  return status;
}
