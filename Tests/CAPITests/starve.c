/* starve.c: every allocation of a small run, of any size, is refused (`starve all`; without, some of them).
 *
 * Swift's runtime and standard library end a process that gets no memory for a few bytes; what the library itself asks for
 * is a status.  Either way nobody waits, and the file is the one that was there or the new one.  Each refusal gets a process
 * of its own (`starve each I`). */
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

/* `starve each I`, in a process of its own: I below 0 refuses nothing and prints how many there are. */
static int refuse_one(long long number) {
  char path[60];
  name_file(path, sizeof path, getppid());
  alarm(30);
  const long long first = allocations;
  if (number >= 0) only = first + number;
  const int result = small_run(path);
  only = -1;
  if (number < 0) printf("%lld\n", allocations - first), fflush(stdout);
  return number >= 0 && !refused ? NEVER_REFUSED : result;
}

static long long run_one(long long number, int *status) { /* what it prints, if it refuses nothing */
  char text[30], printed[30] = {0};
  int ends[2];
  snprintf(text, sizeof text, "%lld", number);
  fflush(stdout);
  if (pipe(ends)) abort();
  pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1), close(ends[0]), close(ends[1]);
    if (!freopen("/dev/null", "w", stderr)) _exit(127); /* a runtime that ends the process says so at length */
    execl("/proc/self/exe", "starve", "each", text, (char *)NULL), _exit(127);
  }
  close(ends[1]);
  for (size_t at = 0; at < sizeof printed - 1;) {
    ssize_t more = read(ends[0], printed + at, sizeof printed - 1 - at);
    if (more <= 0) break;
    at += (size_t)more;
  }
  close(ends[0]);
  if (child < 0 || waitpid(child, status, 0) != child) abort();
  return atoll(printed);
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

/* Every `every`-th of them.  ends[] counts: went on to the right end, a status, the process ended. */
static void test_each(long long every) {
  enum { RIGHT, STATUS, ENDED, KINDS_OF_END };
  long long ends[KINDS_OF_END] = {0}, tried = 0, olds = 0, news = 0;
  char path[60], command[100];
  static unsigned char old_bytes[1 << 20];
  void *bytes;
  size_t old_size, size;
  int status;
  name_file(path, sizeof path, getpid());
  snprintf(command, sizeof command, "rm -f %s*", path);
  run_one(-1, &status); /* makes the file */
  const uint64_t old = file_hash(path, &old_size, &bytes);
  memcpy(old_bytes, bytes, old_size);
  const long long count = run_one(-1, &status);
  const uint64_t new = file_hash(path, &size, &bytes);
  CHECK(count > 1000 && size == old_size && size < sizeof old_bytes && new != old, "%lld allocations, %zu bytes", count, size);
  for (long long number = 0; number < count; number += every, tried++) {
    FILE *f = fopen(path, "w");
    if (!f || fwrite(old_bytes, 1, old_size, f) != old_size || fclose(f)) abort();
    run_one(number, &status);
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    /* The runtime says so and aborts, or fails in its tables of types. */
    const int is_runtime = signal == SIGABRT || signal == SIGILL || signal == SIGTRAP || signal == SIGSEGV;
    CHECK(code == 0 || code == NEVER_REFUSED || code == NO_MEMORY_LEFT || is_runtime,
          "allocation %lld of %lld refused: exit %d, signal %d", number, count, code, signal);
    ends[code == NO_MEMORY_LEFT ? STATUS : is_runtime ? ENDED : RIGHT]++;
    const uint64_t left = file_hash(path, &size, &bytes);
    CHECK(left == old || left == new, "allocation %lld of %lld refused: the file is lost", number, count);
    CHECK(left == new || code != 0, "allocation %lld of %lld refused: all went well, and nothing was saved", number, count);
    olds += left == old, news += left == new;
  }
  if (system(command)) abort();
  char seen[200];
  snprintf(seen, sizeof seen, "%lld times the run went on, %lld times a status said it, %lld times Swift's runtime or hwloc "
           "ended the process at once; %lld old files, %lld new ones", ends[RIGHT], ends[STATUS], ends[ENDED], olds, news);
  injected("one allocation of any size refused, in a run of load, step and save", tried, seen);
}

int main(int count, char **arguments) {
  static char printing[BUFSIZ];
  setvbuf(stdout, printing, _IOLBF, sizeof printing); /* else it is allocated in the middle of a run */
  uint64_t state = seed;
  for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = (float)(2 * uniform(&state) - 1);
  if (count == 3) return refuse_one(atoll(arguments[2]));
  printf("starve: seed %llu\n", (unsigned long long)seed);
  test_each(count == 2 && !strcmp(arguments[1], "all") ? 1 : 101);
  return summary();
}
