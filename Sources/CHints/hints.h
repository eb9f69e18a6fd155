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

/* Nothing but fused multiply-adds in registers, which Swift's compiler takes apart here: `rounds` of HINT_CHAINS
 * independent ones of 16 lanes, enough for all that a core begins before the first is done. Returns what keeps them. */
#ifdef __AVX512F__
enum { HINT_CHAINS = 12 };
#else
enum { HINT_CHAINS = 6 };
#endif
static inline float hint_multiply_add(long rounds, float from) {
  hint_lanes sums[HINT_CHAINS], factor = (hint_lanes)(0.999f), addend = (hint_lanes)(from);
  for (int j = 0; j < HINT_CHAINS; j++) sums[j] = addend * (float)(j + 1);
  for (long i = 0; i < rounds; i++)
    for (int j = 0; j < HINT_CHAINS; j++) sums[j] = __builtin_elementwise_fma(sums[j], factor, addend);
  for (int j = 1; j < HINT_CHAINS; j++) sums[0] += sums[j];
  return sums[0][0];
}

#ifdef __x86_64__
/* Whether the processor has all of x86-64-v4. */
static inline int hint_has_wide_vectors(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
