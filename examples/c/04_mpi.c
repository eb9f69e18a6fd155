/* 04_mpi.c: one layer, its experts spread over MPI ranks, learns a function.  Any number of ranks that divides 8:
 *
 *   mpicc 04_mpi.c $(pkg-config --cflags --libs fastermoe) -o mpi && mpirun -n 4 ./mpi
 *
 * Each rank draws tokens of its own; the library takes them to the experts, wherever these are, and brings the results
 * back.  Nothing else differs from a single process, but that gradients are reduced before each step. */
#include <fastermoe_mpi.h>
#include <stdio.h>

enum { TOKENS = 256, MODEL = 16, HIDDEN = 64, EXPERTS = 8, TOP_K = 2, STEPS = 500 }; /* n d h E k */

#define CHECK(call)                                                \
  do {                                                             \
    if ((call) != FMOE_OK) {                                       \
      fprintf(stderr, "%s: %s\n", #call, fmoe_last_error());       \
      MPI_Abort(MPI_COMM_WORLD, 1);                                \
    }                                                              \
  } while (0)

static float tokens[TOKENS * MODEL], wanted[TOKENS * MODEL], output[TOKENS * MODEL]; /* [n, d] */
static float grad_output[TOKENS * MODEL], grad_tokens[TOKENS * MODEL];               /* [n, d] */

/* What is to be learned: each number of a token times its neighbour. */
static void draw(uint64_t *state) {
  for (int i = 0; i < TOKENS * MODEL; i++) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    tokens[i] = (float)(*state >> 40) / 8388608.0f - 1; /* evenly between -1 and 1 */
  }
  for (int i = 0; i < TOKENS * MODEL; i++) wanted[i] = tokens[i] * tokens[i / MODEL * MODEL + (i + 1) % MODEL];
}

/* Half the mean square of the error, per token; its gradient goes to grad_output. */
static double loss_of_output(void) {
  double sum = 0;
  for (int i = 0; i < TOKENS * MODEL; i++) {
    float error = output[i] - wanted[i];
    grad_output[i] = error / TOKENS;
    sum += 0.5 * error * error / TOKENS;
  }
  return sum;
}

static void descend(float *values, const float *gradients, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] -= 3.0f * gradients[i];
}

int main(int argc, char **argv) {
  int level, rank, ranks;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level); /* this thread alone will call MPI */
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);

  fmoe_group_options limited = {.struct_size = sizeof limited, .timeout_seconds = 60}; /* for a rank that hangs */
  fmoe_group *group;
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &limited, &group));
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = MODEL;
  options.d_hidden = HIDDEN;
  options.experts = EXPERTS;
  options.top_k = TOP_K;
  options.balance_loss = 0.01;
  options.seed = 1; /* equal on all ranks */
  fmoe_layer *layer;
  CHECK(fmoe_layer_create(group, &options, &layer));
  fmoe_tensors v = {.struct_size = sizeof v}, g = {.struct_size = sizeof g};
  CHECK(fmoe_layer_values(layer, &v)); /* of this rank's experts, and of the gate, which all ranks have */
  CHECK(fmoe_layer_gradients(layer, &g));

  int64_t held = v.local_experts, counts[EXPERTS] = {0}, all_counts[EXPERTS];
  uint64_t state = 42 + (uint64_t)rank; /* every rank has other tokens */
  for (int step = 0; step <= STEPS; step++) {
    fmoe_pass *pass;
    draw(&state);
    CHECK(fmoe_layer_zero_gradients(layer));
    CHECK(fmoe_gate(layer, tokens, TOKENS, &pass));
    CHECK(fmoe_forward(pass, output));
    double loss = loss_of_output(), sum;
    CHECK(fmoe_backward(pass, grad_output, grad_tokens, NULL));
    CHECK(fmoe_layer_reduce_gradients(layer)); /* now they are those of the mean of all ranks' losses */
    descend(v.gate, g.gate, EXPERTS * MODEL);
    descend(v.w1, g.w1, held * HIDDEN * MODEL), descend(v.b1, g.b1, held * HIDDEN);
    descend(v.w2, g.w2, held * MODEL * HIDDEN), descend(v.b2, g.b2, held * MODEL);

    fmoe_routing routing = {.struct_size = sizeof routing};
    CHECK(fmoe_pass_routing(pass, &routing));
    for (int e = 0; e < EXPERTS; e++) counts[e] += routing.counts[e];
    fmoe_pass_destroy(pass);
    MPI_Reduce(&loss, &sum, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0 && step % 100 == 0) printf("step %3d: loss %.4f\n", step, sum / ranks);
  }

  MPI_Reduce(counts, all_counts, EXPERTS, MPI_INT64_T, MPI_SUM, 0, MPI_COMM_WORLD);
  for (int r = 0; r < ranks && rank == 0; r++) {
    int64_t rows = 0;
    for (int64_t e = r * held; e < (r + 1) * held; e++) rows += all_counts[e];
    printf("rank %d computed %lld rows\n", r, (long long)rows);
  }
  fmoe_layer_destroy(layer);
  fmoe_group_destroy(group); /* before MPI_Finalize */
  MPI_Finalize();
  return 0;
}
