/* json.h: a reader of JSON that takes nothing else, as a test wants one. */
#ifndef JSON_H
#define JSON_H

typedef struct json {
  char kind;           /* { [ " n: number, or t f 0 */
  const char *key;     /* in an object */
  char *text;          /* of a string, without its escapes */
  double number;
  struct json *first, *next;
} json;

json *json_read(const char *path); /* what is none is a failed check, read up to there; NULL: there is no such file */
void json_free(json *v);           /* NULL is fine */

/* Of an object, what is at a key; where that is nothing, or v is NULL: NULL, `missing`, "". */
const json *in(const json *v, const char *key);
double number_in(const json *v, const char *key, double missing);
const char *text_in(const json *v, const char *key);

#endif
