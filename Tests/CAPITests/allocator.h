/* allocator.h: stands in front of the allocator of the program that has it: counts, and refuses on demand. */
#ifndef ALLOCATOR_H
#define ALLOCATOR_H
#include <stdatomic.h>

extern atomic_llong allocations; /* so far, by anyone in this process */
extern atomic_llong live_bytes;

/* What is refused, and how often anything was.  Refusing by size takes large ones, of 64 KiB and more: smaller ones kill any
 * program. */
extern atomic_int refusing;
extern atomic_int granted; /* large allocations still to be granted while refusing */
/* The number of an allocation, among all, with which `manner` of refusing begins, whatever its size; -1: none. */
extern atomic_llong only;
enum manner {
  ONE,     /* it is refused */
  LASTING, /* it and all that follow are, if the library asks */
  DRY,     /* nothing is refused, but the system maps no more memory for this process */
};
extern enum manner manner;
extern atomic_int refused;

#endif
