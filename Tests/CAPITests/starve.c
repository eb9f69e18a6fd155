/* starve.c: memory runs out at every allocation of a small run, of any size (`starve all`; without, at some of them).
 *
 * What is asked for in vain is a status sooner or later, never the end of the process; nobody waits, and the file is the one that
 * was there or the new one.  Each refusal gets a process of its own (`starve MANNER I`). */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "allocator.h"
#include "check.h"
#include "oracle.h"

static const uint64_t seed = 27182818;

enum { NEVER_REFUSED = 3, NO_MEMORY_LEFT, WRONG }; /* exit codes */
static const char *const manners[] = {[ONE] = "one", [LASTING] = "lasting", [DRY] = "dry"};
static const fmoe_layer_options small_options = {.struct_size = sizeof small_options, .d_model = 64, .d_hidden = 32,
                                                 .experts = 8, .seed = 5};

static float x[16 * 64];

/* A run as a host makes it: takes a checkpoint, makes a step, saves over it.  0, or who could not go on. */
static int small_run(const char *path) {
  static float y[16 * 64], grad[16 * 64];
  const fmoe_group_options alone = {.struct_size = sizeof alone, .threads = 2, .bind = 1};
  const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 0.01};
  fmoe_group *group = NULL;
  fmoe_layer *layer = NULL;
  fmoe_pass *pass = NULL;
  fmoe_status status = fmoe_group_create_local(1, &alone, &group);
  if (!status) status = fmoe_layer_create(group, &small_options, &layer);
  if (!status && !access(path, F_OK)) status = fmoe_layer_load(layer, path);
  if (!status) status = fmoe_gate(layer, x, 16, &pass);
  if (!status) status = fmoe_plan(pass, NULL, NULL);
  if (!status) status = fmoe_forward(pass, y);
  if (!status) status = fmoe_backward(pass, x, grad, NULL);
  if (!status) status = fmoe_layer_adamw(layer, &adamw);
  if (!status) status = fmoe_layer_save(layer, path);
  fmoe_pass_destroy(pass), fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  /* What hwloc or the system is refused may have another name. */
  const int is_machine = status == FMOE_ERROR_MEMORY || status == FMOE_ERROR_TOPOLOGY || status == FMOE_ERROR_FILE;
  return status == FMOE_OK ? 0 : is_machine && *fmoe_last_error() ? NO_MEMORY_LEFT : WRONG;
}

static void name_file(char *path, size_t room, pid_t of) { snprintf(path, room, "/tmp/fastermoe-each-%d", (int)of); }

/* So much of the stack is there, whatever the system refuses later. */
__attribute__((noinline)) static void touch_stack(void) {
  volatile char stack[256 << 10];
  for (size_t i = 0; i < sizeof stack; i += 1024) stack[i] = 1;
}

/* `starve MANNER I`, in a process of its own: I below 0 refuses nothing and prints how many there are. */
static int refuse_from(long long number) {
  char path[60];
  touch_stack();
  name_file(path, sizeof path, getppid());
  alarm(30);
  const long long first = allocations;
  if (number >= 0) only = first + number;
  const int result = small_run(path);
  only = -1;
  if (number < 0) printf("%lld\n", allocations - first), fflush(stdout);
  return number >= 0 && !refused ? NEVER_REFUSED : result;
}

struct end {
  int code, signal;
  long long allocations; /* if it refuses nothing */
};
static struct end run_one(enum manner how, long long number) {
  char text[30], printed[30] = {0};
  int ends[2], status;
  snprintf(text, sizeof text, "%lld", number);
  fflush(stdout);
  if (pipe(ends)) abort();
  pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1), close(ends[0]), close(ends[1]);
    if (!freopen("/dev/null", "w", stderr)) _exit(127); /* a runtime that ends the process says so at length */
    execl("/proc/self/exe", "starve", manners[how], text, (char *)NULL), _exit(127);
  }
  close(ends[1]);
  for (size_t at = 0; at < sizeof printed - 1;) {
    ssize_t more = read(ends[0], printed + at, sizeof printed - 1 - at);
    if (more <= 0) break;
    at += (size_t)more;
  }
  close(ends[0]);
  if (child < 0 || waitpid(child, &status, 0) != child) abort();
  return (struct end){.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0,
                      .allocations = atoll(printed)};
}

static uint64_t file_hash(const char *path, size_t *size, void **copy) {
  static unsigned char bytes[1 << 20];
  uint64_t hash = 1;
  FILE *f = fopen(path, "r");
  *size = f ? fread(bytes, 1, sizeof bytes, f) : 0;
  if (f) fclose(f);
  for (size_t i = 0; i < *size; i++) hash = (hash ^ bytes[i]) * UINT64_C(1099511628211);
  *copy = bytes;
  return hash;
}

/* At every `every`-th of them. */
static void test_each(enum manner how, const char *what, long long every) {
  long long went_on = 0, said = 0, tried = 0, olds = 0, news = 0;
  char path[60], command[100];
  static unsigned char old_bytes[1 << 20];
  void *bytes;
  size_t old_size, size;
  name_file(path, sizeof path, getpid());
  snprintf(command, sizeof command, "rm -f %s*", path);
  run_one(how, -1); /* makes the file */
  const uint64_t old = file_hash(path, &old_size, &bytes);
  memcpy(old_bytes, bytes, old_size);
  const long long count = run_one(how, -1).allocations;
  const uint64_t new = file_hash(path, &size, &bytes);
  CHECK(count > 1000 && size == old_size && size < sizeof old_bytes && new != old, "%lld allocations, %zu bytes", count, size);
  for (long long number = 0; number < count; number += every, tried++) {
    FILE *f = fopen(path, "w");
    if (!f || fwrite(old_bytes, 1, old_size, f) != old_size || fclose(f)) abort();
    const struct end end = run_one(how, number);
    CHECK(end.code == 0 || end.code == NEVER_REFUSED || end.code == NO_MEMORY_LEFT,
          "%s, %lld of %lld: exit %d, signal %d", manners[how], number, count, end.code, end.signal);
    said += end.code == NO_MEMORY_LEFT, went_on += end.code == 0 || end.code == NEVER_REFUSED;
    const uint64_t left = file_hash(path, &size, &bytes);
    CHECK(left == old || left == new, "%s, %lld of %lld: the file is lost", manners[how], number, count);
    CHECK(left == new || end.code != 0, "%s, %lld of %lld: all went well, and nothing was saved", manners[how], number, count);
    olds += left == old, news += left == new;
  }
  if (system(command)) abort();
  char seen[200];
  snprintf(seen, sizeof seen, "%lld times the run went on, %lld times a status said it; %lld old files, %lld new ones", went_on,
           said, olds, news);
  injected(what, tried, seen);
}

int main(int count, char **arguments) {
  static char printing[BUFSIZ];
  setvbuf(stdout, printing, _IOLBF, sizeof printing); /* else it is allocated in the middle of a run */
  uint64_t state = seed;
  for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = (float)(2 * uniform(&state) - 1);
  if (count == 3) {
    while (strcmp(manners[manner], arguments[1])) manner++;
    return refuse_from(atoll(arguments[2]));
  }
  printf("starve: seed %llu\n", (unsigned long long)seed);
  const int is_all = count == 2 && !strcmp(arguments[1], "all");
  test_each(ONE, "one allocation of any size refused, in a run of load, step and save", is_all ? 1 : 101);
  test_each(LASTING, "all the library's allocations from the i-th on refused", is_all ? 1 : 101);
  test_each(DRY, "the system has no more memory from the i-th allocation on", is_all ? 1 : 101);
  return summary();
}
