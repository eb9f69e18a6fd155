/* interchange.c: files from Python's safetensors, and files for it: the other side is interchange.py.  Where Python does
 * not have the package, nothing is tested, and that is said. */
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "folder.h"

enum { E_ = 4, D = 6, H = 5 };
static int python(const char *command) {
  char line[300];
  const char *which = getenv("PYTHON");
  snprintf(line, sizeof line, "%s interchange.py %s %s", which ? which : "python3", command, folder);
  fflush(stdout);
  int status = system(line);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(void) {
  if (!mkdtemp(folder)) return perror(folder), 2;
  int code = python("write");
  if (code == 77 || code == 127) {
    printf("not run: interchange, there is no Python with safetensors and numpy here (PYTHON names another one)\n");
    rmdir(folder);
    return summary();
  }
  CHECK(code == 0, "%d", code);
  const fmoe_layer_options o = {.struct_size = sizeof o, .d_model = D, .d_hidden = H, .experts = E_};
  fmoe_group *group;
  fmoe_layer *layer;
  EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &group));
  EXPECT(FMOE_OK, fmoe_layer_create(group, &o, &layer));
  const char *files[] = {"python", "python-adamw"};
  for (int f = 0; f < 2; f++) {
    fmoe_tensors t = {.struct_size = sizeof t};
    EXPECT(FMOE_OK, fmoe_layer_load(layer, in_folder(files[f])));
    EXPECT(FMOE_OK, fmoe_layer_values(layer, &t));
    for (int e = 0; e < E_; e++) {
      const struct { const float *from; int count; } parts[] = {
          {t.gate, E_ * D}, {t.w1 + e * H * D, H * D}, {t.b1 + e * H, H}, {t.w2 + e * D * H, D * H}, {t.b2 + e * D, D}};
      for (int p = 0; p < 5; p++)
        for (int i = 0; i < parts[p].count; i++)
          CHECK(parts[p].from[i] == (float)((p == 0 ? 0 : 4 * e + p) * 1000 + i), "%s: expert %d, tensor %d, value %d is %g",
                files[f], e, p, i, (double)parts[p].from[i]);
    }
  }
  EXPECT(FMOE_OK, fmoe_layer_save(layer, in_folder("c")));
  CHECK(python("read") == 0, "Python reads it");
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("python-half")));
  CHECK(strstr(fmoe_last_error(), "is F16, not F32"), "%s", fmoe_last_error());
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("python-transposed")));
  CHECK(strstr(fmoe_last_error(), "\"gate.weight\" is [6, 4], not [4, 6]"), "%s", fmoe_last_error());
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  const char *all[] = {"python", "python-adamw", "python-half", "python-transposed", "c"};
  for (int i = 0; i < 5; i++) unlink(in_folder(all[i]));
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
