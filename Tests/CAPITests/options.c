/* options.c: options and structs of any age and with any values, and the machines that options name. */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "subject.h"

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
  for (uint32_t part = 1; part < sizeof older.topology; part++) { /* half a pointer is none */
    older.struct_size = (uint32_t)offsetof(fmoe_group_options, topology) + part;
    check_group(&older);
  }
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
  check_works(layer), fmoe_layer_destroy(layer);

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

int main(int count, char **arguments) {
  subject_begin("options", count, arguments);
  test_group_options();
  test_layer_options();
  test_rooms();
  test_plan_options();
  test_topology();
  return subject_end();
}
