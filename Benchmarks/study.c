/* study: what the recorded routing of trainings takes over this network, predicted and measured.
 *
 *   mpirun -n W study --link NAME --width D --hidden H --csv FILE [--every N] [--measure N] NAME=ROUTING...
 *
 * The group calibrates itself.  Of each file that train_gpt --record made, every --every'th step is predicted and of those every
 * --measure'th one also measured: all layers' plan + forward + backward of fmoe_route's passes, once without shadows and
 * once as the library plans.  Seconds are sums over layers; measured ones are the median of 3 of the slowest rank's.
 * CSV: a line for each step and plan, appended. */
#include <fastermoe_mpi.h>
#include <string.h>

#include "../examples/c/routing.h"
#include "measure.h"

enum { NO_SHADOW, OURS, PLANS, REPEATS = 3 };
static const char *const plans[PLANS] = {"no shadow", "ours"};
static const fmoe_plan_options options_of[PLANS] = {[NO_SHADOW] = {sizeof(fmoe_plan_options), 1, 0, 0, NULL},
                                                    [OURS] = {sizeof(fmoe_plan_options), 0, 0, 0, NULL}};

static int rank, size;
static fmoe_group *group;
static fmoe_cluster *cluster;

static void refuse(const char *words) {
  if (rank == 0) fprintf(stderr, "study: %s\n", words);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static void *allocate(int64_t count, size_t bytes) {
  void *p = calloc((size_t)count, bytes);
  if (!p) refuse("no memory");
  return p;
}

typedef struct outcome {
  double predicted[PLANS], measured[PLANS];
} outcome;

/* One layer of one step, added to what its step takes. */
static void add_layer(outcome *of, fmoe_layer *layer, const fmoe_layer_options *options, const routing_file *file,
                      const int32_t *choices, const float *weights, float *rows[3], int measures) {
  const int64_t n = file->shape.tokens / size, k = file->shape.top_k, E = file->shape.experts;
  int64_t *counts = allocate(size * E, sizeof *counts);
  for (int64_t slot = 0; slot < n * size * k; slot++)
    if (choices[slot] >= 0) counts[slot / (n * k) * E + choices[slot]]++;
  for (int plan = 0; plan < PLANS; plan++) {
    fmoe_plan_report report = {.struct_size = sizeof report};
    CHECK(fmoe_cluster_plan(cluster, options, counts, &options_of[plan], &report));
    of->predicted[plan] += report.seconds_planned;
  }
  free(counts);
  double times[PLANS][REPEATS];
  for (int repeat = 0; measures && repeat < REPEATS; repeat++)
    for (int turn = 0; turn < PLANS; turn++) {
      const int plan = (turn + repeat) % PLANS; /* nobody always comes after the same one */
      fmoe_pass *pass;
      CHECK(fmoe_route(layer, rows[0], n, choices + rank * n * k, weights + rank * n * k, &pass));
      MPI_Barrier(MPI_COMM_WORLD);
      double mine = MPI_Wtime();
      CHECK(fmoe_plan(pass, &options_of[plan], NULL));
      CHECK(fmoe_forward(pass, rows[1]));
      CHECK(fmoe_backward(pass, rows[0], rows[2], NULL));
      mine = MPI_Wtime() - mine;
      fmoe_pass_destroy(pass);
      MPI_Allreduce(&mine, &times[plan][repeat], 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    }
  for (int plan = 0; measures && plan < PLANS; plan++) of->measured[plan] += median(times[plan], REPEATS);
}

static void study(const char *name, const char *path, const char *link, int64_t width, int64_t hidden, int every,
                  int measure, FILE *csv) {
  routing_file file;
  if (routing_open(&file, path) != 0) refuse(file.error);
  if (file.shape.tokens % size != 0 || file.shape.experts % size != 0) refuse("the ranks do not divide tokens and experts");
  const int64_t n = file.shape.tokens / size, slots = (int64_t)file.shape.tokens * file.shape.top_k;
  fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
  fmoe_layer *layer;
  options.d_model = width, options.d_hidden = hidden, options.experts = file.shape.experts, options.top_k = file.shape.top_k;
  CHECK(fmoe_layer_create(group, &options, &layer));
  int32_t *choices = allocate(slots, sizeof *choices);
  float *weights = allocate(slots, sizeof *weights), *rows[3];
  for (int i = 0; i < 3; i++) rows[i] = allocate(n * width, sizeof(float));
  for (int64_t i = 0; i < n * width; i++) rows[0][i] = (float)(i * 7919 % 1000) / 500 - 1;
  double sums[2][PLANS] = {{0}};
  int steps = 0, measured = 0;
  for (int64_t step = every; step <= file.steps; step += every, steps++) {
    outcome of = {{0}, {0}};
    const int measures = step / every % measure == 0;
    if (routing_seek(&file, step - 1) != 0) refuse(file.error);
    for (int at = 0; at < file.shape.layers; at++) {
      if (routing_read(&file, choices, weights) != 0) refuse(file.error);
      add_layer(&of, layer, &options, &file, choices, weights, rows, measures);
    }
    for (int plan = 0; plan < PLANS; plan++) {
      sums[0][plan] += of.predicted[plan];
      if (measures) sums[1][plan] += of.measured[plan];
      if (rank != 0) continue;
      fprintf(csv, "%s,%s,%s,%lld,%.6g,", link, name, plans[plan], (long long)step, of.predicted[plan]);
      if (measures) fprintf(csv, "%.6g", of.measured[plan]);
      fprintf(csv, "\n");
    }
    measured += measures;
  }
  if (rank == 0 && measured > 0)
    printf("%-14s %8.2f / %8.2f   %8.2f / %8.2f\n", name, sums[0][0] / steps * 1e3, sums[1][0] / measured * 1e3,
           sums[0][1] / steps * 1e3, sums[1][1] / measured * 1e3), fflush(stdout);
  for (int i = 0; i < 3; i++) free(rows[i]);
  free(weights), free(choices);
  fmoe_layer_destroy(layer), routing_close(&file);
}

int main(int argc, char **argv) {
  int provided, every = 10, measure = 10, first = 1;
  const char *link = "this network", *path = NULL;
  int64_t width = 0, hidden = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (; first + 1 < argc && !strncmp(argv[first], "--", 2); first += 2) {
    const char *value = argv[first + 1];
    if (!strcmp(argv[first], "--link")) link = value;
    else if (!strcmp(argv[first], "--csv")) path = value;
    else if (!strcmp(argv[first], "--width")) width = atoi(value);
    else if (!strcmp(argv[first], "--hidden")) hidden = atoi(value);
    else if (!strcmp(argv[first], "--every")) every = atoi(value);
    else if (!strcmp(argv[first], "--measure")) measure = atoi(value);
  }
  if (!path || width < 1 || hidden < 1 || every < 1 || measure < 1 || first == argc) refuse("see the head of study.c");
  FILE *csv = rank == 0 ? fopen(path, "a") : NULL;
  if (rank == 0 && !csv) refuse("the CSV cannot be written");
  if (csv && (fseek(csv, 0, SEEK_END), ftell(csv) == 0)) fprintf(csv, "link,gate,plan,step,predicted_s,measured_s\n");
  fmoe_group_options one = {.struct_size = sizeof one, .threads = 1};
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &one, &group));
  CHECK(fmoe_group_calibrate(group, 4));
  CHECK(fmoe_cluster_of_group(group, &cluster));
  if (rank == 0) printf("%d workers, %s; the experts of a step in ms, predicted / measured:\n%-14s %19s   %19s\n", size, link, "gate", "no shadow", "as planned");
  for (; first < argc; first++) {
    char name[64];
    const char *equals = strchr(argv[first], '=');
    if (!equals || equals - argv[first] >= (int)sizeof name) refuse("files are given as NAME=ROUTING");
    snprintf(name, sizeof name, "%.*s", (int)(equals - argv[first]), argv[first]);
    study(name, equals + 1, link, width, hidden, every, measure, csv);
  }
  if (csv && fclose(csv) != 0) refuse("the CSV was not written as a whole");
  fmoe_cluster_destroy(cluster);
  fmoe_group_destroy(group);
  return MPI_Finalize();
}
