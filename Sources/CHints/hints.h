/* What Swift has no words for: asking for a cache line before it is needed; `soon` into the first cache, else the second. */
static inline void hint_read_soon(const void *line) { __builtin_prefetch(line, 0, 3); }
static inline void hint_read_later(const void *line) { __builtin_prefetch(line, 0, 2); }
static inline void hint_write_soon(const void *line) { __builtin_prefetch(line, 1, 3); }

/* And a square root of 16 lanes at once: Swift's own goes lane by lane. */
typedef float hint_lanes __attribute__((ext_vector_type(16)));
__attribute__((always_inline)) static inline hint_lanes hint_square_root(hint_lanes x) {
  return __builtin_elementwise_sqrt(x);
}
