#include "json.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

typedef struct reader {
  const char *at;
  int is_wrong;
} reader;

static void space(reader *r) { r->at += strspn(r->at, " \t\r\n"); }
static int take(reader *r, char c) { return space(r), *r->at == c ? r->at++, 1 : 0; }

static char *string(reader *r) {
  char *text = malloc(strlen(r->at) + 1), *to = text;
  if (!text) abort();
  if (!take(r, '"')) r->is_wrong = 1;
  while (!r->is_wrong && *r->at != '"') {
    if ((unsigned char)*r->at < 0x20) r->is_wrong = 1;
    else if (*r->at != '\\') *to++ = *r->at++;
    else if (r->at[1] && strchr("\"\\/bfnrt", r->at[1])) *to++ = r->at[1], r->at += 2;
    else if (r->at[1] == 'u' && strspn(r->at + 2, "0123456789abcdefABCDEF") >= 4) *to++ = '?', r->at += 6;
    else r->is_wrong = 1;
  }
  if (!r->is_wrong) r->at++;
  return *to = 0, text;
}

static double number(reader *r) { /* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)? */
  const char *p = r->at + (*r->at == '-'), *digits = "0123456789";
  size_t whole = strspn(p, digits), part = 1, power = 1;
  r->is_wrong |= !whole || (whole > 1 && *p == '0');
  p += whole;
  if (*p == '.') part = strspn(p + 1, digits), p += 1 + part;
  if (*p == 'e' || *p == 'E') p += 1 + (p[1] == '+' || p[1] == '-'), power = strspn(p, digits), p += power;
  r->is_wrong |= !part || !power;
  double value = strtod(r->at, NULL);
  return r->at = p, value;
}

static json *value(reader *r) {
  json *v = calloc(1, sizeof *v);
  if (!v) abort();
  space(r);
  v->kind = *r->at;
  if (*r->at == '"') v->text = string(r);
  else if (*r->at == '{' || *r->at == '[') {
    const char close = *r->at++ == '{' ? '}' : ']';
    json **end = &v->first;
    if (take(r, close)) return v;
    do {
      char *key = NULL;
      if (close == '}') {
        key = (space(r), string(r));
        r->is_wrong |= !take(r, ':');
      }
      if (r->is_wrong) return free(key), v;
      *end = value(r), (*end)->key = key, end = &(*end)->next;
    } while (!r->is_wrong && take(r, ','));
    r->is_wrong |= !take(r, close);
  } else if (!strncmp(r->at, "true", 4) || !strncmp(r->at, "null", 4)) r->at += 4;
  else if (!strncmp(r->at, "false", 5)) r->at += 5;
  else v->kind = 'n', v->number = number(r);
  return v;
}

void json_free(json *v) {
  for (json *next; v; v = next) next = v->next, json_free(v->first), free(v->text), free((char *)v->key), free(v);
}

json *json_read(const char *path) {
  FILE *file = fopen(path, "r");
  if (!CHECK(file, "%s is not there", path)) return NULL;
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *text = calloc((size_t)size + 1, 1);
  if (!text || fread(text, 1, (size_t)size, file) != (size_t)size) abort();
  fclose(file);
  reader r = {.at = text};
  json *v = value(&r);
  space(&r);
  CHECK(!r.is_wrong && r.at == text + size, "%s is no JSON from `%.40s` on", path, r.at);
  return free(text), v;
}

const json *in(const json *v, const char *key) {
  for (v = v ? v->first : NULL; v; v = v->next)
    if (v->key && !strcmp(v->key, key)) return v;
  return NULL;
}

double number_in(const json *v, const char *key, double missing) {
  const json *found = in(v, key);
  return found && found->kind == 'n' ? found->number : missing;
}

const char *text_in(const json *v, const char *key) {
  const json *found = in(v, key);
  return found && found->text ? found->text : "";
}
