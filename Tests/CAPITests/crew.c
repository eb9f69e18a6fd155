#include "crew.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- the ranks ----------------------------------------------------------------------------- */

static fmoe_group_options group_options(const crew *c) {
  return (fmoe_group_options){.struct_size = sizeof(fmoe_group_options), .bind = 1,
                              .threads = c->options.threads ? c->options.threads : 1,
                              .timeout_seconds = c->options.timeout,
                              .topology = c->options.topology,
                              .profile = c->options.profile};
}

crew *crew_without_groups(crew_options options) {
  crew *c = calloc(1, sizeof *c);
  if (!c) abort();
  c->ranks = options.ranks, c->options = options;
  if (options.over_mailbox) c->mail = mailbox_create(options.ranks, options.mail);
  return c;
}

fmoe_status crew_join(crew *c, int32_t rank) {
  fmoe_transport transport = mailbox_transport(c->mail, rank);
  fmoe_group_options options = group_options(c);
  return fmoe_group_create(&transport, &options, &c->groups[rank]);
}

static void join(crew *c, int32_t rank, void *unused) {
  (void)unused;
  EXPECT(FMOE_OK, crew_join(c, rank));
}

crew *crew_create(crew_options options) {
  crew *c = crew_without_groups(options);
  fmoe_group_options of_group = group_options(c);
  if (c->mail) crew_run(c, join, NULL);
  else EXPECT(FMOE_OK, fmoe_group_create_local(c->ranks, &of_group, c->groups));
  for (int32_t r = 0; r < c->ranks; r++)
    if (!c->groups[r]) exit(summary());
  return c;
}

typedef struct turn {
  crew *crew;
  int32_t rank;
  crew_work *work;
  void *context;
  pthread_t thread;
} turn;

static void *take_turn(void *argument) {
  turn *t = argument;
  if (t->crew->mail) mailbox_sit(t->crew->mail, t->rank);
  t->work(t->crew, t->rank, t->context);
  if (t->crew->mail) mailbox_stand(t->crew->mail, t->rank);
  return NULL;
}

void crew_run(crew *c, crew_work *work, void *context) {
  turn turns[MOST_RANKS];
  for (int32_t r = 0; r < c->ranks; r++) {
    turns[r] = (turn){.crew = c, .rank = r, .work = work, .context = context};
    if (pthread_create(&turns[r].thread, NULL, take_turn, &turns[r])) abort();
  }
  for (int32_t r = 0; r < c->ranks; r++) pthread_join(turns[r].thread, NULL);
}

void crew_destroy(crew *c) {
  for (int32_t r = 0; r < c->ranks; r++) fmoe_group_destroy(c->groups[r]);
  if (c->mail) mailbox_destroy(c->mail);
  free(c);
}

double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static char running[200];

static void on_alarm(int unused) {
  static const char end[] = ": still running, failed\n";
  (void)unused;
  if (write(1, running, strlen(running)) < 0 || write(1, end, sizeof end - 1) < 0) _exit(2);
  _exit(1);
}

void begin_test(const char *name, unsigned seconds_at_most) {
  snprintf(running, sizeof running, "%s", name);
  signal(SIGALRM, on_alarm);
  alarm(seconds_at_most);
}

/* ---- a problem spread over them ------------------------------------------------------------ */

const char *const routing_names[ROUTINGS] = {"gate", "balanced", "skewed", "one expert", "dropped"};

static void route(oracle *o, int routing, int64_t first_slot, int is_last, uint64_t *state) {
  o->routed = routing != GATED;
  if (!o->routed) return;
  fill_float(o->weight, o->tokens * o->choices, 1, state);
  for (int64_t slot = 0; slot < o->tokens * o->choices; slot++) {
    int32_t any = (int32_t)(uniform(state) * (double)o->experts), hot = (int32_t)(o->experts / 2);
    switch (routing) {
      case BALANCED: o->choice[slot] = (int32_t)((first_slot + slot) % o->experts); break;
      case SKEWED: o->choice[slot] = slot % o->choices == 0 && slot / o->choices % 2 == 0 ? hot : any; break;
      case ONE_EXPERT: o->choice[slot] = (int32_t)o->experts - 1; break;
      default: o->choice[slot] = is_last || slot % 3 == 1 ? -1 : any;
    }
  }
}

/* All parts together as one problem; its gradients are the mean's since its grad_y is divided. */
static oracle *join_parts(oracle *const *parts, int32_t ranks, int64_t tokens) {
  const oracle *first = parts[0];
  oracle *o = oracle_create(tokens, first->choices, first->experts, first->model, first->hidden, first->activation);
  o->routed = first->routed, o->balance = first->balance, o->z = first->z;
  for (int t = 0; t < TENSORS; t++) memcpy(o->values[t], first->values[t], (size_t)o->sizes[t] * sizeof(double));
  for (int64_t r = 0, at = 0; r < ranks; at += parts[r++]->tokens) {
    int64_t rows = parts[r]->tokens * o->model, slots = parts[r]->tokens * o->choices;
    memcpy(o->x + at * o->model, parts[r]->x, (size_t)rows * sizeof(double));
    memcpy(o->choice + at * o->choices, parts[r]->choice, (size_t)slots * sizeof(int32_t));
    memcpy(o->weight + at * o->choices, parts[r]->weight, (size_t)slots * sizeof(double));
    for (int64_t i = 0; i < rows; i++) o->grad_y[at * o->model + i] = (float)(parts[r]->grad_y[i] / ranks);
  }
  return o;
}

spread *spread_create(int32_t ranks, const int64_t *tokens, int routing, shape shape, uint64_t seed) {
  spread *s = calloc(1, sizeof *s);
  int64_t *everyone = calloc((size_t)shape.E, sizeof *everyone), all = 0;
  if (!s || !everyone) abort();
  s->ranks = ranks;
  for (int32_t r = 0; r < ranks; all += tokens[r++]) {
    uint64_t of_values = 1, state = seed + 1000 * (uint64_t)r + (uint64_t)routing;
    oracle *o = s->part[r] = oracle_create(tokens[r], shape.k, shape.E, shape.d, shape.h, shape.activation);
    o->balance = shape.balance, o->z = shape.z;
    fill_values(o, &of_values);
    fill_float(o->x, o->tokens * o->model, 1, &state);
    fill_float(o->grad_y, o->tokens * o->model, 1, &state);
    route(o, routing, all * shape.k, ranks > 1 && r == ranks - 1, &state);
    oracle_gate(o); /* for the counts; the losses need everyone's */
    for (int64_t e = 0; e < shape.E; e++) everyone[e] += o->counts[e];
  }
  for (int32_t r = 0; r < ranks; r++) {
    oracle *o = s->part[r];
    o->everyone = malloc((size_t)shape.E * sizeof *everyone);
    if (!o->everyone) abort();
    memcpy(o->everyone, everyone, (size_t)shape.E * sizeof *everyone);
    oracle_gate(o), oracle_run(o);
  }
  for (int t = 0; t < TENSORS; t++)
    for (int64_t i = 0; i < s->part[0]->sizes[t]; i++) {
      double sum = 0;
      for (int32_t r = 0; r < ranks; r++) sum += s->part[r]->gradients[t][i];
      for (int32_t r = 0; r < ranks; r++) s->part[r]->gradients[t][i] = sum / ranks;
    }
  s->whole = join_parts(s->part, ranks, all);
  free(everyone);
  return s;
}

void spread_destroy(spread *s) {
  for (int32_t r = 0; r < s->ranks; r++) oracle_destroy(s->part[r]);
  oracle_destroy(s->whole);
  free(s);
}

/* got = factor · one, where the factor is a power of two wherever bits are compared, so that the product is exact. */
static void compare(const char *what, const char *name, const float *got, const float *one, int64_t count, float factor,
                    int same_bits) {
  float largest = 0, difference = 0;
  int64_t worst = 0, unequal = 0;
  for (int64_t i = 0; i < count; i++) {
    float wanted = factor * one[i], apart = fabsf(got[i] - wanted);
    unequal += memcmp(&got[i], &wanted, sizeof wanted) != 0;
    largest = fmaxf(largest, fabsf(wanted));
    if (!(apart <= difference)) difference = isnan(apart) ? INFINITY : apart, worst = i;
  }
  CHECK(same_bits ? unequal == 0 : (double)difference <= rounding * (double)largest,
        "%s: %s: %lld of %lld values are not those of one worker alone: [%lld] %.9g, %.9g", what, name,
        (long long)unequal, (long long)count, (long long)worst, count ? (double)got[worst] : 0,
        count ? (double)(factor * one[worst]) : 0);
}

void check_alone(const char *what, const spread *s, int32_t rank, const batch *b, const batch *alone, int same_bits) {
  const oracle *o = s->part[rank];
  const float W = (float)s->ranks; /* grad_tokens and grad_weights are of the rank's own loss, not of the mean */
  int64_t at = 0;
  for (int32_t r = 0; r < rank; r++) at += s->part[r]->tokens;
  compare(what, "y", b->y, alone->y + at * o->model, o->tokens * o->model, 1, same_bits);
  compare(what, "grad_tokens", b->grad_x, alone->grad_x + at * o->model, o->tokens * o->model, W, same_bits);
  if (o->routed) compare(what, "grad_weights", b->grad_weight, alone->grad_weight + at * o->choices,
                         o->tokens * o->choices, W, same_bits);
  for (int t = 0; t < TENSORS; t++) {
    int64_t first = t == GATE ? 0 : b->first_expert * (o->sizes[t] / o->experts);
    compare(what, tensor_names[t], b->gradients[t], alone->gradients[t] + first, b->sizes[t], 1, same_bits);
  }
}
