/* What Swift has no words for: asking for a cache line before it is needed; `soon` into the first cache, else the second. */
static inline void hint_read_soon(const void *line) { __builtin_prefetch(line, 0, 3); }
static inline void hint_read_later(const void *line) { __builtin_prefetch(line, 0, 2); }
static inline void hint_write_soon(const void *line) { __builtin_prefetch(line, 1, 3); }

/* Writing 64 bytes at an address that is a multiple of 64 past the caches, and waiting until all such bytes are where other
 * threads see them. */
typedef float hint_lanes __attribute__((ext_vector_type(16)));
__attribute__((always_inline)) static inline void hint_write_past(void *line, hint_lanes x) {
  __builtin_nontemporal_store(x, (hint_lanes *)line);
}
static inline void hint_written_past(void) {
#ifdef __x86_64__
  __builtin_ia32_sfence();
#endif
}

/* And a square root of 16 lanes at once: Swift's own goes lane by lane. */
__attribute__((always_inline)) static inline hint_lanes hint_square_root(hint_lanes x) {
  return __builtin_elementwise_sqrt(x);
}
