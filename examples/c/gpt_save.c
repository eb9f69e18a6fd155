/* gpt_save.c: a training in a folder. */
#define _POSIX_C_SOURCE 200809L
#include "gpt_inside.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A dense tensor's three arrays follow each other, in the order of gpt_tensors, behind this. */
typedef struct dense_head {
  char format[16]; /* "train_gpt 1" */
  int64_t floats;  /* behind it */
  int64_t step, updates;
  uint64_t random;
} dense_head;

static const char FORMAT[16] = "train_gpt 1";

static void name_file(char *path, const char *folder, const char *what, int step) {
  snprintf(path, FILENAME_MAX, "%s/step%d.%s", folder, step, what);
}

static int64_t dense_floats(const gpt *model) {
  int64_t floats = 0;
  for (int i = 0; i < model->tensor_count; i++) floats += model->tensors[i].mean ? 3 * model->tensors[i].size : 0;
  return floats;
}

/* Writes a file as a whole or not at all. */
static fmoe_status write_file(const char *path, const gpt *model, const void *head, size_t size) {
  char draft[FILENAME_MAX + 8];
  snprintf(draft, sizeof draft, "%s.draft", path);
  FILE *file = fopen(draft, "wb");
  int good = file && fwrite(head, size, 1, file) == 1;
  for (int i = 0; model && good && i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++) good = good && fwrite(parts[p], sizeof(float), (size_t)t->size, file) == (size_t)t->size;
  }
  good = good && fflush(file) == 0 && fsync(fileno(file)) == 0;
  if (file) good = fclose(file) == 0 && good;
  if (good && rename(draft, path) == 0) return FMOE_OK;
  remove(draft);
  return gpt_fail(FMOE_ERROR_FILE, "%s cannot be written", path);
}

static int latest_in(const char *folder) { /* the step that counts, or -1 */
  char path[FILENAME_MAX];
  int step = -1;
  snprintf(path, sizeof path, "%s/latest", folder);
  FILE *file = fopen(path, "r");
  if (file && fscanf(file, "%d", &step) != 1) step = -1;
  if (file) fclose(file);
  return step;
}

static void layer_name(char *name, int layer) { snprintf(name, 40, "layer%d.safetensors", layer); }

fmoe_status gpt_save(gpt *model, const char *folder, gpt_place place) {
  char path[FILENAME_MAX], name[40];
  int before = latest_in(folder);
  for (int i = 0; i < model->config.layers; i++) {
    layer_name(name, i), name_file(path, folder, name, place.step);
    TRY(fmoe_layer_save(model->blocks[i].experts, path));
  }
  fmoe_status status = FMOE_OK;
  if (model->peers.rank == 0) {
    dense_head head = {.floats = dense_floats(model), .step = place.step, .updates = model->updates, .random = place.random};
    memcpy(head.format, FORMAT, sizeof FORMAT);
    name_file(path, folder, "dense", place.step);
    status = write_file(path, model, &head, sizeof head);
    char latest[24];
    int length = snprintf(latest, sizeof latest, "%d\n", place.step);
    snprintf(path, sizeof path, "%s/latest", folder);
    if (status == FMOE_OK) status = write_file(path, NULL, latest, (size_t)length);
    for (int i = -1; status == FMOE_OK && before >= 0 && before != place.step && i < model->config.layers; i++) {
      if (i < 0) snprintf(name, sizeof name, "dense");
      else layer_name(name, i);
      name_file(path, folder, name, before);
      remove(path);
    }
  }
  return gpt_agree(model, status);
}

/* Worker 0 alone. */
static fmoe_status read_dense(gpt *model, const char *folder, int step, dense_head *head) {
  char path[FILENAME_MAX];
  name_file(path, folder, "dense", step);
  FILE *file = step < 0 ? NULL : fopen(path, "rb");
  if (!file) return gpt_fail(FMOE_ERROR_FILE, "%s holds no training", folder);
  int good = fread(head, sizeof *head, 1, file) == 1 && memcmp(head->format, FORMAT, sizeof FORMAT) == 0 &&
             head->floats == dense_floats(model);
  for (int i = 0; good && i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++) good = good && fread(parts[p], sizeof(float), (size_t)t->size, file) == (size_t)t->size;
  }
  good = good && fgetc(file) == EOF;
  fclose(file);
  return good ? FMOE_OK : gpt_fail(FMOE_ERROR_FILE, "%s is not of a model of this kind", path);
}

fmoe_status gpt_load(gpt *model, const char *folder, gpt_place *place) {
  dense_head head = {.step = 0};
  float numbers[6] = {0}; /* step, updates, and four times 16 bits: worker 0's for all, as the sum with zeros */
  fmoe_status status = FMOE_OK;
  if (model->peers.rank == 0) {
    status = read_dense(model, folder, latest_in(folder), &head);
    numbers[0] = (float)head.step, numbers[1] = (float)head.updates;
    for (int i = 0; i < 4; i++) numbers[2 + i] = (float)(head.random >> 16 * i & 0xffff);
  } else {
    for (int i = 0; i < model->tensor_count; i++) {
      const tensor *t = &model->tensors[i];
      float *parts[] = {t->value, t->mean, t->square};
      for (int p = 0; t->mean && p < 3; p++) memset(parts[p], 0, (size_t)t->size * sizeof(float));
    }
  }
  if ((status = gpt_agree(model, status)) != FMOE_OK || (status = gpt_sum(model, numbers, 6)) != FMOE_OK) return status;
  for (int i = 0; i < model->tensor_count; i++) {
    const tensor *t = &model->tensors[i];
    float *parts[] = {t->value, t->mean, t->square};
    for (int p = 0; t->mean && p < 3; p++)
      if ((status = gpt_sum(model, parts[p], t->size)) != FMOE_OK) return status;
  }
  *place = (gpt_place){.step = (int)numbers[0]};
  model->updates = (int)numbers[1];
  for (int i = 0; i < 4; i++) place->random |= (uint64_t)numbers[2 + i] << 16 * i;
  for (int i = 0; i < model->config.layers; i++) {
    char path[FILENAME_MAX], name[40];
    layer_name(name, i), name_file(path, folder, name, place->step);
    TRY(fmoe_layer_load(model->blocks[i].experts, path));
  }
  return FMOE_OK;
}
