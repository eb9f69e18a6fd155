/* overlap: what schedules and shadows save, over MPI.
 *
 *   mpirun -n W overlap [--shape n,d,h,E,k] [--hot SHARE] [--group-size G] [--repeats N] [--json FILE]
 *
 * Every rank sends the same number of rows to every expert (fmoe_route), but --hot sends that share of all rows to expert 0
 * first. In turns, in one run: a step (forward + backward) of the coarse schedule, of the overlapped one, of that with
 * expert 0 shadowed, of ZeRO stage 3, of as many rows on average computed by a worker alone, and of a layer with the same
 * rows but next to no computing. Medians over repeats of the slowest rank. The ideal is the larger of computing alone and
 * communicating alone. */
#include <fastermoe_mpi.h>
#include <string.h>

#include "measure.h"

enum { COARSE, OVERLAPPED, SHADOWED, ZERO, COMPUTING, COMMUNICATING, KINDS };
static const char *names[KINDS] = {"coarse", "overlapped", "expert 0 shadowed", "ZeRO-3", "computing alone", "communicating alone"};

static float *floats(int64_t count) {
  float *p = malloc((size_t)count * sizeof *p);
  if (!p) MPI_Abort(MPI_COMM_WORLD, 1);
  for (int64_t i = 0; i < count; i++) p[i] = (float)(i * 7919 % 1000) / 500 - 1;
  return p;
}

static fmoe_layer *layer(fmoe_group *group, int64_t d, int64_t h, int64_t E, int32_t k) {
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  options.d_model = d, options.d_hidden = h, options.experts = E, options.top_k = k;
  options.activation = FMOE_GELU_TANH, options.seed = 1;
  fmoe_layer *made;
  CHECK(fmoe_layer_create(group, &options, &made));
  return made;
}

int main(int argc, char **argv) {
  long n = 2048, d = 512, h = 2048, E = 8, k = 2;
  int provided, rank, size, repeats = 9, group_size = 0;
  double hot = 0;
  const char *json = NULL;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--shape")) sscanf(argv[i + 1], "%ld,%ld,%ld,%ld,%ld", &n, &d, &h, &E, &k);
    else if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--group-size")) group_size = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--hot")) hot = atof(argv[i + 1]);
    else if (!strcmp(argv[i], "--json")) json = argv[i + 1];
  }
  if (repeats < 1 || repeats > 100) repeats = 9;

  fmoe_group *together, *alone;
  fmoe_group_options one = {.struct_size = sizeof one, .threads = 1};
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &one, &together));
  CHECK(fmoe_group_create_local(1, &one, &alone));
  fmoe_layer *layers[KINDS];
  layers[COARSE] = layers[OVERLAPPED] = layers[SHADOWED] = layers[ZERO] = layer(together, d, h, E, (int32_t)k);
  layers[COMPUTING] = layer(alone, d, h, E / size, (int32_t)k > E / size ? (int32_t)(E / size) : (int32_t)k);
  layers[COMMUNICATING] = layer(together, d, 1, E, (int32_t)k);
  float *x = floats(n * d), *dy = floats(n * d), *y = floats(n * d), *dx = floats(n * d), *weights = floats(n * k);
  int32_t *choices = malloc((size_t)(n * k) * sizeof *choices);
  if (!choices) MPI_Abort(MPI_COMM_WORLD, 1);

  uint8_t *shadows = calloc((size_t)E, 1);
  if (!shadows) MPI_Abort(MPI_COMM_WORLD, 1);
  shadows[0] = 1;
  double times[KINDS][100];
  for (int r = -1; r < repeats; r++)
    for (int kind = 0; kind < KINDS; kind++) {
      int64_t experts = kind == COMPUTING ? E / size : E, per = kind == COMPUTING && k > experts ? experts : k;
      int64_t tokens = n * k / per; /* as many rows */
      for (int64_t s = 0; s < n * k; s++) {
        int chilled = kind == COMPUTING || (double)(s * 7919 % 1000) >= hot * 1000;
        choices[s] = chilled ? (int32_t)(s % experts) : 0;
      }
      if (tokens > n) MPI_Abort(MPI_COMM_WORLD, 2);
      fmoe_plan_options plan = {.struct_size = sizeof plan, .schedule = kind == COARSE || kind == COMMUNICATING ? 1 : 2,
                                .shadowing = kind == SHADOWED ? 2 : kind == ZERO ? 4 : 1, .group_size = group_size,
                                .shadows = shadows};
      fmoe_pass *pass;
      double begin, mine, slowest;
      MPI_Barrier(MPI_COMM_WORLD);
      begin = MPI_Wtime();
      CHECK(fmoe_route(layers[kind], x, tokens, choices, weights, &pass));
      CHECK(fmoe_plan(pass, &plan, NULL));
      CHECK(fmoe_forward(pass, y));
      CHECK(fmoe_backward(pass, dy, dx, NULL));
      mine = MPI_Wtime() - begin;
      fmoe_pass_destroy(pass);
      MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      if (r >= 0) times[kind][r] = slowest;
    }
  double medians[KINDS];
  for (int kind = 0; kind < KINDS; kind++) medians[kind] = median(times[kind], repeats);
  double ideal = medians[COMPUTING] > medians[COMMUNICATING] ? medians[COMPUTING] : medians[COMMUNICATING];
  if (rank == 0) {
    printf("%d ranks, n %ld, d %ld, h %ld, E %ld, k %ld; ms:", size, n, d, h, E, k);
    for (int kind = 0; kind < KINDS; kind++) printf(" %s %.1f%s", names[kind], medians[kind] * 1e3, kind + 1 < KINDS ? "," : "\n");
    printf("R_CC %.2f; overlapped over ideal %.3f; coarse over overlapped %.3f, overlapped over shadowed %.3f\n",
           medians[COMPUTING] / medians[COMMUNICATING], medians[OVERLAPPED] / ideal, medians[COARSE] / medians[OVERLAPPED],
           medians[OVERLAPPED] / medians[SHADOWED]);
    FILE *out = json ? fopen(json, "w") : NULL;
    if (out) {
      fprintf(out, "{\"ranks\": %d, \"n\": %ld, \"d\": %ld, \"h\": %ld, \"E\": %ld, \"k\": %ld, \"hot\": %g, \"coarse\": %.6g, \"overlapped\": %.6g, \"shadowed\": %.6g, \"zero\": %.6g, \"computing\": %.6g, \"communicating\": %.6g}\n",
              size, n, d, h, E, k, hot, medians[COARSE], medians[OVERLAPPED], medians[SHADOWED], medians[ZERO], medians[COMPUTING],
              medians[COMMUNICATING]);
      fclose(out);
    }
  }
  fmoe_layer_destroy(layers[COARSE]), fmoe_layer_destroy(layers[COMPUTING]), fmoe_layer_destroy(layers[COMMUNICATING]);
  fmoe_group_destroy(alone), fmoe_group_destroy(together);
  free(x), free(dy), free(y), free(dx), free(weights), free(choices), free(shadows);
  return MPI_Finalize();
}
