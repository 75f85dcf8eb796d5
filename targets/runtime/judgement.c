#include "judgement.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "json.h"

/* docs/measuring.md says why these. All are shares. */
static const double MOST_WAITED = 0.25;    /* of the time, by a thread, for a core */
static const double MOST_STOLEN = 0.25;    /* of the threads' time, by the hypervisor */
static const double MOST_OTHER_LOAD = 0.75; /* of all cores, by other programs */
static const double MOST_FALL = 0.25;      /* of the frequency */
static const double MOST_APART = 0.25;     /* of the least window's median */
static const double MOST_DRIFT = 0.1;      /* of the median, from the first window to the last */
static const double CHANCE = 0.01;         /* a trend this probable by chance is none */

__attribute__((format(printf, 2, 3))) static void add(struct judgement *judgement,
                                                      const char *format, ...)
{
    if (judgement->count == MOST_REASONS)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(judgement->reasons[judgement->count++], REASON_BYTES, format, arguments);
    va_end(arguments);
}

static void judge_throttling(struct judgement *judgement, const struct conditions *conditions)
{
    static const char *const FLAGS[] = {"low voltage", "capped frequency", "throttling",
                                        "the soft temperature limit"};
    char text[REASON_BYTES / 2] = "";
    int length = 0;
    for (int bit = 0; conditions->throttle_flags > 0 && bit < 4; bit++)
        if (conditions->throttle_flags >> bit & 1)
            length += snprintf(text + length, sizeof text - (size_t)length, "%s%s",
                               length > 0 ? ", " : "", FLAGS[bit]);
    if (length > 0)
        add(judgement, "throttled: the firmware reported %s (0x%lx)", text,
            (unsigned long)conditions->throttle_flags);
    if (conditions->throttle_events > 0)
        add(judgement, "throttled: the CPU counted %.0f thermal throttle events",
            conditions->throttle_events);
    if (conditions->cooling_level > 0 && isnan(conditions->hottest_celsius))
        add(judgement, "throttled: the system slowed the CPU down to cool it (level %.0f)",
            conditions->cooling_level);
    else if (conditions->cooling_level > 0)
        add(judgement, "throttled: the system slowed the CPU down to cool it (level %.0f, %.0f °C)",
            conditions->cooling_level, conditions->hottest_celsius);
    judgement->lasting = judgement->count > 0;
}

static void judge_clock(struct judgement *judgement, const struct clock_range *clock,
                        const char *whose)
{
    if (clock->fell_to_khz < (1 - MOST_FALL) * clock->fell_from_khz)
        add(judgement, "unstable: the %sfrequency fell from %.0f to %.0f MHz", whose,
            clock->fell_from_khz * 1e-3, clock->fell_to_khz * 1e-3);
}

/* What NVML calls a reason, bit by bit; those that are harmless have no name. */
static const char *const GPU_REASONS[] = {
    NULL,
    NULL,
    "the power cap",
    "a slowdown of its hardware",
    "the clock of its group",
    "heat, by software",
    "heat, by hardware",
    "the power supply",
    "the display's clock",
};
enum { GPU_REASON_COUNT = sizeof GPU_REASONS / sizeof *GPU_REASONS };

static void judge_gpu(struct judgement *judgement, const struct gpu_conditions *gpu)
{
    long reasons = gpu->throttle_reasons > 0 ? gpu->throttle_reasons & ~HARMLESS_REASONS : 0;
    char text[REASON_BYTES / 2] = "";
    int length = 0;
    for (int bit = 0; bit < GPU_REASON_COUNT; bit++)
        if ((reasons >> bit & 1) != 0 && length < (int)sizeof text)
            length += snprintf(text + length, sizeof text - (size_t)length, "%s%s",
                               length > 0 ? "; " : "", GPU_REASONS[bit]);
    if (reasons != 0)
        add(judgement, "throttled: the GPU's clock was held down by %s (0x%lx)",
            length > 0 ? text : "a reason without a name here", (unsigned long)reasons);
    if (gpu->cooling_level > 0)
        add(judgement, "throttled: the system slowed the GPU down to cool it (level %.0f)",
            gpu->cooling_level);
    judgement->lasting = judgement->lasting || reasons != 0 || gpu->cooling_level > 0;
    judge_clock(judgement, &gpu->clock, "GPU's ");
}

static void judge_load(struct judgement *judgement, const struct load *load)
{
    if (load->threads > load->own_cores) { /* then they wait for each other */
        if (load->other_cores > MOST_WAITED * load->cores)
            add(judgement, "other load: other programs used %.1f of %d cores, and %d threads share "
                "%d", load->other_cores, load->cores, load->threads, load->own_cores);
    } else if (load->waited_share > MOST_WAITED && isnan(load->other_cores))
        add(judgement, "other load: a thread waited for a core %.0f %% of the time",
            100 * load->waited_share);
    else if (load->waited_share > MOST_WAITED)
        add(judgement, "other load: a thread waited for a core %.0f %% of the time; other programs "
            "used %.1f of %d cores", 100 * load->waited_share, load->other_cores, load->cores);
    else if (load->other_cores > MOST_OTHER_LOAD * load->cores)
        add(judgement, "other load: other programs used %.1f of %d cores, and memory and caches "
            "with them", load->other_cores, load->cores);
    if (load->stolen_share > MOST_STOLEN)
        add(judgement, "other load: the hypervisor took %.0f %% of the time of its cores",
            100 * load->stolen_share);
}

void judge_conditions(struct judgement *judgement, const struct conditions *conditions)
{
    judge_throttling(judgement, conditions);
    if (conditions->has_gpu)
        judge_gpu(judgement, &conditions->gpu);
    judge_clock(judgement, &conditions->clock, "");
    judge_load(judgement, &conditions->load);
}

void judge_windows(struct judgement *judgement, const double medians_ms[WINDOWS])
{
    double least = medians_ms[0], most = medians_ms[0];
    for (int i = 1; i < WINDOWS; i++) {
        least = fmin(least, medians_ms[i]);
        most = fmax(most, medians_ms[i]);
    }
    if (most > (1 + MOST_APART) * least)
        add(judgement, "unstable: the medians of its ten windows go from %.4g to %.4g ms, %.0f %% "
            "apart", least, most, 100 * (most / least - 1));
    double change = trend_change(medians_ms);
    double probability = trend_probability(medians_ms);
    if (fabs(change) > MOST_DRIFT && probability < CHANCE)
        add(judgement, "drifting: its windows' medians %s by %.0f %% from the first to the last, "
            "which happens by chance with a probability of %.2g", change > 0 ? "rose" : "fell",
            100 * fabs(change), probability);
}

void judgement_print(const struct judgement *judgement)
{
    putchar('[');
    for (int i = 0; i < judgement->count; i++) {
        printf("%s", i > 0 ? ", " : "");
        json_string(judgement->reasons[i]);
    }
    putchar(']');
}
