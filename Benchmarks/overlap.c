/* overlap: what schedules and shadows save, over MPI.
 *
 *   mpirun -n W overlap [--shape n,d,h,E,k] [--ratio R] [--hot SHARE] [--group-size G] [--repeats N] [--json FILE]
 *
 * Every rank sends the same number of rows to every expert (fmoe_route), but --hot sends that share of all rows to expert 0
 * first. In turns, in one run: a step (forward + backward) of the coarse schedule, of the overlapped one, of that with
 * expert 0 shadowed, of ZeRO stage 3, of as many rows on average computed by a worker alone, and of a layer with the same
 * rows but next to no computing. Medians over repeats of the slowest rank. The ideal is the larger of computing alone and
 * communicating alone. With --ratio h is no more than a first guess: it becomes what makes computing take R times as long as
 * communicating here. */
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

static long n = 2048, d = 512, h = 2048, E = 8, k = 2;
static int rank, size, group_size = 0;
static double hot = 0, ratio = 0;
static fmoe_group *together, *alone;
static float *x, *dy, *y, *dx, *weights;
static int32_t *choices;
static uint8_t *shadows;

/* Seconds of the slowest rank. */
static double step(fmoe_layer *used, int kind) {
  int64_t experts = kind == COMPUTING ? E / size : E, per = kind == COMPUTING && k > experts ? experts : k;
  int64_t tokens = n * k / per; /* as many rows */
  if (tokens > n) MPI_Abort(MPI_COMM_WORLD, 2);
  for (int64_t s = 0; s < n * k; s++) {
    int chilled = kind == COMPUTING || (double)(s * 7919 % 1000) >= hot * 1000;
    choices[s] = chilled ? (int32_t)(s % experts) : 0;
  }
  fmoe_plan_options plan = {.struct_size = sizeof plan, .schedule = kind == COARSE || kind == COMMUNICATING ? 1 : 2,
                            .shadowing = kind == SHADOWED ? 2 : kind == ZERO ? 4 : 1, .group_size = group_size,
                            .shadows = shadows};
  fmoe_pass *pass;
  double mine, slowest;
  MPI_Barrier(MPI_COMM_WORLD);
  mine = MPI_Wtime();
  CHECK(fmoe_route(used, x, tokens, choices, weights, &pass));
  CHECK(fmoe_plan(pass, &plan, NULL));
  CHECK(fmoe_forward(pass, y));
  CHECK(fmoe_backward(pass, dy, dx, NULL));
  mine = MPI_Wtime() - mine;
  fmoe_pass_destroy(pass);
  MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return slowest;
}

/* Medians of `repeats` steps of each kind from `first` on, in turns. */
static void measure(int first, int repeats, double *medians) {
  static double times[KINDS][100];
  fmoe_layer *whole = layer(together, d, h, E, (int32_t)k), *thin = layer(together, d, 1, E, (int32_t)k);
  fmoe_layer *own = layer(alone, d, h, E / size, (int32_t)(k > E / size ? E / size : k));
  for (int r = -1; r < repeats; r++)
    for (int kind = first; kind < KINDS; kind++) {
      double seconds = step(kind == COMPUTING ? own : kind == COMMUNICATING ? thin : whole, kind);
      if (r >= 0) times[kind][r] = seconds;
    }
  for (int kind = first; kind < KINDS; kind++) medians[kind] = median(times[kind], repeats);
  fmoe_layer_destroy(whole), fmoe_layer_destroy(thin), fmoe_layer_destroy(own);
}

int main(int argc, char **argv) {
  int provided, repeats = 9;
  const char *json = NULL;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--shape")) sscanf(argv[i + 1], "%ld,%ld,%ld,%ld,%ld", &n, &d, &h, &E, &k);
    else if (!strcmp(argv[i], "--ratio")) ratio = atof(argv[i + 1]);
    else if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--group-size")) group_size = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--hot")) hot = atof(argv[i + 1]);
    else if (!strcmp(argv[i], "--json")) json = argv[i + 1];
  }
  if (repeats < 1 || repeats > 100) repeats = 9;

  fmoe_group_options one = {.struct_size = sizeof one, .threads = 1};
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &one, &together));
  CHECK(fmoe_group_create_local(1, &one, &alone));
  x = floats(n * d), dy = floats(n * d), y = floats(n * d), dx = floats(n * d), weights = floats(n * k);
  choices = malloc((size_t)(n * k) * sizeof *choices), shadows = calloc((size_t)E, 1);
  if (!choices || !shadows) MPI_Abort(MPI_COMM_WORLD, 1);
  shadows[0] = 1;

  double medians[KINDS];
  for (int trial = 0; trial < 2 && ratio > 0; trial++) {
    measure(COMPUTING, 3, medians);
    double wide = ratio * (double)h * medians[COMMUNICATING] / medians[COMPUTING];
    h = wide < 16 ? 16 : wide > 16384 ? 16384 : (long)(wide / 16 + 0.5) * 16;
  }
  measure(0, repeats, medians);
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
  fmoe_group_destroy(alone), fmoe_group_destroy(together);
  free(x), free(dy), free(y), free(dx), free(weights), free(choices), free(shadows);
  return MPI_Finalize();
}
