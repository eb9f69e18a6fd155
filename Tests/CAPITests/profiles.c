/* profiles.c: files that keep what a group measured: read back, refused where they are another group's or broken, and no harm
 * done where they cannot be written. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "measured.h"

static char profile[100];

static void join_as(crew *c, int32_t rank, void *context) {
  fmoe_status *status = context;
  status[rank] = crew_join(c, rank);
  if (status[rank] == FMOE_ERROR_FILE) /* this rank's text names the file */
    CHECK(rank == 0 && strstr(fmoe_last_error(), c->options.profile), "%s", fmoe_last_error());
}

/* Making a group with this file fails on rank 0 with words, and on all others. */
static void check_refused(int32_t ranks, const char *text, const char *words) {
  spit(profile, text, strlen(text));
  crew *c = crew_without_groups((crew_options){.ranks = ranks, .over_mailbox = 1, .timeout = 20, .profile = profile});
  fmoe_status status[MOST_RANKS];
  crew_run(c, join_as, status);
  for (int32_t r = 0; r < ranks; r++)
    CHECK(status[r] == (r ? FMOE_ERROR_PEER : FMOE_ERROR_FILE), "rank %d: %s", r, fmoe_status_name(status[r]));
  crew_destroy(c);
  fmoe_group *group = (fmoe_group *)&group;
  fmoe_group_options o = {.struct_size = sizeof o, .profile = profile, .threads = 1};
  EXPECT(FMOE_ERROR_FILE, fmoe_group_create_local(1, &o, &group));
  CHECK(group == (fmoe_group *)&group, "out-parameters are written only on FMOE_OK");
  if (words) CHECK(strstr(fmoe_last_error(), profile), "\"%s\" names no file", fmoe_last_error());
}

/* `text` with the first `from` made `to`; the caller frees it. */
static char *with(const char *text, const char *from, const char *to) {
  const char *at = strstr(text, from);
  char *made = malloc(strlen(text) + strlen(to) + 1);
  if (!CHECK(at, "no %s in %s", from, text)) return strcpy(made, text);
  sprintf(made, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  return made;
}

static void test_profiles(void) {
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    unlink(profile);
    crew_options options = {.ranks = 2, .over_mailbox = over_mailbox, .timeout = 60, .profile = profile};
    crew *c = crew_create(options); /* no file yet, which is fine */
    CHECK(access(profile, F_OK), "and none is made");
    crew_run(c, run_calibrate, NULL);
    crew_run(c, run_write, "first");
    crew_destroy(c);
    char *text = text_of(profile);
    CHECK(strstr(text, "\"fastermoe_profile\" : 1"), "%s", text);
    c = crew_create(options);
    crew_run(c, run_write, "second");
    char *first = text_of(of_rank("first", 0));
    for (int32_t r = 0; r < 2; r++) {
      char *second = text_of(of_rank("second", r));
      CHECK(!strcmp(first, second) && strlen(first) > 100, "read back: %s", second);
      free(second), unlink(of_rank("first", r)), unlink(of_rank("second", r));
    }
    char *after = text_of(profile);
    CHECK(!strcmp(text, after), "reading changes no file");
    free(first), free(after);
    crew_destroy(c);
    if (over_mailbox) {
      static const struct { const char *from, *to; } changes[] = {
          {"\"threads\" : 1", "\"threads\" : 2"}, {"\"host\" : 0", "\"host\" : 1"}, {"\"package\" : 0", "\"package\" : 3"},
          {"\"numa_node\" : 0", "\"numa_node\" : 1"}, {"\"cores\" : ", "\"cores\" : 9"}, {"x86-64-v", "x86-64-w"},
          {"\"processor\" : \"", "\"processor\" : \"Other "}, {"\"fastermoe_profile\" : 1", "\"fastermoe_profile\" : 2"},
          {"\"within_hosts\"", "\"between_hosts\""}, {"\"message_slowdown\" : ", "\"message_slowdown\" : -"},
          {"\"latency_seconds\" : ", "\"latency_seconds\" : -"}, {"\"bytes_per_second\" : ", "\"bytes_per_second\" : -"},
          {"\"workers\"", "\"worker\""}, {"{", "["}, {" 576,", " 577,"}, /* rows, and no digits of a rate */
      };
      for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        if (changes[i].from[0] == 'x' && !strstr(text, changes[i].from)) continue; /* another architecture */
        char *other = with(text, changes[i].from, changes[i].to);
        check_refused(2, other, "");
        free(other);
      }
      check_refused(3, text, "2 workers");
      check_refused(2, "", "");
    } else {
      check_refused(2, text, NULL); /* who shares memory is not who has links; and one worker is not two */
    }
    free(text);
  }
  unlink(profile);
}

static void run_unwritable(crew *c, int32_t rank, void *context) {
  const spread *s = context;
  fmoe_cluster *cluster;
  EXPECT(rank ? FMOE_ERROR_PEER : FMOE_ERROR_FILE, fmoe_group_calibrate(c->groups[rank], 0.05));
  EXPECT(FMOE_ERROR_STAGE, fmoe_cluster_of_group(c->groups[rank], &cluster)); /* nothing has changed */
  fmoe_layer *layer = layer_of(c->groups[rank], s->part[rank]);
  batch b = run(layer, s->part[rank]);
  check_batch("the group goes on", &b, s->part[rank]);
  batch_free(&b), fmoe_layer_destroy(layer);
}

static void run_some_profile(crew *c, int32_t rank, void *unused) {
  (void)unused;
  fmoe_transport transport = mailbox_transport(c->mail, rank);
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .profile = rank ? profile : NULL};
  fmoe_group *group;
  EXPECT(FMOE_ERROR_DISAGREE, fmoe_group_create(&transport, &o, &group));
}

static void test_bad_paths(void) {
  static const int64_t tokens[2] = {20, 31};
  const shape shape = {.k = 2, .E = 4, .d = 12, .h = 20, .activation = FMOE_GELU};
  spread *s = spread_create(2, tokens, GATED, shape, seed);
  for (int over_mailbox = 0; over_mailbox < 2; over_mailbox++) {
    crew *c = crew_create((crew_options){
        .ranks = 2, .over_mailbox = over_mailbox, .timeout = 60, .profile = "/no-such-folder/profile.json"});
    crew_run(c, run_unwritable, s);
    crew_destroy(c);
  }
  spread_destroy(s);
  fmoe_group *group;
  fmoe_group_options o = {.struct_size = sizeof o, .threads = 1, .profile = folder}; /* there, but not to be read */
  EXPECT(FMOE_ERROR_FILE, fmoe_group_create_local(1, &o, &group));
  crew *c = crew_without_groups((crew_options){.ranks = 2, .over_mailbox = 1});
  crew_run(c, run_some_profile, NULL);
  crew_destroy(c);
}

#define RUN(test) (begin_test("profiles: " #test, 200), test())

int main(void) {
  printf("profiles: seed %llu\n", (unsigned long long)seed);
  if (!mkdtemp(folder)) return perror(folder), 2;
  snprintf(profile, sizeof profile, "%s/profile.json", folder);
  RUN(test_profiles);
  RUN(test_bad_paths);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
