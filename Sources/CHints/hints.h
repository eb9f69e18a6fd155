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

/* Over the lanes, halving them each time, where Swift's own go lane by lane: their sum; their highest, if none is NaN. */
typedef float hint_8_lanes __attribute__((ext_vector_type(8)));
typedef float hint_4_lanes __attribute__((ext_vector_type(4)));
__attribute__((always_inline)) static inline float hint_sum(hint_lanes x) {
  hint_8_lanes a = x.lo + x.hi;
  hint_4_lanes b = a.lo + a.hi;
  return (b[0] + b[2]) + (b[1] + b[3]);
}
__attribute__((always_inline)) static inline float hint_highest(hint_lanes x) {
  hint_8_lanes a = x.lo > x.hi ? x.lo : x.hi;
  hint_4_lanes b = a.lo > a.hi ? a.lo : a.hi, c = b > b.zwxy ? b : b.zwxy, d = c > c.yxwz ? c : c.yxwz;
  return d[0];
}

/* A bit for each lane of x that is at least, or that equals, the one of y. */
typedef _Bool hint_flags __attribute__((ext_vector_type(16)));
__attribute__((always_inline)) static inline unsigned hint_at_least(hint_lanes x, hint_lanes y) {
  return __builtin_bit_cast(unsigned short, __builtin_convertvector(x >= y, hint_flags));
}
__attribute__((always_inline)) static inline unsigned hint_equal(hint_lanes x, hint_lanes y) {
  return __builtin_bit_cast(unsigned short, __builtin_convertvector(x == y, hint_flags));
}

/* Each even lane twice, each odd lane twice. */
__attribute__((always_inline)) static inline hint_lanes hint_evens(hint_lanes x) {
  return __builtin_shufflevector(x, x, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
}
__attribute__((always_inline)) static inline hint_lanes hint_odds(hint_lanes x) {
  return __builtin_shufflevector(x, x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
}

/* 8 rows of 8 floats, `apart` floats from one to the next, across their diagonal to rows that are `to_apart` apart: in pairs,
 * then in fours, then by halves, with three shuffles a row where Swift's even and odd halves take six. */
#define HINT_8(x, y, a, b, c, d, e, f, g, h) __builtin_shufflevector(x, y, a, b, c, d, e, f, g, h)
__attribute__((always_inline)) static inline void hint_turn(const float *from, long apart, float *to, long to_apart) {
  hint_8_lanes rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; i++) __builtin_memcpy(&rows[i], from + i * apart, sizeof rows[i]);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = HINT_8(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = HINT_8(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = HINT_8(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = HINT_8(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    hint_8_lanes low = HINT_8(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    hint_8_lanes high = HINT_8(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    __builtin_memcpy(to + i * to_apart, &low, sizeof low);
    __builtin_memcpy(to + (i + 4) * to_apart, &high, sizeof high);
  }
}
#undef HINT_8

/* The finaliser of SplitMix64 for 8 words at once: Swift multiplies them one by one. */
typedef unsigned long long hint_words __attribute__((ext_vector_type(8)));
__attribute__((always_inline)) static inline hint_words hint_mix(hint_words z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

/* Draws as whole numbers below 2^24: the upper bits of 16 words, or those of both halves of 8. */
typedef int hint_8_ints __attribute__((ext_vector_type(8)));
typedef int hint_16_ints __attribute__((ext_vector_type(16)));
typedef unsigned hint_16_halves __attribute__((ext_vector_type(16)));
__attribute__((always_inline)) static inline hint_lanes hint_upper_bits(hint_words low, hint_words high) {
  hint_16_ints bits;
  bits.lo = __builtin_convertvector(low >> 40, hint_8_ints);
  bits.hi = __builtin_convertvector(high >> 40, hint_8_ints);
  return __builtin_convertvector(bits, hint_lanes);
}
__attribute__((always_inline)) static inline hint_lanes hint_upper_bits_of_halves(hint_words words) {
  hint_16_halves bits = __builtin_bit_cast(hint_16_halves, words) >> 8;
  return __builtin_convertvector(__builtin_bit_cast(hint_16_ints, bits), hint_lanes);
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

/* The same count and the same place, of which the compiler is to know nothing: else it unrolls a loop until what it sums up
 * falls out of the registers, and keeps in a register what an instruction can read on its way. */
static inline long hint_any_count(long count) {
  __asm__("" : "+r"(count));
  return count;
}
static inline const float *hint_any_place(const float *place) {
  __asm__("" : "+r"(place));
  return place;
}

/* The calling thread's floating point from here on is what programs begin with: to nearest, subnormal numbers, no traps.
 * What it was before goes to `before`, for fesetenv to bring back. */
#include <fenv.h>
static inline void hint_plain_floats(fenv_t *before) {
  fegetenv(before);
  fesetenv(FE_DFL_ENV);
}

/* Whether Intel made the processor: in what kernels must know of one, its kinds have much in common. */
static inline int hint_is_intel(void) {
#ifdef __x86_64__
  return __builtin_cpu_is("intel");
#else
  return 0;
#endif
}

#ifdef __x86_64__
/* Whether the processor has all of x86-64-v4. */
static inline int hint_has_wide_vectors(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/* The processor that runs the calling thread: a declaration that Swift's module of the C library leaves out. */
int sched_getcpu(void);

/* The system's own functions, in a library that is linked with --wrap. */
#include <malloc.h>
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);
int __real_posix_memalign(void **out, size_t alignment, size_t size);
/* What stands in front of them there: Sources/CAPI/Allocation.swift.  The last ones are C++'s operator new and CPU_ALLOC. */
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *block, size_t size);
int __wrap_posix_memalign(void **out, size_t alignment, size_t size);
void *__wrap__Znwm(size_t size);
void *__wrap__ZnwmSt11align_val_t(size_t size, size_t alignment);
void *__wrap___sched_cpualloc(size_t count);
