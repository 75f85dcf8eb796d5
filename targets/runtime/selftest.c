#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "beside.h"
#include "checksums.h"
#include "commands.h"
#include "description.h"
#include "error.h"
#include "json.h"
#include "sample.h"

/* How far one output was off, over all samples. */
struct difference {
    double max_abs_error; /* infinite where only one of both is NaN or infinite */
    uint64_t different;   /* elements that are not bit-equal */
};

static int64_t load_integer(const char *dtype, const uint8_t *bytes, size_t item)
{
    int64_t value = 0;
    memcpy(&value, bytes, item);
    if (dtype[0] == 'i' && item < sizeof value) {
        int64_t sign = (int64_t)1 << (8 * item - 1);
        value = (value ^ sign) - sign;
    }
    return value;
}

static double abs_error(const char *dtype, const uint8_t *a, const uint8_t *b, size_t item)
{
    if (strcmp(dtype, "float32") != 0) {
        int64_t x = load_integer(dtype, a, item);
        int64_t y = load_integer(dtype, b, item);
        return (double)(x > y ? (uint64_t)x - (uint64_t)y : (uint64_t)y - (uint64_t)x);
    }
    float x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    if (x == y || (isnan(x) && isnan(y)))
        return 0;
    double error = fabs((double)x - (double)y);
    return isnan(error) ? INFINITY : error;
}

static size_t item_bytes(const char *dtype)
{
    return strstr(dtype, "64") != NULL   ? 8
           : strstr(dtype, "32") != NULL ? 4
           : strstr(dtype, "16") != NULL ? 2
                                         : 1;
}

static void compare(struct difference *difference, const struct model_tensor *tensor,
                    const uint8_t *got, const uint8_t *wanted)
{
    size_t item = item_bytes(tensor->dtype);
    for (uint64_t at = 0; at < tensor->bytes; at += item) {
        if (memcmp(got + at, wanted + at, item) == 0)
            continue;
        difference->different++;
        double error = abs_error(tensor->dtype, got + at, wanted + at, item);
        if (error > difference->max_abs_error)
            difference->max_abs_error = error;
    }
}

static bool within(const struct difference *difference, double tolerance)
{
    return tolerance == 0 ? difference->different == 0 : difference->max_abs_error <= tolerance;
}

/* Read golden/INDEX.out. All its bytes, or NULL with error_text() set. */
static uint8_t *read_wanted(int index, uint64_t bytes)
{
    char name[64], path[BESIDE_BYTES] = "";
    snprintf(name, sizeof name, "golden/%d.out", index);
    FILE *file = beside_executable(path, name) == 0 ? fopen(path, "rb") : NULL;
    if (file == NULL) {
        error_set("%s: %s", path, strerror(errno));
        return NULL;
    }
    uint8_t *wanted = malloc((size_t)bytes + 1);
    bool whole = wanted != NULL && fread(wanted, 1, (size_t)bytes + 1, file) == bytes;
    fclose(file);
    if (!whole) {
        error_set("%s does not hold %llu bytes", path, (unsigned long long)bytes);
        free(wanted);
        return NULL;
    }
    return wanted;
}

/* Run one golden sample. MODEL_OK, or an exit code with error_text() set. */
static int check_sample(struct sample *sample, int index, struct difference *differences)
{
    uint8_t *wanted = read_wanted(index, sample->output_bytes);
    if (wanted == NULL)
        return MODEL_UNUSABLE;
    int code = sample_run(sample);
    const uint8_t *at = wanted;
    for (int i = 0; code == MODEL_OK && i < description.output_count; i++) {
        compare(&differences[i], &description.outputs[i], sample->outputs[i], at);
        at += description.outputs[i].bytes;
    }
    free(wanted);
    return code;
}

static bool print_result(int file_count, int sample_count, const struct difference *differences)
{
    bool passed = true;
    for (int i = 0; i < description.output_count; i++)
        passed = passed && within(&differences[i], description.tolerances[i]);
    printf("{\"passed\": %s, \"files\": %d, \"samples\": %d, \"outputs\": [",
           passed ? "true" : "false", file_count, sample_count);
    for (int i = 0; i < description.output_count; i++) {
        printf("%s{\"name\": ", i > 0 ? ", " : "");
        json_string(description.outputs[i].name);
        printf(", \"max_abs_error\": ");
        json_number(differences[i].max_abs_error);
        printf(", \"different_elements\": %llu", (unsigned long long)differences[i].different);
        printf(", \"tolerance\": ");
        json_number(description.tolerances[i]);
        printf(", \"passed\": %s}",
               within(&differences[i], description.tolerances[i]) ? "true" : "false");
    }
    printf("]}\n");
    return passed;
}

int selftest_command(const struct options *options)
{
    int files;
    int code = checksums_check(&files);
    if (code == MODEL_OK)
        code = open_model(options);
    if (code != MODEL_OK)
        return code;
    struct sample sample = {0};
    struct difference *differences =
        calloc((size_t)description.output_count + 1, sizeof *differences);
    if (differences == NULL || sample_open(&sample) != 0) {
        free(differences);
        return complain("%s", "no memory");
    }
    int count = 0;
    int found = 1;
    while (code == MODEL_OK && (found = sample_read_golden(&sample, count)) == 1) {
        code = check_sample(&sample, count, differences);
        count++;
    }
    if (code != MODEL_OK || found < 0)
        code = (complain("%s", error_text()), code != MODEL_OK ? code : MODEL_UNUSABLE);
    else if (count == 0)
        code = complain("%s", "there is no golden/0.in beside the executable");
    else
        code = print_result(files, count, differences) ? MODEL_OK : MODEL_FAILED;
    sample_close(&sample);
    free(differences);
    return code;
}
