#define _POSIX_C_SOURCE 200809L

#include "timing.h"

#include <stdlib.h>
#include <time.h>

#include "error.h"
#include "machine.h"
#include "statistics.h"

/* A sample shorter than this is mostly clock, and a second of them is a file of megabytes. */
#define SHORTEST_SAMPLE_MS 0.01

/* Between two looks: this long, and so many times an inference that those which are run untimed do
 * not matter. */
enum { LOOK_EVERY_MS = 250, LOOK_EVERY_RUNS = 20 };

double now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

int timing_settle(struct sample *sample, long runs)
{
    int code = MODEL_OK;
    for (long i = 0; code == MODEL_OK && i < runs; i++)
        code = sample_run(sample);
    return code;
}

int timing_look(struct conditions *conditions, struct sample *sample, double now, double latest_ms,
                long runs)
{
    double pause = LOOK_EVERY_RUNS * latest_ms;
    if (now < conditions->latest_ms + (pause > LOOK_EVERY_MS ? pause : LOOK_EVERY_MS))
        return MODEL_OK;
    conditions_look(conditions);
    return timing_settle(sample, runs);
}

static int make_room(struct samples *samples)
{
    if (samples->count < samples->capacity)
        return MODEL_OK;
    size_t capacity = samples->capacity > 0 ? 2 * samples->capacity : 1024;
    double *ms = realloc(samples->ms, capacity * sizeof *ms);
    if (ms == NULL) {
        error_set("no memory for %zu times", capacity);
        return MODEL_UNUSABLE;
    }
    samples->ms = ms;
    samples->capacity = capacity;
    return MODEL_OK;
}

int timing_measure(struct sample *sample, struct samples *samples, long runs, double seconds,
                   struct conditions *conditions)
{
    samples->count = 0;
    int code = conditions != NULL ? timing_settle(sample, samples->runs_each) : MODEL_OK;
    double start = now_ms();
    double end = start;
    while (code == MODEL_OK &&
           (samples->count < (size_t)runs || end - start < seconds * 1e3)) {
        if ((code = make_room(samples)) != MODEL_OK)
            break;
        double before = now_ms(), ms = 0;
        code = machine_time_runs(sample, samples->runs_each, &ms);
        end = now_ms();
        samples->ms[samples->count++] = ms / (double)samples->runs_each;
        if (code == MODEL_OK && conditions != NULL)
            code = timing_look(conditions, sample, end, end - before, samples->runs_each);
    }
    return code;
}

/* Until the medians of three windows in a row agree within 2 %. */
int timing_warm_up(struct sample *sample, struct samples *samples, double max_seconds)
{
    double end = now_ms() + max_seconds * 1e3;
    double latest = 0, before = 0;
    samples->runs_each = 1;
    samples->count = 0;
    while (now_ms() < end) {
        int code = timing_measure(sample, samples, 5, 0.05, NULL);
        if (code != MODEL_OK)
            return code;
        sort_ascending(samples->ms, samples->count);
        double median = quantile(samples->ms, samples->count, 0.5);
        double low = median < latest ? median : latest;
        double high = median > latest ? median : latest;
        low = before < low ? before : low;
        high = before > high ? before : high;
        if (high <= 1.02 * low)
            break;
        before = latest;
        latest = median;
    }
    if (samples->count > 0) {
        double median = quantile(samples->ms, samples->count, 0.5);
        if (median < SHORTEST_SAMPLE_MS)
            samples->runs_each = 1 + (long)(SHORTEST_SAMPLE_MS / (median > 1e-6 ? median : 1e-6));
    }
    return MODEL_OK;
}

int timing_prepare(const struct options *options, struct sample *sample, struct samples *samples)
{
    int code = open_model(options);
    if (code != MODEL_OK)
        return code;
    if (sample_open(sample) != 0 || sample_read_golden(sample, 0) < 0)
        return complain("%s", error_text());
    code = machine_prepare(sample);
    if (code == MODEL_OK)
        code = timing_warm_up(sample, samples, options->warmup_seconds);
    if (code != MODEL_OK)
        complain("%s", error_text());
    return code;
}
