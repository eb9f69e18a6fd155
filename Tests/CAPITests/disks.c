/* disks.c: paths that lead nowhere, disks that are full or shut, and a process that is killed while it saves: the old file
 * is as it was, or the new one is whole. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "crew.h"
#include "folder.h"
#include "stored.h"

static void test_paths(void) {
  fmoe_layer *layer = one(options(FMOE_GELU, 6));
  const char *bad[] = {"", "/no-such-folder/layer", folder, "/dev/null", in_folder("pipe"), "/tmp/\xff\xfe/none"};
  CHECK(!mkfifo(in_folder("pipe"), 0600), "%d", errno);
  uint64_t before = values_of(layer);
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(layer, bad[i]));
    EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, bad[i]));
    CHECK(strstr(fmoe_last_error(), bad[i]) || bad[i][5] == (char)0xff, "%s", fmoe_last_error());
  }
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, "/dev/zero"));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(layer, in_folder("none")));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_save(layer, NULL));
  EXPECT(FMOE_ERROR_ARGUMENT, fmoe_layer_load(layer, NULL));
  CHECK(values_of(layer) == before, "nothing has changed");
  unlink(in_folder("pipe"));
  CHECK(!chdir(folder), "%d", errno); /* a path without a folder */
  EXPECT(FMOE_OK, fmoe_layer_save(layer, "plain"));
  EXPECT(FMOE_OK, fmoe_layer_load(layer, "plain"));
  unlink("plain");
  CHECK(!chdir("/") && entries(folder) == 0, "no draft is left behind");
  fmoe_layer_destroy(layer);
}

/* A file of 1 MB and more, with the values of a seed. */
static const fmoe_layer_options megabytes = {.struct_size = sizeof megabytes, .d_model = 200, .d_hidden = 200,
                                             .experts = 4};

static fmoe_layer *large(uint64_t of) {
  fmoe_layer_options o = megabytes;
  o.seed = of;
  return one(o);
}

static float first_value(fmoe_layer *layer) {
  fmoe_tensors t = {.struct_size = sizeof t};
  fmoe_layer_values(layer, &t);
  return t.w1[0];
}

static void fill_disk(const char *path) {
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, path));
  CHECK(strstr(fmoe_last_error(), "cannot be written"), "%s", fmoe_last_error());
  EXPECT(FMOE_OK, fmoe_layer_load(seen, path));
  CHECK(first_value(seen) == first_value(old), "the old file is as it was");
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

static void in_child(void (*work)(void)) { /* limits and mounts are of a process; its threads are its own, too */
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    one_group = NULL, atomic_store(&failed, 0);
    work();
    fflush(stdout);
    _exit(failed != 0);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "%d", status);
}

static void with_limit(void) {
  fmoe_layer *old = large(1);
  EXPECT(FMOE_OK, fmoe_layer_save(old, in_folder("full")));
  signal(SIGXFSZ, SIG_IGN);
  for (rlim_t most = 0; most <= 1000000; most += 100000) {
    struct rlimit limit = {most, RLIM_INFINITY};
    CHECK(!setrlimit(RLIMIT_FSIZE, &limit), "%d", errno);
    fill_disk(in_folder("full"));
  }
  CHECK(entries(folder) == 1, "no draft is left behind");
  injected("a file that may not become longer than so many bytes", 11, "FMOE_ERROR_FILE; the old file, no draft");
  fmoe_layer_destroy(old);
}

static void on_small_disk(void) {
  char path[100];
  if (mount("none", folder, "tmpfs", 0, "size=2m")) {
    printf("disks: no full disk, this user may not mount one: %s\n", strerror(errno));
    return;
  }
  snprintf(path, sizeof path, "%s/full", folder);
  fmoe_layer *old = large(1);
  EXPECT(FMOE_OK, fmoe_layer_save(old, path)); /* 1.3 MB: there is no room for another one */
  fill_disk(path);
  CHECK(entries(folder) == 1, "no draft is left behind");
  injected("a full disk", 1, "FMOE_ERROR_FILE; the old file, no draft");
  CHECK(!mount("none", folder, NULL, MS_REMOUNT | MS_RDONLY, "size=2m"), "%d", errno);
  fill_disk(path);
  injected("a file system that can only be read", 1, "FMOE_ERROR_FILE; the old file");
  fmoe_layer_destroy(old);
  CHECK(!umount(folder), "%d", errno);
}

/* As somebody who may neither read one file nor write into the folder of another. */
static void as_nobody(void) {
  const char *shut = in_folder("shut"), *kept = in_folder("shut/kept"), *secret = in_folder("shut/secret");
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  CHECK(!mkdir(shut, 0755) && !chmod(folder, 0755), "%d", errno);
  EXPECT(FMOE_OK, fmoe_layer_save(old, kept));
  EXPECT(FMOE_OK, fmoe_layer_save(old, secret));
  CHECK(!chmod(kept, 0444) && !chmod(secret, 0) && !chmod(shut, 0555), "%d", errno);
  if (geteuid() == 0) CHECK(!setuid(65534), "%d", errno);
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_load(seen, secret));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, in_folder("shut/none")));
  EXPECT(FMOE_ERROR_FILE, fmoe_layer_save(new, kept));
  EXPECT(FMOE_OK, fmoe_layer_load(seen, kept));
  CHECK(first_value(seen) == first_value(old) && entries(shut) == 2, "%d files", entries(shut));
  injected("a file that may not be read, a folder that may not be written", 3, "FMOE_ERROR_FILE; the old file, no draft");
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

/* Whenever a process is killed, the path leads to a whole file, the old or the new one. */
static void test_killed(void) {
  const char *path = in_folder("layer");
  fmoe_layer *old = large(1), *new = large(2), *seen = large(3);
  int olds = 0, news = 0;
  begin_test("killed", 600);
  for (int i = 0; i < 40; i++) {
    EXPECT(FMOE_OK, fmoe_layer_save(old, path));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
      one_group = NULL;
      fmoe_layer *mine = large(2);
      raise(SIGSTOP);
      fmoe_layer_save(mine, path);
      for (;;) pause();
    }
    int status;
    if (waitpid(child, &status, WUNTRACED) != child || !WIFSTOPPED(status)) abort();
    kill(child, SIGCONT);
    usleep((useconds_t)(i * 150)); /* until there is no more to be interrupted */
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    EXPECT(FMOE_OK, fmoe_layer_load(seen, path));
    float value = first_value(seen);
    olds += value == first_value(old), news += value == first_value(new);
  }
  CHECK(olds + news == 40, "%d old, %d new", olds, news);
  char what[100];
  snprintf(what, sizeof what, "%d whole old files, %d whole new ones, %d drafts left", olds, news, entries(folder) - 1);
  injected("a process killed while it saves, at another time each", 40, what);
  char command[100];
  snprintf(command, sizeof command, "rm -f %s/layer*", folder);
  CHECK(system(command) == 0, "%s", command);
  fmoe_layer_destroy(old), fmoe_layer_destroy(new), fmoe_layer_destroy(seen);
}

int main(void) {
  if (!mkdtemp(folder)) return perror(folder), 2;
  in_child(with_limit), in_child(on_small_disk), in_child(as_nobody);
  char command[200];
  snprintf(command, sizeof command, "chmod 700 %s/shut && rm -rf %s/shut %s/full", folder, folder, folder);
  CHECK(system(command) == 0, "%s", command);
  test_paths();
  test_killed();
  fmoe_group_destroy(one_group);
  CHECK(!rmdir(folder), "a file is left behind in %s", folder);
  return summary();
}
