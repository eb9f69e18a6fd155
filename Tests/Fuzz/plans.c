/* plans.c: bytes as a cluster, counts and a strategy, predicted; and as a routing and a strategy, played by ranks over a
 * transport that delays and reorders: the outputs have the bits of the coarse plan's. */
#include <math.h>

#include "../CAPITests/crew.h"
#include "fuzz.h"

enum { MOST = 6, EXPERTS = 3 * MOST };

/* ---- predicted ------------------------------------------------------------------------------- */

/* A cluster of any shape and speed; with `speed` a power of two, all of it exactly so much faster. */
static void describe(const char *path, int workers, input in, double speed) {
  FILE *f = fopen(path, "w");
  if (!f) abort();
  const uint32_t hosts = 1 + below(&in, 4);
  fprintf(f, "{\"fastermoe_cluster\": 1, \"places\": [{\"name\": \"root\"}");
  for (uint32_t h = 0; h < hosts; h++) {
    fprintf(f, ", {\"name\": \"h%u\", \"in\": \"root\"", h);
    const uint32_t links = below(&in, 4);
    if (links) fprintf(f, ", \"up\": {\"bytes_per_second\": %.17g, \"latency_seconds\": %.17g}",
                       speed * ldexp(1 + take(&in), 20), ldexp(take(&in), -20) / speed);
    if (links == 3) fprintf(f, ", \"down\": {\"bytes_per_second\": %.17g}", speed * ldexp(1 + take(&in), 20));
    fprintf(f, "}");
  }
  fprintf(f, "], \"workers\": [");
  for (int w = 0; w < workers; w++) {
    fprintf(f, "%s{\"name\": \"w%d\", \"in\": \"h%u\"", w ? ", " : "", w, below(&in, hosts));
    if (below(&in, 4)) fprintf(f, ", \"up\": {\"bytes_per_second\": %.17g, \"latency_seconds\": %.17g}",
                               speed * ldexp(1 + take(&in), 22), ldexp(take(&in), -22) / speed);
    fprintf(f, ", \"flops_per_second\": [[1, %.17g], [%d, %.17g]]", speed * ldexp(1 + take(&in), 22),
            2 + take(&in), speed * ldexp(1 + take(&in), 24));
    if (!below(&in, 4)) fprintf(f, ", \"weight_gradient_flops_per_second\": [[9, %.17g]]", speed * ldexp(1 + take(&in), 24));
    if (!below(&in, 4)) fprintf(f, ", \"row_bytes_per_second\": %.17g", speed * ldexp(1 + take(&in), 24));
    fprintf(f, "}");
  }
  fprintf(f, "]");
  if (workers > 1 && !below(&in, 3))
    fprintf(f, ", \"peer_links\": [{\"from\": \"w0\", \"to\": \"w1\", \"there\": {\"bytes_per_second\": %.17g}}]",
            speed * ldexp(1 + take(&in), 24));
  if (!below(&in, 3)) fprintf(f, ", \"computing_slowdown\": %.17g", 1 + take(&in) / 256.0);
  if (!below(&in, 3)) fprintf(f, ", \"message_slowdown\": %.17g", 1 + take(&in) / 256.0);
  fprintf(f, "}\n");
  if (fclose(f)) abort();
}

static void predict(input in) {
  const int workers = 1 + (int)below(&in, MOST), experts = workers * (1 + (int)below(&in, 3));
  static int64_t counts[MOST * EXPERTS];
  uint8_t shadows[EXPERTS];
  for (int i = 0; i < workers * experts; i++) counts[i] = (int64_t)take(&in) << (take(&in) % 8);
  int asked = 0;
  for (int e = 0; e < experts; e++) asked += shadows[e] = take(&in) % 3 == 0;
  const fmoe_layer_options layer = {.struct_size = sizeof layer, .d_model = 1 + take(&in), .d_hidden = 1 + take(&in),
                                    .experts = experts, .top_k = 1, .activation = take(&in) % 5};
  fmoe_plan_options o = {.struct_size = sizeof o, .shadowing = take(&in) % 5, .schedule = take(&in) % 3,
                         .group_size = take(&in) % (workers + 1), .shadows = shadows};
  fmoe_plan_report reports[3];
  fmoe_status first = FMOE_OK;
  fmoe_cluster *cluster = NULL;
  for (int i = 0; i < 3; i++) { /* twice the same, and twice as fast */
    if (i != 1) {
      fmoe_cluster_destroy(cluster);
      describe("cluster.json", workers, in, i == 2 ? 2 : 1);
      DEMAND(FAIR(fmoe_cluster_read("cluster.json", &cluster)) == FMOE_OK, "%s", fmoe_last_error());
    }
    memset(&reports[i], 0, sizeof reports[i]), reports[i].struct_size = sizeof reports[i];
    fmoe_status status = FAIR(fmoe_cluster_plan(cluster, &layer, counts, &o, &reports[i]));
    if (i == 0) first = status;
    DEMAND(status == first, "%s, then %s", fmoe_status_name((int32_t)first), fmoe_status_name((int32_t)status));
  }
  fmoe_cluster_destroy(cluster);
  if (first != FMOE_OK) return;
  const fmoe_plan_report r = reports[0], fast = reports[2];
  const double rounding = 1 + 1e-9;
  DEMAND(!memcmp(&r, &reports[1], sizeof r), "planned %.17g, then %.17g", r.seconds_planned, reports[1].seconds_planned);
  DEMAND(isfinite(r.seconds_plain) && isfinite(r.seconds_planned) && isfinite(r.seconds_semi_ideal), "plain %g, planned %g",
         r.seconds_plain, r.seconds_planned);
  DEMAND(r.seconds_ideal >= 0 && r.seconds_ideal <= r.seconds_planned * rounding, "ideal %.17g, planned %.17g",
         r.seconds_ideal, r.seconds_planned);
  DEMAND(r.seconds_ideal <= r.seconds_semi_ideal * rounding, "ideal %.17g, semi-ideal %.17g", r.seconds_ideal,
         r.seconds_semi_ideal);
  if (o.shadowing == 0 && o.schedule != 2)
    DEMAND(r.seconds_planned <= r.seconds_plain, "planned %.17g, plain %.17g", r.seconds_planned, r.seconds_plain);
  DEMAND(r.shadows >= 0 && r.shadows <= experts && (o.shadowing != 1 || !r.shadows), "%d shadows", r.shadows);
  DEMAND(o.shadowing != 2 || r.shadows == asked, "%d shadows of %d", r.shadows, asked);
  DEMAND(r.group_size >= 1 && r.group_size <= workers && r.steps >= 1, "groups of %d, %d steps", r.group_size, r.steps);
  /* Half as long a step has half the time to be planned, so only the plan that always is the same must take exactly half. */
  DEMAND(r.seconds_plain == 2 * fast.seconds_plain, "twice as fast: plain %.17g and %.17g", r.seconds_plain, fast.seconds_plain);
  if (o.schedule == 1 && (o.shadowing == 1 || o.shadowing == 2))
    DEMAND(r.seconds_planned == 2 * fast.seconds_planned, "twice as fast: planned %.17g and %.17g", r.seconds_planned,
           fast.seconds_planned);
}

/* ---- played ---------------------------------------------------------------------------------- */

enum { RANKS = 4, N = 7, D = 5, H = 3, K = 2, E = 2 * RANKS };

typedef struct play {
  input in[RANKS]; /* of each rank's tokens */
  fmoe_plan_options how;
  int gated;
} play;

static void play_rank(crew *c, int32_t rank, void *context) {
  const play *p = context;
  input in = p->in[rank];
  const int experts = 2 * c->ranks;
  const fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = H, .experts = experts,
                                      .top_k = K, .seed = 9};
  const int64_t n = below(&in, N + 1);
  int32_t choices[N * K];
  float weights[N * K], x[N * D], grad_y[N * D], y[2][N * D] = {{0}}, grad_x[2][N * D] = {{0}};
  for (int i = 0; i < N * K; i++) choices[i] = (int32_t)below(&in, (uint32_t)experts + 1) - 1, weights[i] = take(&in) / 256.0f;
  for (int i = 0; i < N * D; i++) x[i] = (float)(int8_t)take(&in) / 64, grad_y[i] = (float)(i % 13) / 8 - 1;
  fmoe_layer *layer = NULL;
  DEMAND(FAIR(fmoe_layer_create(c->groups[rank], &options, &layer)) == FMOE_OK, "%s", fmoe_last_error());
  for (int turn = 0; turn < 2; turn++) {
    const fmoe_plan_options coarse = {.struct_size = sizeof coarse, .shadowing = 1, .schedule = 1};
    fmoe_pass *pass = NULL;
    fmoe_status status = p->gated ? FAIR(fmoe_gate(layer, x, n, &pass)) : FAIR(fmoe_route(layer, x, n, choices, weights, &pass));
    DEMAND(status == FMOE_OK, "%s", fmoe_last_error());
    DEMAND(FAIR(fmoe_plan(pass, turn ? &p->how : &coarse, NULL)) == FMOE_OK, "%s", fmoe_last_error());
    DEMAND(FAIR(fmoe_forward(pass, y[turn])) == FMOE_OK, "%s", fmoe_last_error());
    DEMAND(FAIR(fmoe_backward(pass, grad_y, grad_x[turn], NULL)) == FMOE_OK, "%s", fmoe_last_error());
    fmoe_pass_destroy(pass);
  }
  DEMAND(!memcmp(y[0], y[1], sizeof y[0]), "rank %d of %d: another output", rank, c->ranks);
  /* To rounding: rows that move come back with their weights multiplied in. */
  float most = 1;
  for (int i = 0; i < N * D; i++) most = fmaxf(most, fabsf(grad_x[0][i]));
  for (int i = 0; i < N * D; i++)
    DEMAND(fabsf(grad_x[0][i] - grad_x[1][i]) <= 1e-5f * most, "rank %d of %d: gradient %d is %g, then %g", rank, c->ranks, i,
           grad_x[0][i], grad_x[1][i]);
  fmoe_layer_destroy(layer);
}

static void play_plan(input in) {
  const int ranks = 1 + (int)below(&in, RANKS);
  uint8_t shadows[E];
  play p = {.gated = (int)below(&in, 2)};
  for (int e = 0; e < E; e++) shadows[e] = below(&in, 3) == 0;
  p.how = (fmoe_plan_options){.struct_size = sizeof p.how, .shadowing = below(&in, 3) ? 2 : below(&in, 2) ? 4 : 0,
                              .schedule = (int32_t)below(&in, 3), .shadows = shadows};
  if (p.how.schedule == 2) p.how.group_size = (int32_t)below(&in, (uint32_t)ranks + 1);
  mailbox_options mail = {.seed = take(&in), .delay_tests = (int32_t)below(&in, 8), .reorder = (int32_t)below(&in, 2),
                          .eager = (int32_t)below(&in, 2)};
  for (int r = 0; r < ranks; r++) {
    const size_t each = in.left / (size_t)(ranks - r);
    p.in[r] = (input){in.at, each}, in.at += each, in.left -= each;
  }
  crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = 1, .mail = mail});
  crew_run(c, play_rank, &p);
  crew_destroy(c);
  DEMAND(!atomic_load(&failed), "a transport's contract");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  input in = {data, size};
  if (take(&in) % 4) predict(in);
  else play_plan(in);
  return 0;
}
