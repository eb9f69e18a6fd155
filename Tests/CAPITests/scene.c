#include "scene.h"

#include <string.h>

int small;

void scene_begin(const char *program, int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  printf("%s: seed %llu\n", program, (unsigned long long)seed);
}

crew *crew_of(int32_t ranks, int over_mailbox) {
  return crew_create((crew_options){.ranks = ranks, .over_mailbox = over_mailbox});
}

void check_ended(const crew *c) {
  for (int32_t r = 0; c->mail && r < c->ranks; r++) {
    mailbox_traffic t = mailbox_sent(c->mail, r);
    CHECK(t.starts == t.ends, "rank %d: %lld requests started, %lld ended", r, (long long)t.starts, (long long)t.ends);
  }
}

void make_layer(crew *c, int32_t rank, void *context) {
  seats *all = context;
  fmoe_tensors tensors = {.struct_size = sizeof tensors};
  const oracle *o = all->s->part[rank];
  all->layer[rank] = layer_of(c->groups[rank], o);
  EXPECT(FMOE_OK, fmoe_layer_values(all->layer[rank], &tensors));
  CHECK(tensors.local_experts == o->experts / c->ranks && tensors.first_expert == rank * tensors.local_experts,
        "rank %d of %d has %d of %d experts from %d", rank, c->ranks, tensors.local_experts, (int)o->experts,
        (int)tensors.first_expert);
}

void layers_destroy(seats *all, int32_t ranks) {
  for (int32_t r = 0; r < ranks; r++) fmoe_layer_destroy(all->layer[r]);
}

void run_scene(crew *c, int32_t rank, void *context) {
  scene *at = context;
  make_layer(c, rank, &at->all);
  at->got[rank] = run(at->all.layer[rank], at->all.s->part[rank]);
}

void check_scene(const char *what, const crew *c, scene *at, const batch *alone, int same_bits) {
  for (int32_t r = 0; r < c->ranks; r++) {
    const oracle *o = at->all.s->part[r];
    check_routing(what, &at->got[r], o), check_batch(what, &at->got[r], o), check_gradients(what, &at->got[r], o);
    if (alone) check_alone(what, at->all.s, r, &at->got[r], alone, same_bits);
  }
}

void end_scene(crew *c, scene *at) {
  for (int32_t r = 0; r < c->ranks; r++) batch_free(&at->got[r]);
  layers_destroy(&at->all, c->ranks);
  check_ended(c);
}
