#include <stdio.h>
#include <stdlib.h>

#include "commands.h"
#include "description.h"
#include "error.h"
#include "json.h"
#include "machine.h"
#include "statistics.h"
#include "threads.h"
#include "timing.h"

/* Of how many runs, the latest ones, the times of single calls are kept. */
enum { KEPT_RUNS = 1024 };

static struct {
    double *call_ms;  /* per call, of the latest run */
    double *total_ms; /* per call */
    double *kept_ms;  /* per kept run and call */
    long runs;
} profile;

/* Run, and add every kernel's time up. */
static int profile_runs(struct sample *sample, const struct options *options)
{
    double end = now_ms() + options->seconds * 1e3;
    int code = MODEL_OK;
    while (code == MODEL_OK && (profile.runs < options->runs || now_ms() < end)) {
        code = machine_time_calls(sample, profile.call_ms);
        for (int call = 0; call < description.call_count; call++) {
            double ms = profile.call_ms[call];
            profile.total_ms[call] += ms;
            profile.kept_ms[profile.runs % KEPT_RUNS * description.call_count + call] = ms;
        }
        ++profile.runs;
    }
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
    sort_ascending(ms, count);
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
    int code = timing_prepare(options, &sample, &samples);
    size_t calls = (size_t)description.call_count + 1;
    profile.call_ms = calloc(calls, sizeof *profile.call_ms);
    profile.total_ms = calloc(calls, sizeof *profile.total_ms);
    profile.kept_ms = calloc(calls * KEPT_RUNS, sizeof *profile.kept_ms);
    if (code == MODEL_OK &&
        (profile.call_ms == NULL || profile.total_ms == NULL || profile.kept_ms == NULL))
        code = complain("%s", "no memory");
    else if (code == MODEL_OK) {
        code = profile_runs(&sample, options);
        if (code != MODEL_OK)
            complain("%s", error_text());
        else
            print_profile();
    }
    free(profile.call_ms);
    free(profile.total_ms);
    free(profile.kept_ms);
    free(samples.ms);
    sample_close(&sample);
    return code;
}
