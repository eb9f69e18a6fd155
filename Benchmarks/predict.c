/* predict: what the library predicts beside what it then measures, over MPI; and strategies beside each other.
 *
 *   mpirun -n W predict --link NAME [--csv FILE] [--repeats N] [--calibrate SECONDS] [--cluster FILE.json]
 *                     [--timeline FILE]
 *
 * The group calibrates itself. Then for several layers and routings, even to one expert with half of all rows, five plans take
 * turns: FastMoE's (coarse, no shadow), no shadow as predicted best, the paper's Algorithm 1, ZeRO stage 3, and what the
 * library chooses. A step is plan + forward + backward of fmoe_route's pass; seconds are the median over repeats of the
 * slowest rank's; planning is rank 0's call of fmoe_plan as a share of it, the ranks' agreement included. CSV: a line for
 * each case, appended; --cluster keeps what was measured, --timeline every rank's latest step of ours in the first case, as
 * FILE.RANK.json. */
#include <fastermoe_mpi.h>
#include <math.h>
#include <string.h>

#include "measure.h"

typedef struct shape { int64_t n, d, h, E; int32_t k; } shape;
static const shape shapes[] = {{2048, 512, 640, 8, 2}, {1024, 512, 2048, 8, 2}, {2048, 256, 512, 16, 1}, {512, 1024, 512, 4, 2}};
enum { SHAPES = sizeof shapes / sizeof *shapes };
enum { EVEN, ZIPF, HOT, ROUTINGS };
static const char *routings[ROUTINGS] = {"even", "zipf 1.2", "hot half"};
enum { FASTMOE, NO_SHADOW, PAPER, ZERO, OURS, PLANS };
static const char *plans[PLANS] = {"FastMoE", "no shadow", "Algorithm 1", "ZeRO-3", "ours"};
static const fmoe_plan_options options_of[PLANS] = {
  [FASTMOE] = {sizeof(fmoe_plan_options), 1, 1, 0, NULL},   [NO_SHADOW] = {sizeof(fmoe_plan_options), 1, 0, 0, NULL},
  [PAPER] = {sizeof(fmoe_plan_options), 3, 0, 0, NULL},     [ZERO] = {sizeof(fmoe_plan_options), 4, 0, 0, NULL},
  [OURS] = {sizeof(fmoe_plan_options), 0, 0, 0, NULL},
};
enum { MOST_REPEATS = 100 };

static void *allocate(int64_t count, size_t size) {
  void *p = calloc((size_t)count, size);
  if (!p) MPI_Abort(MPI_COMM_WORLD, 1);
  return p;
}

/* The same generator everywhere: a number below 1 for each slot. */
static double uniform(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (double)(*state >> 11) / 9007199254740992.0;
}

/* Each token's k choices are different experts, drawn by their weights. */
static void route(int32_t *choices, const shape *s, int routing, uint64_t seed) {
  double weight[64], total = 0;
  for (int64_t e = 0; e < s->E; e++) {
    weight[e] = routing == ZIPF ? pow((double)(e + 1), -1.2) : 1;
    total += weight[e];
  }
  for (int64_t t = 0; t < s->n; t++)
    for (int32_t j = 0; j < s->k; j++) {
      int32_t chosen = 0;
      int again = 1;
      while (again) {
        if (routing == HOT && j == 0 && uniform(&seed) < 0.5 * s->k) {
          chosen = 0;
        } else {
          double left = uniform(&seed) * total;
          for (chosen = 0; chosen + 1 < s->E && left >= weight[chosen]; chosen++) left -= weight[chosen];
        }
        again = 0;
        for (int32_t i = 0; i < j; i++) again |= choices[t * s->k + i] == chosen;
      }
      choices[t * s->k + j] = chosen;
    }
}

int main(int argc, char **argv) {
  int provided, rank, size, repeats = 5;
  const char *link = "this network", *path = NULL, *cluster_file = NULL, *timeline = NULL;
  double calibrate = 3;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--link")) link = argv[i + 1];
    else if (!strcmp(argv[i], "--csv")) path = argv[i + 1];
    else if (!strcmp(argv[i], "--timeline")) timeline = argv[i + 1];
    else if (!strcmp(argv[i], "--cluster")) cluster_file = argv[i + 1];
    else if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--calibrate")) calibrate = atof(argv[i + 1]);
  }
  if (repeats < 1 || repeats > MOST_REPEATS) repeats = 5;
  FILE *csv = NULL;
  if (rank == 0 && path) {
    csv = fopen(path, "a");
    if (!csv) MPI_Abort(MPI_COMM_WORLD, 1);
    fseek(csv, 0, SEEK_END);
    if (ftell(csv) == 0) fprintf(csv, "link,workers,n,d,h,E,k,routing,plan,shadows,group_size,predicted_s,measured_s\n");
  }

  fmoe_group *group;
  fmoe_group_options one = {.struct_size = sizeof one, .threads = 1};
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &one, &group));
  CHECK(fmoe_group_calibrate(group, calibrate));
  fmoe_cluster *cluster;
  CHECK(fmoe_cluster_of_group(group, &cluster));
  if (rank == 0 && cluster_file) CHECK(fmoe_cluster_write(cluster, cluster_file));
  fmoe_cluster_destroy(cluster);
  if (rank == 0) {
    printf("%d workers, %s; a step in ms, predicted / measured:\n%-24s %-9s", size, link, "n, d, h, E, k", "rows");
    for (int plan = 0; plan < PLANS; plan++) printf(" %20s", plans[plan]);
    printf("  no shadow over ours  planning of ours\n");
  }
  for (int at = 0; at < SHAPES; at++) {
    const shape *s = &shapes[at];
    fmoe_layer_options options = FMOE_LAYER_OPTIONS_INIT;
    options.d_model = s->d, options.d_hidden = s->h, options.experts = s->E, options.top_k = s->k;
    options.activation = FMOE_GELU_TANH, options.seed = 1;
    fmoe_layer *layer;
    CHECK(fmoe_layer_create(group, &options, &layer));
    float *x = allocate(s->n * s->d, sizeof *x), *y = allocate(s->n * s->d, sizeof *y), *dx = allocate(s->n * s->d, sizeof *dx);
    float *weights = allocate(s->n * s->k, sizeof *weights);
    int32_t *choices = allocate(s->n * s->k, sizeof *choices);
    for (int64_t i = 0; i < s->n * s->d; i++) x[i] = (float)(i * 7919 % 1000) / 500 - 1;
    for (int64_t i = 0; i < s->n * s->k; i++) weights[i] = 0.5f;
    for (int routing = 0; routing < ROUTINGS; routing++) {
      double times[PLANS][MOST_REPEATS], medians[PLANS], planning[MOST_REPEATS];
      fmoe_plan_report report[PLANS];
      route(choices, s, routing, (uint64_t)(rank + 1) * 7919);
      for (int r = -1; r < repeats; r++)
        for (int turn = 0; turn < PLANS; turn++) {
          const int plan = (turn + r + 1) % PLANS; /* nobody always comes after the same one */
          fmoe_pass *pass;
          double begin, planned, mine, slowest;
          report[plan] = (fmoe_plan_report){.struct_size = sizeof report[plan]};
          CHECK(fmoe_route(layer, x, s->n, choices, weights, &pass));
          MPI_Barrier(MPI_COMM_WORLD);
          begin = MPI_Wtime();
          CHECK(fmoe_plan(pass, &options_of[plan], &report[plan]));
          planned = MPI_Wtime() - begin;
          CHECK(fmoe_forward(pass, y));
          CHECK(fmoe_backward(pass, x, dx, NULL));
          mine = MPI_Wtime() - begin;
          if (timeline && at == 0 && routing == EVEN && plan == OURS) {
            char file[4096];
            snprintf(file, sizeof file, "%s.%d.json", timeline, rank);
            CHECK(fmoe_pass_write_timeline(pass, file));
          }
          fmoe_pass_destroy(pass);
          MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
          if (r >= 0) times[plan][r] = slowest;
          if (r >= 0 && plan == OURS) planning[r] = planned;
        }
      if (rank == 0) {
        char name[64];
        snprintf(name, sizeof name, "%lld, %lld, %lld, %lld, %d", (long long)s->n, (long long)s->d, (long long)s->h, (long long)s->E, s->k);
        printf("%-24s %-9s", name, routings[routing]);
      }
      for (int plan = 0; plan < PLANS; plan++) {
        medians[plan] = median(times[plan], repeats);
        if (rank) continue;
        printf(" %7.1f /%7.1f %d/%d", report[plan].seconds_planned * 1e3, medians[plan] * 1e3, report[plan].shadows, report[plan].group_size);
        if (csv)
          fprintf(csv, "%s,%d,%lld,%lld,%lld,%lld,%d,%s,%s,%d,%d,%.6g,%.6g\n", link, size, (long long)s->n, (long long)s->d,
                  (long long)s->h, (long long)s->E, s->k, routings[routing], plans[plan], report[plan].shadows,
                  report[plan].group_size, report[plan].seconds_planned, medians[plan]);
      }
      if (rank == 0) {
        double share = median(planning, repeats) / medians[OURS];
        printf("  %19.3f  %14.2f %%\n", medians[NO_SHADOW] / medians[OURS], 100 * share), fflush(stdout);
      }
    }
    free(x), free(y), free(dx), free(weights), free(choices);
    fmoe_layer_destroy(layer);
  }
  if (csv && fclose(csv)) MPI_Abort(MPI_COMM_WORLD, 1);
  fmoe_group_destroy(group);
  return MPI_Finalize();
}
