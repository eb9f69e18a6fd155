#include "routing.h"

#include <stdarg.h>
#include <string.h>

static const char MAGIC[16] = "fmoe routing 1\n";
enum { HEADER = 40 };
static const uint64_t START = UINT64_C(0xcbf29ce484222325);

static uint64_t checksum(uint64_t sum, const void *bytes, size_t size) {
  const unsigned char *at = bytes;
  for (size_t i = 0; i < size; i++) sum = (sum ^ at[i]) * UINT64_C(0x100000001b3);
  return sum;
}

static int fail(routing_file *of, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(of->error, sizeof of->error, format, values);
  va_end(values);
  return -1;
}

static int64_t slots(const routing_file *of) { return (int64_t)of->shape.tokens * of->shape.top_k; }
static int64_t record_size(const routing_file *of) { return slots(of) * 8 + 8; }
static uint64_t record_start(const routing_file *of) {
  const uint64_t number = (uint64_t)of->record;
  return checksum(START, &number, sizeof number);
}

int routing_create(routing_file *of, const char *path, routing_shape shape) {
  *of = (routing_file){.shape = shape, .file = fopen(path, "wb")};
  if (!of->file) return fail(of, "%s cannot be written", path);
  const int32_t sizes[4] = {shape.layers, shape.experts, shape.top_k, shape.tokens};
  const uint64_t sum = checksum(checksum(START, MAGIC, sizeof MAGIC), sizes, sizeof sizes);
  if (fwrite(MAGIC, sizeof MAGIC, 1, of->file) != 1 || fwrite(sizes, sizeof sizes, 1, of->file) != 1 ||
      fwrite(&sum, sizeof sum, 1, of->file) != 1)
    return fail(of, "%s: the disk takes no more", path);
  return 0;
}

int routing_write(routing_file *of, const int32_t *choices, const float *weights) {
  const size_t size = (size_t)slots(of) * 4;
  const uint64_t sum = checksum(checksum(record_start(of), choices, size), weights, size);
  if (fwrite(choices, 1, size, of->file) != size || fwrite(weights, 1, size, of->file) != size ||
      fwrite(&sum, sizeof sum, 1, of->file) != 1)
    return fail(of, "the routing cannot be recorded: the disk takes no more");
  of->record++;
  return 0;
}

int routing_open(routing_file *of, const char *path) {
  char magic[sizeof MAGIC];
  int32_t sizes[4];
  uint64_t sum;
  *of = (routing_file){.file = fopen(path, "rb")};
  if (!of->file) return fail(of, "%s cannot be read", path);
  if (fread(magic, sizeof magic, 1, of->file) != 1 || memcmp(magic, MAGIC, sizeof MAGIC) != 0)
    return fail(of, "%s is no recorded routing", path);
  if (fread(sizes, sizeof sizes, 1, of->file) != 1 || fread(&sum, sizeof sum, 1, of->file) != 1 ||
      sum != checksum(checksum(START, MAGIC, sizeof MAGIC), sizes, sizeof sizes))
    return fail(of, "%s is damaged: the checksum of its head does not hold", path);
  of->shape = (routing_shape){sizes[0], sizes[1], sizes[2], sizes[3]};
  for (int i = 0; i < 4; i++)
    if (sizes[i] < 1 || sizes[i] > 1 << 30 || (int64_t)sizes[2] * sizes[3] > 1 << 30)
      return fail(of, "%s is damaged: its sizes are out of range", path);
  const int64_t step = record_size(of) * of->shape.layers;
  if (fseeko(of->file, 0, SEEK_END) != 0) return fail(of, "%s cannot be read", path);
  const int64_t bytes = (int64_t)ftello(of->file) - HEADER;
  of->steps = bytes / step;
  if (bytes % step != 0)
    return fail(of, "%s is damaged: it ends within step %lld", path, (long long)(of->steps + 1));
  return routing_seek(of, 0);
}

int routing_seek(routing_file *of, int64_t step) {
  if (step < 0 || step > of->steps)
    return fail(of, "step %lld is not among the %lld recorded ones", (long long)(step + 1), (long long)of->steps);
  of->record = step * of->shape.layers;
  return fseeko(of->file, HEADER + record_size(of) * of->record, SEEK_SET) == 0 ? 0 : fail(of, "the routing cannot be read");
}

int routing_read(routing_file *of, int32_t *choices, float *weights) {
  const size_t size = (size_t)slots(of) * 4;
  const long long step = of->record / of->shape.layers + 1, layer = of->record % of->shape.layers;
  uint64_t sum;
  if (fread(choices, 1, size, of->file) != size || fread(weights, 1, size, of->file) != size ||
      fread(&sum, sizeof sum, 1, of->file) != 1)
    return fail(of, "the recorded routing cannot be read at step %lld, layer %lld", step, layer);
  if (sum != checksum(checksum(record_start(of), choices, size), weights, size))
    return fail(of, "the recorded routing is damaged: the checksum of step %lld, layer %lld does not hold", step, layer);
  for (int64_t slot = 0; slot < slots(of); slot++)
    if (choices[slot] < -1 || choices[slot] >= of->shape.experts)
      return fail(of, "the recorded routing has expert %d of %d at step %lld, layer %lld", choices[slot],
                  of->shape.experts, step, layer);
  of->record++;
  return 0;
}

int routing_close(routing_file *of) {
  const int failed = of->file && fclose(of->file) != 0;
  of->file = NULL;
  return failed ? fail(of, "the routing was not written as a whole") : 0;
}
