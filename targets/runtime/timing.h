/* Times of single inferences. */
#ifndef TIMING_H
#define TIMING_H

#include <stddef.h>

#include "commands.h"
#include "conditions.h"
#include "sample.h"

/* Of very short inferences, means over `runs_each` in a row. */
struct samples {
    double *ms;
    long runs_each;
    size_t count;
    size_t capacity;
};

double now_ms(void);

/* Open the model, with the golden input where there is one, and warm up. MODEL_OK, or an exit code
 * with the message printed. */
int timing_prepare(const struct options *options, struct sample *sample, struct samples *samples);

/* Run until times are steady, `max_seconds` at most. MODEL_OK, or an error code. */
int timing_warm_up(struct sample *sample, struct samples *samples, double max_seconds);

/* Run at least `runs` times and `seconds`, and keep the times. In between, look at the conditions
 * unless they are NULL; they have begun. MODEL_OK, or an error code. */
int timing_measure(struct sample *sample, struct samples *samples, long runs, double seconds,
                   struct conditions *conditions);

/* Run `runs` times untimed: what a look did to caches and sleeping threads is over then. MODEL_OK, or
 * an error code. */
int timing_settle(struct sample *sample, long runs);

/* Where it is time to, look at the conditions and settle. `now` is when the latest `runs` ended, which
 * took `latest_ms`. MODEL_OK, or an error code. */
int timing_look(struct conditions *conditions, struct sample *sample, double now, double latest_ms,
                long runs);

#endif
