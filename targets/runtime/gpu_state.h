/* What a GPU says of its clocks, its heat and what slows it down. */
#ifndef GPU_STATE_H
#define GPU_STATE_H

/* NAN, or -1 for the reasons, where the system does not say. */
struct gpu_state {
    double frequency_khz, highest_khz; /* of its multiprocessors: now, and at most */
    double memory_khz;
    double temperature_celsius;
    double power_watts;
    double performance_state; /* 0 is the fastest */
    double cooling_level;  /* of Jetson boards: how far the system slows the GPU down to cool it */
    long throttle_reasons; /* bits of NVML: why the clock is not higher */
};

/* Reasons that are none where a GPU works: it is idle, or somebody chose its clocks. */
enum { HARMLESS_REASONS = 0x3 };

#endif
