/* text.c: reads files whole, cuts off their ends, and sifts the rest by runs of words. */
#define _POSIX_C_SOURCE 200809L
#include "text.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { RUN = 8 }; /* words in a row that betray a quotation */

typedef struct bytes {
  unsigned char *at;
  int64_t size, room;
} bytes;

static int append(bytes *to, const unsigned char *from, int64_t size) {
  if (to->size + size > to->room) {
    int64_t room = 2 * to->room + size;
    unsigned char *at = realloc(to->at, (size_t)room);
    if (!at) return -1;
    to->at = at;
    to->room = room;
  }
  memcpy(to->at + to->size, from, (size_t)size);
  to->size += size;
  return 0;
}

static int read_file(const char *path, bytes *out) {
  unsigned char buffer[65536];
  size_t size;
  FILE *file = fopen(path, "rb");
  if (!file) return -1;
  int result = 0;
  while (result == 0 && (size = fread(buffer, 1, sizeof buffer, file)) > 0) result = append(out, buffer, (int64_t)size);
  if (ferror(file)) result = -1;
  fclose(file);
  return result;
}

/* ---- runs of words ----------------------------------------------------------------------------- */
typedef struct runs { /* a set of hashes with open addressing; 0 is an empty place */
  uint64_t *at;
  uint64_t mask; /* places - 1, a power of two minus 1, and more than twice the words */
} runs;

static uint64_t *place(const runs *set, uint64_t hash) {
  uint64_t i = hash & set->mask;
  while (set->at[i] != 0 && set->at[i] != hash) i = (i + 1) & set->mask;
  return &set->at[i];
}

/* Goes through all runs of RUN words in a text; adds them to the set, or tells whether one of them is there. */
static int walk(runs *set, const unsigned char *at, int64_t size, int adds) {
  uint64_t recent[RUN] = {0}, word = 0;
  int64_t words = 0;
  for (int64_t i = 0; i <= size; i++) {
    if (i < size && (isalnum(at[i]) || at[i] >= 128)) {
      word = (word ? word : 0xcbf29ce484222325u) ^ (uint64_t)tolower(at[i]); /* FNV-1a */
      word *= 0x100000001b3u;
    } else if (word) {
      recent[words++ % RUN] = word;
      word = 0;
      if (words < RUN) continue;
      uint64_t hash = 1;
      for (int64_t w = words - RUN; w < words; w++) {
        hash = (hash ^ recent[w % RUN]) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
      uint64_t *found = place(set, hash | 1);
      if (adds)
        *found = hash | 1;
      else if (*found)
        return 1;
    }
  }
  return 0;
}

/* The end of the paragraph that begins at `from`: past the next empty line, or the end of the text. */
static int64_t next_paragraph(const unsigned char *at, int64_t size, int64_t from) {
  for (int64_t i = from; i + 1 < size; i++)
    if (at[i] == '\n' && at[i + 1] == '\n') {
      for (i += 2; i < size && at[i] == '\n';) i++;
      return i;
    }
  return size;
}

static int64_t cut_of(const unsigned char *at, int64_t size) { /* where the held-out end of a file begins */
  int64_t tenth = size - size / 10, cut = next_paragraph(at, size, tenth);
  return cut < size ? cut : tenth; /* a last tenth without paragraphs is cut as it comes */
}

/* ---- text -------------------------------------------------------------------------------------- */
static int32_t *to_symbols(const text *t, const bytes *from) {
  int32_t *symbols = malloc(((size_t)from->size + 1) * sizeof symbols[0]);
  for (int64_t i = 0; symbols && i < from->size; i++) symbols[i] = t->symbol_of[from->at[i]];
  return symbols;
}

/* files [count] hold the texts; train and held_out take them apart. */
static int split(const bytes *files, int count, bytes *train, bytes *held_out) {
  for (int f = 0; f < count; f++) {
    int64_t cut = cut_of(files[f].at, files[f].size);
    if (append(held_out, files[f].at + cut, files[f].size - cut) != 0) return -1;
  }
  runs set = {NULL, 1023};
  while (set.mask < (uint64_t)held_out->size) set.mask = 2 * set.mask + 1; /* a word and its gap are 2 bytes or more */
  set.at = calloc(set.mask + 1, sizeof set.at[0]);
  if (!set.at) return -1;
  int result = 0;
  for (int f = 0; f < count; f++) { /* file by file: no run goes from one into the next */
    int64_t cut = cut_of(files[f].at, files[f].size);
    walk(&set, files[f].at + cut, files[f].size - cut, 1);
  }
  for (int f = 0; f < count; f++) {
    int64_t cut = cut_of(files[f].at, files[f].size), end;
    for (int64_t from = 0; from < cut && result == 0; from = end) {
      end = next_paragraph(files[f].at, cut, from);
      if (!walk(&set, files[f].at + from, end - from, 0)) result = append(train, files[f].at + from, end - from);
    }
  }
  free(set.at);
  return result;
}

int text_read(text *out, char *const *paths, int count, char *error, int size) {
  memset(out, 0, sizeof *out);
  bytes *files = calloc((size_t)count + 1, sizeof files[0]), train = {NULL, 0, 0}, held_out = {NULL, 0, 0};
  int result = files ? 0 : -1;
  int64_t total = 0;
  snprintf(error, (size_t)size, "no memory for the text");
  for (int f = 0; f < count && result == 0; f++) {
    errno = 0;
    result = read_file(paths[f], &files[f]);
    if (result != 0) snprintf(error, (size_t)size, "%s: %s", paths[f], strerror(errno ? errno : ENOMEM));
    total += files[f].size;
  }
  if (result == 0) result = split(files, count, &train, &held_out);
  if (result == 0) {
    char occurs[256] = {0};
    for (int f = 0; f < count; f++)
      for (int64_t i = 0; i < files[f].size; i++) occurs[files[f].at[i]] = 1;
    for (int b = 0; b < 256; b++) {
      out->symbol_of[b] = occurs[b] ? out->vocab : -1;
      if (occurs[b]) out->byte_of[out->vocab++] = (unsigned char)b;
    }
    out->train = to_symbols(out, &train);
    out->held_out = to_symbols(out, &held_out);
    out->train_size = train.size;
    out->held_out_size = held_out.size;
    out->left_out = total - train.size - held_out.size;
    if (!out->train || !out->held_out) result = -1;
  }
  for (int f = 0; files && f < count; f++) free(files[f].at);
  free(files);
  free(train.at);
  free(held_out.at);
  if (result != 0) text_free(out);
  return result;
}

void text_free(text *what) {
  free(what->train);
  free(what->held_out);
  what->train = what->held_out = NULL;
}

double text_unigram_entropy(const text *what) {
  double count[256], sum = 0;
  for (int j = 0; j < what->vocab; j++) count[j] = 1; /* as if all had been seen once more: none is impossible */
  for (int64_t i = 0; i < what->train_size; i++) count[what->train[i]]++;
  for (int64_t i = 0; i < what->held_out_size; i++)
    sum -= log(count[what->held_out[i]] / (double)(what->train_size + what->vocab));
  return sum / (double)what->held_out_size;
}

/* ---- folders ------------------------------------------------------------------------------------ */
int text_list(const char *folder, char ***paths, int *count, char *error, int size) {
  struct dirent **entries;
  int found = scandir(folder, &entries, NULL, alphasort), kept = 0, result = 0;
  if (found < 0) {
    snprintf(error, (size_t)size, "%s: %s", folder, strerror(errno));
    return -1;
  }
  char **list = calloc((size_t)found + 1, sizeof list[0]);
  for (int i = 0; i < found; i++) {
    size_t length = strlen(folder) + strlen(entries[i]->d_name) + 2;
    char *path = list ? malloc(length) : NULL;
    struct stat about;
    if (!path) {
      result = -1;
    } else {
      snprintf(path, length, "%s/%s", folder, entries[i]->d_name);
      if (lstat(path, &about) == 0 && S_ISREG(about.st_mode))
        list[kept++] = path;
      else
        free(path);
    }
    free(entries[i]);
  }
  free(entries);
  if (result != 0) {
    snprintf(error, (size_t)size, "no memory for the names of files");
    text_free_paths(list, kept);
    return -1;
  }
  *paths = list;
  *count = kept;
  return 0;
}

void text_free_paths(char **paths, int count) {
  for (int i = 0; paths && i < count; i++) free(paths[i]);
  free(paths);
}
