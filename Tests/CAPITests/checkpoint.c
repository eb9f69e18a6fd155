/* checkpoint.c: layers in files.  Any number of workers reads what any number wrote; the format is the documented one, read
 * here by hand; a rank or a transport that fails leaves the old file as it was.  altered.c has files that are wrong, disks.c
 * what the system refuses. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crew.h"
#include "folder.h"
#include "stored.h"

static const uint64_t seed = 14142135;

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

/* ---- a training goes on -------------------------------------------------------------------- */

/* What the layer's next pass makes of a rank's tokens: choices, weights, outputs and gradients. */
static uint64_t next_pass(fmoe_layer *layer, int32_t rank) {
  enum { N = 64 };
  static _Thread_local float tokens[N * D], output[N * D], grads[N * D];
  uint64_t state = seed + (uint64_t)rank;
  fmoe_pass *pass;
  fmoe_routing routing = {.struct_size = sizeof routing};
  fmoe_tensors t = {.struct_size = sizeof t};
  for (int i = 0; i < N * D; i++) tokens[i] = (float)(2 * uniform(&state) - 1);
  EXPECT(FMOE_OK, fmoe_layer_begin_gradients(layer));
  if (!EXPECT(FMOE_OK, fmoe_gate(layer, tokens, N, &pass))) return 0;
  EXPECT(FMOE_OK, fmoe_pass_routing(pass, &routing));
  uint64_t hash = hash_floats(1, (const float *)(const void *)routing.choices, N * routing.top_k);
  hash = hash_floats(hash, routing.weights, N * routing.top_k);
  EXPECT(FMOE_OK, fmoe_forward(pass, output));
  EXPECT(FMOE_OK, fmoe_backward(pass, tokens, grads, NULL));
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &t));
  fmoe_pass_destroy(pass);
  hash = hash_floats(hash_floats(hash, output, N * D), grads, N * D);
  return hash_floats(hash, t.gate, E * D);
}

typedef struct onward {
  fmoe_layer_options options;
  int draws;
} onward;

/* A layer that goes on from a file does what the one that wrote it does, which has used its memory more often. */
static void go_on(crew *c, int32_t rank, void *context) {
  const onward *o = context;
  fmoe_layer *layer, *other, *new;
  EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o->options, &layer));
  EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o->options, &other));
  EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &o->options, &new));
  for (int pass = 0; pass < 3; pass++) next_pass(layer, rank);
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("a")));
  EXPECT(FMOE_OK, fmoe_layer_load(other, in_folder("a")));
  for (int pass = 0; pass < 2; pass++) {
    const uint64_t wanted = next_pass(layer, rank);
    CHECK(next_pass(other, rank) == wanted, "rank %d of %d, gate %d, drop %d", rank, c->ranks, o->options.gate, o->options.drop);
    CHECK(!o->draws || next_pass(new, rank) != wanted, "rank %d of %d, gate %d draws", rank, c->ranks, o->options.gate);
  }
  fmoe_layer_destroy(layer), fmoe_layer_destroy(other), fmoe_layer_destroy(new);
}

static void test_going_on(void) {
  onward all[24];
  int count = 0;
  for (int32_t of = FMOE_GATE_TOPK; of <= FMOE_GATE_SWIPE; of++)
    for (int32_t drop = FMOE_DROP_LAST; drop <= FMOE_DROP_UNIMPORTANT; drop++) {
      const int has_room = of == FMOE_GATE_SWITCH || of == FMOE_GATE_GSHARD;
      if (drop != FMOE_DROP_LAST && !has_room) continue;
      onward *o = &all[count++];
      *o = (onward){.options = options(FMOE_RELU, 9)};
      o->options.gate = of, o->options.drop = drop, o->options.capacity_factor = has_room ? 0.5 : 0;
      if (of == FMOE_GATE_BASE) o->options.top_k = 1;
      o->draws = of == FMOE_GATE_NOISY || of == FMOE_GATE_GSHARD || drop == FMOE_DROP_RANDOM;
    }
  all[count] = (onward){.options = options(FMOE_RELU, 9), .draws = 1}, all[count++].options.input_jitter = 0.1;
  all[count] = (onward){.options = options(FMOE_RELU, 9)}, all[count++].options.bias_step = 0.1;
  for (int i = 0; i < count; i++)
    for (int w = 0; w < 3; w++) {
      begin_test("going on", 60);
      crew *c = crew_of(1 + (w > 0), w == 2);
      crew_run(c, go_on, &all[i]), crew_destroy(c);
    }
  unlink(in_folder("a"));
  /* A gate that leaves nothing to chance may use what one that does has learnt. */
  gate = FMOE_GATE_GSHARD;
  fmoe_layer *drawing = one(options(FMOE_RELU, 8));
  gate = FMOE_GATE_TOPK;
  fmoe_layer *plain = one(options(FMOE_RELU, 9));
  EXPECT(FMOE_OK, fmoe_layer_save(drawing, in_folder("a")));
  EXPECT(FMOE_OK, fmoe_layer_load(plain, in_folder("a")));
  CHECK(values_of(plain) == values_of(drawing), "what is learnt");
  fmoe_layer_destroy(plain), fmoe_layer_destroy(drawing), unlink(in_folder("a"));
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
  test_format();
  test_noise();
  test_bias();
  test_going_on();
  test_any_workers(FMOE_GATE_TOPK), test_any_workers(FMOE_GATE_NOISY);
  bias_step = 0.5, test_any_workers(FMOE_GATE_SWITCH), bias_step = 0;
  test_large();
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
