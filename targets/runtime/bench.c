#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "error.h"
#include "facts.h"
#include "json.h"
#include "judgement.h"
#include "machine.h"
#include "mlperf.h"
#include "statistics.h"
#include "sustained.h"
#include "threads.h"
#include "timing.h"

enum { MOST_ATTEMPTS = 3 };

struct bench {
    struct samples samples;
    struct conditions conditions;
    struct judgement judgement;
    double windows_ms[WINDOWS];
    bool has_windows;
    int attempts;
    unsigned long long peak_memory_bytes; /* before there are many times to keep */
    struct mlperf mlperf;
    struct sustained sustained;
};

static int measure_once(struct bench *bench, struct sample *sample, const struct options *options)
{
    conditions_begin(&bench->conditions);
    int code = timing_measure(sample, &bench->samples, options->runs, options->seconds,
                              &bench->conditions);
    if (code != MODEL_OK)
        return code;
    conditions_end(&bench->conditions);
    memset(&bench->judgement, 0, sizeof bench->judgement);
    judge_conditions(&bench->judgement, &bench->conditions);
    bench->has_windows =
        window_medians(bench->samples.ms, bench->samples.count, bench->windows_ms) == 0;
    if (bench->has_windows)
        judge_windows(&bench->judgement, bench->windows_ms);
    return MODEL_OK;
}

/* Measure, again where the first time was disturbed, and then what else was asked for. */
static int measure_all(struct bench *bench, struct sample *sample, const struct options *options)
{
    int code = timing_settle(sample, 1);
    bench->peak_memory_bytes = facts_peak_memory_bytes();
    for (bool again = true; again && code == MODEL_OK;) {
        if (bench->attempts++ > 0)
            code = timing_warm_up(sample, &bench->samples, options->warmup_seconds);
        if (code == MODEL_OK)
            code = measure_once(bench, sample, options);
        again = !options->anyway && bench->judgement.count > 0 && !bench->judgement.lasting &&
                bench->attempts < MOST_ATTEMPTS;
    }
    if (code == MODEL_OK && options->mlperf)
        code = mlperf_measure(sample, &bench->mlperf);
    if (code == MODEL_OK && options->sustained_minutes > 0)
        code = sustained_measure(sample, &bench->sustained, options->sustained_minutes,
                                 bench->samples.runs_each);
    return code == MODEL_OK ? machine_time_rest(sample) : code;
}

static const struct {
    const char *name;
    double part;
} QUANTILES[] = {{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}};
enum { QUANTILE_COUNT = sizeof QUANTILES / sizeof *QUANTILES };

static void print_interval(const struct samples *samples, const double *sorted, double part)
{
    double at = quantile(sorted, samples->count, part);
    double dispersion = quantile_dispersion(samples->ms, samples->count, part, at);
    long count = (long)samples->count;
    struct ranks ranks = quantile_ranks(count, part, dispersion);
    if (ranks.low < 1) {
        printf("null");
        return;
    }
    printf("[%.6f, ", sorted[ranks.low - 1]);
    if (ranks.high <= count)
        printf("%.6f]", sorted[ranks.high - 1]);
    else
        printf("null]");
}

static void print_figures(const struct bench *bench, const double *sorted, bool refused)
{
    const struct samples *samples = &bench->samples;
    printf("], \"min_ms\": %.6f", sorted[0]);
    for (int i = 0; i < QUANTILE_COUNT; i++)
        if (refused)
            printf(", \"%s_ms\": null", QUANTILES[i].name);
        else
            printf(", \"%s_ms\": %.6f", QUANTILES[i].name,
                   quantile(sorted, samples->count, QUANTILES[i].part));
    printf(", \"intervals_ms\": {");
    for (int i = 0; i < QUANTILE_COUNT; i++) {
        printf("%s\"%s\": ", i > 0 ? ", " : "", QUANTILES[i].name);
        if (refused)
            printf("null");
        else
            print_interval(samples, sorted, QUANTILES[i].part);
    }
    printf("}, \"windows_ms\": [");
    for (int i = 0; bench->has_windows && i < WINDOWS; i++)
        printf("%s%.6f", i > 0 ? ", " : "", bench->windows_ms[i]);
    printf("], \"refused\": ");
    judgement_print(&bench->judgement);
}

static int print_bench(const struct bench *bench, const struct options *options)
{
    const struct samples *samples = &bench->samples;
    double *sorted = malloc(samples->count * sizeof *sorted);
    if (sorted == NULL)
        return complain("no memory for %zu times", samples->count);
    memcpy(sorted, samples->ms, samples->count * sizeof *sorted);
    sort_ascending(sorted, samples->count);
    bool refused = !options->anyway && bench->judgement.count > 0;
    printf("{\"samples_ms\": [");
    for (size_t i = 0; i < samples->count; i++)
        printf("%s%.6f", i > 0 ? ", " : "", samples->ms[i]);
    print_figures(bench, sorted, refused);
    free(sorted);
    printf(", \"attempts\": %d, \"runs_per_sample\": %ld", bench->attempts, samples->runs_each);
    printf(", \"peak_memory_bytes\": %llu", bench->peak_memory_bytes);
    printf(", \"threads\": %d, \"device\": {", threads_count());
    facts_print_constant();
    machine_print(refused);
    printf("}, \"conditions\": ");
    conditions_print(&bench->conditions);
    printf(", \"sustained\": ");
    sustained_print(&bench->sustained);
    printf(", \"mlperf\": ");
    if (options->mlperf)
        mlperf_print(&bench->mlperf, options->anyway);
    else
        printf("null");
    printf("}\n");
    return MODEL_OK;
}

int bench_command(const struct options *options)
{
    static struct bench bench;
    struct sample sample = {0};
    int code = timing_prepare(options, &sample, &bench.samples);
    if (code == MODEL_OK) {
        code = measure_all(&bench, &sample, options);
        if (code != MODEL_OK)
            complain("%s", error_text());
        else
            code = print_bench(&bench, options);
    }
    sample_close(&sample);
    free(bench.samples.ms);
    free(bench.sustained.windows);
    return code;
}
