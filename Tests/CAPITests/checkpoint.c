/* checkpoint.c: layers in files.  Any number of workers reads what any number wrote; the format is the documented one,
 * read and written here by hand; what is altered, cut off or of another layer is refused by name and changes nothing; a
 * disk that is full, a rank that fails and a process that is killed leave the old file as it was. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "crew.h"

static const uint64_t seed = 14142135;
static char folder[] = "/tmp/fastermoe-XXXXXX";

static const char *in_folder(const char *name) { /* one of eight texts in turn */
  static _Thread_local char paths[8][100];
  static _Thread_local int turn;
  char *path = paths[turn++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

/* ---- files ----------------------------------------------------------------------------------- */

typedef struct bytes {
  unsigned char *data;
  size_t size;
} bytes;

static bytes slurp(const char *path) {
  bytes all = {0};
  struct stat s;
  int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &s) || !(all.data = malloc((size_t)s.st_size + 1))) abort();
  all.size = (size_t)s.st_size;
  if (read(file, all.data, all.size) != (ssize_t)all.size) abort();
  close(file);
  return all;
}

static void spit(const char *path, const void *data, size_t size) {
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || write(file, data, size) != (ssize_t)size || close(file)) abort();
}

static int entries(const char *of) { /* files in a folder */
  int count = 0;
  DIR *d = opendir(of);
  if (!d) abort();
  for (struct dirent *e; (e = readdir(d));) count += e->d_name[0] != '.';
  closedir(d);
  return count;
}

/* ---- layers ---------------------------------------------------------------------------------- */

enum { E = 4, D = 6, H = 5 };

static int32_t gate = FMOE_GATE_TOPK; /* of the layers that follow */
static double bias_step;              /* of these, too */

static fmoe_layer_options options(int32_t activation, uint64_t of) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = 2, .d_model = D, .d_hidden = H,
                              .experts = E, .activation = activation, .gate = gate, .seed = of,
                              .bias_step = bias_step};
}

/* A hash for each tensor of a rank's values, comparable between layers with as many workers. */
static uint64_t values_of_sizes(fmoe_layer *layer, int64_t experts, int64_t d, int64_t h) {
  fmoe_tensors t = {.struct_size = sizeof t};
  float *list[TENSORS + 2];
  uint64_t hash = 1;
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  tensors_of(&t, list), list[TENSORS] = t.noise, list[TENSORS + 1] = t.gate_bias;
  const int64_t e = t.local_experts;
  const int64_t sizes[TENSORS + 2] = {experts * d, e * h * d, e * h, e * d * h, e * d, e * h * d, experts * d, experts};
  for (int i = 0; i <= TENSORS + 1; i++)
    for (int64_t at = 0; list[i] && at < sizes[i]; at++) {
      uint32_t bits;
      memcpy(&bits, list[i] + at, sizeof bits);
      hash = (hash ^ bits) * UINT64_C(1099511628211);
    }
  return hash;
}

static uint64_t values_of(fmoe_layer *layer) { return values_of_sizes(layer, E, D, H); }

/* A few steps of AdamW on gradients that depend on the parameter alone, not on the worker that has it. */
static void learn(fmoe_layer *layer, int steps) {
  fmoe_tensors g = {.struct_size = sizeof g};
  float *list[TENSORS + 1];
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  tensors_of(&g, list), list[TENSORS] = g.noise;
  const int64_t e = g.local_experts, each[TENSORS + 1] = {E * D, H * D, H, D * H, D, H * D, E * D};
  const fmoe_adamw_options how = {.struct_size = sizeof how, .learning_rate = 0.01, .weight_decay = 0.1};
  for (int s = 0; s < steps; s++) {
    for (int i = 0; i <= TENSORS; i++) {
      const int is_of_all = i == GATE || i == TENSORS;
      int64_t count = is_of_all ? each[i] : e * each[i], first = is_of_all ? 0 : g.first_expert * each[i];
      for (int64_t at = 0; list[i] && at < count; at++) {
        uint64_t state = (uint64_t)(first + at) * 64 + (uint64_t)i * 8 + (uint64_t)s;
        list[i][at] = (float)uniform(&state) - 0.5f;
      }
    }
    EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &how));
    fmoe_tensors t = {.struct_size = sizeof t};
    EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
    for (int expert = 0; t.gate_bias && expert < E; expert++) t.gate_bias[expert] += (float)(expert - s) * 0.01f;
  }
}

static fmoe_group *one_group;

static fmoe_layer *one(fmoe_layer_options o) {
  fmoe_layer *layer;
  if (!one_group) EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &one_group));
  if (!EXPECT(FMOE_OK, fmoe_layer_create(one_group, &o, &layer))) exit(summary());
  return layer;
}

/* ---- any W reads what any W wrote ------------------------------------------------------------ */

typedef struct trip {
  const char *path, *again;
  int32_t activation;
  int steps;
} trip;

static void write_layer(crew *c, int32_t rank, void *context) {
  const trip *t = context;
  fmoe_layer_options o = options(t->activation, 5);
  fmoe_layer *layer;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &layer))) return;
  learn(layer, t->steps);
  EXPECT(FMOE_OK, fmoe_layer_save(layer, t->path));
  fmoe_layer_destroy(layer);
}

static void read_layer(crew *c, int32_t rank, void *context) {
  const trip *t = context;
  fmoe_layer_options o = options(t->activation, 5), other = options(t->activation, 6);
  fmoe_layer *layer, *wanted;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &wanted))) return;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &other, &layer))) return;
  learn(wanted, t->steps), learn(layer, rank == 0 && c->ranks == 1 ? 1 : 0);
  EXPECT(FMOE_OK, fmoe_layer_load(layer, t->path));
  CHECK(values_of(layer) == values_of(wanted), "rank %d of %d has what was saved", rank, c->ranks);
  /* What AdamW remembers came along: the two go the same way. */
  learn(layer, 2), learn(wanted, 2);
  CHECK(values_of(layer) == values_of(wanted), "rank %d of %d goes on as if never saved", rank, c->ranks);
  EXPECT(FMOE_OK, fmoe_layer_load(layer, t->path));
  EXPECT(FMOE_OK, fmoe_layer_save(layer, t->again));
  fmoe_layer_destroy(layer), fmoe_layer_destroy(wanted);
}

static crew *crew_of(int32_t ranks, int over_mailbox) {
  return crew_create((crew_options){.ranks = ranks, .over_mailbox = over_mailbox, .timeout = 20,
                                    .mail = {.seed = seed, .delay_tests = 2, .reorder = 1}});
}

static void test_any_workers(int32_t of_gate) {
  gate = of_gate;
  for (int32_t activation = FMOE_GELU; activation <= (gate ? FMOE_GELU : FMOE_SWIGLU); activation += FMOE_SWIGLU)
    for (int steps = 0; steps < 4; steps += 3) {
      bytes first = {0};
      for (int w = 0; w < 6; w++) {
        begin_test("any workers", 300);
        trip t = {.path = in_folder("a"), .again = in_folder("b"), .activation = activation, .steps = steps};
        crew *c = crew_of(1 << w % 3, w / 3);
        crew_run(c, write_layer, &t), crew_destroy(c);
        bytes file = slurp(t.path);
        if (!first.data) first = file;
        CHECK(file.size == first.size && !memcmp(file.data, first.data, file.size), "%d workers write the same file",
              1 << w % 3);
        if (file.data != first.data) free(file.data);
        for (int r = 0; r < 6; r++) {
          c = crew_of(1 << r % 3, r / 3);
          crew_run(c, read_layer, &t), crew_destroy(c);
          bytes copy = slurp(t.again);
          CHECK(copy.size == first.size && !memcmp(copy.data, first.data, copy.size), "%d workers hand it on", 1 << r % 3);
          free(copy.data);
        }
      }
      free(first.data);
      unlink(in_folder("a")), unlink(in_folder("b"));
    }
  CHECK(entries(folder) == 0, "no draft is left behind");
  gate = FMOE_GATE_TOPK;
}

/* More than a piece of what travels at once, over a transport. */
static void save_large(crew *c, int32_t rank, void *context) {
  fmoe_layer_options o = {.struct_size = sizeof o, .d_model = 1200, .d_hidden = 1000, .experts = 2, .seed = 3};
  fmoe_layer *layer, *other;
  EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &layer));
  o.seed = 4;
  EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &other));
  EXPECT(FMOE_OK, fmoe_layer_save(layer, context));
  EXPECT(FMOE_OK, fmoe_layer_load(other, context));
  fmoe_tensors a = {.struct_size = sizeof a}, b = a;
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &a)), EXPECT(FMOE_OK, fmoe_layer_values(other, &b));
  size_t matrix = (size_t)a.local_experts * 1200 * 1000 * sizeof(float);
  CHECK(!memcmp(a.w1, b.w1, matrix) && !memcmp(a.w2, b.w2, matrix), "rank %d", rank);
  fmoe_layer_destroy(layer), fmoe_layer_destroy(other);
}

static void test_large(void) {
  for (int over = 0; over < 2; over++) {
    begin_test("large", 120);
    crew *c = crew_of(2, over);
    crew_run(c, save_large, (void *)(uintptr_t)in_folder("a")), crew_destroy(c);
  }
  unlink(in_folder("a"));
}

/* ---- the format, by hand --------------------------------------------------------------------- */

/* The place of a tensor's bytes in a file, after its entry in the header: NULL if it is not there like that. */
static const float *tensor_in(bytes file, const char *name, const char *shape, size_t floats) {
  uint64_t length;
  memcpy(&length, file.data, 8); /* little end first, as here */
  char wanted[200], *header = strndup((const char *)file.data + 8, length);
  snprintf(wanted, sizeof wanted, "\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[", name, shape);
  const char *entry = strstr(header, wanted);
  unsigned long long from = 0, to = 0;
  int is_there = entry && sscanf(entry + strlen(wanted), "%llu,%llu]}", &from, &to) == 2 && to - from == 4 * floats;
  CHECK(is_there && 8 + length + to <= file.size, "%s: %s", wanted, header);
  free(header);
  return is_there ? (const float *)(const void *)(file.data + 8 + length + from) : NULL;
}

static void test_format(void) {
  fmoe_layer *layer = one(options(FMOE_RELU, 9));
  fmoe_tensors t = {.struct_size = sizeof t};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("a")));
  bytes file = slurp(in_folder("a"));
  uint64_t length;
  memcpy(&length, file.data, 8);
  CHECK((8 + length) % 64 == 0 && file.data[8] == '{', "%llu", (unsigned long long)length);
  const float *gate = tensor_in(file, "gate.weight", "4,6", E * D);
  CHECK(gate && !memcmp(gate, t.gate, E * D * 4), "the gate");
  for (int e = 0; e < E; e++) {
    char name[60];
#define SAME(what, shape, from, count)                                                  \
  snprintf(name, sizeof name, "experts.%d." what, e);                                   \
  const float *from##_ = tensor_in(file, name, shape, count);                           \
  CHECK(from##_ && !memcmp(from##_, t.from + e * (count), (count) * 4), "%s", name)
    SAME("w1.weight", "5,6", w1, H * D);
    SAME("w1.bias", "5", b1, H);
    SAME("w2.weight", "6,5", w2, D * H);
    SAME("w2.bias", "6", b2, D);
  }
  CHECK(file.size == 8 + length + 4 * (E * D + E * (2 * H * D + H + D)), "and nothing else: %zu bytes", file.size);
  free(file.data), fmoe_layer_destroy(layer), unlink(in_folder("a"));
}

/* The noise's matrix, what AdamW remembers of it, and no layer of another gate that takes it or does without. */
static void test_noise(void) {
  fmoe_layer *plain = one(options(FMOE_RELU, 9));
  EXPECT(FMOE_OK, fmoe_layer_save(plain, in_folder("a")));
  gate = FMOE_GATE_NOISY;
  fmoe_layer *layer = one(options(FMOE_RELU, 8));
  fmoe_tensors t = {.struct_size = sizeof t};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  uint64_t before = values_of(layer), of_plain = values_of(plain);
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("a")));
  CHECK(strstr(fmoe_last_error(), "lacks the tensor \"gate.noise.weight\""), "%s", fmoe_last_error());
  learn(layer, 1);
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("a")));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(plain, in_folder("a")));
  CHECK(strstr(fmoe_last_error(), "gate.noise.weight\""), "%s", fmoe_last_error());
  CHECK(values_of(layer) != before && values_of(plain) == of_plain, "a refused file changes nothing");
  bytes file = slurp(in_folder("a"));
  const float *noise = tensor_in(file, "gate.noise.weight", "4,6", E * D);
  CHECK(noise && !memcmp(noise, t.noise, E * D * 4), "the noise");
  const float *mean = tensor_in(file, "optimizer.exp_avg.gate.noise.weight", "4,6", E * D);
  const float *square = tensor_in(file, "optimizer.exp_avg_sq.gate.noise.weight", "4,6", E * D);
  for (int i = 0; mean && square && i < E * D; i++) /* as learn made the gradient; one step from 0 */
    CHECK(mean[i] != 0 && fabsf(mean[i] * mean[i] * 0.1f - square[i]) <= 1e-5f * square[i], "%d: %g, %g", i,
          (double)mean[i], (double)square[i]);
  free(file.data), fmoe_layer_destroy(layer), fmoe_layer_destroy(plain), unlink(in_folder("a"));
  gate = FMOE_GATE_TOPK;
}

/* The bias by which a gate balances, and no layer without one that takes it or with one that does without. */
static void test_bias(void) {
  fmoe_layer *plain = one(options(FMOE_RELU, 9));
  EXPECT(FMOE_OK, fmoe_layer_save(plain, in_folder("a")));
  bias_step = 0.001;
  fmoe_layer *layer = one(options(FMOE_RELU, 8));
  fmoe_tensors t = {.struct_size = sizeof t};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
  for (int e = 0; e < E; e++) CHECK(t.gate_bias[e] == 0, "a new bias is 0");
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("a")));
  CHECK(strstr(fmoe_last_error(), "lacks the tensor \"gate.bias\""), "%s", fmoe_last_error());
  learn(layer, 2);
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("a")));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(plain, in_folder("a")));
  CHECK(strstr(fmoe_last_error(), "gate.bias\""), "%s", fmoe_last_error());
  bytes file = slurp(in_folder("a"));
  const float *bias = tensor_in(file, "gate.bias", "4", E);
  CHECK(bias && bias[3] != 0 && !memcmp(bias, t.gate_bias, E * 4), "the bias");
  free(file.data), fmoe_layer_destroy(layer), fmoe_layer_destroy(plain), unlink(in_folder("a"));
  bias_step = 0;
}

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

/* ---- paths and disks ---------------------------------------------------------------------------- */

static void test_paths(void) {
  fmoe_layer *layer = one(options(FMOE_GELU, 6));
  const char *bad[] = {"", "/no-such-folder/layer", folder, "/dev/null", in_folder("pipe"), "/tmp/\xff\xfe/none"};
  CHECK(!mkfifo(in_folder("pipe"), 0600), "%d", errno);
  uint64_t before = values_of(layer);
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(layer, bad[i]));
    EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, bad[i]));
    CHECK(strstr(fmoe_last_error(), bad[i]) || bad[i][5] == (char)0xff, "%s", fmoe_last_error());
  }
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, "/dev/zero"));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("none")));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_save(layer, NULL));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_load(layer, NULL));
  CHECK(values_of(layer) == before, "nothing has changed");
  unlink(in_folder("pipe"));
  CHECK(!chdir(folder), "%d", errno); /* a path without a folder */
  EXPECT(FMOE_OK, fmoe_layer_save(layer, "plain"));
  EXPECT(FMOE_OK, fmoe_layer_load(layer, "plain"));
  unlink("plain");
  CHECK(!chdir("/") && entries(folder) == 0, "no draft is left behind");
  fmoe_layer_destroy(layer);
}

/* A file of 1 MB and more, with the values of a seed. */
static const fmoe_layer_options megabytes = {.struct_size = sizeof megabytes, .d_model = 200, .d_hidden = 200,
                                             .experts = 4};

static fmoe_layer *large(uint64_t of) {
  fmoe_layer_options o = megabytes;
  o.seed = of;
  return one(o);
}

static float first_value(fmoe_layer *layer) {
  fmoe_tensors t = {.struct_size = sizeof t};
  fmoe_layer_values(layer, &t);
  return t.w1[0];
}

static void fill_disk(const char *path) {
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, path));
  CHECK(strstr(fmoe_last_error(), "cannot be written"), "%s", fmoe_last_error());
  EXPECT(FMOE_OK, fmoe_layer_load(seen, path));
  CHECK(first_value(seen) == first_value(old), "the old file is as it was");
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

static void in_child(void (*work)(void)) { /* limits and mounts are of a process; its threads are its own, too */
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    one_group = NULL, atomic_store(&failed, 0);
    work();
    fflush(stdout);
    _exit(failed != 0);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "%d", status);
}

static void with_limit(void) {
  fmoe_layer *old = large(1);
  EXPECT(FMOE_OK, fmoe_layer_save(old, in_folder("full")));
  signal(SIGXFSZ, SIG_IGN);
  for (rlim_t most = 0; most <= 1000000; most += 100000) {
    struct rlimit limit = {most, RLIM_INFINITY};
    CHECK(!setrlimit(RLIMIT_FSIZE, &limit), "%d", errno);
    fill_disk(in_folder("full"));
  }
  CHECK(entries(folder) == 1, "no draft is left behind");
  injected("a file that may not become longer than so many bytes", 11, "FMOE_ERROR_FILE; the old file, no draft");
  fmoe_layer_destroy(old);
}

static void on_small_disk(void) {
  char path[100];
  if (mount("none", folder, "tmpfs", 0, "size=2m")) {
    printf("checkpoint: no full disk, this user may not mount one: %s\n", strerror(errno));
    return;
  }
  snprintf(path, sizeof path, "%s/full", folder);
  fmoe_layer *old = large(1);
  EXPECT(FMOE_OK, fmoe_layer_save(old, path)); /* 1.3 MB: there is no room for another one */
  fill_disk(path);
  CHECK(entries(folder) == 1, "no draft is left behind");
  injected("a full disk", 1, "FMOE_ERROR_FILE; the old file, no draft");
  CHECK(!mount("none", folder, NULL, MS_REMOUNT | MS_RDONLY, "size=2m"), "%d", errno);
  fill_disk(path);
  injected("a file system that can only be read", 1, "FMOE_ERROR_FILE; the old file");
  fmoe_layer_destroy(old);
  CHECK(!umount(folder), "%d", errno);
}

/* As somebody who may neither read one file nor write into the folder of another. */
static void as_nobody(void) {
  const char *shut = in_folder("shut"), *kept = in_folder("shut/kept"), *secret = in_folder("shut/secret");
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  CHECK(!mkdir(shut, 0755) && !chmod(folder, 0755), "%d", errno);
  EXPECT(FMOE_OK, fmoe_layer_save(old, kept));
  EXPECT(FMOE_OK, fmoe_layer_save(old, secret));
  CHECK(!chmod(kept, 0444) && !chmod(secret, 0) && !chmod(shut, 0555), "%d", errno);
  if (geteuid() == 0) CHECK(!setuid(65534), "%d", errno);
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(seen, secret));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, in_folder("shut/none")));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, kept));
  EXPECT(FMOE_OK, fmoe_layer_load(seen, kept));
  CHECK(first_value(seen) == first_value(old) && entries(shut) == 2, "%d files", entries(shut));
  injected("a file that may not be read, a folder that may not be written", 3, "FMOE_ERROR_FILE; the old file, no draft");
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

/* Whenever a process is killed, the path leads to a whole file, the old or the new one. */
static void test_killed(void) {
  const char *path = in_folder("layer");
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  int olds = 0, news = 0;
  begin_test("killed", 600);
  for (int i = 0; i < 40; i++) {
    EXPECT(FMOE_OK, fmoe_layer_save(old, path));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
      one_group = NULL;
      fmoe_layer *mine = large(2);
      raise(SIGSTOP);
      fmoe_layer_save(mine, path);
      for (;;) pause();
    }
    int status;
    if (waitpid(child, &status, WUNTRACED) != child || !WIFSTOPPED(status)) abort();
    kill(child, SIGCONT);
    usleep((useconds_t)(i * 150)); /* until there is no more to be interrupted */
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    EXPECT(FMOE_OK, fmoe_layer_load(seen, path));
    float value = first_value(seen);
    olds += value == first_value(old), news += value == first_value(new);
  }
  CHECK(olds + news == 40, "%d old, %d new", olds, news);
  char what[100];
  snprintf(what, sizeof what, "%d whole old files, %d whole new ones, %d drafts left", olds, news, entries(folder) - 1);
  injected("a process killed while it saves, at another time each", 40, what);
  char command[100];
  snprintf(command, sizeof command, "rm -f %s/layer*", folder);
  CHECK(system(command) == 0, "%s", command);
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

/* ---- one rank fails ------------------------------------------------------------------------------ */

static void fail_in_turn(crew *c, int32_t rank, void *context) {
  fmoe_layer_options o = options(FMOE_GELU, 5);
  fmoe_layer *layer;
  (void)context;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &layer))) return;
  uint64_t before = values_of(layer);
  const char *good = in_folder("together"), *bad = "/no-such-folder/layer";
  EXPECT(FMOE_OK, fmoe_layer_save(layer, good));
  for (int32_t culprit = 0; culprit < c->ranks; culprit++) {
    fmoe_status wanted = rank == culprit ? FMOE_ERROR_ARGUMENT : FMOE_ERROR_PEER;
    EXPECT(wanted, fmoe_layer_save(layer, rank == culprit ? NULL : good));
    EXPECT(wanted, fmoe_layer_load(layer, rank == culprit ? NULL : good));
  }
  EXPECT(rank == 0 ? FMOE_ERROR_FILE : FMOE_ERROR_PEER, fmoe_layer_save(layer, bad));
  if (rank != 0) CHECK(strstr(fmoe_last_error(), "fmoe_layer_save failed on rank 0"), "%s", fmoe_last_error());
  EXPECT(rank == 0 ? FMOE_ERROR_FILE : FMOE_ERROR_PEER, fmoe_layer_load(layer, bad));
  EXPECT(FMOE_OK, fmoe_layer_load(layer, rank == 0 ? good : bad)); /* of the others the path is not used */
  /* One rank has made a step more: its file would be nobody's. */
  learn(layer, rank == 1 ? 2 : 1);
  EXPECT(FMOE_ERROR_DISAGREE, fmoe_layer_save(layer, good));
  /* Load and save do not meet. */
  EXPECT(FMOE_ERROR_DISAGREE, rank == 0 ? fmoe_layer_save(layer, good) : fmoe_layer_load(layer, good));
  EXPECT(FMOE_OK, fmoe_layer_load(layer, good));
  CHECK(values_of(layer) == before, "and life goes on");
  fmoe_layer_destroy(layer);
}

typedef struct breakdown {
  int32_t culprit;
  int64_t start;
  int is_load;
  int happened;
} breakdown;

static void break_down(crew *c, int32_t rank, void *context) {
  breakdown *b = context;
  fmoe_layer_options o = options(FMOE_GELU, 6);
  fmoe_layer *layer;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o, &layer))) return;
  if (rank == b->culprit) mailbox_fail(c->mail, rank, b->start, 0, 1);
  fmoe_status status = b->is_load ? fmoe_layer_load(layer, in_folder("kept")) : fmoe_layer_save(layer, in_folder("kept"));
  int happened = mailbox_failed(c->mail, b->culprit);
  if (rank == b->culprit) {
    b->happened = happened;
    EXPECT(happened ? FMOE_ERROR_PEER : FMOE_OK, status);
  }
  fmoe_layer_destroy(layer);
}

/* A transport that breaks at the i-th message, for all i: nobody hangs, and there is a whole file. */
static void test_breakdowns(void) {
  fmoe_layer *seen = one(options(FMOE_GELU, 7));
  int64_t messages = 0;
  EXPECT(FMOE_OK, fmoe_layer_save(seen, in_folder("kept")));
  for (int is_load = 0; is_load < 2; is_load++)
    for (int32_t culprit = 0; culprit < 2; culprit++) {
      breakdown b = {.culprit = culprit, .is_load = is_load, .happened = 1};
      for (b.start = 1; b.happened; b.start++, messages++) {
        begin_test("breakdown", 120);
        crew *c = crew_create((crew_options){.ranks = 2, .over_mailbox = 1, .timeout = 5, .mail = {.seed = seed}});
        crew_run(c, break_down, &b), crew_destroy(c);
        EXPECT(FMOE_OK, fmoe_layer_load(seen, in_folder("kept")));
        CHECK(entries(folder) == 1, "no draft is left behind");
      }
    }
  injected("a transport that fails at its i-th call of a save or a load, all i, 2 ranks", (long long)messages,
           "FMOE_ERROR_PEER; a whole file, no draft");
  unlink(in_folder("kept"));
  fmoe_layer_destroy(seen);
}

int main(void) {
  if (!mkdtemp(folder)) return perror(folder), 2;
  printf("checkpoint: seed %llu\n", (unsigned long long)seed);
  in_child(with_limit), in_child(on_small_disk), in_child(as_nobody);
  char command[200];
  snprintf(command, sizeof command, "chmod 700 %s/shut && rm -rf %s/shut %s/full", folder, folder, folder);
  CHECK(system(command) == 0, "%s", command);
  test_format();
  test_noise();
  test_bias();
  test_any_workers(FMOE_GATE_TOPK), test_any_workers(FMOE_GATE_NOISY);
  bias_step = 0.5, test_any_workers(FMOE_GATE_SWITCH), bias_step = 0;
  test_large();
  test_altered();
  test_other_layers();
  test_files_of_others();
  test_paths();
  test_killed();
  for (int w = 0; w < 4; w++) {
    begin_test("one rank fails", 300);
    crew *c = crew_of(2 << w % 2, w / 2);
    crew_run(c, fail_in_turn, NULL), crew_destroy(c);
  }
  unlink(in_folder("together"));
  test_breakdowns();
  fmoe_group_destroy(one_group);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
