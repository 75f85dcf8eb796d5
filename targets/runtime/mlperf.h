/* The single-stream scenario of MLPerf Inference. */
#ifndef MLPERF_H
#define MLPERF_H

#include "judgement.h"
#include "sample.h"

struct mlperf {
    long queries;
    double seconds;
    double mean_ms;
    double p90_ms, p99_ms;           /* of the queries; at most 0.1 % too high, as all quantiles */
    long discarded;                  /* the highest latencies that early stopping passes over */
    double estimate_ms;              /* of the 90th percentile, with 99 % confidence */
    double estimate_99_ms;           /* of the 99th; NAN where there are too few queries */
    struct judgement judgement;
};

/* Send queries, each as soon as the one before is answered. MODEL_OK, or an error code. */
int mlperf_measure(struct sample *sample, struct mlperf *mlperf);

/* A JSON object. */
void mlperf_print(const struct mlperf *mlperf, int anyway);

#endif
