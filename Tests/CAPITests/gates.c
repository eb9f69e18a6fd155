/* gates.c: every gate of the library against its rule in Double, forward and gradients, on one worker and on several.
 *
 * The rule says which experts a token chooses; with these held, the loss of the whole model is computed in Double from
 * tokens and parameters, and its central differences are what the library's gradients must be.  `gates small` is for
 * valgrind. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crew.h"

static const uint64_t seed = 31415926;
static int small;

/* ---- the numbers that gates draw, as the library makes them: a mix of SplitMix64 over a counter ---- */

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  return z ^ (z >> 31);
}

static uint64_t draw(uint64_t of_layer, uint64_t stream, int64_t index) {
  uint64_t key = mix(mix(of_layer + UINT64_C(0x9E3779B97F4A7C15)) ^ stream * UINT64_C(0xD1B54A32D192ED03));
  return mix(key + (uint64_t)index * UINT64_C(0x9E3779B97F4A7C15));
}

static double drawn(uint64_t of_layer, uint64_t stream, int64_t index) { /* [0, 1) */
  return ldexp((double)(draw(of_layer, stream, index) >> 40), -24);
}

static double share_of(uint64_t of_layer, int64_t pass, int64_t index) {
  return drawn(of_layer, (UINT64_C(1) << 32) + (uint64_t)pass, index);
}

/* A factor of the gate's input: each draw gives two, from its lower and its upper half. */
static double jitter_of(uint64_t of_layer, int64_t pass, int64_t index, double bound) {
  const uint64_t word = draw(of_layer, (UINT64_C(1) << 48) + (uint64_t)pass, index / 2);
  const uint32_t half = (uint32_t)(index % 2 ? word >> 32 : word);
  return 1 + (2 * ldexp((double)(half >> 8), -24) - 1) * bound;
}

/* Box and Muller. */
static double normal_of(uint64_t of_layer, int64_t pass, int64_t index) {
  const int64_t pair = index / 2;
  const double radius = sqrt(-2 * log(1 - share_of(of_layer, pass, 2 * pair)));
  const double angle = 2 * acos(-1) * share_of(of_layer, pass, 2 * pair + 1);
  return index % 2 ? radius * sin(angle) : radius * cos(angle);
}

/* ---- a gate and a batch over ranks ---------------------------------------------------------- */

typedef struct rule {
  int32_t gate, drop, evaluates;
  double factor, remote, jitter, step; /* step: of the bias */
  uint32_t shadows;                    /* a bit for each expert that is expected to be shadowed */
} rule;

typedef struct world {
  rule rule;
  shape shape;
  spread *s;               /* its whole is all tokens on one worker; choices and weights here are by the rule */
  int32_t ranks;
  int64_t pass;            /* the how-manieth of the layer */
  uint64_t layer_seed;
  int32_t *candidate;      /* [n, k] what was weighed; whole->choice is what is left of it */
  double *share;           /* [E] f of the balance loss */
  double *balance, *z;     /* [W] losses */
  int64_t *moved;          /* [W] choices */
  double *noise;           /* [E, d] of the noisy gate */
  double *draw, *bar;      /* [n, E] what is drawn; whose score is an expert's bar, or -1 */
  double *clean, *width;   /* [n, E] */
  double bias[64];         /* [E] as the gate finds it */
} world;

static int is_noisy(const world *w) { return w->rule.gate == FMOE_GATE_NOISY && !w->rule.evaluates; }

static void *zeros(int64_t count, size_t size) {
  void *block = calloc((size_t)count + 1, size);
  if (!block) abort();
  return block;
}

static int32_t dropping(const world *w) {
  return w->rule.drop == FMOE_DROP_RANDOM && w->rule.evaluates ? FMOE_DROP_LAST : w->rule.drop;
}

static int64_t capacity(const world *w, int64_t tokens) {
  double own = w->rule.gate == FMOE_GATE_SWITCH ? 1.25 : 1, factor = w->rule.factor > 0 ? w->rule.factor : own;
  if (w->rule.evaluates) factor *= 2;
  return (int64_t)ceil(factor * (double)(tokens * w->shape.k) / (double)w->shape.E);
}

/* ---- scores, weights and losses, given the choices ------------------------------------------ */

static double log_sum(const double *logits, int64_t E) {
  double top = -INFINITY, sum = 0;
  for (int64_t e = 0; e < E; e++) top = fmax(top, logits[e]);
  for (int64_t e = 0; e < E; e++) sum += exp(logits[e] - top);
  return top + log(sum);
}

static void score(world *w) {
  oracle *o = w->s->whole;
  const int64_t E = o->experts, d = o->model;
  for (int64_t i = 0; i < o->tokens; i++)
    for (int64_t e = 0; e < E; e++) {
      double sum = 0, spread = 0;
      for (int64_t c = 0; c < d; c++) {
        double x = o->x[i * d + c];
        if (w->rule.jitter > 0 && !w->rule.evaluates)
          x *= jitter_of(w->layer_seed, w->pass, i * ((d + 15) / 16 * 16) + c, w->rule.jitter);
        sum += x * o->values[GATE][e * d + c];
        spread += x * w->noise[e * d + c];
      }
      w->clean[i * E + e] = sum, w->width[i * E + e] = log1p(exp(spread)) + 0.01;
      o->logits[i * E + e] = sum + (is_noisy(w) ? w->width[i * E + e] * w->draw[i * E + e] : 0);
    }
}

/* (variance / mean^2) of E sums. */
static double variation(const double *x, int64_t E) {
  double mean = 0, variance = 0;
  for (int64_t e = 0; e < E; e++) mean += x[e] / (double)E;
  for (int64_t e = 0; e < E; e++) variance += (x[e] - mean) * (x[e] - mean) / (double)(E - 1);
  return variance / (mean * mean + 1e-10);
}

static double noisy_loss(const world *w) {
  const oracle *o = w->s->whole;
  const int64_t E = o->experts, k = o->choices;
  double importance[64] = {0}, load[64] = {0};
  for (int64_t i = 0; i < o->tokens; i++) {
    for (int64_t j = 0; j < k; j++) importance[o->choice[i * k + j]] += o->weight[i * k + j];
    for (int64_t e = 0; e < E; e++) {
      const int64_t at = i * E + e, bar = (int64_t)w->bar[at];
      load[e] += bar < 0 ? 1 : 0.5 * erfc(-(w->clean[at] - o->logits[i * E + bar]) / w->width[at] / sqrt(2));
    }
  }
  return w->shape.balance * (variation(importance, E) + variation(load, E));
}

static void weigh(world *w) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts;
  for (int64_t i = 0; i < o->tokens; i++) {
    const double *logits = o->logits + i * E;
    double all = log_sum(logits, E), chosen = 0;
    for (int64_t j = 0; j < k; j++)
      if (w->candidate[i * k + j] >= 0) chosen += exp(logits[w->candidate[i * k + j]] - all);
    for (int64_t j = 0; j < k; j++) {
      const int32_t e = w->candidate[i * k + j];
      double *weight = &o->weight[i * k + j];
      if (e < 0) *weight = 0;
      else if (w->rule.gate == FMOE_GATE_BASE) *weight = 1 / (1 + exp(-logits[e]));
      else *weight = exp(logits[e] - all) / (k == 1 || w->rule.gate == FMOE_GATE_SWITCH ? 1 : chosen);
    }
  }
}

/* The mean over ranks of their losses. */
static double loss_of(world *w) {
  oracle *o = w->s->whole;
  const int64_t E = o->experts, d = o->model;
  double total = 0;
  score(w), weigh(w);
  for (int64_t slot = 0; slot < o->tokens * o->choices; slot++)
    if (o->choice[slot] < 0) o->weight[slot] = 0;
  oracle_run(o);
  const double noisy = is_noisy(w) && o->tokens ? noisy_loss(w) : 0;
  for (int64_t r = 0, first = 0; r < w->ranks; first += w->s->part[r++]->tokens) {
    const int64_t n = w->s->part[r]->tokens;
    w->balance[r] = noisy, w->z[r] = 0;
    for (int64_t i = first; i < first + n; i++) {
      const double lse = log_sum(o->logits + i * E, E);
      for (int64_t e = 0; e < E && w->rule.gate != FMOE_GATE_NOISY; e++)
        w->balance[r] += w->shape.balance * (double)E * w->share[e] * exp(o->logits[i * E + e] - lse) / (double)n;
      w->z[r] += w->shape.z * lse * lse / (double)n;
      for (int64_t c = 0; c < d; c++) total += o->y[i * d + c] * o->grad_y[i * d + c];
    }
    total += w->balance[r] + w->z[r];
  }
  return total / w->ranks;
}

/* ---- who is chosen ---------------------------------------------------------------------------- */

/* By what token i chooses expert e. */
static double preference(const world *w, int64_t i, int64_t e) {
  const double score = w->s->whole->logits[i * w->shape.E + e];
  return w->rule.step > 0 ? 1 / (1 + exp(-score)) + w->bias[e] : score;
}

static void choose_highest(world *w) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts;
  for (int64_t i = 0; i < o->tokens; i++)
    for (int64_t j = 0; j < k; j++) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; e++) {
        int taken = 0;
        for (int64_t q = 0; q < j; q++) taken |= w->candidate[i * k + q] == e;
        if (!taken && (best < 0 || preference(w, i, e) > preference(w, i, best))) best = e;
      }
      w->candidate[i * k + j] = (int32_t)best;
    }
}

/* Two packages of two NUMA nodes with a core each: so two workers have a package each, four a node each. */
static const char *const machine = "pack:2 numa:2 core:1 pu:1";
static int32_t levels_of(const world *w) { return w->ranks / 2; }
static int32_t crossed(const world *w, int32_t rank, int32_t expert) {
  const int32_t owner = expert / (int32_t)(w->shape.E / w->ranks);
  if (w->rule.shadows >> expert & 1) return 0; /* everybody has a copy */
  return w->ranks == 4 ? (owner != rank) + (owner / 2 != rank / 2) : owner != rank;
}
static int is_near(const world *w) {
  return w->rule.gate == FMOE_GATE_TOPOLOGY || w->rule.gate == FMOE_GATE_HIERARCHICAL;
}
static int64_t budget(const world *w, int32_t level, int64_t choices) {
  const double s = w->rule.remote > 0 ? w->rule.remote : 0.14;
  return (int64_t)floor((level ? s + s * (1 - s) : s) * (double)choices);
}

/* The rule of the topology gates for one rank and level: the highest scores may cross it. */
static void stay_near(world *w, int32_t rank, int32_t level, int64_t first, int64_t n) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts;
  const int32_t limit = levels_of(w) - level;
  char *leaves = zeros(n * k, 1);
  for (int64_t a = 0; a < n * k; a++) {
    const int32_t e = w->candidate[first * k + a];
    int64_t higher = 0;
    if (e < 0 || crossed(w, rank, e) < limit) continue;
    for (int64_t b = 0; b < n * k; b++) {
      const int32_t other = w->candidate[first * k + b];
      if (other < 0 || crossed(w, rank, other) < limit) continue;
      const double more = preference(w, first + b / k, other) - preference(w, first + a / k, e);
      higher += more > 0 || (more == 0 && b < a);
    }
    leaves[a] = higher >= budget(w, level, n * k);
  }
  for (int64_t a = 0; a < n * k; a++)
    if (leaves[a]) w->candidate[first * k + a] = -1;
  for (int64_t a = 0; a < n * k; a++) {
    int32_t *own = w->candidate + (first + a / k) * k, best = -1;
    for (int32_t e = 0; e < E && leaves[a]; e++) {
      int taken = crossed(w, rank, e) >= limit;
      for (int64_t j = 0; j < k; j++) taken |= own[j] == e;
      if (!taken && (best < 0 || preference(w, first + a / k, e) > preference(w, first + a / k, best))) best = e;
    }
    if (leaves[a]) own[a % k] = best, w->moved[rank]++;
  }
  free(leaves);
}

/* SWIPE, one choice after the other: all workers' experts take as many. */
static void share_out(world *w) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts, n = o->tokens, W = w->ranks, each = E / W;
  int64_t room[MOST_RANKS];
  char *over = zeros(n, 1);
  for (int64_t r = 0; r < W; r++) room[r] = n * k / W + (r < n * k % W);
  for (int64_t j = 0; j < k; j++) {
    for (int64_t i = 0; i < n; i++) {
      int64_t *of_owner = &room[w->candidate[i * k + j] / each];
      over[i] = *of_owner == 0;
      *of_owner -= !over[i];
    }
    for (int64_t i = 0, r = 0, first = 0; i < n; i++) {
      int32_t to = 0, best = -1, again = -1;
      while (i - first >= w->s->part[r]->tokens) first += w->s->part[r++]->tokens;
      if (!over[i]) continue;
      while (room[to] == 0) to++;
      for (int32_t e = (int32_t)(to * each); e < (to + 1) * each; e++) {
        int taken = 0;
        for (int64_t q = 0; q < k; q++) taken |= w->candidate[i * k + q] == e;
        if (!taken && (best < 0 || preference(w, i, e) > preference(w, i, best))) best = e;
        if (again < 0 || preference(w, i, e) > preference(w, i, again)) again = e;
      }
      w->candidate[i * k + j] = best < 0 ? again : best;
      room[to]--, w->moved[r]++;
    }
  }
  free(over);
}

/* What an expert's score must exceed: the highest that was not chosen, or the lowest that was. */
static void find_bars(world *w) {
  const oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts;
  for (int64_t i = 0; i < o->tokens; i++) {
    const int32_t *chosen = w->candidate + i * k;
    int64_t next = -1;
    for (int pass = 0; pass < 2; pass++)
      for (int64_t e = 0; e < E; e++) {
        int taken = 0;
        for (int64_t j = 0; j < k; j++) taken |= chosen[j] == e;
        if (pass) w->bar[i * E + e] = (double)(taken ? next : chosen[k - 1]);
        else if (!taken && (next < 0 || o->logits[i * E + e] > o->logits[i * E + next])) next = e;
      }
  }
}

/* Of the tokens first ... first + n, drops what comes for an expert behind `room` others by the rule. */
static void limit(world *w, int64_t first, int64_t n, int64_t room) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices;
  for (int64_t i = first; i < first + n; i++)
    for (int64_t j = 0; j < k; j++) {
      const int32_t e = w->candidate[i * k + j];
      int64_t before = 0;
      for (int64_t a = first; a < first + n; a++)
        for (int64_t b = 0; b < k; b++) {
          if (w->candidate[a * k + b] != e) continue;
          const int64_t other = a * k + b, slot = i * k + j, draws = INT64_C(1) << 40;
          const double more = o->weight[other] - o->weight[slot];
          const double luck = share_of(w->layer_seed, w->pass, draws + other) - share_of(w->layer_seed, w->pass, draws + slot);
          const double importance = o->weight[a * k] - o->weight[i * k];
          const int earlier = b < j || (b == j && a < i);
          switch (dropping(w)) {
            case FMOE_DROP_LIGHTEST: before += more > 0 || (more == 0 && earlier); break;
            case FMOE_DROP_RANDOM: before += luck > 0 || (luck == 0 && earlier); break;
            case FMOE_DROP_UNIMPORTANT:
              before += b < j || (b == j && (importance > 0 || (importance == 0 && a < i)));
              break;
            default: before += earlier;
          }
        }
      if (before >= room) o->choice[i * k + j] = -1;
    }
}

static void choose(world *w) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, E = o->experts, slots = o->tokens * k;
  const int is_switch = w->rule.gate == FMOE_GATE_SWITCH, is_gshard = w->rule.gate == FMOE_GATE_GSHARD;
  const int64_t padded = (E + 15) / 16 * 16;
  for (int64_t i = 0; i < o->tokens; i++)
    for (int64_t e = 0; e < E; e++) w->draw[i * E + e] = normal_of(w->layer_seed, w->pass, i * padded + e);
  score(w), choose_highest(w);
  for (int64_t r = 0, first = 0; r < w->ranks; first += w->s->part[r++]->tokens)
    for (int32_t level = 0; is_near(w) && level < levels_of(w); level++)
      if (level == 0 || w->rule.gate == FMOE_GATE_HIERARCHICAL)
        stay_near(w, (int32_t)r, level, first, w->s->part[r]->tokens);
  for (int64_t e = 0; e < E; e++) w->share[e] = 0;
  for (int64_t slot = 0; slot < slots; slot++)
    if (w->candidate[slot] < 0) continue;
    else if (!is_gshard) w->share[w->candidate[slot]] += 1 / (double)slots;
    else if (slot % k == 0) w->share[w->candidate[slot]] += (double)k / (double)slots;
  if (w->rule.gate == FMOE_GATE_SWIPE && !w->rule.evaluates) share_out(w);
  weigh(w);
  if (is_noisy(w)) find_bars(w);
  memcpy(o->choice, w->candidate, (size_t)slots * sizeof *o->choice);
  if (is_switch && dropping(w) == FMOE_DROP_LAST) limit(w, 0, o->tokens, capacity(w, o->tokens));
  for (int64_t r = 0, first = 0; r < w->ranks; first += w->s->part[r++]->tokens) {
    const int64_t n = w->s->part[r]->tokens;
    if (is_switch && dropping(w) != FMOE_DROP_LAST) limit(w, first, n, capacity(w, o->tokens) * n / o->tokens);
    if (!is_gshard) continue;
    limit(w, first, n, capacity(w, n));
    for (int64_t slot = first * k; slot < (first + n) * k && !w->rule.evaluates; slot++)
      if (slot % k && !((double)k * o->weight[slot] > share_of(w->layer_seed, w->pass, slot))) o->choice[slot] = -1;
  }
}

/* ---- every number that the library must give ------------------------------------------------ */

/* d loss / d *value */
static double slope(world *w, double *value) {
  const double step = 1e-5, kept = *value;
  double before, after;
  *value = kept - step, before = loss_of(w);
  *value = kept + step, after = loss_of(w);
  *value = kept;
  return (after - before) / (2 * step);
}

static void fill_parts(world *w, double *of_noise) {
  oracle *o = w->s->whole;
  const int64_t k = o->choices, d = o->model, W = w->ranks;
  double *of_gate = zeros(o->sizes[GATE], sizeof(double)), *of_tokens = zeros(o->tokens * d, sizeof(double));
  for (int64_t i = 0; i < o->sizes[GATE]; i++) of_gate[i] = slope(w, &o->values[GATE][i]);
  for (int64_t i = 0; i < o->sizes[GATE]; i++) of_noise[i] = is_noisy(w) ? slope(w, &w->noise[i]) : 0;
  for (int64_t i = 0; i < o->tokens * d; i++) of_tokens[i] = slope(w, &o->x[i]) * (double)W;
  loss_of(w);
  for (int64_t r = 0, first = 0; r < W; first += w->s->part[r++]->tokens) {
    oracle *part = w->s->part[r];
    const int64_t n = part->tokens;
    memcpy(part->choice, o->choice + first * k, (size_t)(n * k) * sizeof *o->choice);
    memcpy(part->weight, o->weight + first * k, (size_t)(n * k) * sizeof(double));
    memcpy(part->y, o->y + first * d, (size_t)(n * d) * sizeof(double));
    memcpy(part->grad_x, of_tokens + first * d, (size_t)(n * d) * sizeof(double));
    for (int t = 0; t < TENSORS; t++)
      for (int64_t i = 0; i < o->sizes[t]; i++)
        part->gradients[t][i] = t == GATE ? of_gate[i] : o->gradients[t][i] / (double)W;
    memset(part->counts, 0, (size_t)o->experts * sizeof *part->counts);
    memset(part->everyone, 0, (size_t)o->experts * sizeof *part->everyone);
    for (int64_t slot = 0; slot < n * k; slot++)
      if (part->choice[slot] >= 0) part->counts[part->choice[slot]]++;
    for (int64_t slot = 0; slot < o->tokens * k; slot++)
      if (o->choice[slot] >= 0) part->everyone[o->choice[slot]]++;
    part->balance_loss = w->balance[r], part->z_loss = w->z[r];
  }
  free(of_gate), free(of_tokens);
}

static world *world_create(rule rule, shape shape, int32_t ranks, const int64_t *tokens, int64_t pass) {
  world *w = zeros(1, sizeof *w);
  w->rule = rule, w->shape = shape, w->ranks = ranks, w->pass = pass, w->layer_seed = 7;
  w->s = spread_create(ranks, tokens, GATED, shape, seed + (uint64_t)rule.gate);
  oracle *o = w->s->whole;
  o->routed = 1; /* so that oracle_run takes choices and weights as they are */
  for (int64_t r = 0, at = 0; r < ranks; at += w->s->part[r++]->tokens * o->model)
    memcpy(o->grad_y + at, w->s->part[r]->grad_y, (size_t)(w->s->part[r]->tokens * o->model) * sizeof(double));
  w->candidate = zeros(o->tokens * o->choices, sizeof(int32_t));
  w->share = zeros(o->experts, sizeof(double));
  w->balance = zeros(ranks, sizeof(double)), w->z = zeros(ranks, sizeof(double));
  w->moved = zeros(ranks, sizeof(int64_t));
  double **of_scores[] = {&w->draw, &w->bar, &w->clean, &w->width};
  uint64_t state = seed;
  for (int i = 0; i < 4; i++) *of_scores[i] = zeros(o->tokens * o->experts, sizeof(double));
  w->noise = zeros(o->sizes[GATE], sizeof(double));
  fill_float(w->noise, o->sizes[GATE], 1, &state);
  fill_float(w->bias, o->experts, 0.1, &state);
  choose(w);
  return w;
}

static void world_destroy(world *w) {
  spread_destroy(w->s);
  free(w->candidate), free(w->share), free(w->balance), free(w->z), free(w->moved);
  free(w->noise), free(w->draw), free(w->bar), free(w->clean), free(w->width), free(w);
}

/* ---- the library ------------------------------------------------------------------------------ */

typedef struct trial {
  world *w;
  double *of_noise;        /* [E, d] its gradient */
  batch got[MOST_RANKS], again[MOST_RANKS];
} trial;

static fmoe_layer *gated_layer(fmoe_group *group, const world *w, const oracle *o) {
  fmoe_layer_options options = options_of(o);
  fmoe_layer *layer = NULL;
  options.gate = w->rule.gate, options.drop = w->rule.drop, options.capacity_factor = w->rule.factor;
  options.remote_share = w->rule.remote, options.seed = w->layer_seed;
  options.input_jitter = w->rule.jitter, options.bias_step = w->rule.step;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer))) exit(summary());
  set_values(layer, o);
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &tensors));
  CHECK((tensors.noise != NULL) == (w->rule.gate == FMOE_GATE_NOISY), "noise is there where the gate has some");
  for (int64_t i = 0; tensors.noise && i < o->sizes[GATE]; i++) tensors.noise[i] = (float)w->noise[i];
  CHECK((tensors.gate_bias != NULL) == (w->rule.step > 0), "a bias is there where the gate has one");
  for (int64_t e = 0; tensors.gate_bias && e < o->experts; e++) tensors.gate_bias[e] = (float)w->bias[e];
  if (w->rule.evaluates) EXPECT(FMOE_OK, fmoe_layer_set_training(layer, 0));
  if (w->rule.shadows) {
    uint8_t shadows[64] = {0};
    for (int64_t e = 0; e < o->experts; e++) shadows[e] = w->rule.shadows >> e & 1;
    EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, shadows));
  }
  return layer;
}

static void describe(char *what, size_t room, const world *w, const char *way) {
  snprintf(what, room, "gate %d, %s, W %d, n %d, E %d, k %d, factor %g, drop %d, jitter %g, bias %g, shadows %x, %s, pass %d",
           w->rule.gate, way, w->ranks, (int)w->s->whole->tokens, (int)w->shape.E, (int)w->shape.k, w->rule.factor,
           w->rule.drop, w->rule.jitter, w->rule.step, (unsigned)w->rule.shadows,
           w->rule.evaluates ? "evaluating" : "training", (int)w->pass);
}

/* The load moves the bias after backward, in training alone; on all ranks alike. */
static void check_bias(const char *what, const world *w, fmoe_layer *layer) {
  fmoe_tensors values = {.struct_size = sizeof values}, gradients = {.struct_size = sizeof gradients};
  EXPECT(FMOE_OK, fmoe_layer_values(layer, &values));
  EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &gradients));
  CHECK(!gradients.gate_bias, "%s: a bias has no gradient", what);
  double mean = 0;
  for (int64_t e = 0; e < w->shape.E; e++) mean += w->share[e] / (double)w->shape.E;
  for (int64_t e = 0; values.gate_bias && e < w->shape.E; e++) {
    const double off = mean - w->share[e]; /* shares are of 23 tokens: equal to the mean, or off by far more than rounding */
    const float step = w->rule.evaluates || fabs(off) < 1e-9 ? 0 : (float)(off > 0 ? w->rule.step : -w->rule.step);
    CHECK(values.gate_bias[e] == (float)w->bias[e] + step, "%s: bias of expert %d is %g, was %g, load off by %g", what, (int)e,
          values.gate_bias[e], w->bias[e], off);
  }
}

static void run_trial(crew *c, int32_t rank, void *context) {
  trial *t = context;
  for (int again = 0; again < 2; again++) {
    fmoe_layer *layer = gated_layer(c->groups[rank], t->w, t->w->s->part[rank]);
    for (int64_t pass = 1; pass < t->w->pass; pass++) {
      fmoe_pass *unused;
      EXPECT(FMOE_OK, fmoe_gate(layer, NULL, 0, &unused));
      fmoe_pass_destroy(unused);
    }
    *(again ? &t->again[rank] : &t->got[rank]) = run(layer, t->w->s->part[rank]);
    fmoe_tensors tensors = {.struct_size = sizeof tensors};
    EXPECT(FMOE_OK, fmoe_layer_gradients(layer, &tensors));
    char what[300];
    describe(what, sizeof what, t->w, "");
    check_bias(what, t->w, layer);
    if (tensors.noise) {
      check_close(what, "noise", tensors.noise, t->of_noise, t->w->s->whole->sizes[GATE]);
    }
    fmoe_layer_destroy(layer);
  }
}

/* BASE's sharing out has its own tests; here the library's choices are taken as they are, if they share out. */
static void ask_base(crew *c, int32_t rank, void *context) {
  trial *t = context;
  const oracle *o = t->w->s->part[rank];
  fmoe_layer *layer = gated_layer(c->groups[rank], t->w, o);
  fmoe_routing r = {.struct_size = sizeof r};
  batch b = batch_of(o, layer);
  int64_t first = 0;
  for (int32_t before = 0; before < rank; before++) first += t->w->s->part[before]->tokens;
  begin(&b, layer);
  EXPECT(FMOE_OK, fmoe_pass_routing(b.pass, &r));
  for (int64_t i = 0; i < o->tokens; i++) t->w->candidate[first + i] = t->w->s->whole->choice[first + i] = r.choices[i];
  for (int64_t e = 0; e < o->experts; e++)
    CHECK(r.counts[e] <= (o->tokens + o->experts - 1) / o->experts, "expert %d gets %d of %d tokens", (int)e,
          (int)r.counts[e], (int)o->tokens);
  batch_free(&b), fmoe_layer_destroy(layer);
}

static void check_room(const char *what, const world *w) {
  const oracle *o = w->s->whole;
  for (int32_t r = 0; r < w->ranks && is_near(w); r++) {
    const oracle *part = w->s->part[r];
    const int64_t all = part->tokens * part->choices;
    int64_t over[3] = {0}; /* choices that cross so many levels and more */
    for (int64_t slot = 0; slot < all; slot++)
      for (int32_t c = 0; part->choice[slot] >= 0 && c <= crossed(w, r, part->choice[slot]); c++) over[c]++;
    for (int32_t level = 0; level < levels_of(w); level++)
      if (level == 0 || w->rule.gate == FMOE_GATE_HIERARCHICAL)
        CHECK(over[levels_of(w) - level] <= budget(w, level, all), "%s: rank %d: %d cross level %d", what, r,
              (int)over[levels_of(w) - level], level);
  }
  for (int32_t owner = 0; owner < w->ranks && w->rule.gate == FMOE_GATE_SWIPE && !w->rule.evaluates; owner++) {
    const int64_t each = o->experts / w->ranks, all = o->tokens * o->choices;
    int64_t rows = 0;
    for (int64_t e = owner * each; e < (owner + 1) * each; e++) rows += w->s->part[0]->everyone[e];
    CHECK(rows == all / w->ranks + (owner < all % w->ranks), "%s: rank %d takes %d", what, owner, (int)rows);
  }
  for (int64_t e = 0; e < o->experts; e++) {
    int64_t all = 0;
    for (int32_t r = 0; r < w->ranks; r++) {
      const oracle *part = w->s->part[r];
      all += part->counts[e];
      if (w->rule.gate == FMOE_GATE_GSHARD)
        CHECK(part->counts[e] <= capacity(w, part->tokens), "%s: rank %d, expert %d", what, r, (int)e);
    }
    if (w->rule.gate == FMOE_GATE_SWITCH)
      CHECK(all <= capacity(w, o->tokens), "%s: expert %d takes %d", what, (int)e, (int)all);
  }
}

static int64_t drops, moves; /* that the rules made, so that the tests say whether they have met any */

static void check_world(const char *way, crew *c, world *w) {
  char what[300];
  trial t = {.w = w, .of_noise = zeros(w->s->whole->sizes[GATE], sizeof(double))};
  describe(what, sizeof what, w, way);
  if (w->rule.gate == FMOE_GATE_BASE && !w->rule.evaluates) crew_run(c, ask_base, &t);
  fill_parts(w, t.of_noise);
  crew_run(c, run_trial, &t);
  check_room(what, w);
  for (int32_t r = 0; r < w->ranks; r++) {
    const oracle *o = w->s->part[r];
    fmoe_routing routing = {.struct_size = sizeof routing};
    check_routing(what, &t.got[r], o), check_batch(what, &t.got[r], o), check_gradients(what, &t.got[r], o);
    check_bits(what, &t.got[r], &t.again[r]);
    EXPECT(FMOE_OK, fmoe_pass_routing(t.got[r].pass, &routing));
    int64_t dropped = 0;
    for (int64_t slot = 0; slot < o->tokens * o->choices; slot++) dropped += o->choice[slot] < 0;
    CHECK(routing.dropped == dropped, "%s: %d dropped, not %d", what, (int)routing.dropped, (int)dropped);
    if (is_near(w) || w->rule.gate == FMOE_GATE_SWIPE)
      CHECK(routing.moved == w->moved[r], "%s: %d moved", what, (int)routing.moved);
    drops += dropped, moves += routing.moved;
    batch_free(&t.got[r]), batch_free(&t.again[r]);
  }
  free(t.of_noise);
}

/* The same tokens on 1, 2 and 4 workers, over each kind of group. */
static void test_rule(rule rule, shape shape) {
  static const int64_t tokens[3][4] = {{23, 0, 0, 0}, {9, 14, 0, 0}, {9, 5, 0, 9}};
  for (int split = 0; split < (small ? 2 : 3); split++)
    for (int way = 0; way < 2; way++) {
      const int32_t ranks = 1 << split;
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      world *w = world_create(rule, shape, ranks, tokens[split], 1 + split);
      check_world(way ? "mailbox" : "local", c, w);
      world_destroy(w), crew_destroy(c);
    }
}

static void test_capacities(void) {
  drops = 0;
  for (int32_t gate = FMOE_GATE_SWITCH; gate <= FMOE_GATE_GSHARD; gate++)
    for (int64_t k = 1; k <= 3; k++)
      for (int kind = 0; kind < 8; kind++) {
        /* Kinds 4 to 7: by chance, in training and not, what is least important, and the lightest where room is short. */
        rule rule = {.gate = gate, .drop = kind == 1 ? FMOE_DROP_LIGHTEST : kind < 4 ? FMOE_DROP_LAST : kind < 6
                     ? FMOE_DROP_RANDOM : kind == 6 ? FMOE_DROP_UNIMPORTANT : FMOE_DROP_LIGHTEST,
                     .evaluates = kind == 2 || kind == 5, .factor = kind > 2 ? 0.4 : 0};
        shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = kind % 2 ? FMOE_SWIGLU : FMOE_GELU,
                       .balance = kind ? 0.7 : 0, .z = kind > 1 ? 0.4 : 0};
        if (!small || (k == 2 && (kind == 3 || kind == 6))) test_rule(rule, shape);
      }
  CHECK(small || drops > 100, "only %d choices were dropped", (int)drops);
}

static void test_noise(void) {
  for (int64_t k = 1; k <= 8; k = k < 3 ? k + 1 : k + 5)
    for (int kind = 0; kind < 4; kind++) {
      rule rule = {.gate = FMOE_GATE_NOISY, .evaluates = kind == 3};
      shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = kind % 2 ? 0.7 : 0,
                     .z = kind > 1 ? 0.4 : 0};
      if (!small || (k == 2 && kind == 1)) test_rule(rule, shape);
    }
}

static void test_base(void) {
  for (int kind = 0; kind < 2; kind++) {
    rule rule = {.gate = FMOE_GATE_BASE, .evaluates = kind};
    test_rule(rule, (shape){.k = 1, .E = 8, .d = 6, .h = 5, .activation = FMOE_SWIGLU, .z = 0.4 * kind});
  }
}

static void test_near(void) {
  drops = moves = 0;
  for (int32_t gate = FMOE_GATE_TOPOLOGY; gate <= FMOE_GATE_HIERARCHICAL; gate++)
    for (int64_t k = 1; k <= 3; k++)
      for (int kind = 0; kind < 3; kind++) {
        rule rule = {.gate = gate, .remote = kind == 1 ? 0.3 : kind == 2 ? 1 : 0};
        shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = kind ? 0.7 : 0,
                       .z = kind > 1 ? 0.4 : 0};
        if (!small || (k == 3 && kind == 0)) test_rule(rule, shape);
      }
  CHECK(small || (moves > 100 && drops > 10), "%d choices moved, %d dropped", (int)moves, (int)drops);
}

static void test_swipe(void) {
  moves = 0;
  for (int64_t k = 1; k <= 3; k++) /* 3 are more than a worker of four has experts */
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = FMOE_GATE_SWIPE, .evaluates = kind == 1};
      shape shape = {.k = k, .E = 8, .d = 6, .h = 5, .activation = FMOE_SWIGLU, .balance = kind ? 0.7 : 0,
                     .z = kind > 1 ? 0.4 : 0};
      if (!small || (k == 3 && kind == 2)) test_rule(rule, shape);
    }
  CHECK(small || moves > 40, "only %d choices moved", (int)moves);
}

/* What the gate reads is jittered, and so are its gradients; widths that 16 does not divide, and several blocks. */
static void test_jitter(void) {
  static const int32_t gates[] = {FMOE_GATE_SWITCH, FMOE_GATE_TOPK, FMOE_GATE_NOISY, FMOE_GATE_GSHARD};
  for (int gate = 0; gate < 4; gate++)
    for (int kind = 0; kind < 2; kind++) {
      rule rule = {.gate = gates[gate], .jitter = 0.3, .evaluates = kind && gate == 0};
      shape shape = {.k = gate ? 2 : 1, .E = 8, .d = gate ? 6 : 37 + 20 * kind, .h = 5, .activation = FMOE_GELU,
                     .balance = 0.7, .z = 0.4};
      if (!small || (gate == 0 && kind == 0)) test_rule(rule, shape);
    }
}

static void test_bias(void) {
  static const int32_t gates[] = {FMOE_GATE_TOPK, FMOE_GATE_SWITCH, FMOE_GATE_GSHARD, FMOE_GATE_TOPOLOGY,
                                  FMOE_GATE_HIERARCHICAL};
  for (int gate = 0; gate < 5; gate++)
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = gates[gate], .step = 0.01, .evaluates = kind == 1, .remote = gate > 2 ? 0.3 : 0};
      shape shape = {.k = gate == 1 ? 1 : 2, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU,
                     .balance = kind ? 0.7 : 0, .z = kind > 1 ? 0.4 : 0};
      if (!small || (gate == 3 && kind == 2)) test_rule(rule, shape);
    }
}

/* Experts that will be shadowed are inside: the rule, and results, of passes that play these very shadows. */
static void test_expected(void) {
  for (int32_t gate = FMOE_GATE_TOPOLOGY; gate <= FMOE_GATE_HIERARCHICAL; gate++)
    for (int kind = 0; kind < 3; kind++) {
      rule rule = {.gate = gate, .remote = 0.1, .shadows = kind == 0 ? 0x04 : kind == 1 ? 0x91 : 0xff,
                   .step = kind == 1 ? 0.01 : 0};
      shape shape = {.k = 2, .E = 8, .d = 6, .h = 5, .activation = FMOE_GELU, .balance = 0.7};
      if (!small || (gate == FMOE_GATE_TOPOLOGY && kind == 1)) test_rule(rule, shape);
    }
}

/* Shadows that leave out what the gate counted as local are refused, on all ranks and without harm; what is left open
 * is these very ones, which the pass' own record shows. */
static void run_kept(crew *c, int32_t rank, void *unused) {
  enum { N = 12, D = 4, E = 8 };
  static const uint8_t expected[E] = {0, 0, 1, 0, 0, 1, 0, 0}, less[E] = {0, 0, 1, 0, 0, 0, 0, 1}, more[E] = {1, 0, 1, 0, 0, 1, 0, 0};
  static const uint8_t wrong[E] = {0, 0, 2, 0, 0, 0, 0, 0};
  static float x[MOST_RANKS][N * D], y[MOST_RANKS][N * D];
  fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = 3, .experts = E,
                                .gate = FMOE_GATE_TOPOLOGY};
  fmoe_plan_options never = {.struct_size = sizeof never, .shadowing = 1}, given = {.struct_size = sizeof given, .shadowing = 2};
  fmoe_layer *layer = NULL, *plain = NULL;
  fmoe_pass *pass = NULL;
  (void)unused;
  for (int i = 0; i < N * D; i++) x[rank][i] = (float)((i * 31 + rank * 7) % 17) / 8 - 1;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &layer))) exit(summary());
  options.gate = FMOE_GATE_TOPK;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &plain))) exit(summary());
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(plain, expected));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(NULL, expected));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_expect_shadows(layer, wrong));
  if (c->ranks > 1) { /* sets must be equal */
    EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, rank ? expected : more));
    EXPECT(FMOE_ERROR_DISAGREE, fmoe_gate(layer, x[rank], N, &pass));
  }
  EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, expected));
  for (int turn = 0; turn < 4; turn++) { /* NULL, no plan at all, what is expected, and more */
    EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], N, &pass));
    if (c->ranks > 1) {
      EXPECT(FMOE_ERROR_ARGUMENT, fmoe_plan(pass, &never, NULL));
      given.shadows = less;
      EXPECT(FMOE_ERROR_ARGUMENT, fmoe_plan(pass, &given, NULL));
    }
    given.shadows = turn == 2 ? expected : more;
    if (turn != 1) EXPECT(FMOE_OK, fmoe_plan(pass, turn ? &given : NULL, NULL));
    EXPECT(FMOE_OK, fmoe_forward(pass, y[rank]));
    char path[64], text[1 << 16];
    snprintf(path, sizeof path, "kept-%d-%d.json", (int)getpid(), rank);
    EXPECT(FMOE_OK, fmoe_pass_write_timeline(pass, path));
    FILE *file = fopen(path, "r");
    const size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
    text[size] = 0;
    if (file) fclose(file);
    remove(path);
    for (int e = 0; e < E && c->mail; e++) { /* ranks of one process read shadows in place */
      char name[32];
      snprintf(name, sizeof name, "fetch expert %d ", e);
      const int wanted = c->ranks > 1 && (turn == 3 ? more : expected)[e];
      CHECK(!strstr(text, name) == !wanted, "turn %d, rank %d: expert %d %s", turn, rank, e, wanted ? "is missing" : "is shadowed");
    }
    EXPECT(FMOE_OK, fmoe_backward(pass, x[rank], y[rank], NULL));
    fmoe_pass_destroy(pass);
  }
  EXPECT(FMOE_OK, fmoe_layer_expect_shadows(layer, NULL));
  EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], N, &pass));
  EXPECT(FMOE_OK, fmoe_plan(pass, &never, NULL));
  fmoe_pass_destroy(pass);
  fmoe_layer_destroy(layer), fmoe_layer_destroy(plain);
}

static void test_kept(void) {
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (int way = 0; way < 2; way++) {
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      crew_run(c, run_kept, NULL);
      crew_destroy(c);
    }
}

/* Scores on which rules stumble, by the tokens: all equal, not a number, infinite, a single token. */
typedef struct oddity {
  int32_t gate, kind;
} oddity;

static void run_oddity(crew *c, int32_t rank, void *context) {
  enum { N = 37, D = 4, E = 8 };
  const oddity *odd = context;
  static float x[MOST_RANKS][N * D], y[MOST_RANKS][N * D];
  fmoe_layer_options options = {.struct_size = sizeof options, .d_model = D, .d_hidden = 3, .experts = E,
                                .gate = odd->gate, .balance_loss = odd->gate == FMOE_GATE_BASE ? 0 : 0.1, .z_loss = 0.1};
  const int64_t n = odd->kind % 4 == 3 ? rank == 0 : N;
  const int more = odd->kind / 4; /* with whatever the gate may have besides */
  if (more) options.input_jitter = 0.5;
  if (more && odd->gate != FMOE_GATE_NOISY && odd->gate != FMOE_GATE_BASE && odd->gate != FMOE_GATE_SWIPE)
    options.bias_step = 0.5;
  if (more && (odd->gate == FMOE_GATE_SWITCH || odd->gate == FMOE_GATE_GSHARD))
    options.drop = FMOE_DROP_RANDOM + (odd->kind % 2), options.capacity_factor = 0.5;
  fmoe_layer *layer = NULL;
  fmoe_routing r = {.struct_size = sizeof r};
  for (int i = 0; i < N * D; i++)
    x[rank][i] = odd->kind % 4 == 0 ? 0 : i / D % 3 ? (float)(i % 7) - 3 : odd->kind % 4 == 1 ? NAN : INFINITY;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(c->groups[rank], &options, &layer))) exit(summary());
  for (int training = 1; training >= 0; training--) {
    fmoe_pass *pass = NULL;
    EXPECT(FMOE_OK, fmoe_layer_set_training(layer, training));
    EXPECT(FMOE_OK, fmoe_gate(layer, x[rank], n, &pass));
    EXPECT(FMOE_OK, fmoe_pass_routing(pass, &r));
    int64_t live = 0, twice = 0, strange = 0, counted = 0;
    for (int64_t s = 0; s < n * r.top_k; s++) {
      strange += r.choices[s] < -1 || r.choices[s] >= E || (r.choices[s] < 0 && r.weights[s] != 0);
      for (int64_t j = s / r.top_k * r.top_k; j < s; j++) twice += r.choices[s] >= 0 && r.choices[j] == r.choices[s];
      live += r.choices[s] >= 0;
    }
    for (int e = 0; e < E; e++) {
      counted += r.counts[e];
      if (odd->gate == FMOE_GATE_BASE && training)
        CHECK(r.counts[e] <= (n + E - 1) / E, "kind %d: expert %d gets %d", odd->kind, e, (int)r.counts[e]);
    }
    /* Scores that are all equal: each loss is its coefficient times what it is where all experts are as likely. */
    if (odd->kind % 4 == 0 && odd->gate != FMOE_GATE_NOISY && training) {
      const double balance = odd->gate == FMOE_GATE_BASE ? 0 : 0.1, z = 0.1 * log(E) * log(E);
      CHECK(fabs(r.balance_loss - balance) < 1e-6 && fabs(r.z_loss - z) < 1e-6, "gate %d, kind %d, %d ranks: losses %g, %g",
            odd->gate, odd->kind, c->ranks, r.balance_loss, r.z_loss);
    }
    CHECK(!strange && !twice && counted == live && r.dropped == n * r.top_k - live, "gate %d, kind %d, %d ranks",
          odd->gate, odd->kind, c->ranks);
    EXPECT(FMOE_OK, fmoe_forward(pass, y[rank]));
    EXPECT(FMOE_OK, fmoe_backward(pass, x[rank], y[rank], NULL));
    fmoe_pass_destroy(pass);
  }
  fmoe_layer_destroy(layer);
}

static void test_oddities(void) {
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    for (int way = 0; way < 2; way++) {
      crew *c = crew_create((crew_options){.ranks = ranks, .over_mailbox = way, .topology = machine});
      for (int32_t gate = FMOE_GATE_TOPK; gate <= FMOE_GATE_SWIPE; gate++)
        for (int kind = 0; kind < 8; kind++) crew_run(c, run_oddity, &(oddity){gate, kind});
      crew_destroy(c);
    }
}

int main(int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  printf("gates: seed %llu\n", (unsigned long long)seed);
  begin_test("capacities", 300);
  test_capacities();
  begin_test("noise", 300);
  test_noise();
  begin_test("base", 300);
  test_base();
  begin_test("near", 300);
  test_near();
  begin_test("swipe", 300);
  test_swipe();
  begin_test("jitter", 300);
  test_jitter();
  begin_test("bias", 300);
  test_bias();
  begin_test("expected shadows", 300);
  test_expected();
  test_kept();
  begin_test("oddities", 300);
  test_oddities();
  alarm(0);
  return summary();
}
