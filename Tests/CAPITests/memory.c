/* memory.c: a step in its stride allocates nothing, a refused allocation is a status and no more, and nothing leaks.
 *
 * All of it on one worker alone and on two, over the library's own memory and over a mailbox.
 *
 * Every allocation of a small run, of any size, is refused too (`memory all`; without, some of them): where Swift's runtime
 * then ends the process, the checkpoint is whole.
 *
 * This program stands in front of the allocator: it counts, and it refuses on demand.  Every refusal gets a process of
 * its own (`memory refuse KIND I`), so that a crash is one failed check. */
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "oracle.h"
#include "transports.h"

/* ---- in front of the allocator ------------------------------------------------------------- */

static const size_t large = 64 << 10; /* bytes: allocations from here on are refused; smaller ones kill any program */
static atomic_llong allocations;      /* so far, by anyone in this process */
static atomic_llong live_bytes;
static atomic_int refusing;
static atomic_int granted;            /* large allocations still to be granted while refusing */
static atomic_int refused;
static atomic_llong only = -1;        /* number among all allocations: this one is refused, whatever its size */

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static int refuse(size_t size) {
  if (atomic_fetch_add(&allocations, 1) == only) return atomic_fetch_add(&refused, 1), errno = ENOMEM, 1;
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

/* ---- the ranks ----------------------------------------------------------------------------- */

enum { ALONE, LOCAL, MAILBOX, KINDS }; /* of groups; the latter two have a rank on this thread and one on another */
static const char *const kind_names[KINDS] = {"alone", "local", "mailbox"};
static const char *const group_names[KINDS] = {"one worker", "two workers, threads", "two workers, a transport"};
enum { MOST = 2 };

static int kind;
static int32_t ranks;
static pthread_barrier_t meeting;
static mailbox *mail;
static fmoe_group *groups[MOST];

static void meet(void) { pthread_barrier_wait(&meeting); }

typedef struct turn {
  int32_t rank;
  void (*work)(int32_t rank);
} turn;

static void *take_turn(void *argument) {
  const turn *t = argument;
  t->work(t->rank);
  return NULL;
}

/* Both threads live as long as the work: what the C library keeps for a new one is no business of the tests. */
static void run_ranks(int of_kind, void (*work)(int32_t rank)) {
  turn other = {.rank = 1, .work = work};
  pthread_t thread;
  kind = of_kind, ranks = kind == ALONE ? 1 : MOST;
  if (pthread_barrier_init(&meeting, NULL, (unsigned)ranks)) abort();
  if (kind != ALONE && pthread_create(&thread, NULL, take_turn, &other)) abort();
  work(0);
  if (kind != ALONE) pthread_join(thread, NULL);
  pthread_barrier_destroy(&meeting);
}

/* ---- the work ------------------------------------------------------------------------------ */

static const uint64_t seed = 27182818;
static const long long slack = 4096; /* bytes that may stay live: the C library keeps a little for each thread it had */
enum { N = 600, K = 2, D = 256, H = 96, E = 64 }; /* large enough for a sum of the gate to ask for much memory */
static float tokens[N * D], grad_output[N * D], weights[N * K];
static int32_t choices[N * K];
static float output[MOST][N * D], grad_tokens[MOST][N * D], grad_weights[MOST][N * K];

static const fmoe_group_options group_options = {.struct_size = sizeof group_options, .threads = 2, .bind = 1};
static fmoe_layer_options layer_options = {.struct_size = sizeof layer_options, .top_k = K, .d_model = D, .d_hidden = H,
                                           .experts = E, .seed = 5, .balance_loss = 0.1, .z_loss = 0.1};

/* Sums of bits: equal exactly if the values are, for all that tests need. */
static uint64_t mix(uint64_t hash, const float *values, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    hash = (hash ^ bits) * UINT64_C(1099511628211);
  }
  return hash;
}

static uint64_t results(int32_t rank, fmoe_layer *layer, int64_t n) {
  fmoe_tensors g = {.struct_size = sizeof g};
  const int64_t experts = E / ranks;
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  uint64_t hash = mix(mix(mix(1, output[rank], n * D), grad_tokens[rank], n * D), g.gate, E * D);
  return mix(mix(mix(mix(hash, g.w1, experts * H * D), g.b1, experts * H), g.w2, experts * D * H), g.b2, experts * D);
}

/* A call for which memory may be refused, to this rank or to a peer: it says so, again when asked again, and works once
 * there is memory.  Peers fail together, so that they ask again together. */
#define PERSIST(call)                                                                                   \
  do {                                                                                                  \
    const fmoe_status refusal = FMOE_ERROR_MEMORY, peers = ranks > 1 ? FMOE_ERROR_PEER : refusal;       \
    fmoe_status status = call;                                                                          \
    if (status == FMOE_OK) break;                                                                       \
    EXPECT_EITHER(refusal, peers, status);                                                              \
    EXPECT_EITHER(refusal, peers, call);                                                                \
    refusing = 0;                                                                                       \
    EXPECT(FMOE_OK, call);                                                                              \
  } while (0)

static fmoe_group *join(int32_t rank) {
  if (kind == MAILBOX) {
    if (rank == 0) mail = mailbox_create(ranks, (mailbox_options){.seed = seed});
    meet();
    fmoe_transport transport = mailbox_transport(mail, rank);
    mailbox_sit(mail, rank);
    PERSIST(fmoe_group_create(&transport, &group_options, &groups[rank]));
  } else {
    if (rank == 0) PERSIST(fmoe_group_create_local(ranks, &group_options, groups));
    meet();
  }
  return groups[rank];
}

/* After all that hangs from the group has been destroyed. */
static void part(int32_t rank) {
  meet();
  if (kind == MAILBOX && rank == 0) mailbox_destroy(mail);
  meet();
}

static int adamw_too; /* in each step */

static void step(int32_t rank, fmoe_layer *layer, int64_t n, int routed) {
  fmoe_pass *pass = NULL;
  fmoe_plan_report report = {.struct_size = sizeof report};
  PERSIST(fmoe_layer_zero_gradients(layer));
  if (routed) PERSIST(fmoe_route(layer, tokens + (N - n) * D, n, choices, weights, &pass));
  else PERSIST(fmoe_gate(layer, tokens + (N - n) * D, n, &pass));
  PERSIST(fmoe_plan(pass, NULL, kind == ALONE ? &report : NULL)); /* a report measures speeds, which takes its time */
  PERSIST(fmoe_forward(pass, output[rank]));
  PERSIST(fmoe_backward(pass, grad_output, grad_tokens[rank], routed ? grad_weights[rank] : NULL));
  PERSIST(fmoe_layer_reduce_gradients(layer));
  if (adamw_too) EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &(fmoe_adamw_options){.struct_size = sizeof(fmoe_adamw_options), .learning_rate = 1e-6}));
  fmoe_pass_destroy(pass);
}

/* A step of AdamW, through a file and back: on the same values, so that what comes after is the same. */
static void store(int32_t rank, fmoe_group *group) {
  static char path[100];
  const fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = H, .experts = 4, .seed = 5};
  const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 0.1};
  fmoe_layer *layer = NULL, *other = NULL;
  if (rank == 0) snprintf(path, sizeof path, "/tmp/fastermoe-memory-%d", (int)getpid());
  meet();
  PERSIST(fmoe_layer_create(group, &options, &layer));
  PERSIST(fmoe_layer_create(group, &options, &other));
  fmoe_tensors g = {.struct_size = sizeof g}, a = g, b = g;
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  g.w1[3] = 1;
  PERSIST(fmoe_layer_save(layer, path)); /* without what AdamW remembers */
  PERSIST(fmoe_layer_load(other, path));
  for (int refused_here = 1; refused_here;) { /* each rank for itself: nobody is told */
    fmoe_status status = fmoe_layer_adamw(layer, &adamw);
    if ((refused_here = status != FMOE_OK)) EXPECT(FMOE_ERROR_MEMORY, status), refusing = 0;
  }
  PERSIST(fmoe_layer_save(layer, path));
  PERSIST(fmoe_layer_load(other, path));
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &a)), EXPECT(FMOE_OK, fmoe_layer_values(other, &b));
  CHECK(!memcmp(a.w1, b.w1, (size_t)(a.local_experts * H * D) * sizeof(float)), "%s", kind_names[kind]);
  fmoe_layer_destroy(layer), fmoe_layer_destroy(other);
  meet();
  if (rank == 0) unlink(path);
}

/* From nothing to two passes in flight, then a larger one, and back to nothing. */
static uint64_t whole_life(int32_t rank) {
  fmoe_group *group = join(rank);
  fmoe_layer *layer = NULL;
  fmoe_pass *early = NULL;
  PERSIST(fmoe_layer_create(group, &layer_options, &layer));
  PERSIST(fmoe_gate(layer, tokens, N / 3, &early));
  step(rank, layer, N / 4, 1);
  PERSIST(fmoe_forward(early, output[rank]));
  step(rank, layer, N, 0);
  fmoe_pass_destroy(early);
  store(rank, group);
  uint64_t hash = results(rank, layer, N);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  part(rank);
  return hash;
}

enum { NEVER_REFUSED = 3 };
static int first_refusal;

static void refuse_from_first(int32_t rank) {
  uint64_t wanted = whole_life(rank);
  CHECK(whole_life(rank) == wanted, "two lives, the same bits");
  meet();
  long long before = live_bytes;
  meet();
  granted = first_refusal;
  refusing = 1;
  meet();
  uint64_t got = whole_life(rank);
  meet();
  refusing = 0;
  CHECK(got == wanted, "%s, after large allocation %d was refused: the same bits", kind_names[kind], first_refusal);
  CHECK(live_bytes <= before + slack, "%s, after large allocation %d was refused: %lld bytes stay", kind_names[kind],
        first_refusal, live_bytes - before);
}

static int refuse_from(int of_kind, int first) {
  alarm(30); /* seconds: waiting for memory for ever is a failure too */
  first_refusal = first;
  run_ranks(of_kind, refuse_from_first);
  return failed ? 1 : refused ? 0 : NEVER_REFUSED;
}

static void test_refusals(int of_kind) {
  enum { ENOUGH = 1000 };
  int status = 0, first = 0;
  for (; first < ENOUGH; first++) {
    char name[2] = {(char)('0' + of_kind), 0}, number[20];
    snprintf(number, sizeof number, "%d", first);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) execl("/proc/self/exe", "memory", "refuse", name, number, (char *)NULL), _exit(127);
    if (child < 0 || waitpid(child, &status, 0) != child) abort();
    if (WIFEXITED(status) && WEXITSTATUS(status) == NEVER_REFUSED) break;
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s, refusing from large allocation %d on: %s %d",
          kind_names[of_kind], first, WIFSIGNALED(status) ? "signal" : "exit",
          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
  CHECK(first > 3 && first < ENOUGH, "a life has large allocations to refuse: %d", first);
  char what[100];
  snprintf(what, sizeof what, "allocations of 64 KiB and more refused from the i-th on, %s", group_names[of_kind]);
  injected(what, first, "FMOE_ERROR_MEMORY, and with memory again the same bits; nothing leaks");
}

/* ---- every allocation, of any size --------------------------------------------------------- */

/* Swift's runtime and standard library end a process that gets no memory for a few bytes; what the library itself asks
 * for is a status.  Either way nobody waits, and the file is the one that was there or the new one. */
enum { NO_MEMORY_LEFT = 4, WRONG = 5 };
static const fmoe_layer_options small_options = {.struct_size = sizeof small_options, .d_model = 64, .d_hidden = 32,
                                                 .experts = 8, .seed = 5};

/* A run as a host makes it: takes a checkpoint, makes a step, saves over it.  0, or who could not go on. */
static int small_run(const char *path) {
  static float x[16 * 64], y[16 * 64], grad[16 * 64];
  const fmoe_group_options alone = {.struct_size = sizeof alone, .threads = 2, .bind = 1};
  const fmoe_adamw_options adamw = {.struct_size = sizeof adamw, .learning_rate = 0.01};
  fmoe_group *group = NULL;
  fmoe_layer *layer = NULL;
  fmoe_pass *pass = NULL;
  memcpy(x, tokens, sizeof x);
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

/* `memory each I`, in a process of its own: I below 0 refuses nothing and prints how many there are. */
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
    execl("/proc/self/exe", "memory", "each", text, (char *)NULL), _exit(127);
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

static void steady_steps(int32_t rank) {
  static const int64_t tokens_of_step[] = {N, N - 1, N / 3, 0, 1, N, 17};
  static long long before;
  fmoe_group *group = join(rank);
  fmoe_layer *layer = NULL;
  EXPECT(FMOE_OK, fmoe_layer_create(group, &layer_options, &layer));
  for (int routed = 0; routed < (layer_options.gate ? 1 : 2); routed++) {
    for (int i = 0; i < 3; i++) step(rank, layer, N, routed);
    for (size_t i = 0; i < sizeof tokens_of_step / sizeof *tokens_of_step; i++) {
      meet();
      if (rank == 0) before = allocations;
      meet();
      step(rank, layer, tokens_of_step[i], routed);
      meet();
      if (rank == 0)
        CHECK(allocations == before, "%s, gate %d, %lld allocations in a %s step of %d tokens", kind_names[kind],
              layer_options.gate, allocations - before, routed ? "routed" : "gated", (int)tokens_of_step[i]);
      meet(); /* destroying may allocate */
    }
  }
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
  part(rank);
}

static void test_steady_state(int of_kind) {
  const fmoe_layer_options usual = layer_options;
  adamw_too = 1;
  for (int32_t gate = FMOE_GATE_TOPK; gate <= FMOE_GATE_SWIPE; gate++) {
    /* With a bias that hardly moves: where ever fewer choices are dropped, more rows want more memory. */
    layer_options.gate = gate, layer_options.input_jitter = 0.01;
    if (gate != FMOE_GATE_NOISY && gate != FMOE_GATE_BASE && gate != FMOE_GATE_SWIPE) layer_options.bias_step = 1e-12;
    if (gate == FMOE_GATE_BASE) layer_options.top_k = 1, layer_options.balance_loss = 0;
    for (int32_t drop = 0; drop < (gate == FMOE_GATE_SWITCH || gate == FMOE_GATE_GSHARD ? 4 : 1); drop += FMOE_DROP_UNIMPORTANT)
      layer_options.drop = drop, run_ranks(of_kind, steady_steps);
    layer_options = usual;
  }
  adamw_too = 0;
}

/* Several layers and passes of one group, given up at every stage and in changing order. */
static void short_life(int32_t rank, int turn) {
  fmoe_group *group = join(rank);
  fmoe_layer *layers[2] = {NULL, NULL};
  fmoe_pass *passes[4] = {NULL, NULL, NULL, NULL};
  for (int l = 0; l < 2; l++) EXPECT(FMOE_OK, fmoe_layer_create(group, &layer_options, &layers[l]));
  for (int p = 0; p < 4; p++) {
    EXPECT(FMOE_OK, fmoe_gate(layers[p % 2], tokens, 40 + p, &passes[p]));
    if (p > 0) EXPECT(FMOE_OK, fmoe_plan(passes[p], NULL, NULL));
    if (p > 1) EXPECT(FMOE_OK, fmoe_forward(passes[p], output[rank]));
    if (p > 2) EXPECT(FMOE_OK, fmoe_backward(passes[p], grad_output, grad_tokens[rank], NULL));
  }
  if (turn % 3 == 0) fmoe_group_destroy(group);
  if (turn % 2 == 0) fmoe_layer_destroy(layers[0]);
  for (int p = 0; p < 4; p++) fmoe_pass_destroy(passes[(p + turn) % 4]);
  if (turn % 2 != 0) fmoe_layer_destroy(layers[0]);
  fmoe_layer_destroy(layers[1]);
  if (turn % 3 != 0) fmoe_group_destroy(group);
  part(rank);
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
static void short_lives(int32_t rank) {
  enum { WARM = 6, TURNS = 36 };
  long long before = 0, most = 0;
  long space = 0;
  for (int turn = 0; turn < WARM + TURNS; turn++) {
    meet();
    if (turn == WARM && rank == 0) usleep(100000), before = live_bytes, space = of_process("VmSize:");
    meet();
    short_life(rank, turn);
    meet();
    if (rank == 0 && turn >= WARM && live_bytes - before > most) most = live_bytes - before;
  }
  if (rank != 0) return;
  CHECK(most <= slack, "%s, up to %lld bytes stay, in the end %lld", kind_names[kind], most, live_bytes - before);
  CHECK(of_process("VmSize:") <= space + (16 << 10), "%ld KiB of address space grow to %ld, as if stacks stayed", space,
        of_process("VmSize:"));
}

static void test_no_leaks(int of_kind) {
  run_ranks(of_kind, short_lives);
  for (int i = 0; i < 100 && of_process("Threads:") > 1; i++) usleep(10000); /* the kernel may lag behind a join */
  CHECK(of_process("Threads:") == 1, "%ld threads remain", of_process("Threads:"));
}

int main(int count, char **arguments) {
  static char printing[BUFSIZ];
  setvbuf(stdout, printing, _IOLBF, sizeof printing); /* else it is allocated in the middle of a test */
  uint64_t state = seed;
  for (int i = 0; i < N * D; i++) tokens[i] = (float)(2 * uniform(&state) - 1), grad_output[i] = (float)uniform(&state);
  for (int s = 0; s < N * K; s++) choices[s] = s % (E + 1) - 1, weights[s] = (float)uniform(&state);
  if (count == 3) return refuse_one(atoll(arguments[2]));
  if (count == 4) return refuse_from(atoi(arguments[2]), atoi(arguments[3]));
  printf("memory: seed %llu\n", (unsigned long long)seed);
  test_each(count == 2 && !strcmp(arguments[1], "all") ? 1 : 101);
  for (int k = ALONE; k < KINDS; k++) test_refusals(k), test_steady_state(k), test_no_leaks(k);
  return summary();
}
