/* altered.c: files that no layer like this wrote.  What is altered in a byte, cut off or of another layer is refused by name
 * and changes nothing; what another program wrote well is taken. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crew.h"
#include "folder.h"
#include "stored.h"

/* ---- what is altered or cut off ---------------------------------------------------------------- */

static int is_tiny; /* the layer is test_files_of_others's */

static long long refused_files;

static void refuse_file(fmoe_layer *layer, const void *data, size_t size, const char *words) {
  const char *path = in_folder("altered");
  uint64_t before = is_tiny ? values_of_sizes(layer, 1, 2, 1) : values_of(layer);
  spit(path, data, size), refused_files++;
  if (!EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, path))) return;
  CHECK(strstr(fmoe_last_error(), path) && strstr(fmoe_last_error(), words), "\"%s\" without \"%s\"", fmoe_last_error(), words);
  CHECK((is_tiny ? values_of_sizes(layer, 1, 2, 1) : values_of(layer)) == before, "a refused file changes nothing");
}

static void test_altered(void) {
  fmoe_layer *writer = one(options(FMOE_GELU, 5)), *layer = one(options(FMOE_GELU, 6));
  learn(writer, 1), learn(layer, 2);
  EXPECT(FMOE_OK, fmoe_layer_save(writer, in_folder("a")));
  bytes file = slurp(in_folder("a"));
  uint64_t length;
  memcpy(&length, file.data, 8);
  const unsigned char flips[] = {1, 0x20, 0x80, 0xff};
  begin_test("altered", 300);
  for (size_t at = 0; at < file.size; at++)
    for (size_t f = 0; f < sizeof flips; f++) {
      if (at >= 8 && f != at % sizeof flips) continue; /* all of them in the first 8 bytes, one in each other */
      file.data[at] ^= flips[f];
      refuse_file(layer, file.data, file.size, at < 8 + length ? "" : "tensor \"");
      file.data[at] ^= flips[f];
    }
  for (size_t at = 8; at < 8 + length; at++) /* spaces are as good as others to JSON */
    if (file.data[at] == ' ') file.data[at] = '\n', refuse_file(layer, file.data, file.size, "checksum"), file.data[at] = ' ';
  begin_test("cut off", 300);
  for (size_t size = 0; size < file.size; size += size < 8 + length ? 7 : 1)
    refuse_file(layer, file.data, size, size < 8 + length ? "" : "inside tensor \"");
  refuse_file(layer, file.data, file.size - 1, "inside tensor \"optimizer.exp_avg_sq.experts.3.w2.bias\"");
  unsigned char *longer = malloc(file.size + 1);
  if (!longer) abort();
  memcpy(longer, file.data, file.size), longer[file.size] = 0;
  refuse_file(layer, longer, file.size + 1, "1 bytes behind its last tensor");
  memcpy(longer, file.data, 8 + length), longer[8 + length + 8] ^= 4; /* behind the steps */
  memcpy(longer + 8 + length, file.data + 8 + length, file.size - 8 - length), longer[8 + length + 8] ^= 4;
  refuse_file(layer, longer, file.size, "tensor \"gate.weight\"");
  longer[8 + length + 8] ^= 4;
  spit(in_folder("altered"), longer, file.size);
  EXPECT(FMOE_OK, fmoe_layer_load(layer, in_folder("altered")));
  CHECK(values_of(layer) == values_of(writer), "unaltered it is fine");
  injected("a file altered in one byte, each byte, or cut off", refused_files, "FMOE_ERROR_FILE, what is wrong by name; the layer as it was");
  free(longer), free(file.data);
  fmoe_layer_destroy(writer), fmoe_layer_destroy(layer);
  unlink(in_folder("a")), unlink(in_folder("altered"));
}

/* ---- files of others --------------------------------------------------------------------------- */

static void test_other_layers(void) {
  fmoe_layer *layer = one(options(FMOE_GELU, 6));
  struct { fmoe_layer_options o; const char *words; } others[] = {
      {options(FMOE_SWIGLU, 5), "lacks the tensor \"experts.0.w1.bias\""},
      {options(FMOE_GELU, 5), "tensor \"experts.0.w1.weight\" is [7, 6], not [5, 6]"},
      {options(FMOE_GELU, 5), "tensor \"gate.weight\" is [4, 3], not [4, 6]"},
      {options(FMOE_GELU, 5), "tensor \"gate.weight\" is [8, 6], not [4, 6]"}};
  others[1].o.d_hidden = 7, others[2].o.d_model = 3, others[3].o.experts = 8;
  for (int i = 0; i < 4; i++) {
    fmoe_layer *other = one(others[i].o);
    EXPECT(FMOE_OK, fmoe_layer_save(other, in_folder("a")));
    bytes file = slurp(in_folder("a"));
    refuse_file(layer, file.data, file.size, others[i].words);
    free(file.data), fmoe_layer_destroy(other);
  }
  fmoe_layer *gated = one(options(FMOE_SWIGLU, 6));
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("a")));
  bytes file = slurp(in_folder("a"));
  refuse_file(gated, file.data, file.size, "lacks the tensor \"experts.0.w3.weight\"");
  free(file.data), fmoe_layer_destroy(gated), fmoe_layer_destroy(layer);
  unlink(in_folder("a")), unlink(in_folder("altered"));
}

/* A small file as another program would write it: without checksums, in the order of names. */
static size_t by_hand(unsigned char *out, const char *header, const float *data, size_t floats) {
  uint64_t length = strlen(header);
  memcpy(out, &length, 8), memcpy(out + 8, header, length), memcpy(out + 8 + length, data, 4 * floats);
  return 8 + length + 4 * floats;
}

#define W1 "\"experts.0.w1.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]}"
#define W2 "\"experts.0.w2.weight\":{\"data_offsets\":[8,16],\"shape\":[2,1],\"dtype\":\"F32\"}"
#define W3 "\"experts.0.w3.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[16,24]}"
#define GATE_ "\"gate.weight\" : {\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[24, 32]}"

static void test_files_of_others(void) {
  fmoe_layer_options o = {.struct_size = sizeof o, .d_model = 2, .d_hidden = 1, .experts = 1, .activation = FMOE_SWIGLU};
  fmoe_layer *layer = one(o);
  is_tiny = 1;
  const float data[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  unsigned char file[4000];
  size_t size = by_hand(file, "{\"__metadata__\":{\"format\":\"pt\"}," W1 "," W2 "," W3 "," GATE_ "}   ", data, 8);
  spit(in_folder("a"), file, size);
  EXPECT(FMOE_OK, fmoe_layer_load(layer, in_folder("a")));
  fmoe_tensors t = {.struct_size = sizeof t};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  CHECK(t.w1[0] == 1 && t.w1[1] == 2 && t.w2[1] == 4 && t.w3[0] == 5 && t.gate[0] == 7 && t.gate[1] == 8, "%g", t.gate[0]);
  CHECK(!symlink(in_folder("a"), in_folder("link")), "%d", errno);
  EXPECT(FMOE_OK, fmoe_layer_load(layer, in_folder("link"))); /* reading follows links, writing does not replace them */
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(layer, in_folder("link")));
  unlink(in_folder("link"));
  static const struct { const char *header; int floats; const char *words; } wrong[] = {
      {"{}", 0, "lacks the tensor \"gate.weight\""},
      {"[]", 0, "array"},
      {"", 0, "ends too early"},
      {"null", 0, ""},
      {"{" W1 "," W2 "," W3 "}", 6, "lacks the tensor \"gate.weight\""},
      {"{" W1 "," W2 "," W3 "," GATE_ "}", 7, "inside tensor \"gate.weight\""},
      {"{" W1 "," W2 "," W3 "," GATE_ "}", 9, "4 bytes behind"},
      {"{" W1 "," W2 "," W3 "," GATE_ ",\"experts.1.w1.weight\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[32,36]}}", 9,
       "has the tensor \"experts.1.w1.weight\""},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[24,28]}}", 7,
       "tensor \"gate.weight\" is BF16, not F32"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[24,36]}}", 9,
       "tensor \"gate.weight\" has 12 bytes, not 8"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[24,32]}}", 8,
       "tensor \"gate.weight\" is [2], not [1, 2]"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[16,24]}}", 6,
       "begins at byte 16 of the data, not at 24"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[28,36]}}", 9,
       "tensor \"gate.weight\" begins at byte 28"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[32,24]}}", 8, "gate.weight"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[-1,24]}}", 8, "gate.weight"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[24,9223372036854775807]}}", 8,
       "inside tensor \"gate.weight\""},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[24]}}", 8, "gate.weight"},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":{\"dtype\":\"F32\",\"data_offsets\":[24,32]}}", 8, "gate.weight lacks \"shape\""},
      {"{" W1 "," W2 "," W3 ",\"gate.weight\":3}", 8, "gate.weight"},
      {"{" W1 "," W2 "," W3 "," GATE_ ",\"__metadata__\":{\"n\":3}}", 8, "__metadata__.n"},
      {"{" W1 "," W2 "," W3 "," GATE_ ",\"__metadata__\":{\"fastermoe.format\":\"1\"}}", 8, "its header"},
      {"{" W1 "," W2 "," W3 "," GATE_ ",\"__metadata__\":{\"fastermoe.format\":\"2\"}}", 8, "format"},
      {"{" W1 "," W2 "," W3 "," GATE_ ",\"optimizer.step\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[32,40]}}", 10,
       "lacks the tensor \"optimizer.exp_avg.gate.weight\""},
  };
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    float more[10] = {0};
    refuse_file(layer, file, by_hand(file, wrong[i].header, more, (size_t)wrong[i].floats), wrong[i].words);
  }
  const uint64_t lengths[] = {UINT64_MAX, UINT64_C(1) << 63, 100000001, 100000000};
  for (int i = 0; i < 4; i++) memcpy(file, &lengths[i], 8), refuse_file(layer, file, 1000, "header");
  /* Deep, as a parser that calls itself would not survive. */
  static char deep[2000000];
  uint64_t length = sizeof deep - 8;
  memset(deep, '[', sizeof deep), memcpy(deep, &length, 8);
  refuse_file(layer, deep, sizeof deep, "");
  unlink(in_folder("a")), unlink(in_folder("altered"));
  is_tiny = 0;
  fmoe_layer_destroy(layer);
}

int main(void) {
  if (!mkdtemp(folder)) return perror(folder), 2;
  test_altered();
  test_other_layers();
  test_files_of_others();
  fmoe_group_destroy(one_group);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
