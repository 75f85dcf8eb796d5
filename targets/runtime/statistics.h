/* What a sample of times says about the times. */
#ifndef STATISTICS_H
#define STATISTICS_H

#include <stddef.h>

void sort_ascending(double *values, size_t count);

/* Quantile of sorted values, linear between neighbours. */
double quantile(const double *sorted, size_t count, double part);

/* P(X <= k), X binomial: `n` trials of probability `p`, 0 < p < 1. */
double binomial_at_most(long k, long n, double p);

/* The largest k for which P(X <= k) is at most `limit`; -1 where there is none. */
long binomial_low(long n, double p, double limit);

/* Ranks, from 1, of the sorted values between which a quantile of the distribution lies with 95 %
 * confidence, whatever the distribution. `low` 0 or `high` > n: no value bounds it there. David and
 * Nagaraja, "Order Statistics", 2003, section 7.1. Values that depend on their neighbours tell less:
 * `dispersion` values count as one. */
struct ranks {
    long low;
    long high;
};
struct ranks quantile_ranks(long n, double part, double dispersion);

/* Of `n` values, how many may be over a limit so that with this confidence no more than a share of
 * 1 - `part` of the distribution is; 0: too few values. The early stopping of MLPerf. */
long early_stopping(long n, double part, double confidence);

/* By how much the number of values below a quantile varies more between consecutive batches than
 * if the values, in the order in which they came, were independent; at least 1. */
double quantile_dispersion(const double *values, size_t count, double part, double at);

enum { WINDOWS = 10 };

/* Medians of ten consecutive tenths, in their order. 0, or -1 below ten values or without memory. */
int window_medians(const double *values, size_t count, double *medians);

/* Probability that independent values rise or fall at least as steadily as these, in either
 * direction: the exact test of Mann, 1945, and Kendall, 1975. */
double trend_probability(const double values[WINDOWS]);

/* By how much they change from first to last, as a share of their median: by the median slope of
 * all pairs, Theil, 1950, and Sen, 1968. */
double trend_change(const double values[WINDOWS]);

#endif
