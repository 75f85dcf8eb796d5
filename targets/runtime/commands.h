/* What the executable can be asked to do. Every command prints one JSON document on stdout, or a
 * message on stderr, and returns the exit code. */
#ifndef COMMANDS_H
#define COMMANDS_H

#include <stdint.h>

struct options {
    const char *weights; /* NULL: beside the executable */
    const char *cache;   /* file for decoded weights; NULL: memory */
    int threads;         /* 0: as many as the target has cores */
    const char *cores;   /* NULL: where the system puts them */
    double seconds;      /* measure at least so long */
    long runs;           /* and at least so often */
    double warmup_seconds; /* warm up at most so long; 0: not at all */
    int anyway;            /* measure once, and print the figures whatever disturbed them */
    int mlperf;            /* measure by the single-stream rule of MLPerf */
    double sustained_minutes; /* afterwards run so long without a pause; 0: not */
};

int info_command(const struct options *options);

/* Check the files that SHA256SUMS lists, where it lies beside the executable; then compare the
 * answers to golden/N.in with golden/N.out, N = 0, 1, … */
int selftest_command(const struct options *options);

int bench_command(const struct options *options);

int profile_command(const struct options *options);

/* Answer the samples of one file in another; `-` is stdin or stdout. */
int run_command(const struct options *options, const char *input_path, const char *output_path);

/* Print a message on stderr as `model: …` and return MODEL_UNUSABLE. */
__attribute__((format(printf, 1, 2))) int complain(const char *format, ...);

/* Open the model as the options say. MODEL_OK, or an exit code with the message printed. That the
 * cache cannot be used is a message only. */
int open_model(const struct options *options);

#endif
