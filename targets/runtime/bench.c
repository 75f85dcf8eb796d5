#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "commands.h"
#include "description.h"
#include "error.h"
#include "facts.h"
#include "json.h"
#include "profile.h"
#include "sample.h"
#include "threads.h"

/* A sample shorter than this is mostly clock, and a second of them is a file of megabytes. */
#define SHORTEST_SAMPLE_MS 0.01

/* Times of single inferences; of very short ones, means over `runs_each` in a row. */
struct samples {
    double *ms;
    long runs_each;
    size_t count;
    size_t capacity;
};

static double now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Quantile of sorted times, linear between neighbours. */
static double quantile(const double *sorted, size_t count, double part)
{
    double at = part * (double)(count - 1);
    size_t below = (size_t)at;
    size_t above = below + 1 < count ? below + 1 : below;
    return sorted[below] + (at - (double)below) * (sorted[above] - sorted[below]);
}

/* Run at least `runs` times and `seconds`, and keep the times. MODEL_OK, or an error code. */
static int measure(struct sample *sample, struct samples *samples, long runs, double seconds)
{
    samples->count = 0;
    double start = now_ms();
    double end = start;
    while (samples->count < (size_t)runs || end - start < seconds * 1e3) {
        if (samples->count == samples->capacity) {
            size_t capacity = samples->capacity > 0 ? 2 * samples->capacity : 1024;
            double *ms = realloc(samples->ms, capacity * sizeof *ms);
            if (ms == NULL) {
                error_set("no memory for %zu times", capacity);
                return MODEL_UNUSABLE;
            }
            samples->ms = ms;
            samples->capacity = capacity;
        }
        double before = now_ms();
        for (long i = 0; i < samples->runs_each; i++) {
            int code = sample_run(sample);
            if (code != MODEL_OK)
                return code;
        }
        end = now_ms();
        samples->ms[samples->count++] = (end - before) / (double)samples->runs_each;
    }
    return MODEL_OK;
}

/* Run until the medians of three windows in a row agree within 2 %, or time is up. */
static int warm_up(struct sample *sample, struct samples *samples, double max_seconds)
{
    double end = now_ms() + max_seconds * 1e3;
    double latest = 0, before = 0;
    samples->runs_each = 1;
    while (now_ms() < end) {
        int code = measure(sample, samples, 5, 0.05);
        if (code != MODEL_OK)
            return code;
        qsort(samples->ms, samples->count, sizeof *samples->ms, ascending);
        double median = quantile(samples->ms, samples->count, 0.5);
        double low = median < latest ? median : latest;
        double high = median > latest ? median : latest;
        low = before < low ? before : low;
        high = before > high ? before : high;
        if (high <= 1.02 * low)
            return MODEL_OK;
        before = latest;
        latest = median;
    }
    return MODEL_OK;
}

/* Open the model, with the golden input where there is one, and warm up. */
static int prepare(const struct options *options, struct sample *sample, struct samples *samples)
{
    int code = open_model(options);
    if (code != MODEL_OK)
        return code;
    if (sample_open(sample) != 0 || sample_read_golden(sample, 0) < 0)
        return complain("%s", error_text());
    code = warm_up(sample, samples, options->warmup_seconds);
    if (code != MODEL_OK) {
        complain("%s", error_text());
        return code;
    }
    if (samples->count > 0) {
        double median = quantile(samples->ms, samples->count, 0.5);
        if (median < SHORTEST_SAMPLE_MS)
            samples->runs_each = 1 + (long)(SHORTEST_SAMPLE_MS / (median > 1e-6 ? median : 1e-6));
    }
    return code;
}

static int print_bench(const struct samples *samples, const struct facts *before)
{
    double *sorted = malloc(samples->count * sizeof *sorted);
    if (sorted == NULL)
        return complain("no memory for %zu times", samples->count);
    memcpy(sorted, samples->ms, samples->count * sizeof *sorted);
    qsort(sorted, samples->count, sizeof *sorted, ascending);
    printf("{\"samples_ms\": [");
    for (size_t i = 0; i < samples->count; i++)
        printf("%s%.6f", i > 0 ? ", " : "", samples->ms[i]);
    printf("], \"min_ms\": %.6f, \"p50_ms\": %.6f, \"p90_ms\": %.6f, \"p99_ms\": %.6f", sorted[0],
           quantile(sorted, samples->count, 0.5), quantile(sorted, samples->count, 0.9),
           quantile(sorted, samples->count, 0.99));
    printf(", \"runs_per_sample\": %ld", samples->runs_each);
    printf(", \"peak_memory_bytes\": %llu", facts_peak_memory_bytes());
    printf(", \"threads\": %d, \"device\": {", threads_count());
    facts_print_constant();
    struct facts after = facts_now();
    printf(", \"before\": ");
    facts_print(before);
    printf(", \"after\": ");
    facts_print(&after);
    printf("}}\n");
    free(sorted);
    return MODEL_OK;
}

int bench_command(const struct options *options)
{
    struct sample sample = {0};
    struct samples samples = {0};
    int code = prepare(options, &sample, &samples);
    if (code == MODEL_OK) {
        struct facts before = facts_now();
        code = measure(&sample, &samples, options->runs, options->seconds);
        if (code != MODEL_OK)
            complain("%s", error_text());
        else
            code = print_bench(&samples, &before);
    }
    sample_close(&sample);
    free(samples.ms);
    return code;
}

/* Of how many runs, the latest ones, the times of single calls are kept. */
enum { KEPT_RUNS = 1024 };

static struct {
    double start_ms;
    double *total_ms; /* per call */
    double *kept_ms;  /* per kept run and call */
    long runs;
} profile;

static void add_call_time(int call)
{
    double ms = now_ms() - profile.start_ms;
    profile.total_ms[call] += ms;
    profile.kept_ms[profile.runs % KEPT_RUNS * description.call_count + call] = ms;
    profile.start_ms = now_ms();
}

/* Run with the hook set, so that every kernel's time is added up. */
static int profile_runs(struct sample *sample, const struct options *options)
{
    double end = now_ms() + options->seconds * 1e3;
    profile_after_call = add_call_time;
    int code = MODEL_OK;
    while (code == MODEL_OK && (profile.runs < options->runs || now_ms() < end)) {
        profile.start_ms = now_ms();
        code = sample_run(sample);
        ++profile.runs;
    }
    profile_after_call = NULL;
    return code;
}

/* Mean of the middle half of a call's times: a mean without the runs that the system interrupted,
 * and finer than the clock, which a median is not. */
static double midmean(int call)
{
    static double ms[KEPT_RUNS];
    size_t count = profile.runs < KEPT_RUNS ? (size_t)profile.runs : KEPT_RUNS;
    for (size_t i = 0; i < count; i++)
        ms[i] = profile.kept_ms[i * (size_t)description.call_count + (size_t)call];
    qsort(ms, count, sizeof *ms, ascending);
    size_t cut = count / 4;
    double sum = 0;
    for (size_t i = cut; i < count - cut; i++)
        sum += ms[i];
    return sum / (double)(count - 2 * cut);
}

static void print_profile(void)
{
    printf("{\"runs\": %ld, \"threads\": %d, \"calls\": [", profile.runs, threads_count());
    for (int call = 0; call < description.call_count; call++) {
        printf("%s{\"node\": ", call > 0 ? ", " : "");
        json_string(description.nodes[call]);
        printf(", \"total_ms\": %.6f, \"mean_ms\": %.6f, \"midmean_ms\": %.9f}",
               profile.total_ms[call], profile.total_ms[call] / (double)profile.runs,
               midmean(call));
    }
    printf("]}\n");
}

int profile_command(const struct options *options)
{
    struct sample sample = {0};
    struct samples samples = {0};
    int code = prepare(options, &sample, &samples);
    size_t calls = (size_t)description.call_count + 1;
    profile.total_ms = calloc(calls, sizeof *profile.total_ms);
    profile.kept_ms = calloc(calls * KEPT_RUNS, sizeof *profile.kept_ms);
    if (code == MODEL_OK && (profile.total_ms == NULL || profile.kept_ms == NULL))
        code = complain("%s", "no memory");
    else if (code == MODEL_OK) {
        code = profile_runs(&sample, options);
        if (code != MODEL_OK)
            complain("%s", error_text());
        else
            print_profile();
    }
    free(profile.total_ms);
    free(profile.kept_ms);
    free(samples.ms);
    sample_close(&sample);
    return code;
}
