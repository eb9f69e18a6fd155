/* fastermoe.h: train mixture-of-experts layers on many CPUs.  C99, no dependencies.
 *
 * Words.      W workers (ranks) in a group; E experts in the whole group, E/W held by each worker;
 *             n tokens on this worker (ranks may differ, 0 is fine); k experts chosen per token;
 *             d model width; h hidden width.
 * Matrices    are dense row-major float32 without padding: [n, d] is n rows of d.
 *             Times are seconds, volumes bytes, work flops, rates per second.
 * Ownership.  `T **out` gives the caller an object to destroy.  A pointer inside a struct that the
 *             library fills is borrowed; its comment says until when.  Arrays passed in are used
 *             before the call returns, unless the comment says "kept".
 * Threads.    Any thread may use any object, one thread at a time per object; objects of different
 *             groups never interfere.  "Collective" calls are made by all W ranks in one order.  A call leaves
 *             the calling thread's affinity, signal mask and floating-point mode as they were.
 * Failure.    Every fallible call returns fmoe_status; out-parameters are written only on FMOE_OK.
 *             The library never exits, prints, traps on bad input or installs signal handlers.
 * Options.    Set struct_size to sizeof the struct and zero the rest: a zero field means its default.
 *             A struct of an older header is shorter: what it lacks is default.  One of a newer header is longer: it is
 *             taken if all that this library does not know is zero, else FMOE_ERROR_OPTIONS.  Structs that the library
 *             fills tell their room by struct_size and get back how many bytes were written.
 * Not a       A NaN or an infinity in a token makes that token's output row not finite (but ReLU may hide one), and gradients that
 * number.     depend on the value; no other token's output changes by a bit, unless its gate shares room among tokens.
 * Same bits.  The same calls on the same data give the same bits, for any number of threads and in any
 *             floating-point mode of the host's.
 * Together.   A collective call succeeds on all ranks or fails on all.  Where one rank's arguments or memory are at fault,
 *             that rank gets its own status and the others FMOE_ERROR_PEER, and the group may go on.  Where a peer is lost or
 *             silent, the group is broken: its collective calls fail from then on, and destroying is all that is left.
 *             Ranks are only known to each other by their handles: a NULL handle, or a transport that is refused, fails
 *             alone and its peers wait for it.  Over a transport a rank may learn of a lost peer one call after another has.
 * Not yet     there, but declared here: such a call or option returns FMOE_ERROR_UNSUPPORTED, and its text says so. */
#ifndef FASTERMOE_H
#define FASTERMOE_H
#include <stdint.h>

#define FMOE_VERSION_MAJOR 0
#define FMOE_VERSION_MINOR 1
#define FMOE_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status: the band says who must act -------------------------------------------------- */
typedef enum fmoe_status {
  FMOE_OK = 0,
  FMOE_ERROR_ARGUMENT = 1,  /*  1-19 the call is wrong; nothing changed */
  FMOE_ERROR_OPTIONS = 2,   /*       struct_size too small, or a field this version does not know */
  FMOE_ERROR_STAGE = 3,     /*       calls out of order: on a pass, or for speeds that nobody has measured */
  FMOE_ERROR_FILE = 4,      /*       a file is missing, unreadable, or not what it should be */
  FMOE_ERROR_UNSUPPORTED = 5, /*     this version cannot do that yet; the text says what */
  FMOE_ERROR_MEMORY = 20,   /* 20-39 the machine said no; objects stay usable */
  FMOE_ERROR_TOPOLOGY = 21,
  FMOE_ERROR_PEER = 40,     /* 40-59 the group is broken; destroy it and what hangs from it.  Only where a peer's own call
                                     was at fault, which the text says, and with DISAGREE may the group go on */
  FMOE_ERROR_DISAGREE = 41, /*       ranks passed different options, or are in different calls */
  FMOE_ERROR_TIMEOUT = 42,  /*       a peer did not answer within timeout_seconds */
  FMOE_ERROR_INTERNAL = 60, /* 60-79 a defect here; please report */
  FMOE_STATUS_FORCE_32 = 0x7fffffff
} fmoe_status;
const char *fmoe_status_name(int32_t status); /* static; never NULL */
const char *fmoe_last_error(void);            /* this thread's latest failure, in words; until its next failure */
/* For headers that add to this one, as fastermoe_mpi.h does: copies words for fmoe_last_error (NULL: leaves what is there)
 * and returns status. */
fmoe_status fmoe_set_last_error(fmoe_status status, const char *words);
uint32_t fmoe_version(void);                  /* of the loaded library: major << 16 | minor << 8 | patch */

/* ---- objects ----------------------------------------------------------------------------- */
typedef struct fmoe_group fmoe_group;     /* one rank's seat in a group of workers, with its cores    */
typedef struct fmoe_layer fmoe_layer;     /* parameters and gradients of one MoE layer                */
typedef struct fmoe_pass fmoe_pass;       /* one batch on its trip through one layer                  */
typedef struct fmoe_cluster fmoe_cluster; /* a machine room as numbers: workers, links, rates         */

/* ---- group: who works together, over what, on which cores ---------------------------------
 * A rank computes on threads of its own, soon asleep between calls: one for each core of its share.  Ranks that may use the same
 * cores of a machine share them out, neighbours to neighbours; taskset and mpirun's binding are heeded.  Where no others share
 * them out with it, or with bind = 1, a rank computes on the calling thread, too, in place of one of its own.
 * Calls on a rank's group and on all that hangs from it are taken one at a time; a second host thread waits.
 * With fmoe_group_create_local, each rank's calls come from a thread of its own: collective calls wait for the others. */
typedef struct fmoe_message {             /* one leg of an exchange */
  int32_t peer;                           /* 0..W-1, never this rank */
  int32_t receiving;                      /* 0: bytes go to peer; 1: peer's bytes arrive here */
  void *bytes;                            /* kept until the request is done */
  int64_t size;                           /* 1 or more; may exceed 2^31 */
} fmoe_message;
typedef struct fmoe_transport {           /* what the library needs from MPI, UCX, sockets... */
  uint32_t struct_size;
  int32_t rank, size, reserved;           /* reserved: 0 */
  void *context;                          /* kept until release; one thread at a time calls with it */
  /* start returns at once.  From one rank to another, the i-th message sent meets the i-th received; their sizes agree.
   * test sets *done to 1 once all messages of the request have moved, which ends the request; it also drives progress.
   * Both return 0, or anything else when a peer is lost: the group is then broken.
   * The library calls them from the thread that is in a collective call and only during such calls.  It sends large
   * volumes in messages of message_bytes at most, several under way to each peer and received ahead; a sent message that
   * counts as moved only once its receiver has it (as MPI_Issend does) bounds what a slow receiver must store.
   * release: once the group is gone.  Messages of a broken group may still be under way then: the library never gives
   * their memory back.  If making the group fails, release is not called and the context stays the caller's; where a peer
   * was lost, requests may then still be open. */
  int32_t (*start)(void *context, const fmoe_message *messages, int32_t count /* 1 or more */, void **request);
  int32_t (*test)(void *context, void *request, int32_t *done);
  void (*release)(void *context);         /* may be NULL */
  int64_t message_bytes;                  /* longest message that leaves at once, not only when the receiver is ready for
                                             it: 1024 to 2^20, a multiple of 64, equal on all ranks; 0: 60 KiB */
} fmoe_transport;
typedef struct fmoe_group_options {
  uint32_t struct_size;
  int32_t threads;                        /* compute threads of this rank; default: one per core of its share, at least 1 */
  int32_t bind;                           /* 0 pin threads to cores as hwloc says, 1 leave them to the scheduler */
  int32_t reserved;
  double timeout_seconds;                 /* longest wait for a peer in which nothing comes; over a transport longer than
                                             any rank computes in one call; default: forever */
  const char *topology;                   /* hwloc XML path or synthetic string; default: this machine.  What is described
                                             gives the number of threads; they are only pinned on this machine */
  const char *profile;                    /* file of measured speeds: read if there, written by fmoe_group_calibrate; by
                                             rank 0 for all, but all set it or none.  One of other workers, places or
                                             processors is FMOE_ERROR_FILE, its text says what differs */
} fmoe_group_options;
fmoe_status fmoe_group_create(const fmoe_transport *transport /* its context: kept, if this succeeds */,
                              const fmoe_group_options *options /* NULL: defaults */, fmoe_group **out); /* collective */
fmoe_status fmoe_group_create_local(int32_t size, const fmoe_group_options *options /* NULL: defaults */,
                                    fmoe_group **out /* [size] */); /* ranks as threads of this process; size 1: alone */
/* Measures how fast all ranks compute, what messages between them take and how much computing slows down meanwhile, equal
 * results on all ranks.  From then on fmoe_plan and fmoe_cluster_of_group predict by that.  Collective. */
fmoe_status fmoe_group_calibrate(fmoe_group *group, double seconds /* to spend, about; equal on all ranks */);
void fmoe_group_destroy(fmoe_group *group); /* NULL is fine, here and below; what hangs from it may be destroyed later */

/* ---- layer -------------------------------------------------------------------------------- */
enum { FMOE_GELU = 0, FMOE_GELU_TANH = 1, FMOE_RELU = 2, FMOE_SILU = 3, FMOE_SWIGLU = 4 };
/* A gate scores every token against every expert, x·gate, and the k highest scores choose; ties go to the lower expert,
 * NaN ranks as -infinity.  Unless said otherwise, a softmax over the k chosen scores weighs them or, for k = 1, the softmax
 * probability over all experts.  A choice without an expert is -1 and weighs 0; the other weights of its token stay.
 *
 * TOPK          that and no more.  k 2.
 * NOISY         k 2.  In training, normal noise of width softplus(x·noise) + 0.01 is added to the scores.  balance_loss is the
 *               a of a·(CV²(importance) + CV²(load)) over the tokens of all workers, importance being an expert's sum of
 *               weights, load its sum of likelihoods to be chosen; 0 in evaluation and where experts are equally busy.
 * SWITCH        k 1.  Weights are the probabilities over all experts, for any k.  An expert takes ceil(factor·k·n/E) rows of
 *               the whole batch, n counting all workers' tokens; factor 1.25.  FMOE_DROP_LAST keeps those that come first in
 *               the order of all workers' tokens, first choices before second ones, so that W workers drop what one would;
 *               the other ways, below, choose among each worker's own, within a part of the room by its tokens.
 * GSHARD        k 2.  An expert takes ceil(factor·k·n/E) rows of each worker, n being this worker's tokens; factor 1.  In
 *               training, a choice behind the first is dropped by chance unless k·weight exceeds a number drawn from
 *               [0, 1).  The f of the balance loss counts first choices alone.
 *               Where an expert has no room for all, FMOE_DROP_LIGHTEST keeps the choices that weigh most, FMOE_DROP_RANDOM
 *               any, in evaluation those that FMOE_DROP_LAST keeps, and FMOE_DROP_UNIMPORTANT first choices before second
 *               ones and, among these, those of tokens whose first choice weighs most (Tutel's batch priority).
 * BASE          k 1, no balance loss.  Weights are 1/(1 + exp(-score)); the layer's output for a token, added to the token, is
 *               that of the paper.  In training a worker's own tokens are shared out, at most ceil(n/E) to each expert and
 *               exactly n/E where E divides n, so that the sum of scores is near its highest; scores that are not finite
 *               count as the lowest.  In evaluation the highest score chooses.
 * TOPOLOGY      k 2.  Of a worker's n·k choices at most remote_share, rounded down, leave its place: its host, or, where all
 *               are on one host, its package, else its NUMA node, by hwloc and by which cores each rank has.  Those with the
 *               highest scores may; the others choose again, the highest score inside that the token has not chosen, or
 *               -1 where none is left.  Where there is only one place it is TOPK.
 * HIERARCHICAL  k 2.  The same at each level of the tree of hosts, packages and NUMA nodes: of the choices that stay in a
 *               place, at most remote_share may leave the smaller one inside it; all levels together: 1 - (1 -
 *               remote_share)^l may cross the l-th from the top.
 *
 * SWIPE         k 2.  In training the experts of each worker together take as many choices of the whole batch, n·k/W of all
 *               workers' n; where W does not divide them, the first workers take one more.  None is dropped: first choices
 *               before second ones, in the order of all workers' tokens, what its worker has no room for goes to the lowest
 *               workers with room, there to the expert with the token's highest score that it has not chosen, or, if it has
 *               chosen all of that worker's, to one of them again.  In evaluation, and on one worker, it is TOPK.
 *
 * With bias_step a token chooses by 1/(1 + exp(-score)) + bias instead of the score, and the bias of each expert balances
 * the load without a loss (Wang et al. 2024): backward of a pass in training adds bias_step to that of every expert with
 * less than the mean load, takes it from that of every one with more.  Load is f, below.  Weights and gradients are by the
 * scores alone.
 *
 * f counts choices before a capacity drops any or SWIPE moves any.  In evaluation (fmoe_layer_set_training) capacities are
 * twice as large and nothing is left to chance.  What is drawn depends on the seed, on how many of the layer's passes were in
 * training and on a token's place among all workers' tokens. */
enum { FMOE_GATE_TOPK = 0, FMOE_GATE_NOISY = 1, FMOE_GATE_SWITCH = 2, FMOE_GATE_GSHARD = 3, FMOE_GATE_BASE = 4,
       FMOE_GATE_TOPOLOGY = 5, FMOE_GATE_HIERARCHICAL = 6, FMOE_GATE_SWIPE = 7 };
typedef struct fmoe_layer_options {
  uint32_t struct_size;
  int32_t top_k;                          /* default: what the gate is known for, else 2; at most E */
  int64_t d_model;                        /* d, required */
  int64_t d_hidden;                       /* h, required */
  int64_t experts;                        /* E, required, a multiple of W */
  int32_t activation;                     /* FMOE_GELU ... */
  int32_t gate;                           /* FMOE_GATE_TOPK ... */
  uint64_t seed;                          /* of initial weights and of every random choice; equal on all ranks */
  double capacity_factor;                 /* gates with a capacity: its factor in training; default: the gate's own */
  double balance_loss;                    /* a of a·E·sum_e f_e·P_e (f: share of all workers' choices, P: mean probability
                                             over this worker's tokens); default 0 */
  double z_loss;                          /* a of a·mean over tokens of (log sum_e exp logit_e)^2; default 0 */
  double remote_share;                    /* topology gates: most of a worker's choices that may leave its place, (0, 1];
                                             default: by the group's measured links, as fmoe_cluster_remote_share, in
                                             passes that begin after fmoe_group_calibrate or with a profile, if these tell
                                             of links between hosts and within one; else 0.14, the paper's */
  int32_t drop;                           /* gates with a capacity: FMOE_DROP_LAST ... */
  int32_t reserved;                       /* 0 */
  double input_jitter;                    /* in training, every element of what the gate reads of a token is multiplied by a
                                             number drawn from [1 - input_jitter, 1 + input_jitter); Switch's paper: 0.01;
                                             less than 1; default 0 */
  double bias_step;                       /* TOPK, SWITCH, GSHARD and the topology gates: balancing by a bias, see above; its
                                             paper: 0.001; at most 1; default 0: no bias */
} fmoe_layer_options;
#define FMOE_LAYER_OPTIONS_INIT { (uint32_t)sizeof(fmoe_layer_options), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
enum { FMOE_DROP_LAST = 0, FMOE_DROP_LIGHTEST = 1, FMOE_DROP_RANDOM = 2, FMOE_DROP_UNIMPORTANT = 3 };
fmoe_status fmoe_layer_create(fmoe_group *group /* kept */, const fmoe_layer_options *options, fmoe_layer **out); /* collective */
/* 1: the gate trains, with what its rule leaves to chance, as a new layer does; 0: it evaluates.  It holds for passes that
 * begin later, for which it must be equal on all ranks.  Gradients, losses and backward are there in both. */
fmoe_status fmoe_layer_set_training(fmoe_layer *layer, int32_t training);
/* Topology gates count an expert as inside for every worker if all will have a copy of it: it is then known before they
 * choose which experts are shadowed.  shadows [E] of 0/1 says which, for passes that begin later, equal on all ranks; NULL, as a
 * new layer does, what was predicted to be best for the layer's latest pass whose plan was left to choose: none before the
 * first, and none where fmoe_plan does not predict.  Such a pass shadows that very set where fmoe_plan's shadowing is 0 or 3 or
 * it is not called; to ask for a set that leaves one of them out is FMOE_ERROR_ARGUMENT.  Passes of fmoe_route have no
 * such set.  FMOE_ERROR_ARGUMENT for other gates. */
fmoe_status fmoe_layer_expect_shadows(fmoe_layer *layer, const uint8_t *shadows /* [E] or NULL */);
void fmoe_layer_destroy(fmoe_layer *layer); /* passes under way may still be used and destroyed */

/* Values start uniform in +-1/sqrt(inputs), the same for any W.  u = w1·x + b1, a = activation(u), out = w2·a + b2;
 * SwiGLU: a = silu(w1·x) * (w3·x), out = w2·a.  A token's output is the sum over its choices of weight·out. */
typedef struct fmoe_tensors {             /* values or gradients; borrowed until fmoe_layer_destroy */
  uint32_t struct_size;
  int32_t local_experts;                  /* E/W */
  int64_t first_expert;                   /* rank * E/W */
  float *gate;                            /* [E, d]  equal on all ranks */
  float *w1, *b1;                         /* [E/W, h, d]  [E/W, h]   SwiGLU: the gated half, b1 NULL */
  float *w2, *b2;                         /* [E/W, d, h]  [E/W, d]   SwiGLU: b2 NULL */
  float *w3;                              /* [E/W, h, d]  SwiGLU: the linear half; else NULL */
  float *noise;                           /* [E, d]  FMOE_GATE_NOISY: of the noise's width, equal on all ranks; else NULL */
  float *gate_bias;                       /* [E]  values of a layer with bias_step, equal on all ranks; else NULL */
} fmoe_tensors;
fmoe_status fmoe_layer_values(fmoe_layer *layer, fmoe_tensors *out);
fmoe_status fmoe_layer_gradients(fmoe_layer *layer, fmoe_tensors *out); /* backward adds */
fmoe_status fmoe_layer_zero_gradients(fmoe_layer *layer);
/* As fmoe_layer_zero_gradients, but the memory is left to the next backward, which writes gradients instead of adding to them:
 * with few rows an expert, zeroing and reading them is a large part of a step.  Gradients are 0 for every call, while behind
 * pointers taken before stands anything, until backward, or fmoe_layer_gradients asked again, has written them. */
fmoe_status fmoe_layer_begin_gradients(fmoe_layer *layer);
/* Collective.  Afterwards every gradient is that of the mean over workers of their losses: what backward adds to w1 ... w3
 * is so already, those of gate and noise become so here, equal on all ranks.  grad_tokens stay those of the worker's own loss. */
fmoe_status fmoe_layer_reduce_gradients(fmoe_layer *layer);
typedef struct fmoe_adamw_options {       /* step t = 1, 2, ... of a layer, as PyTorch's AdamW: g = gradient_scale·gradient,
                                             m = beta1·m + (1 - beta1)·g,  v = beta2·v + (1 - beta2)·g²,
                                             p -= learning_rate·(weight_decay·p
                                                                 + m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + epsilon)) */
  uint32_t struct_size;
  int32_t zero_gradients;                 /* 1: gradients become 0 in the same sweep; 2: they begin anew, as by
                                             fmoe_layer_begin_gradients; 0: they stay */
  double learning_rate;                   /* required; 0, where a schedule begins or ends, moves m and v alone */
  double beta1, beta2;                    /* [0, 1); default 0.9, 0.999 */
  double epsilon;                         /* default 1e-8 */
  double weight_decay;                    /* default 0: none */
  double gradient_scale;                  /* for clipping: the largest norm over the norm; default 1 */
  int32_t decay_biases;                   /* 0: only matrices decay, 1: b1 and b2 too */
  int32_t reserved;                       /* 0 */
} fmoe_adamw_options;
/* Updates this rank's values by its gradients, after fmoe_layer_reduce_gradients; all ranks do so alike, or their gates
 * part.  Not while a pass waits for its backward.  m, v and t are the layer's: twice the memory of its values from the first
 * call on, which may fail with FMOE_ERROR_MEMORY.  The same bits for any number of threads and workers. */
fmoe_status fmoe_layer_adamw(fmoe_layer *layer, const fmoe_adamw_options *options);
/* Collective.  A safetensors file of all ranks' values, experts by their number among all E, so that any W reads what any
 * other wrote:  gate.weight [E, d], FMOE_GATE_NOISY: gate.noise.weight [E, d] too, with bias_step gate.bias [E], experts.3.w1.weight [h, d],
 * experts.3.w1.bias [h], experts.3.w2.weight [d, h], experts.3.w2.bias [d], SwiGLU: w1, w2, w3 and no biases; after
 * fmoe_layer_adamw also optimizer.step, an I64, and optimizer.exp_avg.NAME (m) and optimizer.exp_avg_sq.NAME (v) of each but
 * gate.bias; gates that leave something to chance: gate.passes, an I64, so that the draws go on where they were.
 * docs/checkpoints.md has the rest.
 * Rank 0 alone has the file: it writes and reads for all, and only its path counts (the others' must not be NULL).
 * save: the file appears at path as a whole, replacing the one that is there; a link or a device is refused.
 * load: takes a file of exactly these tensors, in F32, from any program.  Where there are checksums, as in what save
 * writes, they must hold.  A file that is refused leaves the layer as it was; what changes it only in part is a disk that
 * fails, or a file that is overwritten, between the check and the load.  Without optimizer.*, m, v and t begin anew.
 * Nothing else of a layer is in the file: neither its options nor its gradients. */
fmoe_status fmoe_layer_save(fmoe_layer *layer, const char *path);
fmoe_status fmoe_layer_load(fmoe_layer *layer, const char *path);

/* ---- one step: gate, plan, forward, backward, in this order, each once ---------------------
 * Plan and backward may be left out.  Several passes of one layer may be under way.  Backward adds to the layer's
 * gradients, those of the balance and z losses included.  Outputs must not overlap tokens, nor grad_tokens them;
 * grad_tokens may be grad_output itself, but must not overlap it otherwise, nor what another rank gave. */
typedef struct fmoe_routing {             /* borrowed until the pass is destroyed */
  uint32_t struct_size;
  int32_t top_k;
  int64_t tokens;                         /* n */
  const int32_t *choices;                 /* [n, k] expert of 0..E-1, or -1: dropped, which adds nothing to the output */
  const float *weights;                   /* [n, k] */
  const int64_t *counts;                  /* [E] this rank's tokens for each expert */
  double balance_loss, z_loss;            /* coefficients included */
  int64_t dropped, moved;                 /* of this rank's n·k choices: without an expert; not the gate's highest scores, but
                                             elsewhere by its rule */
} fmoe_routing;
typedef struct fmoe_plan_options {
  uint32_t struct_size;
  int32_t shadowing;                      /* 0 as predicted best, 1 never, 2 exactly `shadows`, 3 the paper's Algorithm 1,
                                             4 every expert, fetched again for backward (ZeRO stage 3) */
  int32_t schedule;                       /* 0 as predicted best, 1 coarse (no overlap), 2 pairwise groups of `group_size` */
  int32_t group_size;                     /* workers per exchange step */
  const uint8_t *shadows;                 /* [E] 0/1, equal on all ranks; read only when shadowing is 2 */
} fmoe_plan_options;
typedef struct fmoe_plan_report {         /* predictions are for forward + backward of this batch; the first report that a
                                             group is asked for measures its speed: some tenths of a second.  Over a
                                             transport there is none before fmoe_group_calibrate or a
                                             profile: FMOE_ERROR_UNSUPPORTED */
  uint32_t struct_size;                   /* in: room; out: bytes written */
  int32_t shadows;                        /* experts shadowed */
  int32_t group_size, steps;
  double seconds_plain;                   /* no shadow, no overlap */
  double seconds_planned;                 /* this plan */
  double seconds_ideal;                   /* the busiest worker or the busiest link of this plan, perfectly overlapped */
  double compute_over_communicate;        /* R_CC of the roofline; infinite where nothing is sent */
  double flops_per_worker;                /* P-bar of the roofline, flop/s */
  double seconds_semi_ideal;              /* computing and communicating, one after the other */
  double compute_over_communicate_step;   /* R_CC of the whole step, three computes over four all-to-alls, where the one
                                             above is one over one: 3/4 of it */
} fmoe_plan_report;
fmoe_status fmoe_gate(fmoe_layer *layer /* kept */, const float *tokens /* [n, d], kept until backward */, int64_t n,
                      fmoe_pass **out); /* collective */
fmoe_status fmoe_route(fmoe_layer *layer /* kept */, const float *tokens /* [n, d], kept until backward */, int64_t n,
                       const int32_t *choices /* [n, k] */, const float *weights /* [n, k] */,
                       fmoe_pass **out); /* the caller's own gate instead of the layer's; collective */
fmoe_status fmoe_pass_routing(fmoe_pass *pass, fmoe_routing *out);
fmoe_status fmoe_plan(fmoe_pass *pass, const fmoe_plan_options *options /* NULL: defaults */,
                      fmoe_plan_report *report /* may be NULL */); /* collective */
fmoe_status fmoe_forward(fmoe_pass *pass, float *output /* [n, d] */); /* collective; plans if fmoe_plan was not called */
fmoe_status fmoe_backward(fmoe_pass *pass, const float *grad_output /* [n, d] */, float *grad_tokens /* [n, d], overwritten */,
                          float *grad_weights /* [n, k] of fmoe_route's weights, overwritten, may be NULL; NULL after
                                                 fmoe_gate */); /* collective */
/* From forward on: what ran when on this rank, computing and communicating, as Chrome trace JSON, which ui.perfetto.dev and
 * chrome://tracing open.  Beside it stands what was predicted, if fmoe_plan made a report for any rank.  Times are those of
 * the host's CLOCK_MONOTONIC, so that files of ranks on one host fit together.  Replaces the file as a whole; a link or a
 * device is refused.  Recording cannot be turned off and takes no time to speak of; docs/model.md says how to read it. */
fmoe_status fmoe_pass_write_timeline(fmoe_pass *pass, const char *path);
void fmoe_pass_destroy(fmoe_pass *pass); /* at any stage; its memory serves the layer's next passes */

/* ---- cluster: predict without running ------------------------------------------------------ */
fmoe_status fmoe_cluster_of_group(fmoe_group *group, fmoe_cluster **out); /* FMOE_ERROR_STAGE before fmoe_group_calibrate or
                                                                             a profile; collective */
fmoe_status fmoe_cluster_read(const char *path, fmoe_cluster **out);      /* a JSON description of any machine room, up to
                                                                             16384 workers; docs/model.md has its keys */
int32_t fmoe_cluster_size(fmoe_cluster *cluster);                         /* W; 0 of NULL */
/* For remote_share: such that the link of the widest places that divide the workers is busy no longer than a worker's own,
 * the smallest over all of them.  0 of NULL, and where workers are in one place or their links have no limit. */
double fmoe_cluster_remote_share(fmoe_cluster *cluster);
fmoe_status fmoe_cluster_write(fmoe_cluster *cluster, const char *path);  /* replaces the file as a whole */
/* What fmoe_plan would choose for these counts, rank by rank.  Of `layer`, the sizes and the activation count. */
fmoe_status fmoe_cluster_plan(fmoe_cluster *cluster, const fmoe_layer_options *layer, const int64_t *counts /* [W, E] */,
                              const fmoe_plan_options *options /* NULL: defaults */, fmoe_plan_report *report);
void fmoe_cluster_destroy(fmoe_cluster *cluster);

#ifdef __cplusplus
}
#endif
#endif
