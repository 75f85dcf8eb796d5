#include "sustained.h"

#include <stdio.h>
#include <stdlib.h>

#include "error.h"
#include "json.h"
#include "model.h"
#include "statistics.h"
#include "timing.h"

/* A window takes five seconds; less where that makes a curve, more where it would not fit. */
enum { FEWEST_WINDOWS = 12, MOST_WINDOWS = 2000 };
static const double SHORTEST_S = 0.25, USUAL_S = 5;

static double window_seconds(double total_s)
{
    double seconds = total_s / FEWEST_WINDOWS;
    seconds = seconds > USUAL_S ? USUAL_S : seconds < SHORTEST_S ? SHORTEST_S : seconds;
    return seconds * MOST_WINDOWS < total_s ? total_s / MOST_WINDOWS : seconds;
}

static int measure_window(struct sample *sample, struct samples *samples, double seconds,
                          struct sustained_window *window)
{
    struct conditions conditions;
    conditions_begin(&conditions);
    int code = timing_measure(sample, samples, 1, seconds, &conditions);
    if (code != MODEL_OK)
        return code;
    conditions_end(&conditions);
    sort_ascending(samples->ms, samples->count);
    *window = (struct sustained_window){
        .p50_ms = quantile(samples->ms, samples->count, 0.5),
        .p90_ms = quantile(samples->ms, samples->count, 0.9),
        .frequency_khz = conditions.has_gpu ? conditions.gpu.clock.lowest_khz
                                            : conditions.clock.lowest_khz,
        .temperature_celsius = conditions.has_gpu ? conditions.gpu.hottest_celsius
                                                  : conditions.hottest_celsius,
        .throttled = conditions_throttled(&conditions),
        .waited_share = conditions.load.waited_share,
    };
    return MODEL_OK;
}

int sustained_measure(struct sample *sample, struct sustained *sustained, double minutes,
                      long runs_each)
{
    struct samples samples = {.runs_each = runs_each};
    double start = now_ms(), seconds = window_seconds(60 * minutes);
    int code = MODEL_OK;
    sustained->count = 0;
    sustained->windows = calloc(MOST_WINDOWS, sizeof *sustained->windows);
    if (sustained->windows == NULL) {
        error_set("no memory for %d windows", (int)MOST_WINDOWS);
        return MODEL_UNUSABLE;
    }
    while (code == MODEL_OK && now_ms() - start < 60e3 * minutes &&
           sustained->count < MOST_WINDOWS) {
        struct sustained_window *window = &sustained->windows[sustained->count++];
        code = measure_window(sample, &samples, seconds, window);
        window->at_s = (now_ms() - start) * 1e-3;
    }
    free(samples.ms);
    return code;
}

static void print_number(const char *key, double number)
{
    printf(", \"%s\": ", key);
    json_number(number);
}

void sustained_print(const struct sustained *sustained)
{
    static const char *const THROTTLED[] = {"null", "false", "true"};
    putchar('[');
    for (int i = 0; i < sustained->count; i++) {
        const struct sustained_window *window = &sustained->windows[i];
        printf("%s{\"at_s\": %.2f", i > 0 ? ", " : "", window->at_s);
        print_number("p50_ms", window->p50_ms);
        print_number("p90_ms", window->p90_ms);
        print_number("frequency_khz", window->frequency_khz);
        print_number("temperature_celsius", window->temperature_celsius);
        printf(", \"throttled\": %s", THROTTLED[window->throttled + 1]);
        print_number("waited_share", window->waited_share);
        putchar('}');
    }
    putchar(']');
}
