/* rules.c: gates in Double, the slow way. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "draws.h"
#include "rules.h"

/* ---- a gate and a batch over ranks ---------------------------------------------------------- */

static int is_noisy(const world *w) { return w->rule.gate == FMOE_GATE_NOISY && !w->rule.evaluates; }

void *zeros(int64_t count, size_t size) {
  void *block = calloc((size_t)count + 1, size);
  if (!block) abort();
  return block;
}

static int32_t dropping(const world *w) {
  return w->rule.drop == FMOE_DROP_RANDOM && w->rule.evaluates ? FMOE_DROP_LAST : w->rule.drop;
}

int64_t capacity(const world *w, int64_t tokens) {
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

int32_t levels_of(const world *w) { return w->ranks / 2; }
int32_t crossed(const world *w, int32_t rank, int32_t expert) {
  const int32_t owner = expert / (int32_t)(w->shape.E / w->ranks);
  if (w->rule.shadows >> expert & 1) return 0; /* everybody has a copy */
  return w->ranks == 4 ? (owner != rank) + (owner / 2 != rank / 2) : owner != rank;
}
int is_near(const world *w) {
  return w->rule.gate == FMOE_GATE_TOPOLOGY || w->rule.gate == FMOE_GATE_HIERARCHICAL;
}
int64_t budget(const world *w, int32_t level, int64_t choices) {
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

void fill_parts(world *w, double *of_noise) {
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

world *world_create(rule rule, shape shape, int32_t ranks, const int64_t *tokens, int64_t pass) {
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

void world_destroy(world *w) {
  spread_destroy(w->s);
  free(w->candidate), free(w->share), free(w->balance), free(w->z), free(w->moved);
  free(w->noise), free(w->draw), free(w->bar), free(w->clean), free(w->width), free(w);
}
