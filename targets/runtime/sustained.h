/* Latency, clock and heat while the model runs without a pause. */
#ifndef SUSTAINED_H
#define SUSTAINED_H

#include "sample.h"

struct sustained_window {
    double at_s; /* its end, since the first began */
    double p50_ms, p90_ms;
    double frequency_khz;       /* the lowest in it; NAN where the system does not say */
    double temperature_celsius; /* the hottest */
    int throttled;              /* 1, 0, or -1 where the system does not say */
    double waited_share;
};

struct sustained {
    struct sustained_window *windows;
    int count;
};

/* Run so long, a window every few seconds. `runs_each` as in struct samples. MODEL_OK, or an error
 * code. `windows` is the caller's to free in any case. */
int sustained_measure(struct sample *sample, struct sustained *sustained, double minutes,
                      long runs_each);

/* A JSON array. */
void sustained_print(const struct sustained *sustained);

#endif
