/* Facts about the device that explain a measurement. */
#ifndef FACTS_H
#define FACTS_H

/* What does not change while the device runs: `"kernel": …, "cpu": …` without braces. */
void facts_print_constant(void);

enum { FACT_TEXT_BYTES = 64 };

/* What may change: null in JSON where the device does not tell. */
struct facts {
    char governor[FACT_TEXT_BYTES];
    double frequency_khz;
    double temperature_celsius;
    char throttled[FACT_TEXT_BYTES]; /* flags of a Raspberry Pi's firmware, hexadecimal */
    double throttle_count;           /* events that an x86 CPU counted since it started */
};

/* The most memory that this process held at any time, its code and the weights included; 0 where the
 * system does not say. */
unsigned long long facts_peak_memory_bytes(void);

struct facts facts_now(void);

/* A JSON object. */
void facts_print(const struct facts *facts);

#endif
