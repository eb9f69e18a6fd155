/* What Swift has no words for: asking for a cache line before it is needed; `soon` into the first cache, else the second. */
static inline void hint_read_soon(const void *line) { __builtin_prefetch(line, 0, 3); }
static inline void hint_read_later(const void *line) { __builtin_prefetch(line, 0, 2); }
static inline void hint_write_soon(const void *line) { __builtin_prefetch(line, 1, 3); }
