/* matmul.h: a team of threads that sleeps when idle, and fast float32 matrix products on it. */
#ifndef MATMUL_H
#define MATMUL_H
#include <stddef.h>

/* ---- team: the caller's thread and size - 1 helpers ---------------------------------------- */
typedef struct team team;
team *team_create(int size); /* NULL: the system gave no memory or no thread */
void team_destroy(team *crew); /* NULL is fine */

/* Calls task(job, index) once for every index of 0..count-1, in any order, and returns when all are done.  Whoever is
 * free takes the next index, so a core that is busy elsewhere delays nobody.  crew NULL: the caller does it all. */
void team_run(team *crew, int count, void (*task)(const void *job, int index), const void *job);

/* ---- matmul -------------------------------------------------------------------------------- */
typedef struct view { /* a matrix where it lies: element (i, j) is at[i * row + j * column] */
  const float *at;
  ptrdiff_t row, column;
} view;
static inline view rows(const float *at, ptrdiff_t width) { /* row-major, rows `width` floats apart */
  view matrix = {at, width, 1};
  return matrix;
}
static inline view turned(view matrix) { /* its transpose: nothing moves, the strides change places */
  view other = {matrix.at, matrix.column, matrix.row};
  return other;
}

/* c [m, n], rows `width` floats apart, becomes (SET) or grows by (ADD) a [m, k] times b [k, n].
 * Every element is summed over k in one fixed order, so the bits depend neither on the team nor on m and n. */
enum { SET, ADD };
void matmul(team *crew, int m, int n, int k, view a, view b, int how, float *c, ptrdiff_t width);
#endif
