#include "statistics.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BATCHES = 20, SMALLEST_BATCH = 10, PAIRS = WINDOWS * (WINDOWS - 1) / 2 };

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void sort_ascending(double *values, size_t count)
{
    qsort(values, count, sizeof *values, ascending);
}

double quantile(const double *sorted, size_t count, double part)
{
    double at = part * (double)(count - 1);
    size_t below = (size_t)at;
    size_t above = below + 1 < count ? below + 1 : below;
    return sorted[below] + (at - (double)below) * (sorted[above] - sorted[below]);
}

double binomial_at_most(long k, long n, double p)
{
    if (k < 0)
        return 0;
    if (k >= n)
        return 1;
    if ((double)k > (double)n * p) /* the sum below is for the lower tail */
        return 1 - binomial_at_most(n - k - 1, n, 1 - p);
    double count = (double)n, most = (double)k;
    double term = exp(lgamma(count + 1) - lgamma(most + 1) - lgamma(count - most + 1) +
                      most * log(p) + (count - most) * log1p(-p));
    double sum = term;
    for (double i = most; i > 0 && term > 1e-17 * sum; i--) {
        term *= i / (count - i + 1) * ((1 - p) / p);
        sum += term;
    }
    return sum;
}

long binomial_low(long n, double p, double limit)
{
    long low = -1, high = n; /* right for `low`, wrong for `high` */
    while (high - low > 1) {
        long middle = low + (high - low) / 2;
        if (binomial_at_most(middle, n, p) <= limit)
            low = middle;
        else
            high = middle;
    }
    return low;
}

struct ranks quantile_ranks(long n, double part, double dispersion)
{
    long independent = (long)((double)n / dispersion);
    if (independent < 1)
        return (struct ranks){0, n + 1};
    long low = binomial_low(independent, part, 0.025) + 1;
    long above = binomial_low(independent, 1 - part, 0.025) + 1; /* ranks from the other end */
    double each = (double)n / (double)independent;
    return (struct ranks){(long)((double)low * each), n + 1 - (long)((double)above * each)};
}

long early_stopping(long n, double part, double confidence)
{
    long over = binomial_low(n, 1 - part, 1 - confidence);
    return over > 0 ? over : 0;
}

double quantile_dispersion(const double *values, size_t count, double part, double at)
{
    size_t batch = count / BATCHES;
    if (batch < SMALLEST_BATCH)
        return 1;
    double below[BATCHES] = {0}, mean = 0, squares = 0;
    for (size_t i = 0; i < BATCHES * batch; i++)
        below[i / batch] += values[i] <= at;
    for (int i = 0; i < BATCHES; i++)
        mean += below[i] / BATCHES;
    for (int i = 0; i < BATCHES; i++)
        squares += (below[i] - mean) * (below[i] - mean);
    double dispersion = squares / (BATCHES - 1) / ((double)batch * part * (1 - part));
    return dispersion > 1 ? dispersion : 1;
}

int window_medians(const double *values, size_t count, double *medians)
{
    if (count < WINDOWS)
        return -1;
    double *window = malloc((count / WINDOWS + 1) * sizeof *window);
    if (window == NULL)
        return -1;
    for (size_t i = 0; i < WINDOWS; i++) {
        size_t start = count / WINDOWS * i + count % WINDOWS * i / WINDOWS;
        size_t end = count / WINDOWS * (i + 1) + count % WINDOWS * (i + 1) / WINDOWS;
        memcpy(window, values + start, (end - start) * sizeof *window);
        sort_ascending(window, end - start);
        medians[i] = quantile(window, end - start, 0.5);
    }
    free(window);
    return 0;
}

/* Of all orders of ten values, the share that has at most so many pairs in the wrong order. */
static double share_of_orders(int inversions)
{
    double orders[PAIRS + 1] = {1}; /* with exactly so many */
    for (int values = 2; values <= WINDOWS; values++) {
        double longer[PAIRS + 1] = {0};
        for (int i = 0; i <= PAIRS; i++)
            for (int moved = 0; moved < values && moved <= i; moved++)
                longer[i] += orders[i - moved] / values;
        memcpy(orders, longer, sizeof orders);
    }
    double share = 0;
    for (int i = 0; i <= inversions; i++)
        share += orders[i];
    return share;
}

double trend_probability(const double values[WINDOWS])
{
    int score = 0;
    for (int i = 0; i < WINDOWS; i++)
        for (int j = 0; j < i; j++)
            score += (values[i] > values[j]) - (values[i] < values[j]);
    double probability = 2 * share_of_orders((PAIRS - abs(score)) / 2);
    return probability < 1 ? probability : 1;
}

double trend_change(const double values[WINDOWS])
{
    double slopes[PAIRS], sorted[WINDOWS];
    int count = 0;
    for (int i = 0; i < WINDOWS; i++)
        for (int j = 0; j < i; j++)
            slopes[count++] = (values[i] - values[j]) / (i - j);
    sort_ascending(slopes, PAIRS);
    memcpy(sorted, values, sizeof sorted);
    sort_ascending(sorted, WINDOWS);
    return (WINDOWS - 1) * quantile(slopes, PAIRS, 0.5) / quantile(sorted, WINDOWS, 0.5);
}
