#include "mlperf.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "json.h"
#include "model.h"
#include "statistics.h"
#include "timing.h"

/* github.com/mlcommons/inference_policies, inference_rules.adoc of 23 July 2026: section
 * "Scenarios" and appendix "Early Stopping Criterion" with d = 0, c = 0.99. */
#ifndef MLPERF_SECONDS /* tests have less patience */
#define MLPERF_SECONDS 600
#endif
static const double TAIL = 0.9, INFERRED_TAIL = 0.99, CONFIDENCE = 0.99;

static long over_latency(long queries, double part)
{
    return early_stopping(queries, part, CONFIDENCE);
}

/* Latencies in nanoseconds, counted: ten minutes of short ones would be gigabytes. A bucket is 1/1024
 * of a power of two wide. */
enum { FINE_BITS = 10, FINE = 1 << FINE_BITS, BUCKETS = (64 - FINE_BITS + 1) * FINE };

static size_t bucket_of(uint64_t ns)
{
    int shift = 0;
    while (ns >> shift >= 2 * FINE)
        shift++;
    return (size_t)shift * FINE + (size_t)(ns >> shift);
}

/* The most that falls into a bucket. */
static double most_ms(size_t bucket)
{
    size_t shift = bucket < 2 * FINE ? 0 : bucket / FINE - 1;
    double next = (double)(bucket - shift * FINE + 1);
    return (ldexp(next, (int)shift) - 1) * 1e-6;
}

/* The value with so many others at or above it, itself included. */
static double from_the_top(const uint32_t *buckets, long rank)
{
    size_t bucket = BUCKETS;
    for (long seen = 0; bucket > 0 && seen < rank;)
        seen += buckets[--bucket];
    return most_ms(bucket);
}

static int measure(struct sample *sample, struct mlperf *mlperf, uint32_t *buckets,
                   struct conditions *conditions)
{
    double start = now_ms(), end = start, sum_ms = 0;
    int code = MODEL_OK;
    while (code == MODEL_OK && (end - start < MLPERF_SECONDS * 1e3 ||
                                over_latency(mlperf->queries, TAIL) == 0)) {
        double before = now_ms();
        code = sample_run(sample);
        end = now_ms();
        sum_ms += end - before;
        buckets[bucket_of((uint64_t)((end - before) * 1e6))]++;
        mlperf->queries++;
        if (code == MODEL_OK)
            code = timing_look(conditions, sample, end, end - before, 1);
    }
    mlperf->seconds = (end - start) * 1e-3;
    mlperf->mean_ms = sum_ms / (double)mlperf->queries;
    return code;
}

static long rank_from_the_top(long queries, double part)
{
    return queries - (long)((double)queries * part);
}

int mlperf_measure(struct sample *sample, struct mlperf *mlperf)
{
    struct conditions conditions;
    memset(mlperf, 0, sizeof *mlperf);
    uint32_t *buckets = calloc(BUCKETS, sizeof *buckets);
    if (buckets == NULL) {
        error_set("no memory for %d counts", (int)BUCKETS);
        return MODEL_UNUSABLE;
    }
    conditions_begin(&conditions);
    int code = timing_settle(sample, 1);
    if (code == MODEL_OK)
        code = measure(sample, mlperf, buckets, &conditions);
    if (code == MODEL_OK) {
        conditions_end(&conditions);
        judge_conditions(&mlperf->judgement, &conditions);
        long over = over_latency(mlperf->queries, TAIL);
        long over_99 = over_latency(mlperf->queries, INFERRED_TAIL);
        mlperf->discarded = over - 1;
        mlperf->estimate_ms = from_the_top(buckets, over);
        mlperf->estimate_99_ms = over_99 > 0 ? from_the_top(buckets, over_99) : NAN;
        mlperf->p90_ms = from_the_top(buckets, rank_from_the_top(mlperf->queries, TAIL));
        mlperf->p99_ms = from_the_top(buckets, rank_from_the_top(mlperf->queries, INFERRED_TAIL));
    }
    free(buckets);
    return code;
}

static void print_ms(const char *key, double ms)
{
    printf(", \"%s\": ", key);
    json_number(ms);
}

void mlperf_print(const struct mlperf *mlperf, int anyway)
{
    int refused = !anyway && mlperf->judgement.count > 0;
    printf("{\"scenario\": \"SingleStream\", \"percentile\": %g, \"confidence\": %g", TAIL,
           CONFIDENCE);
    printf(", \"min_duration_s\": %g", (double)MLPERF_SECONDS);
    printf(", \"duration_s\": %.3f, \"queries\": %ld, \"discarded\": %ld", mlperf->seconds,
           mlperf->queries, mlperf->discarded);
    print_ms("early_stopping_p90_ms", refused ? NAN : mlperf->estimate_ms);
    print_ms("early_stopping_p99_ms", refused ? NAN : mlperf->estimate_99_ms);
    print_ms("p90_ms", refused ? NAN : mlperf->p90_ms);
    print_ms("p99_ms", refused ? NAN : mlperf->p99_ms);
    print_ms("mean_ms", refused ? NAN : mlperf->mean_ms);
    printf(", \"refused\": ");
    judgement_print(&mlperf->judgement);
    putchar('}');
}
