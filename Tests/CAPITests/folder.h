/* folder.h: a test's folder, and its files as bytes, to be looked at and altered.  What fails here ends the program. */
#ifndef FOLDER_H
#define FOLDER_H
#include <stddef.h>

extern char folder[]; /* a template: main makes it by mkdtemp, and removes it when it is empty again */
const char *in_folder(const char *name); /* one of eight texts in turn */

typedef struct bytes {
  unsigned char *data;
  size_t size;
} bytes;

bytes slurp(const char *path); /* data is the caller's to free */
char *text_of(const char *path); /* so is this */
void spit(const char *path, const void *data, size_t size);
int entries(const char *of); /* files in a folder */

#endif
