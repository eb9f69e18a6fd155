/* transport.h: for the files of the transports alone: what they demand of the library, and memory. */
#ifndef TRANSPORT_H
#define TRANSPORT_H
#include <stdlib.h>

#include "check.h"

/* A check that only counts when it fails: how often a library tests is up to timing. */
#define DEMAND(condition, ...) holds((condition) || check(0, __FILE__, __LINE__, #condition, __VA_ARGS__))
static inline int holds(int condition) { return condition; }

static inline void *zeros(size_t count, size_t size) {
  void *block = calloc(count, size);
  if (!block) abort();
  return block;
}

#endif
