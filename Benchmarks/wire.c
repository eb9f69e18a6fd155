/* wire: how much of a link's rate rows get, for mpirun with a rank on each host.
 *
 *   wire [--repeats N] [--json FILE]
 *
 * In turns, in one run: steps of a layer whose experts have one hidden unit, with the coarse schedule, in which rows move
 * while nothing else goes on; steps of as many rows by a worker alone, who moves none; and the same bytes between the same
 * ranks through plain TCP sockets, all peers and both directions at once. A step moves its rows four times: there and back,
 * forward and backward. What moving takes is what the first kind of step takes longer than the second. `busy` is the share
 * of a rank's core that the sockets take, which no computing can have beside them. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fastermoe_mpi.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MODEL = 1024, MOST_RANKS = 16, MOST_REPEATS = 50 };
static int rank, ranks, sockets[MOST_RANKS];

static void stop(const char *what) {
  fprintf(stderr, "wire: rank %d: %s: %s\n", rank, what, strerror(errno));
  MPI_Abort(MPI_COMM_WORLD, 1);
}
#define CHECK(call)                                                             \
  do {                                                                          \
    if ((call) != FMOE_OK) fprintf(stderr, "%s\n", fmoe_last_error()), stop(#call); \
  } while (0)

/* ---- plain sockets --------------------------------------------------------------------------- */
static void connect_all(void) {
  struct sockaddr_in mine = {.sin_family = AF_INET}, all[MOST_RANKS];
  socklen_t size = sizeof mine;
  char name[256];
  struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found;
  int door = socket(AF_INET, SOCK_STREAM, 0);
  if (door < 0 || bind(door, (struct sockaddr *)&mine, sizeof mine) || listen(door, MOST_RANKS) ||
      getsockname(door, (struct sockaddr *)&mine, &size) || gethostname(name, sizeof name) ||
      getaddrinfo(name, NULL, &hints, &found))
    stop("listening");
  mine.sin_addr = ((struct sockaddr_in *)(void *)found->ai_addr)->sin_addr;
  freeaddrinfo(found);
  MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all, sizeof mine, MPI_BYTE, MPI_COMM_WORLD);
  for (int peer = 0; peer < rank; peer++) {
    sockets[peer] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(sockets[peer], (struct sockaddr *)&all[peer], sizeof *all) || write(sockets[peer], &rank, sizeof rank) != sizeof rank)
      stop("connecting");
  }
  for (int left = ranks - 1 - rank; left > 0; left--) {
    int peer, fresh = accept(door, NULL, NULL);
    if (fresh < 0 || read(fresh, &peer, sizeof peer) != sizeof peer) stop("accepting");
    sockets[peer] = fresh;
  }
  close(door);
  for (int peer = 0, one = 1; peer < ranks; peer++)
    if (peer != rank) {
      setsockopt(sockets[peer], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      fcntl(sockets[peer], F_SETFL, O_NONBLOCK);
    }
}

/* `bytes` to each peer and as many from each; others keep the buffers apart. */
static void exchange(const char *out, char *in, int64_t bytes) {
  int64_t sent[MOST_RANKS] = {0}, received[MOST_RANKS] = {0};
  struct pollfd waiting[MOST_RANKS];
  for (;;) {
    int count = 0;
    for (int peer = 0; peer < ranks; peer++) {
      if (peer == rank) continue;
      short events = (short)((sent[peer] < bytes ? POLLOUT : 0) | (received[peer] < bytes ? POLLIN : 0));
      if (events) waiting[count++] = (struct pollfd){.fd = sockets[peer], .events = events};
    }
    if (!count) return;
    if (poll(waiting, (nfds_t)count, -1) < 0) stop("poll");
    for (int peer = 0; peer < ranks; peer++) {
      if (peer == rank) continue;
      ssize_t n = sent[peer] < bytes ? write(sockets[peer], out + peer * bytes + sent[peer], (size_t)(bytes - sent[peer])) : 0;
      if (n < 0 && errno != EAGAIN) stop("write");
      sent[peer] += n > 0 ? n : 0;
      n = received[peer] < bytes ? read(sockets[peer], in + peer * bytes + received[peer], (size_t)(bytes - received[peer])) : 0;
      if (n < 0 && errno != EAGAIN) stop("read");
      received[peer] += n > 0 ? n : 0;
    }
  }
}

/* Seconds that this rank's core was busy so far, with whatever. */
static double busy(void) {
  char line[256], name[16];
  FILE *file = fopen("/proc/stat", "r");
  double value[8], sum = -1; /* user, nice, system, idle, waiting, interrupts, soft ones, stolen */
  snprintf(name, sizeof name, "cpu%d ", sched_getcpu());
  while (file && sum < 0 && fgets(line, sizeof line, file))
    if (!strncmp(line, name, strlen(name)) &&
        sscanf(line, "%*s %lf %lf %lf %lf %lf %lf %lf %lf", value, value + 1, value + 2, value + 3, value + 4, value + 5,
               value + 6, value + 7) == 8)
      sum = value[0] + value[1] + value[2] + value[5] + value[6];
  if (file) fclose(file);
  if (sum < 0) stop("/proc/stat");
  return sum / (double)sysconf(_SC_CLK_TCK);
}

/* ---- both, in turns -------------------------------------------------------------------------- */
static double slowest(double begin) {
  double mine = MPI_Wtime() - begin, all;
  MPI_Allreduce(&mine, &all, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return all;
}

static int by_size(const void *a, const void *b) {
  return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

int main(int argc, char **argv) {
  int level, repeats = 7;
  const char *json = NULL;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--repeats")) repeats = atoi(argv[i + 1]);
    if (!strcmp(argv[i], "--json")) json = argv[i + 1];
  }
  if (ranks < 2 || ranks > MOST_RANKS || repeats < 1 || repeats > MOST_REPEATS)
    return fprintf(stderr, "wire: 2 to %d ranks, 1 to %d repeats\n", MOST_RANKS, MOST_REPEATS), MPI_Abort(MPI_COMM_WORLD, 2);
  connect_all();

  fmoe_group_options limited = {.struct_size = sizeof limited, .threads = 1, .timeout_seconds = 60};
  fmoe_layer_options options = {.struct_size = sizeof options, .top_k = 1, .d_model = MODEL, .d_hidden = 1, .experts = ranks};
  fmoe_plan_options coarse = {.struct_size = sizeof coarse, .shadowing = 1, .schedule = 1};
  fmoe_group *groups[2]; /* together, alone */
  fmoe_layer *layers[2];
  CHECK(fmoe_group_create_mpi(MPI_COMM_WORLD, &limited, &groups[0]));
  CHECK(fmoe_group_create_local(1, &limited, &groups[1]));
  for (int i = 0; i < 2; i++) CHECK(fmoe_layer_create(groups[i], &options, &layers[i]));

  FILE *out = rank == 0 && json ? fopen(json, "w") : NULL;
  if (out) fprintf(out, "{\"ranks\": %d, \"rows\": [", ranks);
  if (rank == 0) printf("%d ranks; MB/s that leave each\nMB to each peer  sockets   busy   rows  ratio  whole steps\n", ranks);
  for (int megabytes = 1; megabytes <= 16; megabytes *= 4) {
    int64_t bytes = (int64_t)megabytes << 20, each = bytes / (MODEL * 4), n = each * ranks;
    size_t floats = (size_t)n * MODEL;
    float *x = calloc(floats, 4), *y = calloc(floats, 4), *dy = calloc(floats, 4), *dx = calloc(floats, 4);
    float *weights = calloc((size_t)n, 4);
    int32_t *choices = calloc((size_t)n, 4);
    if (!x || !y || !dy || !dx || !weights || !choices) stop("memory");
    for (int64_t i = 0; i < n; i++) choices[i] = (int32_t)(i / each), weights[i] = 1;
    double plain[MOST_REPEATS], rows[MOST_REPEATS], ratio[MOST_REPEATS], steps[MOST_REPEATS];
    double socket_seconds = 0, busy_seconds = 0;
    for (int r = -1; r < repeats; r++) { /* the first warms up */
      double begin, seconds[3], before, taken;
      MPI_Barrier(MPI_COMM_WORLD);
      before = busy(), begin = MPI_Wtime();
      for (int leg = 0; leg < 4; leg++) exchange((const char *)x, (char *)y, bytes);
      taken = MPI_Wtime() - begin;
      if (r >= 0) busy_seconds += busy() - before, socket_seconds += taken;
      seconds[0] = slowest(begin);
      for (int i = 0; i < 2; i++) {
        fmoe_pass *pass;
        begin = MPI_Wtime();
        CHECK(fmoe_route(layers[i], x, n, choices, weights, &pass));
        CHECK(fmoe_plan(pass, &coarse, NULL));
        CHECK(fmoe_forward(pass, y));
        CHECK(fmoe_backward(pass, dy, dx, NULL));
        fmoe_pass_destroy(pass);
        seconds[1 + i] = slowest(begin);
      }
      double volume = 4e-6 * (double)bytes * (ranks - 1);
      if (r < 0) continue;
      plain[r] = volume / seconds[0], rows[r] = volume / (seconds[1] - seconds[2]), steps[r] = volume / seconds[1];
      ratio[r] = rows[r] / plain[r];
    }
    qsort(plain, (size_t)repeats, sizeof *plain, by_size);
    qsort(rows, (size_t)repeats, sizeof *rows, by_size);
    qsort(steps, (size_t)repeats, sizeof *steps, by_size);
    qsort(ratio, (size_t)repeats, sizeof *ratio, by_size);
    if (rank == 0) printf("%15d  %7.1f  %4.0f %%  %5.1f  %5.3f  %11.1f\n", megabytes, plain[repeats / 2],
                          100 * busy_seconds / socket_seconds, rows[repeats / 2], ratio[repeats / 2], steps[repeats / 2]);
    if (out)
      fprintf(out, "%s\n  {\"megabytes\": %d, \"sockets\": %.4g, \"busy\": %.3g, \"rows\": %.4g, \"ratio\": %.4g}", megabytes > 1 ? "," : "",
              megabytes, plain[repeats / 2], busy_seconds / socket_seconds, rows[repeats / 2], ratio[repeats / 2]);
    free(x), free(y), free(dy), free(dx), free(weights), free(choices);
  }
  if (out) fprintf(out, "\n ]}\n"), fclose(out);
  for (int i = 0; i < 2; i++) fmoe_layer_destroy(layers[i]), fmoe_group_destroy(groups[i]);
  for (int peer = 0; peer < ranks; peer++)
    if (peer != rank) close(sockets[peer]);
  return MPI_Finalize();
}
