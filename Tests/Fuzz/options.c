/* options.c: bytes as the options of every call that takes some, of any size a struct may claim to have. */
#include "fuzz.h"

/* A struct that begins with its struct_size, in a block that ends where it says that it ends. */
static void *sized(const void *known, size_t size, input *in) {
  const uint32_t most = (uint32_t)size + 16;
  uint8_t kind = take(in);
  uint32_t claimed = kind < 192 ? (uint32_t)size : kind % (most + 1);
  uint8_t *block = calloc(1, claimed < 4 ? 4 : claimed);
  if (!block) abort();
  memcpy(block, known, claimed < size ? claimed : size);
  if (claimed > size && kind & 1) block[size + take(in) % (claimed - size)] = take(in);
  memcpy(block, &claimed, 4);
  return block;
}

static char untouched;

static void group_options(input *in) {
  static char topology[64];
  fmoe_group *groups[3] = {(void *)&untouched, (void *)&untouched, (void *)&untouched};
  int32_t threads = (int32_t)any(in);
  fmoe_group_options o = {.threads = threads < 4096 && threads > 8 ? threads % 8 : threads, .bind = (int32_t)any(in) % 3,
                          .reserved = take(in) > 250, .timeout_seconds = any_double(in)};
  int32_t size = (int32_t)any(in);
  if (size > 3 && size <= 4096) size %= 4; /* more of them are slow, and no other case */
  if (take(in) < 64) {
    size_t length = in->left < sizeof topology - 1 ? in->left : sizeof topology - 1;
    memcpy(topology, in->at, length), topology[length] = 0;
    in->at += length, in->left -= length;
    o.topology = topology;
  }
  if (take(in) > 250) o.profile = "no-such-folder/profile";
  void *given = sized(&o, sizeof o, in);
  fmoe_status status = FAIR(fmoe_group_create_local(size, given, groups));
  for (int32_t r = 0; r < 3; r++)
    if (status == FMOE_OK && r < size) fmoe_group_destroy(groups[r]);
    else DEMAND((void *)groups[r] == &untouched, "rank %d of %d", r, size);
  free(given);
}

static fmoe_group *one_group(void) {
  static fmoe_group *group;
  const fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .bind = 1};
  if (!group && fmoe_group_create_local(1, &o, &group) != FMOE_OK) abort();
  return group;
}

static fmoe_layer_options layer_of(input *in) {
  return (fmoe_layer_options){
      .top_k = (int32_t)any(in), .d_model = (int64_t)any(in), .d_hidden = (int64_t)any(in), .experts = (int64_t)any(in),
      .activation = (int32_t)any(in) % 7, .gate = (int32_t)any(in) % 9, .seed = any(in),
      .capacity_factor = take(in) < 128 ? 0 : any_double(in), .balance_loss = take(in) < 128 ? 0 : any_double(in),
      .z_loss = take(in) < 128 ? 0 : any_double(in), .remote_share = take(in) < 128 ? 0 : any_double(in),
      .drop = take(in) < 128 ? 0 : (int32_t)any(in), .reserved = take(in) > 250};
}

static void adamw_options(fmoe_layer *layer, input *in) {
  fmoe_adamw_options o = {.zero_gradients = (int32_t)any(in) % 3, .learning_rate = any_double(in), .beta1 = any_double(in),
                          .beta2 = any_double(in), .epsilon = any_double(in), .weight_decay = any_double(in),
                          .gradient_scale = any_double(in), .decay_biases = (int32_t)any(in) % 3, .reserved = take(in) > 250};
  void *given = sized(&o, sizeof o, in);
  FAIR(fmoe_layer_adamw(layer, given));
  free(given);
}

/* A report or a struct of pointers, in a block of the size that it claims. */
static void outputs(fmoe_layer *layer, fmoe_pass *pass, input *in) {
  uint32_t size = take(in) % 100;
  uint8_t kind = take(in);
  uint32_t *block = malloc(size < 4 ? 4 : size);
  if (!block) abort();
  *block = size;
  fmoe_status status = kind % 3 == 0   ? FAIR(fmoe_layer_values(layer, (void *)block))
                       : kind % 3 == 1 ? FAIR(fmoe_layer_gradients(layer, (void *)block))
                                       : FAIR(fmoe_pass_routing(pass, (void *)block));
  DEMAND((status == FMOE_OK) == (size >= 8), "room of %u bytes: %d", size, (int)status);
  DEMAND(*block <= size, "%u of %u", *block, size);
  free(block);
}

static void plan_options(fmoe_pass *pass, int64_t experts, input *in) {
  fmoe_plan_options o = {.shadowing = (int32_t)any(in), .schedule = (int32_t)any(in), .group_size = (int32_t)any(in)};
  if (o.shadowing > 5 && take(in) < 200) o.shadowing %= 6;
  if (o.schedule > 3 && take(in) < 200) o.schedule %= 4;
  uint8_t *shadows = malloc((size_t)experts);
  if (!shadows) abort();
  for (int64_t e = 0; e < experts; e++) shadows[e] = (uint8_t)(take(in) % 8 == 7 ? take(in) : e & 1);
  if (take(in) < 224) o.shadows = shadows;
  void *given = sized(&o, sizeof o, in);
  FAIR(fmoe_plan(pass, given, NULL));
  free(given), free(shadows);
}

static void layer_options(input *in) {
  fmoe_layer *layer = (void *)&untouched;
  fmoe_layer_options o = layer_of(in);
  void *given = sized(&o, sizeof o, in);
  uint32_t claimed;
  memcpy(&claimed, given, 4);
  fmoe_status status = FAIR(fmoe_layer_create(one_group(), given, &layer));
  free(given);
  if (status != FMOE_OK) {
    DEMAND((void *)layer == &untouched, "after %s", fmoe_last_error());
    return;
  }
  enum { MOST = 1 << 12 };
  const int64_t n = 3, d = o.d_model;
  if (d <= MOST && o.d_hidden <= MOST && o.experts <= MOST) {
    float *rows = calloc((size_t)(4 * n * d), sizeof *rows);
    fmoe_pass *pass = NULL;
    if (!rows) abort();
    for (int64_t i = 0; i < 2 * n * d; i++) rows[i] = (float)(int8_t)take(in) / 64;
    if (FAIR(fmoe_gate(layer, rows, n, &pass)) == FMOE_OK) {
      adamw_options(layer, in), outputs(layer, pass, in), plan_options(pass, o.experts, in);
      if (FAIR(fmoe_forward(pass, rows + 2 * n * d)) == FMOE_OK) FAIR(fmoe_backward(pass, rows + n * d, rows + 3 * n * d, NULL));
      fmoe_pass_destroy(pass);
    }
    free(rows);
  }
  fmoe_layer_destroy(layer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  input in = {data, size};
  uint8_t kind = take(&in);
  if (kind % 4) layer_options(&in);
  else group_options(&in);
  return 0;
}
