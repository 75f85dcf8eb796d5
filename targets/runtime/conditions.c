#include "conditions.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "json.h"

enum { NOW_BITS = 0xf, SINCE_START_SHIFT = 16 };

void (*conditions_read_gpu)(struct gpu_state *state);

static void add_frequency(struct clock_range *clock, double khz)
{
    if (isnan(khz))
        return;
    clock->lowest_khz = fmin(clock->lowest_khz, khz);
    clock->highest_khz = fmax(clock->highest_khz, khz);
    if (khz * clock->fell_from_khz < clock->fell_to_khz * clock->highest_khz ||
        isnan(clock->fell_to_khz)) {
        clock->fell_to_khz = khz;
        clock->fell_from_khz = clock->highest_khz;
    }
}

static void add_state(struct conditions *conditions, const struct board_state *state)
{
    add_frequency(&conditions->clock, state->frequency_khz);
    conditions->hottest_celsius = fmax(conditions->hottest_celsius, state->temperature_celsius);
    conditions->cooling_level = fmax(conditions->cooling_level, state->cooling_level);
    if (state->throttle_flags >= 0) {
        long known = conditions->throttle_flags < 0 ? 0 : conditions->throttle_flags;
        conditions->throttle_flags = known | (state->throttle_flags & NOW_BITS);
    }
}

/* Look at the GPU, where there is one. */
static void look_at_gpu(struct conditions *conditions, struct gpu_state *state)
{
    if (!conditions->has_gpu)
        return;
    struct gpu_conditions *gpu = &conditions->gpu;
    conditions_read_gpu(state);
    add_frequency(&gpu->clock, state->frequency_khz);
    gpu->hottest_celsius = fmax(gpu->hottest_celsius, state->temperature_celsius);
    gpu->cooling_level = fmax(gpu->cooling_level, state->cooling_level);
    if (state->throttle_reasons >= 0)
        gpu->throttle_reasons = (gpu->throttle_reasons < 0 ? 0 : gpu->throttle_reasons) |
                                state->throttle_reasons;
}

static void add_cores(struct conditions *conditions, const struct tasks *tasks)
{
    for (int i = 0; i < tasks->count; i++)
        if (tasks->list[i].core >= 0 && tasks->list[i].core < MOST_CORES)
            conditions->ran_on[tasks->list[i].core] = true;
}

void conditions_begin(struct conditions *conditions)
{
    static const struct clock_range UNKNOWN = {NAN, NAN, NAN, NAN};
    memset(conditions, 0, sizeof *conditions);
    conditions->clock = conditions->gpu.clock = UNKNOWN;
    conditions->gpu.hottest_celsius = conditions->gpu.cooling_level = NAN;
    conditions->gpu.throttle_reasons = -1;
    conditions->has_gpu = conditions_read_gpu != NULL;
    conditions->hottest_celsius = conditions->cooling_level = conditions->throttle_events = NAN;
    conditions->throttle_flags = -1;
    load_count(&conditions->counters);
    board_state_read(&conditions->before, &conditions->counters.tasks);
    add_state(conditions, &conditions->before);
    look_at_gpu(conditions, &conditions->gpu.before);
    conditions->latest_ms = load_now_ms();
}

void conditions_look(struct conditions *conditions)
{
    struct tasks tasks;
    struct board_state state;
    struct gpu_state gpu;
    look_at_gpu(conditions, &gpu);
    tasks_read(&tasks);
    board_state_read(&state, &tasks);
    add_cores(conditions, &tasks);
    add_state(conditions, &state);
    conditions->looks++;
    conditions->latest_ms = load_now_ms();
}

void conditions_end(struct conditions *conditions)
{
    struct load_counters counters;
    look_at_gpu(conditions, &conditions->gpu.after);
    load_count(&counters);
    conditions->load = load_between(&conditions->counters, &counters);
    board_state_read(&conditions->after, &counters.tasks);
    add_cores(conditions, &counters.tasks);
    add_state(conditions, &conditions->after);
    conditions->throttle_events =
        conditions->after.throttle_count - conditions->before.throttle_count;
    long before = conditions->before.throttle_flags, after = conditions->after.throttle_flags;
    if (before >= 0 && after >= 0)
        conditions->throttle_flags |= (after & ~before) >> SINCE_START_SHIFT & NOW_BITS;
}

static int gpu_throttled(const struct gpu_conditions *gpu)
{
    if (gpu->cooling_level > 0 ||
        (gpu->throttle_reasons > 0 && (gpu->throttle_reasons & ~HARMLESS_REASONS) != 0))
        return 1;
    return gpu->throttle_reasons < 0 && isnan(gpu->cooling_level) ? -1 : 0;
}

int conditions_throttled(const struct conditions *conditions)
{
    if (conditions->has_gpu)
        return gpu_throttled(&conditions->gpu);
    if (conditions->throttle_flags > 0 || conditions->throttle_events > 0 ||
        conditions->cooling_level > 0)
        return 1;
    bool silent = conditions->throttle_flags < 0 && isnan(conditions->throttle_events) &&
                  isnan(conditions->cooling_level);
    return silent ? -1 : 0;
}

static void print_number(const char *key, double number)
{
    printf(", \"%s\": ", key);
    json_number(number);
}

static void print_reasons(const char *key, long reasons)
{
    printf(", \"%s\": ", key);
    throttle_flags_print(reasons);
}

static void print_gpu_state(const struct gpu_state *state)
{
    printf("{\"frequency_khz\": ");
    json_number(state->frequency_khz);
    print_number("highest_khz", state->highest_khz);
    print_number("memory_khz", state->memory_khz);
    print_number("temperature_celsius", state->temperature_celsius);
    print_number("power_watts", state->power_watts);
    print_number("performance_state", state->performance_state);
    print_reasons("throttle_reasons", state->throttle_reasons);
    print_number("cooling_level", state->cooling_level);
    putchar('}');
}

static void print_gpu(const struct gpu_conditions *gpu)
{
    printf(", \"gpu\": {\"before\": ");
    print_gpu_state(&gpu->before);
    printf(", \"after\": ");
    print_gpu_state(&gpu->after);
    print_number("lowest_frequency_khz", gpu->clock.lowest_khz);
    print_number("highest_frequency_khz", gpu->clock.highest_khz);
    print_number("hottest_celsius", gpu->hottest_celsius);
    print_reasons("throttle_reasons", gpu->throttle_reasons);
    print_number("cooling_level", gpu->cooling_level);
    putchar('}');
}

void conditions_print(const struct conditions *conditions)
{
    const struct load *load = &conditions->load;
    printf("{\"before\": ");
    board_state_print(&conditions->before);
    printf(", \"after\": ");
    board_state_print(&conditions->after);
    printf(", \"looks\": %d, \"ran_on\": [", conditions->looks);
    const char *comma = "";
    for (int core = 0; core < MOST_CORES; core++)
        if (conditions->ran_on[core]) {
            printf("%s%d", comma, core);
            comma = ", ";
        }
    printf("], \"cores\": %d", load->cores);
    print_number("seconds", load->seconds);
    print_number("lowest_frequency_khz", conditions->clock.lowest_khz);
    print_number("highest_frequency_khz", conditions->clock.highest_khz);
    print_number("hottest_celsius", conditions->hottest_celsius);
    printf(", \"throttled\": ");
    throttle_flags_print(conditions->throttle_flags);
    print_number("throttle_events", conditions->throttle_events);
    print_number("cooling_level", conditions->cooling_level);
    print_number("waited_share", load->waited_share);
    print_number("stolen_share", load->stolen_share);
    print_number("other_load_cores", load->other_cores);
    print_number("involuntary_switches", load->switches);
    if (conditions->has_gpu)
        print_gpu(&conditions->gpu);
    putchar('}');
}
