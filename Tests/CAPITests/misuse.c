/* misuse.c: what a caller can get wrong, and what the library must leave alone.
 * `misuse small` is for valgrind, which needs the address space for itself and is slow at measuring speeds. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "oracle.h"

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
static const int sanitized = 1; /* it needs the address space, and standard error */
#else
static const int sanitized = 0;
#endif

static int small;
static int limited; /* the address space is, so that no size is too expensive to be refused */

static const uint64_t seed = 16180339;
enum { N = 11, K = 2, E = 3, D = 4, H = 6 }; /* tokens, choices, experts, model, hidden of most layers here */
static float tokens[N * D], output[N * D], grad_output[N * D], grad_tokens[N * D], grad_weights[N * K];
static int32_t choices[N * K];
static float weights[N * K];
static char untouched; /* its address: an out-parameter nobody has written to */

/* The call, which fills `type *out` by &out, fails with one of two statuses and leaves `out` alone. */
#define REFUSED(expected, other, type, call)                               \
  do {                                                                     \
    type *out = (type *)(void *)&untouched;                                \
    EXPECT_EITHER(expected, other, call);                                  \
    CHECK(out == (type *)(void *)&untouched, "%s wrote to its out", #call); \
  } while (0)

static fmoe_group_options group_options(void) {
  return (fmoe_group_options){.struct_size = sizeof(fmoe_group_options)};
}

static fmoe_layer_options layer_options(void) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = K, .d_model = D, .d_hidden = H,
                              .experts = E};
}

static fmoe_group *alone(void) {
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &group))) exit(summary());
  return group;
}

static fmoe_layer *layer_with(fmoe_group *group, fmoe_layer_options options) {
  fmoe_layer *layer = NULL;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer))) exit(summary());
  return layer;
}

static fmoe_pass *gated(fmoe_layer *layer) {
  fmoe_pass *pass = NULL;
  if (!EXPECT(FMOE_OK, fmoe_gate(layer, tokens, N, &pass))) exit(summary());
  return pass;
}

/* The object still does its work. */
static void check_step(fmoe_layer *layer) {
  fmoe_pass *pass = gated(layer);
  EXPECT(FMOE_OK, fmoe_forward(pass, output));
  EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
  for (int i = 0; i < N * D; i++)
    if (!isfinite(output[i]) || !isfinite(grad_tokens[i])) i = N * D, CHECK(0, "a step gives numbers");
  fmoe_pass_destroy(pass);
}

static void check_group(const fmoe_group_options *options) {
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, options, &group))) return;
  fmoe_layer *layer = layer_with(group, layer_options());
  check_step(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- names and words ----------------------------------------------------------------------- */

static void test_names(void) {
  for (int32_t status = -200; status < 300; status++) CHECK(fmoe_status_name(status), "a name for %d", status);
  CHECK(fmoe_status_name(INT32_MIN) && fmoe_status_name(INT32_MAX), "a name for the ends");
  CHECK(strstr(fmoe_status_name(FMOE_ERROR_STAGE), "STAGE"), "%s", fmoe_status_name(FMOE_ERROR_STAGE));
  CHECK(strstr(fmoe_status_name(FMOE_OK), "OK"), "%s", fmoe_status_name(FMOE_OK));
  CHECK(fmoe_version() == (FMOE_VERSION_MAJOR << 16 | FMOE_VERSION_MINOR << 8 | FMOE_VERSION_PATCH),
        "the loaded library is the header's: %x", fmoe_version());
}

static void *fail_elsewhere(void *unused) {
  CHECK(!strcmp(fmoe_last_error(), ""), "a new thread has no failure yet: %s", fmoe_last_error());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(1, NULL, NULL));
  return unused;
}

static void test_last_error(void) {
  char before[1000];
  pthread_t thread;
  CHECK(fmoe_last_error() && !strcmp(fmoe_last_error(), ""), "no failure yet: %s", fmoe_last_error());
  REFUSED(FMOE_ERROR_ARGUMENT, FMOE_ERROR_ARGUMENT, fmoe_group, fmoe_group_create_local(-3, NULL, &out));
  snprintf(before, sizeof before, "%s", fmoe_last_error());
  CHECK(strstr(before, "-3"), "the words name the value: %s", before);
  if (pthread_create(&thread, NULL, fail_elsewhere, NULL)) abort();
  pthread_join(thread, NULL);
  CHECK(!strcmp(before, fmoe_last_error()), "another thread's failure is not ours: %s", fmoe_last_error());
  fmoe_group_destroy(alone());
  CHECK(!strcmp(before, fmoe_last_error()), "success leaves the words: %s", fmoe_last_error());
}

static void test_set_last_error(void) {
  static char endless[100000];
  char words[] = "no communicator";
  CHECK(fmoe_set_last_error(FMOE_ERROR_PEER, words) == FMOE_ERROR_PEER, "the status comes back");
  words[0] = 'x';
  CHECK(!strcmp(fmoe_last_error(), "no communicator"), "words are copied: %s", fmoe_last_error());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(1, NULL, NULL));
  CHECK(!strstr(fmoe_last_error(), "communicator"), "until the next failure: %s", fmoe_last_error());
  CHECK(fmoe_set_last_error(FMOE_ERROR_FILE, NULL) == FMOE_ERROR_FILE && fmoe_last_error(), "no words are fine");
  memset(endless, 'x', sizeof endless - 1); /* longer than any room for words */
  CHECK(fmoe_set_last_error(FMOE_ERROR_PEER, endless) == FMOE_ERROR_PEER, "the status comes back");
  CHECK(!strncmp(fmoe_last_error(), endless, 20), "as much as fits: %s", fmoe_last_error());
}

/* ---- NULL ---------------------------------------------------------------------------------- */

static void test_null(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  fmoe_layer_options options = layer_options();
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  fmoe_routing routing = {.struct_size = sizeof routing};
  fmoe_plan_report report = {.struct_size = sizeof report};
  int64_t counts[E] = {0};
  fmoe_group_destroy(NULL), fmoe_layer_destroy(NULL), fmoe_pass_destroy(NULL), fmoe_cluster_destroy(NULL);
  EXPECT(argument, fmoe_group_create_local(1, NULL, NULL));
  REFUSED(argument, argument, fmoe_group, fmoe_group_create(NULL, NULL, &out));
  EXPECT(argument, fmoe_group_create(NULL, NULL, NULL));
  EXPECT(argument, fmoe_group_create_local(2, NULL, NULL));
  EXPECT(argument, fmoe_group_calibrate(NULL, 1));
  REFUSED(argument, argument, fmoe_layer, fmoe_layer_create(NULL, &options, &out));
  REFUSED(argument, argument, fmoe_layer, fmoe_layer_create(group, NULL, &out));
  EXPECT(argument, fmoe_layer_create(group, &options, NULL));
  EXPECT(argument, fmoe_layer_values(NULL, &tensors));
  EXPECT(argument, fmoe_layer_values(layer, NULL));
  EXPECT(argument, fmoe_layer_gradients(NULL, &tensors));
  EXPECT(argument, fmoe_layer_gradients(layer, NULL));
  EXPECT(argument, fmoe_layer_zero_gradients(NULL));
  EXPECT(argument, fmoe_layer_begin_gradients(NULL));
  EXPECT(argument, fmoe_layer_reduce_gradients(NULL));
  const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 1};
  EXPECT(argument, fmoe_layer_adamw(NULL, &adamw));
  EXPECT(argument, fmoe_layer_adamw(layer, NULL));
  EXPECT(argument, fmoe_layer_save(NULL, "x"));
  EXPECT(argument, fmoe_layer_save(layer, NULL));
  EXPECT(argument, fmoe_layer_load(NULL, "x"));
  EXPECT(argument, fmoe_layer_load(layer, NULL));
  REFUSED(argument, argument, fmoe_pass, fmoe_gate(NULL, tokens, N, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_gate(layer, NULL, N, &out));
  EXPECT(argument, fmoe_gate(layer, tokens, N, NULL));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(NULL, tokens, N, choices, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, NULL, N, choices, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, NULL, weights, &out));
  REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, choices, NULL, &out));
  EXPECT(argument, fmoe_route(layer, tokens, N, choices, weights, NULL));
  EXPECT(argument, fmoe_pass_routing(NULL, &routing));
  EXPECT(argument, fmoe_plan(NULL, NULL, NULL));
  EXPECT(argument, fmoe_plan(NULL, NULL, &report));
  EXPECT(argument, fmoe_forward(NULL, output));
  EXPECT(argument, fmoe_backward(NULL, grad_output, grad_tokens, NULL));
  EXPECT(argument, fmoe_pass_write_timeline(NULL, "x"));
  REFUSED(argument, argument, fmoe_cluster, fmoe_cluster_of_group(NULL, &out));
  EXPECT(argument, fmoe_cluster_of_group(group, NULL));
  REFUSED(FMOE_ERROR_STAGE, FMOE_ERROR_STAGE, fmoe_cluster, fmoe_cluster_of_group(group, &out)); /* nothing was measured */
  REFUSED(argument, argument, fmoe_cluster, fmoe_cluster_read(NULL, &out));
  EXPECT(argument, fmoe_cluster_read("x", NULL));
  EXPECT(argument, fmoe_cluster_write(NULL, "x"));
  EXPECT(argument, fmoe_cluster_plan(NULL, &options, counts, NULL, &report));
  EXPECT(argument, fmoe_cluster_plan(NULL, NULL, NULL, NULL, NULL));
  fmoe_pass *pass = gated(layer);
  EXPECT(argument, fmoe_pass_routing(pass, NULL));
  EXPECT(argument, fmoe_pass_write_timeline(pass, NULL));
  EXPECT(argument, fmoe_forward(pass, NULL));
  EXPECT(FMOE_OK, fmoe_forward(pass, output)); /* a wrong call has changed nothing */
  EXPECT(argument, fmoe_backward(pass, NULL, grad_tokens, NULL));
  EXPECT(argument, fmoe_backward(pass, grad_output, NULL, NULL));
  EXPECT(argument, fmoe_backward(pass, grad_output, grad_tokens, grad_weights)); /* only for fmoe_route */
  EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
  fmoe_pass_destroy(pass);
  for (int routed = 0; routed < 2; routed++) { /* a rank without tokens has no arrays to show */
    if (routed) EXPECT(FMOE_OK, fmoe_route(layer, NULL, 0, NULL, NULL, &pass));
    else EXPECT(FMOE_OK, fmoe_gate(layer, NULL, 0, &pass));
    EXPECT(FMOE_OK, fmoe_forward(pass, NULL));
    EXPECT(FMOE_OK, fmoe_backward(pass, NULL, NULL, NULL));
    fmoe_pass_destroy(pass);
  }
  check_step(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- several seats in one process; what they do together is the business of workers.c, faults.c and losses.c ---- */

static void test_local_seats(void) {
  fmoe_group *nobody = (fmoe_group *)(void *)&untouched, *seats[3] = {nobody, nobody, nobody};
  fmoe_group_options wrong = group_options();
  wrong.threads = -1;
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_group_create_local(2, &wrong, seats));
  wrong = group_options(), wrong.topology = "pack:x";
  EXPECT_EITHER(FMOE_ERROR_FILE, FMOE_ERROR_TOPOLOGY, fmoe_group_create_local(2, &wrong, seats));
  CHECK(seats[0] == nobody && seats[1] == nobody, "no seat is written");
  if (limited) { /* more threads than fit: the ranks that were there go again */
    wrong = group_options(), wrong.threads = 2048;
    EXPECT_EITHER(FMOE_ERROR_MEMORY, FMOE_ERROR_ARGUMENT, fmoe_group_create_local(2, &wrong, seats));
    CHECK(seats[0] == nobody && seats[1] == nobody, "no seat is written");
  }
  EXPECT(FMOE_OK, fmoe_group_create_local(2, NULL, seats));
  CHECK(seats[0] != seats[1] && seats[0] != nobody && seats[1] != nobody && seats[2] == nobody, "two seats, no more");
  fmoe_group_destroy(seats[1]), fmoe_group_destroy(seats[0]);
}

/* ---- options and structs of any age -------------------------------------------------------- */

static void test_group_options(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options_status = FMOE_ERROR_OPTIONS;
  struct { fmoe_group_options known; uint64_t future; } newer = {group_options(), 0};
  newer.known.struct_size = sizeof newer;
  check_group(&newer.known);
  newer.future = 1;
  REFUSED(options_status, options_status, fmoe_group, fmoe_group_create_local(1, &newer.known, &out));
  for (uint32_t size = 0; size < 4; size++) {
    fmoe_group_options o = {.struct_size = size};
    REFUSED(options_status, options_status, fmoe_group, fmoe_group_create_local(1, &o, &out));
  }
  fmoe_group_options older = group_options(); /* from before topology and profile: these are not looked at */
  older.struct_size = offsetof(fmoe_group_options, topology);
  older.topology = older.profile = (const char *)8;
  check_group(&older);
  older.struct_size = 4, older.threads = -5;
  check_group(&older);

  fmoe_group_options o = group_options();
  o.reserved = 1;
  REFUSED(options_status, options_status, fmoe_group, fmoe_group_create_local(1, &o, &out));
  static const int32_t bad_threads[] = {-1, INT32_MIN, 1 << 20, INT32_MAX}, good_threads[] = {0, 1, 2, 3};
  for (int i = 0; i < 4; i++) {
    o = group_options(), o.threads = bad_threads[i];
    REFUSED(argument, i < 2 ? argument : FMOE_ERROR_MEMORY, fmoe_group, fmoe_group_create_local(1, &o, &out));
    for (int32_t bind = 0; bind < 2; bind++) o.threads = good_threads[i], o.bind = bind, check_group(&o);
  }
  o = group_options(), o.threads = 4096; /* more than fit: those that were started end again */
  if (limited) REFUSED(FMOE_ERROR_MEMORY, argument, fmoe_group, fmoe_group_create_local(1, &o, &out));
  static const int32_t bad_bind[] = {-1, 2, INT32_MAX};
  for (int i = 0; i < 3; i++) {
    o = group_options(), o.bind = bad_bind[i];
    REFUSED(argument, options_status, fmoe_group, fmoe_group_create_local(1, &o, &out));
  }
  o = group_options(), o.timeout_seconds = 1e300;
  check_group(&o);
  static const int32_t bad_size[] = {0, -1, INT32_MIN};
  for (int i = 0; i < 3; i++)
    REFUSED(argument, argument, fmoe_group, fmoe_group_create_local(bad_size[i], NULL, &out));
}

static void refuse_layer(fmoe_group *group, fmoe_status expected, fmoe_status other, fmoe_layer_options options) {
  REFUSED(expected, other, fmoe_layer, fmoe_layer_create(group, &options, &out));
}

static void test_layer_options(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options_status = FMOE_ERROR_OPTIONS, memory = FMOE_ERROR_MEMORY;
  fmoe_group *group = alone();
  fmoe_layer_options o;
  struct { fmoe_layer_options known; uint64_t future[2]; } newer = {layer_options(), {0, 0}};
  newer.known.struct_size = sizeof newer;
  fmoe_layer *layer = NULL;
  EXPECT(FMOE_OK, fmoe_layer_create(group, &newer.known, &layer));
  fmoe_layer_destroy(layer);
  newer.future[1] = UINT64_C(1) << 63;
  REFUSED(options_status, options_status, fmoe_layer, fmoe_layer_create(group, &newer.known, &out));
  const uint32_t required = offsetof(fmoe_layer_options, activation);
  for (uint32_t size = 0; size < required; size++)
    o = layer_options(), o.struct_size = size, refuse_layer(group, options_status, options_status, o);
  o = layer_options(), o.struct_size = required, o.activation = 99; /* an older caller's memory, not an activation */
  layer = layer_with(group, o);
  check_step(layer), fmoe_layer_destroy(layer);

  const int64_t wrong[][3] = {{0, H, E}, {D, 0, E}, {D, H, 0}, {-1, H, E}, {D, -1, E}, {D, H, -1},
                              {INT64_MIN, INT64_MIN, INT64_MIN}, {D, H, INT64_MIN}, {-1, -1, E}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
    o = layer_options(), o.d_model = wrong[i][0], o.d_hidden = wrong[i][1], o.experts = wrong[i][2],
    refuse_layer(group, argument, argument, o);
  /* Powers of two and their neighbours: too large for an index, for a size in bytes, or for any machine. */
  for (int d = 0; d < 64; d += 3)
    for (int h = 0; h < 64; h += 3)
      for (int e = 1; e < 64; e += 3)
        if (d + h + e > 40)
          o = layer_options(), o.activation = (d + h) % 2 ? FMOE_SWIGLU : FMOE_GELU,
          o.d_model = (int64_t)(UINT64_C(1) << d) - (d == 63), o.d_hidden = (int64_t)(UINT64_C(1) << h) - (h == 63),
          o.experts = (int64_t)((UINT64_C(1) << e) + (e % 2)), refuse_layer(group, argument, memory, o);
  static const int32_t bad_k[] = {-1, E + 1, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) o = layer_options(), o.top_k = bad_k[i], refuse_layer(group, argument, argument, o);
  static const int32_t bad_choice[] = {-1, 8, INT32_MAX};
  for (int i = 0; i < 3; i++) {
    o = layer_options(), o.activation = bad_choice[i], refuse_layer(group, argument, options_status, o);
    o = layer_options(), o.gate = bad_choice[i], refuse_layer(group, argument, options_status, o);
  }
  for (int32_t gate = FMOE_GATE_TOPK; gate <= FMOE_GATE_SWIPE; gate++) {
    const int has_room = gate == FMOE_GATE_SWITCH || gate == FMOE_GATE_GSHARD;
    const int is_near = gate == FMOE_GATE_TOPOLOGY || gate == FMOE_GATE_HIERARCHICAL;
    const int has_bias = has_room || is_near || gate == FMOE_GATE_TOPK;
    const double bad[] = {-1, NAN, INFINITY, -INFINITY, 1.5};
    for (int i = 0; i < 5; i++) {
      o = layer_options(), o.gate = gate, o.top_k = 0, o.remote_share = bad[i];
      refuse_layer(group, argument, options_status, o);
      o = layer_options(), o.gate = gate, o.top_k = 0, o.capacity_factor = bad[i];
      if (!has_room || i < 4) refuse_layer(group, argument, options_status, o);
      o = layer_options(), o.gate = gate, o.top_k = 0, o.bias_step = bad[i];
      refuse_layer(group, argument, options_status, o);
      o = layer_options(), o.gate = gate, o.top_k = 0, o.input_jitter = bad[i];
      refuse_layer(group, argument, argument, o);
    }
    o = layer_options(), o.gate = gate, o.top_k = 0, o.input_jitter = 1;
    refuse_layer(group, argument, argument, o);
    o = layer_options(), o.gate = gate, o.top_k = 0, o.bias_step = 1;
    if (!has_bias) refuse_layer(group, options_status, options_status, o);
    o = layer_options(), o.gate = gate, o.top_k = 0, o.drop = has_room ? 4 : 1;
    refuse_layer(group, options_status, options_status, o);
    o = layer_options(), o.gate = gate, o.top_k = 0, o.reserved = 1;
    refuse_layer(group, options_status, options_status, o);
    o = layer_options(), o.gate = gate, o.top_k = 0, o.capacity_factor = 1e300 * has_room, o.remote_share = is_near;
    o.bias_step = has_bias, o.input_jitter = 0.99, o.drop = has_room ? FMOE_DROP_UNIMPORTANT : 0;
    layer = layer_with(group, o), fmoe_layer_destroy(layer);
  }
  o = layer_options(), o.gate = FMOE_GATE_BASE, o.top_k = 2, refuse_layer(group, options_status, options_status, o);
  o = layer_options(), o.gate = FMOE_GATE_BASE, o.top_k = 1, o.balance_loss = 0.1;
  refuse_layer(group, options_status, options_status, o);
  layer = layer_with(group, layer_options());
  static const int32_t bad_training[] = {-1, 2, INT32_MAX};
  for (int i = 0; i < 3; i++) EXPECT(argument, fmoe_layer_set_training(layer, bad_training[i]));
  EXPECT(argument, fmoe_layer_set_training(NULL, 1));
  EXPECT(FMOE_OK, fmoe_layer_set_training(layer, 0));
  fmoe_layer_destroy(layer);
  o = layer_options(), o.top_k = 0; /* the default is 2 */
  layer = layer_with(group, o);
  fmoe_routing routing = {.struct_size = sizeof routing};
  fmoe_pass *pass = gated(layer);
  EXPECT(FMOE_OK, fmoe_pass_routing(pass, &routing));
  CHECK(routing.top_k == 2, "%d", routing.top_k);
  fmoe_pass_destroy(pass), fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* Any of the three structs the library fills, with room for `room` bytes: at most that many are written, and
 * struct_size says how many; what follows stays. */
static void check_room(const char *name, fmoe_status (*give)(void *object, void *out), void *object, uint32_t whole,
                       const void *full) {
  for (uint32_t room = 0; room <= whole + 16; room += room < 9 ? 1 : 4) {
    unsigned char bytes[200];
    uint32_t written;
    memset(bytes, 0xa5, sizeof bytes);
    memcpy(bytes, &room, sizeof room);
    if (room < 8) {
      EXPECT(FMOE_ERROR_OPTIONS, give(object, bytes));
      continue;
    }
    if (!EXPECT(FMOE_OK, give(object, bytes))) return;
    memcpy(&written, bytes, sizeof written);
    CHECK(written == (room < whole ? room : whole), "%s: %u bytes for room %u", name, written, room);
    CHECK(!full || !memcmp(bytes + 4, (const char *)full + 4, (room < whole ? room : whole) - 4), "%s: room %u", name,
          room);
    for (uint32_t i = room < whole ? room : whole; i < sizeof bytes; i++)
      if (bytes[i] != 0xa5) i = sizeof bytes, CHECK(0, "%s: wrote beyond room %u", name, room);
  }
}

static fmoe_status give_values(void *layer, void *out) { return fmoe_layer_values(layer, out); }
static fmoe_status give_gradients(void *layer, void *out) { return fmoe_layer_gradients(layer, out); }
static fmoe_status give_routing(void *pass, void *out) { return fmoe_pass_routing(pass, out); }

static fmoe_status give_report(void *layer, void *out) { /* each pass plans once */
  fmoe_pass *pass = gated(layer);
  fmoe_status status = fmoe_plan(pass, NULL, out);
  if (status != FMOE_OK) EXPECT(FMOE_OK, fmoe_plan(pass, NULL, NULL)); /* a wrong call has changed nothing */
  fmoe_pass_destroy(pass);
  return status;
}

static void test_rooms(void) {
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  fmoe_pass *pass = gated(layer);
  fmoe_tensors tensors = {.struct_size = sizeof tensors}, gradients = {.struct_size = sizeof gradients};
  fmoe_routing routing = {.struct_size = sizeof routing};
  fmoe_plan_report report = {.struct_size = sizeof report};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &tensors));
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &gradients));
  EXPECT(FMOE_OK, fmoe_pass_routing(pass, &routing));
  check_room("values", give_values, layer, sizeof tensors, &tensors);
  check_room("gradients", give_gradients, layer, sizeof gradients, &gradients);
  check_room("routing", give_routing, pass, sizeof routing, &routing);
  if (!small) {
    check_room("report", give_report, layer, sizeof report, NULL);
    EXPECT(FMOE_OK, fmoe_plan(pass, NULL, &report));
    CHECK(report.shadows == 0 && report.group_size >= 0 && report.steps >= 0, "alone, nothing is shadowed");
    CHECK(report.seconds_planned >= 0 && report.seconds_planned <= report.seconds_plain, "%g of %g s",
          report.seconds_planned, report.seconds_plain);
  }
  fmoe_pass_destroy(pass), fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

static void refuse_plan(fmoe_pass *pass, fmoe_status expected, fmoe_status other, fmoe_plan_options options) {
  fmoe_plan_report report = {.struct_size = sizeof report, .steps = 123456};
  EXPECT_EITHER(expected, other, fmoe_plan(pass, &options, &report));
  CHECK(report.struct_size == sizeof report && report.steps == 123456, "out-parameters are written only on FMOE_OK");
}

static void test_plan_options(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, options_status = FMOE_ERROR_OPTIONS;
  const fmoe_plan_options defaults = {.struct_size = sizeof defaults};
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  fmoe_pass *pass = gated(layer);
  fmoe_plan_options o;
  struct { fmoe_plan_options known; uint64_t future; } newer = {defaults, 1};
  newer.known.struct_size = sizeof newer;
  EXPECT(options_status, fmoe_plan(pass, &newer.known, NULL));
  for (uint32_t size = 0; size < 4; size++)
    o = defaults, o.struct_size = size, refuse_plan(pass, options_status, options_status, o);
  o = defaults, o.shadowing = 5, refuse_plan(pass, argument, options_status, o);
  o = defaults, o.shadowing = -1, refuse_plan(pass, argument, options_status, o);
  o = defaults, o.shadowing = 2, refuse_plan(pass, argument, FMOE_ERROR_UNSUPPORTED, o); /* and no shadows given */
  o = defaults, o.schedule = 3, refuse_plan(pass, argument, options_status, o);
  o = defaults, o.schedule = -1, refuse_plan(pass, argument, options_status, o);
  o = defaults, o.group_size = -1, refuse_plan(pass, argument, argument, o);
  newer.future = 0;
  EXPECT(FMOE_OK, fmoe_plan(pass, &newer.known, NULL));
  fmoe_pass_destroy(pass);
  for (int32_t known = 0; known < 2; known++) {
    pass = gated(layer);
    o = defaults, o.struct_size = offsetof(fmoe_plan_options, shadows), o.shadowing = o.schedule = known;
    EXPECT(FMOE_OK, fmoe_plan(pass, &o, NULL));
    EXPECT(FMOE_OK, fmoe_forward(pass, output));
    fmoe_pass_destroy(pass);
  }
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* ---- batches ------------------------------------------------------------------------------- */

static void test_batches(void) {
  const fmoe_status argument = FMOE_ERROR_ARGUMENT, memory = FMOE_ERROR_MEMORY;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  static const int64_t negative[] = {-1, INT64_MIN};
  for (int i = 0; i < 2; i++) {
    REFUSED(argument, argument, fmoe_pass, fmoe_gate(layer, tokens, negative[i], &out));
    REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, negative[i], choices, weights, &out));
  }
  for (int bits = 38; bits < 64; bits++) { /* the library must find out before it reads the tokens */
    int64_t n = (int64_t)(UINT64_C(1) << bits) - (bits == 63);
    REFUSED(argument, memory, fmoe_pass, fmoe_gate(layer, tokens, n, &out));
    REFUSED(argument, memory, fmoe_pass, fmoe_route(layer, tokens, n, choices, weights, &out));
  }
  static const int32_t bad_choices[] = {-2, E, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    choices[N * K - 1] = bad_choices[i];
    REFUSED(argument, argument, fmoe_pass, fmoe_route(layer, tokens, N, choices, weights, &out));
  }
  choices[N * K - 1] = -1;
  check_step(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* Calls in any order on a few passes; what each may answer follows from three words of state. */
static void test_stages(void) {
  enum { PASSES = 4, STEPS = 600 };
  struct { fmoe_pass *pass; int planned, ran, finished; } seats[PASSES] = {{NULL, 0, 0, 0}};
  uint64_t state = seed;
  fmoe_group *group = alone();
  fmoe_layer *layer = layer_with(group, layer_options());
  for (int step = 0; step < STEPS; step++) {
    int s = (int)(uniform(&state) * PASSES), action = (int)(uniform(&state) * 6);
    int64_t n = (int64_t)(uniform(&state) * (N + 1));
    fmoe_pass *pass = seats[s].pass;
    fmoe_routing routing = {.struct_size = sizeof routing};
    int planned = seats[s].planned, ran = seats[s].ran, finished = seats[s].finished;
    if (!pass) {
      memset(&seats[s], 0, sizeof seats[s]);
      if (action % 2) EXPECT(FMOE_OK, fmoe_gate(layer, tokens, n, &seats[s].pass));
      else EXPECT(FMOE_OK, fmoe_route(layer, tokens, n, choices, weights, &seats[s].pass));
    } else if (action == 0) {
      EXPECT(planned || ran ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_plan(pass, NULL, NULL));
      seats[s].planned = 1;
    } else if (action == 1 || action == 2) {
      EXPECT(ran ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_forward(pass, output));
      seats[s].ran = 1;
    } else if (action == 3) {
      EXPECT(!ran || finished ? FMOE_ERROR_STAGE : FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
      seats[s].finished = ran;
    } else if (action == 4) {
      EXPECT(FMOE_OK, fmoe_pass_routing(pass, &routing));
    } else {
      fmoe_pass_destroy(pass);
      seats[s].pass = NULL;
    }
  }
  for (int s = 0; s < PASSES; s++) fmoe_pass_destroy(seats[s].pass);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

static void test_destroy_orders(void) {
  static const char orders[6][4] = {"glp", "gpl", "lgp", "lpg", "pgl", "plg"};
  for (int order = 0; order < 6; order++)
    for (int stage = 0; stage < 4; stage++) {
      fmoe_group *group = alone();
      fmoe_layer *layer = layer_with(group, layer_options());
      fmoe_pass *pass = gated(layer);
      if (stage > 0) EXPECT(FMOE_OK, fmoe_plan(pass, NULL, NULL));
      if (stage > 1) EXPECT(FMOE_OK, fmoe_forward(pass, output));
      if (stage > 2) EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
      for (int i = 0; i < 3; i++)
        if (orders[order][i] == 'g') fmoe_group_destroy(group);
        else if (orders[order][i] == 'l') fmoe_layer_destroy(layer);
        else { /* a pass under way may go on when group and layer are destroyed */
          if (stage < 2) EXPECT(FMOE_OK, fmoe_forward(pass, output));
          if (stage == 1 || stage == 2) EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
          fmoe_pass_destroy(pass);
        }
    }
}

/* ---- tokens that are no numbers ------------------------------------------------------------ */

enum { BIG_N = 40, BIG_D = 17, BIG_E = 4, BIG_H = 23 };

static void run_batch(fmoe_layer *layer, int64_t n, const float *x, const int32_t *given, float *y) {
  static float ones[BIG_N * BIG_D], grad[BIG_N * BIG_D], given_weights[BIG_N * K];
  fmoe_pass *pass = NULL;
  for (int i = 0; i < BIG_N * BIG_D; i++) ones[i] = 1;
  for (int s = 0; s < BIG_N * K; s++) given_weights[s] = 0.5f;
  if (given) EXPECT(FMOE_OK, fmoe_route(layer, x, n, given, given_weights, &pass));
  else EXPECT(FMOE_OK, fmoe_gate(layer, x, n, &pass));
  EXPECT(FMOE_OK, fmoe_forward(pass, y));
  EXPECT(FMOE_OK, fmoe_backward(pass, ones, grad, NULL)); /* whatever it gives, it comes back */
  fmoe_pass_destroy(pass);
}

/* One sick token among others gives a row that is no numbers; the others' rows are those of a run without it. */
static void test_non_finite_tokens(void) {
  static const float values[] = {NAN, INFINITY, -INFINITY};
  static float x[BIG_N * BIG_D], y[BIG_N * BIG_D], x_without[BIG_N * BIG_D], y_without[BIG_N * BIG_D];
  static int32_t given[BIG_N * K], given_without[BIG_N * K];
  enum { SICK = 7, BEFORE = SICK * BIG_D, AFTER = (BIG_N - 1 - SICK) * BIG_D };
  uint64_t state = seed;
  fmoe_group *group = alone();
  for (int s = 0; s < BIG_N * K; s++) given[s] = (int32_t)(uniform(&state) * BIG_E);
  memcpy(given_without, given, SICK * K * sizeof *given);
  memcpy(given_without + SICK * K, given + SICK * K + K, (BIG_N - 1 - SICK) * K * sizeof *given);
  for (int i = 0; i < BIG_N * BIG_D; i++) x[i] = (float)(2 * uniform(&state) - 1);
  memcpy(x_without, x, BEFORE * sizeof *x);
  memcpy(x_without + BEFORE, x + BEFORE + BIG_D, AFTER * sizeof *x);
  for (int32_t activation = FMOE_GELU; activation <= FMOE_SWIGLU; activation++) {
    fmoe_layer_options options = layer_options();
    options.d_model = BIG_D, options.d_hidden = BIG_H, options.experts = BIG_E, options.activation = activation;
    fmoe_layer *layer = layer_with(group, options);
    for (int routed = 0; routed < 2; routed++)
      for (int v = 0; v < 3; v++) {
        int finite = 1;
        x[BEFORE + 3] = values[v];
        run_batch(layer, BIG_N, x, routed ? given : NULL, y);
        run_batch(layer, BIG_N - 1, x_without, routed ? given_without : NULL, y_without);
        for (int c = 0; c < BIG_D; c++) finite &= isfinite(y[BEFORE + c]) != 0;
        CHECK(!finite, "activation %d, routed %d: %g in a token gives a finite row", activation, routed, values[v]);
        CHECK(!memcmp(y, y_without, BEFORE * sizeof *y) &&
                  !memcmp(y + BEFORE + BIG_D, y_without + BEFORE, AFTER * sizeof *y),
              "activation %d, routed %d: %g in a token changes the rows of others", activation, routed, values[v]);
      }
    fmoe_layer_destroy(layer);
  }
  fmoe_group_destroy(group);
}

/* ---- machines ------------------------------------------------------------------------------ */

#define NODE " nodeset=\"0x1\" complete_nodeset=\"0x1\""
#define CORES(set) " os_index=\"0\" cpuset=\"" set "\" complete_cpuset=\"" set "\"" NODE
static const char machine[] =
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
    "<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n"
    "<topology version=\"2.0\">\n"
    "<object type=\"Machine\"" CORES("0x1") " allowed_cpuset=\"0x1\" allowed_nodeset=\"0x1\">\n"
    "<object type=\"NUMANode\"" CORES("0x1") " local_memory=\"1048576\"/>\n"
    "<object type=\"PU\"" CORES("0x1") "/>\n"
    "</object>\n</topology>\n";

static void write_text(char *path, const char *text) {
  int file = mkstemps(path, 4);
  if (file < 0 || write(file, text, strlen(text)) != (ssize_t)strlen(text)) abort();
  close(file);
}

static void test_topology(void) {
  static const char *known[] = {"pack:2 core:2 pu:2", "core:1 pu:1", "numa:2 core:8 pu:1"};
  static const char *broken[] = {"pack:x", "pack:2 core:2 nonsense:2", "pack:", "/", "no-such-machine.xml",
                                 "/no/such/folder/machine.xml"};
  fmoe_group_options o = group_options();
  for (int i = 0; i < 3; i++)
    for (int32_t bind = 0; bind < 2; bind++) o.topology = known[i], o.bind = bind, check_group(&o);
  for (int i = 0; i < 6; i++) {
    o.topology = broken[i];
    REFUSED(FMOE_ERROR_FILE, FMOE_ERROR_TOPOLOGY, fmoe_group, fmoe_group_create_local(1, &o, &out));
    CHECK(strstr(fmoe_last_error(), broken[i]), "the words name the value: %s", fmoe_last_error());
  }
  char good[] = "/tmp/machine-XXXXXX.xml", odd[] = "/tmp/m\344chine-XXXXXX.xml", bad[] = "/tmp/machine-XXXXXX.xml";
  write_text(good, machine), write_text(odd, machine), write_text(bad, "<topology>\nnot a machine\n");
  o.topology = good, check_group(&o);
  o.topology = odd, check_group(&o); /* a path is bytes, not UTF-8 */
  o.topology = bad;
  REFUSED(FMOE_ERROR_FILE, FMOE_ERROR_TOPOLOGY, fmoe_group, fmoe_group_create_local(1, &o, &out));
  unlink(good), unlink(odd), unlink(bad);
  static char endless[100000]; /* longer than any room for words */
  memset(endless, 'x', sizeof endless - 1);
  o.topology = endless;
  REFUSED(FMOE_ERROR_FILE, FMOE_ERROR_TOPOLOGY, fmoe_group, fmoe_group_create_local(1, &o, &out));
}

/* ---- the process around it ----------------------------------------------------------------- */

static void test_good_neighbour(void) {
  struct sigaction before[65], after;
  cpu_set_t cores, cores_after;
  fmoe_group_options o = group_options();
  for (int s = 1; s < 65; s++) memset(&before[s], 0, sizeof after), sigaction(s, NULL, &before[s]);
  sched_getaffinity(0, sizeof cores, &cores);
  check_group(NULL);
  for (o.threads = 1; o.threads < 4; o.threads++) check_group(&o);
  fmoe_group *group = alone(); /* and one that lives */
  sched_getaffinity(0, sizeof cores_after, &cores_after);
  CHECK(CPU_EQUAL(&cores, &cores_after), "the caller's thread keeps its cores");
  for (int s = 1; s < 65; s++)
    if (!sigaction(s, NULL, &after)) CHECK(after.sa_handler == before[s].sa_handler, "signal %d is the host's", s);
  fmoe_group_destroy(group);
}

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  limited = !small && !sanitized;
  uint64_t state = seed;
  struct rlimit limit = {UINT64_C(4) << 30, UINT64_C(4) << 30}; /* bytes: what is huge here is huge everywhere */
  if (limited) setrlimit(RLIMIT_AS, &limit);
  printf("misuse: seed %llu\n", (unsigned long long)seed);
  for (int i = 0; i < N * D; i++) tokens[i] = (float)uniform(&state), grad_output[i] = (float)uniform(&state);
  for (int s = 0; s < N * K; s++) choices[s] = s % (E + 1) - 1, weights[s] = (float)uniform(&state);
  FILE *words = tmpfile();
  int standard_error = dup(2);
  if (!words || standard_error < 0) abort();
  if (limited) dup2(fileno(words), 2); /* the tools have things to say there, and hwloc has under them */

  test_last_error(); /* first: before any failure */
  test_names();
  test_set_last_error();
  test_null();
  test_local_seats();
  test_group_options();
  test_layer_options();
  test_rooms();
  test_plan_options();
  test_batches();
  test_stages();
  test_destroy_orders();
  test_non_finite_tokens();
  test_topology();
  test_good_neighbour();

  struct stat said;
  if (fstat(fileno(words), &said)) abort();
  CHECK(said.st_size == 0, "the library never prints, %lld bytes on standard error", (long long)said.st_size);
  dup2(standard_error, 2), close(standard_error), fclose(words);
  return summary();
}
