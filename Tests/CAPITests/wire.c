/* wire.c: what the library asks of a transport: rows that must travel, once, little else, and one release.
 *
 * `wire small` is for valgrind. */
#include "scene.h"

/* ---- bytes on the wire --------------------------------------------------------------------- */

enum { ROUTE_CALL, PLAN_CALL, FORWARD_CALL, BACKWARD_CALL, CALLS };
static const char *const call_names[CALLS] = {"route", "plan", "forward", "backward"};

static void run_call(crew *c, int32_t rank, void *context) {
  scene *at = context;
  batch *b = &at->got[rank];
  if (!b->block) make_layer(c, rank, &at->all), *b = batch_of(at->all.s->part[rank], at->all.layer[rank]);
  else if (at->kind == ROUTE_CALL) begin(b, at->all.layer[rank]);
  else if (at->kind == PLAN_CALL) EXPECT(FMOE_OK, fmoe_plan(b->pass, NULL, NULL));
  else if (at->kind == FORWARD_CALL) forward(b);
  else backward(b), read_gradients(b, at->all.layer[rank]);
}

static mailbox_traffic sent_by_all(const crew *c) {
  mailbox_traffic sum = {0, 0, 0, 0, 0, 0};
  for (int32_t r = 0; r < c->ranks; r++) {
    mailbox_traffic t = mailbox_sent(c->mail, r);
    sum.messages += t.messages, sum.bytes += t.bytes;
    sum.small_messages += t.small_messages, sum.small_bytes += t.small_bytes;
  }
  return sum;
}

static int64_t remote_rows(const spread *s) {
  int64_t rows = 0, local = s->part[0]->experts / s->ranks;
  for (int32_t r = 0; r < s->ranks; r++)
    for (int64_t slot = 0; slot < s->part[r]->tokens * s->part[r]->choices; slot++)
      rows += s->part[r]->choice[slot] >= 0 && s->part[r]->choice[slot] / local != r;
  return rows;
}

/* Rows that leave their rank go once to their expert and once back, in forward as in backward, and nothing else but a
 * record or two between each two ranks and a row of counts: less in all than a single row of tokens, so that the number
 * of rows can be told. */
static void test_bytes(void) {
  static const int64_t tokens[4] = {20, 3, 0, 31};
  for (int32_t ranks = 2; ranks <= (small ? 2 : 4); ranks *= 2)
    for (int routing = BALANCED; routing < ROUTINGS; routing++) {
      const int64_t E = 2 * ranks, d = ranks == 2 ? 256 : 1024, row = d * (int64_t)sizeof(float);
      const int64_t bound = ranks * (ranks - 1) * (4 * E + 256); /* bytes of records in one call */
      const shape shape = {.k = 2, .E = E, .d = d, .h = 3, .activation = FMOE_RELU};
      crew *c = crew_of(ranks, 1);
      scene at = {.all.s = spread_create(ranks, tokens, routing, shape, seed)};
      int64_t rows = remote_rows(at.all.s);
      CHECK(bound < row && rows > 0, "this test can tell rows from records");
      crew_run(c, run_call, &at); /* no call yet: the layers */
      for (at.kind = 0; at.kind < CALLS; at.kind++) {
        mailbox_traffic before = sent_by_all(c), after;
        crew_run(c, run_call, &at);
        after = sent_by_all(c);
        int64_t bytes = after.bytes - before.bytes;
        int64_t data = at.kind == FORWARD_CALL || at.kind == BACKWARD_CALL ? 2 * rows * row : 0;
        CHECK(bytes >= data && bytes <= data + bound,
              "%s, W %d, %s: %lld bytes sent (%lld in %lld messages of up to %d), not %lld and up to %lld of records",
              call_names[at.kind], ranks, routing_names[routing], (long long)bytes,
              (long long)(after.small_bytes - before.small_bytes),
              (long long)(after.small_messages - before.small_messages), SMALL_MESSAGE, (long long)data,
              (long long)bound);
      }
      check_scene("bytes", c, &at, NULL, 0);
      end_scene(c, &at);
      spread_destroy(at.all.s);
      crew_destroy(c);
    }
}

/* ---- a transport's release ----------------------------------------------------------------- */

static void take_pass(crew *c, int32_t rank, void *context) {
  scene *at = context;
  make_layer(c, rank, &at->all);
  at->got[rank] = batch_of(at->all.s->part[rank], at->all.layer[rank]);
  begin(&at->got[rank], at->all.layer[rank]);
}

/* Once, when the last of group, layer and pass is destroyed, in any order. */
static void test_release(void) {
  static const char orders[6][4] = {"glp", "gpl", "lgp", "lpg", "pgl", "plg"};
  static const int64_t tokens[2] = {3, 4};
  const shape shape = {.k = 1, .E = 2, .d = 4, .h = 4, .activation = FMOE_GELU};
  for (int order = 0; order < 6; order++) {
    crew *c = crew_of(2, 1);
    scene at = {.all.s = spread_create(2, tokens, GATED, shape, seed)};
    crew_run(c, take_pass, &at);
    for (int32_t r = 0; r < 2; r++)
      for (int i = 0; i < 3; i++) {
        CHECK(mailbox_released(c->mail, r) == 0, "%s: released before %d", orders[order], i);
        if (orders[order][i] == 'g') fmoe_group_destroy(c->groups[r]), c->groups[r] = NULL;
        else if (orders[order][i] == 'l') fmoe_layer_destroy(at.all.layer[r]);
        else batch_free(&at.got[r]);
      }
    for (int32_t r = 0; r < 2; r++)
      CHECK(mailbox_released(c->mail, r) == 1, "%s: released %d times", orders[order], mailbox_released(c->mail, r));
    spread_destroy(at.all.s);
    crew_destroy(c);
  }
}

int main(int count, char **arguments) {
  scene_begin("wire", count, arguments);
  RUN("wire", test_bytes);
  RUN("wire", test_release);
  return summary();
}
