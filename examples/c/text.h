/* text.h: files of text as symbols to learn from and symbols to be examined on. */
#ifndef TEXT_H
#define TEXT_H
#include <stdint.h>

/* Symbols are the bytes that occur in the files, 0..V-1 in the order of their values.
 *
 * Held out is the end of every file: from the first paragraph that begins in its last tenth.  Texts quote each other
 * (licences above all), so that a paragraph for training is left out when it shares eight words in a row with anything
 * held out, whatever the case, the line breaks and the punctuation.  What remains in common: shorter phrases, style,
 * names, and the set of symbols. */
typedef struct text {
  int32_t vocab;                        /* V */
  int32_t symbol_of[256];               /* of a byte; -1: it occurs nowhere */
  unsigned char byte_of[256];           /* of a symbol */
  int32_t *train, *held_out;            /* [train_size]  [held_out_size] */
  int64_t train_size, held_out_size;
  int64_t left_out;                     /* bytes in neither */
} text;

/* Returns 0, or -1 with the reason in error [size]. */
int text_read(text *out, char *const *paths, int count, char *error, int size);
void text_free(text *what);

/* Regular files of a folder, links aside, sorted by name; *paths is to be freed by text_free_paths. */
int text_list(const char *folder, char ***paths, int *count, char *error, int size);
void text_free_paths(char **paths, int count);

/* What guessing each held-out symbol by its frequency in the training part costs, in nats per symbol. */
double text_unigram_entropy(const text *what);
#endif
