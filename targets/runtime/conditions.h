/* What happened on the board while something was measured. */
#ifndef CONDITIONS_H
#define CONDITIONS_H

#include <stdbool.h>

#include "board_state.h"
#include "gpu_state.h"
#include "load.h"

enum { MOST_CORES = 1024 };

/* A clock over all looks, the first and the last included; NAN where the system does not say. */
struct clock_range {
    double lowest_khz, highest_khz;
    double fell_from_khz, fell_to_khz; /* where it fell furthest, by share */
};

/* What happened on the GPU; the figures are over all looks. */
struct gpu_conditions {
    struct gpu_state before, after;
    struct clock_range clock;
    double hottest_celsius;
    double cooling_level;
    long throttle_reasons; /* that were there at a look; -1 where the system does not say */
};

struct conditions {
    struct board_state before, after;
    struct load load;
    double latest_ms; /* when it was looked at last */
    int looks; /* in between */
    /* Of all looks, the first and the last included; NAN or -1 where the system does not say. */
    struct clock_range clock;
    double hottest_celsius;
    long throttle_flags; /* of the firmware: bits 0 to 3, that were set at a look or in between */
    double throttle_events;
    double cooling_level;
    bool ran_on[MOST_CORES]; /* cores on which a thread was seen */
    struct load_counters counters; /* at the beginning */
    bool has_gpu;
    struct gpu_conditions gpu;
};

/* Reads the state of the GPU that runs the model; NULL where the CPU does. */
extern void (*conditions_read_gpu)(struct gpu_state *state);

/* The first look. Then look a few times per second at most, outside of what is timed. */
void conditions_begin(struct conditions *conditions);
void conditions_look(struct conditions *conditions);
void conditions_end(struct conditions *conditions);

/* Whether what runs the model was slowed down: 1, 0, or -1 where the system does not say. */
int conditions_throttled(const struct conditions *conditions);

/* A JSON object. */
void conditions_print(const struct conditions *conditions);

#endif
