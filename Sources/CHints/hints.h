/* What Swift has no words for: asking for a cache line before it is needed. */
static inline void hint_will_read(const void *line) { __builtin_prefetch(line, 0, 3); }
static inline void hint_will_write(const void *line) { __builtin_prefetch(line, 1, 3); }
