/* draws.c: a mix of SplitMix64 over a counter, so that each number is there without those before it.
 * A pass has streams of its own: from 2^32 on for shares and normals, from 2^48 on for jitter. */
#include "draws.h"

#include <math.h>

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  return z ^ (z >> 31);
}

static uint64_t draw(uint64_t of_layer, uint64_t stream, int64_t index) {
  uint64_t key = mix(mix(of_layer + UINT64_C(0x9E3779B97F4A7C15)) ^ stream * UINT64_C(0xD1B54A32D192ED03));
  return mix(key + (uint64_t)index * UINT64_C(0x9E3779B97F4A7C15));
}

/* [0, 1) */
static double drawn(uint64_t of_layer, uint64_t stream, int64_t index) {
  return ldexp((double)(draw(of_layer, stream, index) >> 40), -24);
}

double share_of(uint64_t of_layer, int64_t pass, int64_t index) {
  return drawn(of_layer, (UINT64_C(1) << 32) + (uint64_t)pass, index);
}

/* Each draw gives two, from its lower and its upper half. */
double jitter_of(uint64_t of_layer, int64_t pass, int64_t index, double bound) {
  const uint64_t word = draw(of_layer, (UINT64_C(1) << 48) + (uint64_t)pass, index / 2);
  const uint32_t half = (uint32_t)(index % 2 ? word >> 32 : word);
  return 1 + (2 * ldexp((double)(half >> 8), -24) - 1) * bound;
}

/* Box and Muller. */
double normal_of(uint64_t of_layer, int64_t pass, int64_t index) {
  const int64_t pair = index / 2;
  const double radius = sqrt(-2 * log(1 - share_of(of_layer, pass, 2 * pair)));
  const double angle = 2 * acos(-1) * share_of(of_layer, pass, 2 * pair + 1);
  return index % 2 ? radius * sin(angle) : radius * cos(angle);
}
