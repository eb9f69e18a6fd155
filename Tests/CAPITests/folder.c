#include "folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

char folder[] = "/tmp/fastermoe-XXXXXX";

const char *in_folder(const char *name) {
  static _Thread_local char paths[8][100];
  static _Thread_local int turn;
  char *path = paths[turn++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

bytes slurp(const char *path) {
  bytes all = {0};
  struct stat s;
  int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &s) || !(all.data = malloc((size_t)s.st_size + 1))) abort();
  all.size = (size_t)s.st_size;
  if (read(file, all.data, all.size) != (ssize_t)all.size) abort();
  close(file);
  return all;
}

char *text_of(const char *path) {
  bytes all = slurp(path);
  all.data[all.size] = 0; /* for which slurp leaves room */
  return (char *)all.data;
}

void spit(const char *path, const void *data, size_t size) {
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || write(file, data, size) != (ssize_t)size || close(file)) abort();
}

int entries(const char *of) {
  int count = 0;
  DIR *d = opendir(of);
  if (!d) abort();
  for (struct dirent *e; (e = readdir(d));) count += e->d_name[0] != '.';
  closedir(d);
  return count;
}
