/* checkpoint.c: bytes as a layer's safetensors file.  What is refused changes nothing; what is taken is saved and loaded
 * as the same.
 *
 * An input is a byte that chooses the layer and what is put right, a header, a zero byte and data.  Put right may be the
 * header's length, the header's own checksum and the length of the data, without which few inputs would come further than
 * these three. */
#include "fuzz.h"

enum { E = 2, D = 2, H = 2, KINDS = 3, TENSORS = 7 };

static fmoe_layer_options options_of(int kind, uint64_t seed) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = 1, .d_model = D, .d_hidden = H,
                              .experts = E, .seed = seed, .activation = kind == 1 ? FMOE_SWIGLU : FMOE_GELU,
                              .gate = kind == 2 ? FMOE_GATE_NOISY : FMOE_GATE_TOPK};
}

static uint64_t values_of(fmoe_layer *layer) {
  fmoe_tensors t = {.struct_size = sizeof t};
  FAIR(fmoe_layer_values(layer, &t));
  const struct { const float *values; int count; } all[TENSORS] = {
      {t.gate, E * D}, {t.w1, E * H * D}, {t.b1, E * H}, {t.w2, E * D * H}, {t.b2, E * D}, {t.w3, E * H * D}, {t.noise, E * D}};
  uint64_t hash = 1;
  for (int i = 0; i < TENSORS; i++)
    for (int at = 0; all[i].values && at < all[i].count; at++) {
      uint32_t bits;
      memcpy(&bits, all[i].values + at, sizeof bits);
      hash = (hash ^ bits) * UINT64_C(1099511628211);
    }
  return hash;
}

/* XXH64 of seed 0, by its specification. */
static const uint64_t prime[5] = {UINT64_C(0x9E3779B185EBCA87), UINT64_C(0xC2B2AE3D27D4EB4F), UINT64_C(0x165667B19E3779F9),
                                  UINT64_C(0x85EBCA77C2B2AE63), UINT64_C(0x27D4EB2F165667C5)};
static uint64_t turn(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
static uint64_t mix(uint64_t sum, uint64_t word) { return turn(sum + word * prime[1], 31) * prime[0]; }
static uint64_t word_at(const uint8_t *p, size_t bytes) {
  uint64_t word = 0;
  memcpy(&word, p, bytes);
  return word;
}

static uint64_t xxh64(const uint8_t *p, size_t size) {
  uint64_t sum = prime[4], lanes[4] = {prime[0] + prime[1], prime[1], 0, 0 - prime[0]};
  size_t left = size;
  if (size >= 32) {
    for (; left >= 32; left -= 32)
      for (int i = 0; i < 4; i++, p += 8) lanes[i] = mix(lanes[i], word_at(p, 8));
    sum = turn(lanes[0], 1) + turn(lanes[1], 7) + turn(lanes[2], 12) + turn(lanes[3], 18);
    for (int i = 0; i < 4; i++) sum = (sum ^ mix(0, lanes[i])) * prime[0] + prime[3];
  }
  sum += size;
  for (; left >= 8; left -= 8, p += 8) sum = turn(sum ^ mix(0, word_at(p, 8)), 27) * prime[0] + prime[3];
  for (; left >= 4; left -= 4, p += 4) sum = turn(sum ^ word_at(p, 4) * prime[0], 23) * prime[1] + prime[2];
  for (; left; left--, p++) sum = turn(sum ^ *p * prime[4], 11) * prime[0];
  sum = (sum ^ sum >> 33) * prime[1], sum = (sum ^ sum >> 29) * prime[2];
  return sum ^ sum >> 32;
}

static void right_checksum(uint8_t *header, size_t size) {
  static const char key[] = "\"fastermoe.header\":\"";
  for (size_t at = 0; at + sizeof key - 1 + 16 <= size; at++) {
    if (memcmp(header + at, key, sizeof key - 1)) continue;
    uint8_t *digits = header + at + sizeof key - 1;
    char sum[17];
    memset(digits, '0', 16);
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)xxh64(header, size));
    memcpy(digits, sum, 16);
    return;
  }
}

static size_t data_bytes(int kind) {
  const size_t floats = kind == 1 ? E * D + 3 * E * H * D : E * D * (size_t)(kind == 2 ? 2 : 1) + E * (2 * H * D + H + D);
  return floats * sizeof(float);
}

static void write_file(const char *path, uint8_t how, int kind, input in) {
  const uint8_t *end = in.left ? memchr(in.at, 0, in.left) : NULL;
  if (how & 64 || !end) {
    spit(path, in.at, in.left); /* as it is */
    return;
  }
  const size_t header = (size_t)(end - in.at), given = in.left - header - 1, plain = data_bytes(kind);
  size_t data = how & 32 ? given : how & 16 ? 8 + 3 * plain : plain;
  uint8_t *file = calloc(1, 8 + header + data);
  if (!file) abort();
  const uint64_t length = header + (how & 8 ? take(&in) : 0);
  memcpy(file, &length, 8), memcpy(file + 8, end - header, header);
  memcpy(file + 8 + header, end + 1, given < data ? given : data);
  if (how & 4) right_checksum(file + 8, header);
  spit(path, file, 8 + header + data);
  free(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static fmoe_group *group;
  const fmoe_group_options alone = {.struct_size = sizeof alone, .threads = 1, .bind = 1};
  input in = {data, size};
  const uint8_t how = take(&in);
  const int kind = how % 4 % KINDS;
  const fmoe_layer_options options = options_of(kind, 5), others = options_of(kind, 6);
  fmoe_layer *layer = NULL, *other = NULL;
  if (!group && fmoe_group_create_local(1, &alone, &group) != FMOE_OK) abort();
  if (fmoe_layer_create(group, &options, &layer) || fmoe_layer_create(group, &others, &other)) abort();
  uint64_t before = values_of(layer);
  write_file("layer", how, kind, in);
  if (FAIR(fmoe_layer_load(layer, "layer")) == FMOE_OK) {
    const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 0.01};
    DEMAND(FAIR(fmoe_layer_save(layer, "saved")) == FMOE_OK, "%s", fmoe_last_error());
    DEMAND(FAIR(fmoe_layer_load(other, "saved")) == FMOE_OK, "%s", fmoe_last_error());
    DEMAND(values_of(layer) == values_of(other), "saved and loaded");
    FAIR(fmoe_layer_adamw(layer, &adamw)), FAIR(fmoe_layer_adamw(other, &adamw));
    DEMAND(values_of(layer) == values_of(other), "saved and loaded with what AdamW remembers");
  } else {
    DEMAND(strstr(fmoe_last_error(), "layer"), "%s", fmoe_last_error());
    DEMAND(values_of(layer) == before, "refused, but taken: %s", fmoe_last_error());
  }
  fmoe_layer_destroy(layer), fmoe_layer_destroy(other);
  return 0;
}
