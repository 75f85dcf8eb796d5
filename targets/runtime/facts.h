/* Facts about the device that explain a measurement. */
#ifndef FACTS_H
#define FACTS_H

/* What does not change while the device runs: `"kernel": …, "cpu": …` without braces. */
void facts_print_constant(void);

/* The most memory that this process held at any time, its code and the weights included; 0 where the
 * system does not say. */
unsigned long long facts_peak_memory_bytes(void);

#endif
