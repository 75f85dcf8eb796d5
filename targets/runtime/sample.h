/* One sample: memory for all inputs and outputs, and its bytes in files. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <stdint.h>
#include <stdio.h>

struct sample {
    void **inputs;
    void **outputs;
    uint64_t input_bytes; /* of all inputs together */
    uint64_t output_bytes;
};

/* Allocate, filled with zeros. 0, or -1 with error_text() set. */
int sample_open(struct sample *sample);

void sample_close(struct sample *sample);

/* Read all inputs, one behind the other. 1, 0 at the end of the file, or -1 with error_text(). */
int sample_read_inputs(struct sample *sample, FILE *file);

/* Read the inputs from golden/INDEX.in beside the executable: 1, 0 where there is no such file,
 * or -1 with error_text() set. */
int sample_read_golden(struct sample *sample, int index);

/* 0, or -1 with error_text() set. */
int sample_run(struct sample *sample);

#endif
