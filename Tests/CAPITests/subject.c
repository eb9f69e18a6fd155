#include "subject.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
static const int sanitized = 1; /* it needs the address space, and standard error */
#else
static const int sanitized = 0;
#endif

int small, limited;
float tokens[N * D], output[N * D], grad_output[N * D], grad_tokens[N * D], grad_weights[N * K];
int32_t choices[N * K];
float weights[N * K];
char untouched;

/* ---- the process --------------------------------------------------------------------------- */

static FILE *words; /* what was said on standard error */
static int standard_error;

void subject_begin(const char *program, int count, char **arguments) {
  small = count > 1 && !strcmp(arguments[1], "small");
  limited = !small && !sanitized;
  uint64_t state = seed;
  struct rlimit limit = {UINT64_C(4) << 30, UINT64_C(4) << 30}; /* bytes: what is huge here is huge everywhere */
  if (limited) setrlimit(RLIMIT_AS, &limit);
  printf("%s: seed %llu\n", program, (unsigned long long)seed);
  for (int i = 0; i < N * D; i++) tokens[i] = (float)uniform(&state), grad_output[i] = (float)uniform(&state);
  for (int s = 0; s < N * K; s++) choices[s] = s % (E + 1) - 1, weights[s] = (float)uniform(&state);
  words = tmpfile();
  standard_error = dup(2);
  if (!words || standard_error < 0) abort();
  if (limited) dup2(fileno(words), 2); /* the tools have things to say there, and hwloc has under them */
}

int subject_end(void) {
  struct stat said;
  if (fstat(fileno(words), &said)) abort();
  CHECK(said.st_size == 0, "the library never prints, %lld bytes on standard error", (long long)said.st_size);
  dup2(standard_error, 2), close(standard_error), fclose(words);
  return summary();
}

/* ---- the layer ----------------------------------------------------------------------------- */

fmoe_group_options group_options(void) {
  return (fmoe_group_options){.struct_size = sizeof(fmoe_group_options)};
}

fmoe_layer_options layer_options(void) {
  return (fmoe_layer_options){.struct_size = sizeof(fmoe_layer_options), .top_k = K, .d_model = D, .d_hidden = H,
                              .experts = E};
}

fmoe_group *alone(void) {
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, NULL, &group))) exit(summary());
  return group;
}

fmoe_layer *layer_with(fmoe_group *group, fmoe_layer_options options) {
  fmoe_layer *layer = NULL;
  if (!EXPECT(FMOE_OK, fmoe_layer_create(group, &options, &layer))) exit(summary());
  return layer;
}

fmoe_pass *gated(fmoe_layer *layer) {
  fmoe_pass *pass = NULL;
  if (!EXPECT(FMOE_OK, fmoe_gate(layer, tokens, N, &pass))) exit(summary());
  return pass;
}

void check_works(fmoe_layer *layer) {
  fmoe_pass *pass = gated(layer);
  EXPECT(FMOE_OK, fmoe_forward(pass, output));
  EXPECT(FMOE_OK, fmoe_backward(pass, grad_output, grad_tokens, NULL));
  for (int i = 0; i < N * D; i++)
    if (!isfinite(output[i]) || !isfinite(grad_tokens[i])) i = N * D, CHECK(0, "a step gives numbers");
  fmoe_pass_destroy(pass);
}

void check_group(const fmoe_group_options *options) {
  fmoe_group *group = NULL;
  if (!EXPECT(FMOE_OK, fmoe_group_create_local(1, options, &group))) return;
  fmoe_layer *layer = layer_with(group, layer_options());
  check_works(layer);
  fmoe_layer_destroy(layer), fmoe_group_destroy(group);
}
