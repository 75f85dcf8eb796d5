/* Whether a measurement can be defended. */
#ifndef JUDGEMENT_H
#define JUDGEMENT_H

#include <stdbool.h>
#include <stddef.h>

#include "conditions.h"
#include "statistics.h"

enum { MOST_REASONS = 8, REASON_BYTES = 256 };

/* What speaks against it, a sentence each. */
struct judgement {
    char reasons[MOST_REASONS][REASON_BYTES];
    int count;
    bool lasting; /* measuring again at once is of no use */
};

/* What the conditions say. */
void judge_conditions(struct judgement *judgement, const struct conditions *conditions);

/* What the medians of consecutive windows say. */
void judge_windows(struct judgement *judgement, const double medians_ms[WINDOWS]);

/* A JSON array. */
void judgement_print(const struct judgement *judgement);

#endif
