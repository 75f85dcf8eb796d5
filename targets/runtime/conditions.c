#include "conditions.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "json.h"

enum { NOW_BITS = 0xf, SINCE_START_SHIFT = 16 };

static void add_frequency(struct conditions *conditions, double khz)
{
    if (isnan(khz))
        return;
    conditions->lowest_khz = fmin(conditions->lowest_khz, khz);
    conditions->highest_khz = fmax(conditions->highest_khz, khz);
    if (khz * conditions->fell_from_khz < conditions->fell_to_khz * conditions->highest_khz ||
        isnan(conditions->fell_to_khz)) {
        conditions->fell_to_khz = khz;
        conditions->fell_from_khz = conditions->highest_khz;
    }
}

static void add_state(struct conditions *conditions, const struct board_state *state)
{
    add_frequency(conditions, state->frequency_khz);
    conditions->hottest_celsius = fmax(conditions->hottest_celsius, state->temperature_celsius);
    conditions->cooling_level = fmax(conditions->cooling_level, state->cooling_level);
    if (state->throttle_flags >= 0) {
        long known = conditions->throttle_flags < 0 ? 0 : conditions->throttle_flags;
        conditions->throttle_flags = known | (state->throttle_flags & NOW_BITS);
    }
}

static void add_cores(struct conditions *conditions, const struct tasks *tasks)
{
    for (int i = 0; i < tasks->count; i++)
        if (tasks->list[i].core >= 0 && tasks->list[i].core < MOST_CORES)
            conditions->ran_on[tasks->list[i].core] = true;
}

void conditions_begin(struct conditions *conditions)
{
    memset(conditions, 0, sizeof *conditions);
    conditions->lowest_khz = conditions->highest_khz = NAN;
    conditions->fell_from_khz = conditions->fell_to_khz = NAN;
    conditions->hottest_celsius = conditions->cooling_level = conditions->throttle_events = NAN;
    conditions->throttle_flags = -1;
    load_count(&conditions->counters);
    board_state_read(&conditions->before, &conditions->counters.tasks);
    add_state(conditions, &conditions->before);
    conditions->latest_ms = load_now_ms();
}

void conditions_look(struct conditions *conditions)
{
    struct tasks tasks;
    struct board_state state;
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

int conditions_throttled(const struct conditions *conditions)
{
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
    print_number("lowest_frequency_khz", conditions->lowest_khz);
    print_number("highest_frequency_khz", conditions->highest_khz);
    print_number("hottest_celsius", conditions->hottest_celsius);
    printf(", \"throttled\": ");
    throttle_flags_print(conditions->throttle_flags);
    print_number("throttle_events", conditions->throttle_events);
    print_number("cooling_level", conditions->cooling_level);
    print_number("waited_share", load->waited_share);
    print_number("stolen_share", load->stolen_share);
    print_number("other_load_cores", load->other_cores);
    print_number("involuntary_switches", load->switches);
    putchar('}');
}
