/* memory.c: a step in its stride allocates nothing, a refused allocation is a status and no more, and nothing leaks.
 *
 * This program stands in front of the allocator: it counts, and it refuses on demand.  Every refusal gets a process of
 * its own (`memory refuse I`), so that a crash is one failed check. */
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "oracle.h"

/* ---- in front of the allocator ------------------------------------------------------------- */

static const size_t large = 64 << 10; /* bytes: allocations from here on are refused; smaller ones kill any program */
static atomic_llong allocations;      /* so far, by anyone in this process */
static atomic_llong live_bytes;
static atomic_int refusing;
static atomic_int granted;            /* large allocations still to be granted while refusing */
static atomic_int refused;

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static int refuse(size_t size) {
  atomic_fetch_add(&allocations, 1);
  if (size < large || !refusing || atomic_fetch_sub(&granted, 1) > 0) return 0;
  atomic_fetch_add(&refused, 1);
  return errno = ENOMEM, 1;
}

static void *count_live(void *block) {
  if (block) atomic_fetch_add(&live_bytes, (long long)malloc_usable_size(block));
  return block;
}

void *malloc(size_t size) { return refuse(size) ? NULL : count_live(__libc_malloc(size)); }
void *memalign(size_t alignment, size_t size) {
  return refuse(size) ? NULL : count_live(__libc_memalign(alignment, size));
}
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
void *valloc(size_t size) { return memalign(4096, size); }

void *calloc(size_t count, size_t size) {
  size_t total = count > SIZE_MAX / (size + !size) ? SIZE_MAX : count * size;
  return refuse(total) ? NULL : count_live(__libc_calloc(count, size));
}

void free(void *block) {
  if (block) atomic_fetch_sub(&live_bytes, (long long)malloc_usable_size(block));
  __libc_free(block);
}

void *realloc(void *block, size_t size) {
  if (refuse(size)) return NULL;
  long long before = block ? (long long)malloc_usable_size(block) : 0;
  void *moved = __libc_realloc(block, size);
  if (moved || !size) atomic_fetch_sub(&live_bytes, before);
  return count_live(moved);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  void *block = memalign(alignment, size);
  return block ? *out = block, 0 : ENOMEM;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  if (refuse(size)) return MAP_FAILED;
  void *block = (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
  if (block != MAP_FAILED) atomic_fetch_add(&live_bytes, (long long)size);
  return block;
}

void *mmap64(void *address, size_t size, int protection, int flags, int file, off64_t offset) {
  return mmap(address, size, protection, flags, file, offset);
}

int munmap(void *address, size_t size) {
  int status = (int)syscall(SYS_munmap, address, size);
  if (!status) atomic_fetch_sub(&live_bytes, (long long)size);
  return status;
}

/* ---- the work ------------------------------------------------------------------------------ */

static const uint64_t seed = 27182818;
static const long long slack = 4096; /* bytes that may stay live: the C library keeps a little for each thread it had */
enum { N = 600, K = 2, D = 64, H = 96, E = 8 };
static float tokens[N * D], grad_output[N * D], output[N * D], grad_tokens[N * D], grad_weights[N * K], weights[N * K];
static int32_t choices[N * K];

static const fmoe_group_options group_options = {.struct_size = sizeof group_options, .threads = 2, .bind = 1};
static const fmoe_layer_options layer_options = {.struct_size = sizeof layer_options, .top_k = K, .d_model = D,
                                                 .d_hidden = H, .experts = E, .seed = 5, .balance_loss = 0.1,
                                                 .z_loss = 0.1};

/* Sums of bits: equal exactly if the values are, for all that tests need. */
static uint64_t mix(uint64_t hash, const float *values, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    hash = (hash ^ bits) * UINT64_C(1099511628211);
  }
  return hash;
}

static uint64_t results(fmoe_layer *layer, int64_t n) {
  fmoe_tensors g = {.struct_size = sizeof g};
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  uint64_t hash = mix(mix(mix(1, output, n * D), grad_tokens, n * D), g.gate, E * D);
  return mix(mix(mix(mix(hash, g.w1, E * H * D), g.b1, E * H), g.w2, E * D * H), g.b2, E * D);
}

/* A call for which memory may be refused: it says so, again when asked again, and works once there is memory. */
#define PERSIST(call)                        \
  do {                                       \
    fmoe_status status = call;               \
    if (status == FMOE_OK) break;            \
    EXPECT(FMOE_ERROR_MEMORY, status);       \
    EXPECT(FMOE_ERROR_MEMORY, call);         \
    refusing = 0;                            \
    EXPECT(FMOE_OK, call);                   \
  } while (0)

static void step(fmoe_layer *layer, int64_t n, int routed) {
  fmoe_pass *pass = NULL;
  fmoe_plan_report report = {.struct_size = sizeof report};
  PERSIST(fmoe_layer_zero_gradients(layer));
  if (routed) PERSIST(fmoe_route(layer, tokens + (N - n) * D, n, choices, weights, &pass));
  else PERSIST(fmoe_gate(layer, tokens + (N - n) * D, n, &pass));
  PERSIST(fmoe_plan(pass, NULL, &report));
  PERSIST(fmoe_forward(pass, output));
  PERSIST(fmoe_backward(pass, grad_output, grad_tokens, routed ? grad_weights : NULL));
  fmoe_pass_destroy(pass);
}

/* From nothing to two passes in flight, then a larger one, and back to nothing. */
static uint64_t whole_life(void) {
  fmoe_group *group = NULL;
  fmoe_layer *layer = NULL;
  fmoe_pass *early = NULL;
  PERSIST(fmoe_group_create_local(1, &group_options, &group));
  PERSIST(fmoe_layer_create(group, &layer_options, &layer));
  PERSIST(fmoe_gate(layer, tokens, N / 3, &early));
  step(layer, N / 4, 1);
  PERSIST(fmoe_forward(early, output));
  step(layer, N, 0);
  fmoe_pass_destroy(early);
  uint64_t hash = results(layer, N);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  return hash;
}

enum { NEVER_REFUSED = 3 };

static int refuse_from(int first) {
  alarm(30); /* seconds: waiting for memory for ever is a failure too */
  uint64_t wanted = whole_life();
  CHECK(whole_life() == wanted, "two lives, the same bits");
  long long before = live_bytes;
  granted = first;
  refusing = 1;
  uint64_t got = whole_life();
  refusing = 0;
  CHECK(got == wanted, "after large allocation %d was refused: the same bits", first);
  CHECK(live_bytes <= before + slack, "after large allocation %d was refused: %lld bytes stay", first,
        live_bytes - before);
  return failed ? 1 : refused ? 0 : NEVER_REFUSED;
}

static void test_refusals(void) {
  enum { ENOUGH = 1000 };
  int status = 0, first = 0;
  for (; first < ENOUGH; first++) {
    char number[20];
    snprintf(number, sizeof number, "%d", first);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) execl("/proc/self/exe", "memory", "refuse", number, (char *)NULL), _exit(127);
    if (child < 0 || waitpid(child, &status, 0) != child) abort();
    if (WIFEXITED(status) && WEXITSTATUS(status) == NEVER_REFUSED) break;
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "refusing from large allocation %d on: %s %d", first,
          WIFSIGNALED(status) ? "signal" : "exit", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
  CHECK(first > 3 && first < ENOUGH, "a life has large allocations to refuse: %d", first);
  printf("memory: refused each of %d large allocations\n", first);
}

static void test_steady_state(void) {
  static const int64_t tokens_of_step[] = {N, N - 1, N / 3, 0, 1, N, 17};
  fmoe_group *group = NULL;
  fmoe_layer *layer = NULL;
  EXPECT(FMOE_OK, fmoe_group_create_local(1, &group_options, &group));
  EXPECT(FMOE_OK, fmoe_layer_create(group, &layer_options, &layer));
  for (int routed = 0; routed < 2; routed++) {
    for (int i = 0; i < 3; i++) step(layer, N, routed);
    for (size_t i = 0; i < sizeof tokens_of_step / sizeof *tokens_of_step; i++) {
      long long before = allocations;
      step(layer, tokens_of_step[i], routed);
      CHECK(allocations == before, "%lld allocations in a %s step of %d tokens", allocations - before,
            routed ? "routed" : "gated", (int)tokens_of_step[i]);
    }
  }
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}

/* Several layers and passes of one group, given up at every stage and in changing order. */
static void short_life(int turn) {
  fmoe_group *group = NULL;
  fmoe_layer *layers[2] = {NULL, NULL};
  fmoe_pass *passes[4] = {NULL, NULL, NULL, NULL};
  EXPECT(FMOE_OK, fmoe_group_create_local(1, &group_options, &group));
  for (int l = 0; l < 2; l++) EXPECT(FMOE_OK, fmoe_layer_create(group, &layer_options, &layers[l]));
  for (int p = 0; p < 4; p++) {
    EXPECT(FMOE_OK, fmoe_gate(layers[p % 2], tokens, 40 + p, &passes[p]));
    if (p > 0) EXPECT(FMOE_OK, fmoe_plan(passes[p], NULL, NULL));
    if (p > 1) EXPECT(FMOE_OK, fmoe_forward(passes[p], output));
    if (p > 2) EXPECT(FMOE_OK, fmoe_backward(passes[p], grad_output, grad_tokens, NULL));
  }
  if (turn % 3 == 0) fmoe_group_destroy(group);
  if (turn % 2 == 0) fmoe_layer_destroy(layers[0]);
  for (int p = 0; p < 4; p++) fmoe_pass_destroy(passes[(p + turn) % 4]);
  if (turn % 2 != 0) fmoe_layer_destroy(layers[0]);
  fmoe_layer_destroy(layers[1]);
  if (turn % 3 != 0) fmoe_group_destroy(group);
}

/* A line of /proc/self/status, such as "Threads:" or "VmSize:" (KiB of address space). */
static long of_process(const char *name) {
  char line[200];
  long value = -1;
  FILE *status = fopen("/proc/self/status", "r");
  while (status && fgets(line, sizeof line, status))
    if (!strncmp(line, name, strlen(name))) value = strtol(line + strlen(name), NULL, 10);
  if (status) fclose(status);
  return value;
}

/* All is given back by the time the last destroy returns, not some time later by some thread. */
static void test_no_leaks(void) {
  enum { WARM = 6, TURNS = 36 };
  long long before = 0, most = 0;
  long space = 0;
  for (int turn = 0; turn < WARM + TURNS; turn++) {
    if (turn == WARM) usleep(100000), before = live_bytes, space = of_process("VmSize:");
    short_life(turn);
    if (turn >= WARM && live_bytes - before > most) most = live_bytes - before;
  }
  CHECK(most <= slack, "up to %lld bytes stay, in the end %lld", most, live_bytes - before);
  CHECK(of_process("VmSize:") <= space + (16 << 10), "%ld KiB of address space grow to %ld, as if stacks stayed", space,
        of_process("VmSize:"));
  for (int i = 0; i < 100 && of_process("Threads:") > 1; i++) usleep(10000); /* the kernel may lag behind a join */
  CHECK(of_process("Threads:") == 1, "%ld threads remain", of_process("Threads:"));
}

int main(int count, char **arguments) {
  static char printing[BUFSIZ];
  setvbuf(stdout, printing, _IOLBF, sizeof printing); /* else it is allocated in the middle of a test */
  uint64_t state = seed;
  for (int i = 0; i < N * D; i++) tokens[i] = (float)(2 * uniform(&state) - 1), grad_output[i] = (float)uniform(&state);
  for (int s = 0; s < N * K; s++) choices[s] = s % (E + 1) - 1, weights[s] = (float)uniform(&state);
  if (count == 3) return refuse_from(atoi(arguments[2]));
  printf("memory: seed %llu\n", (unsigned long long)seed);
  test_refusals();
  test_steady_state();
  test_no_leaks();
  return summary();
}
