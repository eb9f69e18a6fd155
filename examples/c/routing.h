/* routing.h: a file of who went where, for each step and layer of a training, to be played again or counted.
 *
 * The file, all numbers little end first:
 *
 *   "fmoe routing 1\n\0"        16 bytes
 *   layers, experts, k, tokens  four int32; tokens are those of a step, of all workers, in the order of ranks
 *   checksum                    uint64, of these 32 bytes
 *   for each step, for each layer, a record:
 *     choices [tokens, k]       int32, of 0..experts-1, or -1: dropped
 *     weights [tokens, k]       float32
 *     checksum                  uint64, of the record's number, 0, 1, ... as a uint64, and then of these bytes
 *
 * A checksum is FNV-1a of 64 bits.  All records are of one size, so a step is found without reading those before. */
#ifndef ROUTING_H
#define ROUTING_H
#include <stdint.h>
#include <stdio.h>

typedef struct routing_shape {
  int32_t layers, experts, top_k, tokens;
} routing_shape;

enum { ROUTING_ERROR = 256 };
typedef struct routing_file {
  FILE *file;
  routing_shape shape;
  int64_t steps, record;      /* when read: whole steps in the file; the number of the next record */
  char error[ROUTING_ERROR];  /* why a call failed */
} routing_file;

/* All return 0, or -1 with the reason in error.  Close also after a failure. */
int routing_create(routing_file *of, const char *path, routing_shape shape);
int routing_write(routing_file *of, const int32_t *choices, const float *weights); /* the next record */
int routing_open(routing_file *of, const char *path);
int routing_seek(routing_file *of, int64_t step);
int routing_read(routing_file *of, int32_t *choices, float *weights); /* the next record */
int routing_close(routing_file *of); /* fails where not all that was written has arrived */

#endif
