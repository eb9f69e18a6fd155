/* memory.c: a step in its stride allocates nothing, a refused allocation is a status and no more, and nothing leaks.
 *
 * All of it on one worker alone and on two, over the library's own memory and over a mailbox.  Every refusal gets a process
 * of its own (`memory refuse KIND I`), so that a crash is one failed check.  What is refused here is large; starve.c refuses
 * allocations of any size. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "allocator.h"
#include "check.h"
#include "mailbox.h"
#include "oracle.h"

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

static uint64_t results(int32_t rank, fmoe_layer *layer, int64_t n) {
  fmoe_tensors g = {.struct_size = sizeof g};
  const int64_t experts = E / ranks;
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &g));
  uint64_t hash = hash_floats(hash_floats(hash_floats(1, output[rank], n * D), grad_tokens[rank], n * D), g.gate, E * D);
  return hash_floats(hash_floats(hash_floats(hash_floats(hash, g.w1, experts * H * D), g.b1, experts * H), g.w2,
      experts * D * H), g.b2, experts * D);
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
  if (adamw_too) EXPECT(FMOE_OK, fmoe_layer_adamw(layer, &(fmoe_adamw_options){.struct_size = sizeof(fmoe_adamw_options),
      .learning_rate = 1e-6}));
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
  if (count == 4) return refuse_from(atoi(arguments[2]), atoi(arguments[3]));
  printf("memory: seed %llu\n", (unsigned long long)seed);
  for (int k = ALONE; k < KINDS; k++) test_refusals(k), test_steady_state(k), test_no_leaks(k);
  return summary();
}
