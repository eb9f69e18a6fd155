/* plot: how well predictions fit, from the lines of predict --csv.
 *
 *   plot FILE.csv FILE.svg
 *
 * Draws predicted against measured seconds, a point for each case, both axes logarithmic; prints R2 (of the seconds, and of
 * their logarithms), the median and the largest error. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096, SIDE = 520, LEFT = 70, TOP = 20 };
typedef struct point { char plan[32]; double predicted, measured; } point;
static point points[MOST];
static const char *plans[] = {"FastMoE", "no shadow", "Algorithm 1", "ZeRO-3", "ours"};
static const char *colours[] = {"#4477aa", "#228833", "#ccbb44", "#aa3377", "#ee6677"};
enum { PLANS = sizeof plans / sizeof *plans };

static int by_size(const void *a, const void *b) {
  return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double r_squared(int count, double (*of)(double)) {
  double mean = 0, residual = 0, total = 0;
  for (int i = 0; i < count; i++) mean += of(points[i].measured) / count;
  for (int i = 0; i < count; i++) {
    const double off = of(points[i].predicted) - of(points[i].measured), spread = of(points[i].measured) - mean;
    residual += off * off, total += spread * spread;
  }
  return 1 - residual / total;
}

static double same(double x) { return x; }

int main(int argc, char **argv) {
  char line[512];
  int count = 0;
  FILE *in = argc == 3 ? fopen(argv[1], "r") : NULL, *out = in ? fopen(argv[2], "w") : NULL;
  if (!out) return fprintf(stderr, "usage: plot FILE.csv FILE.svg\n"), 2;
  if (!fgets(line, sizeof line, in)) return fprintf(stderr, "%s is empty\n", argv[1]), 1;
  while (count < MOST && fgets(line, sizeof line, in)) {
    char *field = strtok(line, ",");
    for (int at = 0; field; at++, field = strtok(NULL, ",\n")) {
      if (at == 8) snprintf(points[count].plan, sizeof points[count].plan, "%s", field);
      if (at == 11) points[count].predicted = atof(field);
      if (at == 12) points[count].measured = atof(field);
    }
    if (points[count].predicted > 0 && points[count].measured > 0) count++;
  }
  if (count < 2) return fprintf(stderr, "%s has no cases\n", argv[1]), 1;

  double errors[MOST], low = INFINITY, high = 0;
  for (int i = 0; i < count; i++) {
    errors[i] = fabs(points[i].predicted / points[i].measured - 1);
    low = fmin(low, fmin(points[i].predicted, points[i].measured));
    high = fmax(high, fmax(points[i].predicted, points[i].measured));
  }
  qsort(errors, (size_t)count, sizeof *errors, by_size);
  const double linear = r_squared(count, same), logarithmic = r_squared(count, log10);
  printf("%d cases: R2 %.4f (of logarithms %.4f), median error %.1f %%, largest %.0f %%\n", count, linear, logarithmic,
         errors[count / 2] * 100, errors[count - 1] * 100);

  const double first = floor(log10(low)), last = ceil(log10(high)), scale = SIDE / (last - first);
#define X(value) (LEFT + (log10(value) - first) * scale)
#define Y(value) (TOP + SIDE - (log10(value) - first) * scale)
  fprintf(out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"13\">\n",
          SIDE + LEFT + 150, SIDE + TOP + 60);
  fprintf(out, "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n");
  for (int decade = (int)first; decade <= (int)last; decade++)
    for (int digit = 1; digit < (decade < (int)last ? 10 : 2); digit++) {
      const double value = digit * pow(10, decade);
      const char *stroke = digit == 1 ? "#bbb" : "#eee";
      fprintf(out, "<path d=\"M%.1f %d V%d M%d %.1f H%d\" stroke=\"%s\"/>\n", X(value), TOP, TOP + SIDE, LEFT, Y(value), LEFT + SIDE, stroke);
      if (digit == 1 || digit == 2 || digit == 5)
        fprintf(out, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%g</text><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                X(value), TOP + SIDE + 18, value * 1e3, LEFT - 6, Y(value) + 4, value * 1e3);
    }
  fprintf(out, "<path d=\"M%d %d L%d %d\" stroke=\"#333\"/>\n", LEFT, TOP + SIDE, LEFT + SIDE, TOP);
  for (int i = 0; i < count; i++)
    for (int plan = 0; plan < PLANS; plan++)
      if (!strcmp(points[i].plan, plans[plan]))
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\" fill-opacity=\"0.6\"/>\n", X(points[i].measured),
                Y(points[i].predicted), colours[plan]);
  for (int plan = 0; plan < PLANS; plan++)
    fprintf(out, "<circle cx=\"%d\" cy=\"%d\" r=\"5\" fill=\"%s\"/><text x=\"%d\" y=\"%d\">%s</text>\n", LEFT + SIDE + 20,
            TOP + 20 + plan * 22, colours[plan], LEFT + SIDE + 32, TOP + 24 + plan * 22, plans[plan]);
  fprintf(out, "<text x=\"%d\" y=\"%d\">%d cases</text><text x=\"%d\" y=\"%d\">R² %.3f</text><text x=\"%d\" y=\"%d\">median %.1f %%</text>\n",
          LEFT + SIDE + 14, TOP + 160, count, LEFT + SIDE + 14, TOP + 180, linear, LEFT + SIDE + 14, TOP + 200, errors[count / 2] * 100);
  fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">measured, ms</text>\n", LEFT + SIDE / 2, TOP + SIDE + 42);
  fprintf(out, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">predicted, ms</text>\n</svg>\n", TOP + SIDE / 2);
  fclose(in);
  return fclose(out) ? 1 : 0;
}
