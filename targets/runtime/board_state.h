/* What the board says of its clock, its heat and what it does against it. */
#ifndef BOARD_STATE_H
#define BOARD_STATE_H

#include "tasks.h"

/* NAN, an empty text, or -1 for the flags, where the system does not say. */
struct board_state {
    char governor[64];          /* of the cores that the threads run on; several: with commas */
    double frequency_khz;       /* of the first thread's core */
    double temperature_celsius; /* of the hottest zone */
    long throttle_flags;        /* of a Raspberry Pi: bits 0 to 3 now, 16 to 19 since its start */
    double throttle_count;      /* events that x86 CPUs counted since their start */
    double cooling_level;       /* how far the system slows CPUs down to cool them; 0: not */
};

void board_state_read(struct board_state *state, const struct tasks *tasks);

/* A JSON object. */
void board_state_print(const struct board_state *state);

/* The flags as a JSON string, or null. */
void throttle_flags_print(long flags);

#endif
