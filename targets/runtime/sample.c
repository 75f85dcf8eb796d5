#include "sample.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "beside.h"
#include "description.h"
#include "error.h"

static void **allocate(const struct model_tensor *tensors, int count, uint64_t *total_bytes)
{
    void **memory = calloc((size_t)count + 1, sizeof *memory);
    *total_bytes = 0;
    for (int i = 0; memory != NULL && i < count; i++) {
        uint64_t bytes = (tensors[i].bytes / MODEL_ALIGNMENT + 1) * MODEL_ALIGNMENT;
        if (bytes <= SIZE_MAX)
            memory[i] = aligned_alloc(MODEL_ALIGNMENT, (size_t)bytes);
        if (memory[i] == NULL)
            error_set("no memory for %s", tensors[i].name);
        else
            memset(memory[i], 0, (size_t)bytes);
        *total_bytes += tensors[i].bytes;
    }
    return memory;
}

static int complete(void *const *memory, int count)
{
    for (int i = 0; memory != NULL && i < count; i++)
        if (memory[i] == NULL)
            return 0;
    return memory != NULL;
}

int sample_open(struct sample *sample)
{
    error_set("no memory");
    sample->inputs = allocate(description.inputs, description.input_count, &sample->input_bytes);
    sample->outputs =
        allocate(description.outputs, description.output_count, &sample->output_bytes);
    if (complete(sample->inputs, description.input_count) &&
        complete(sample->outputs, description.output_count))
        return 0;
    sample_close(sample);
    return -1;
}

void sample_close(struct sample *sample)
{
    for (int i = 0; sample->inputs != NULL && i < description.input_count; i++)
        free(sample->inputs[i]);
    for (int i = 0; sample->outputs != NULL && i < description.output_count; i++)
        free(sample->outputs[i]);
    free(sample->inputs);
    free(sample->outputs);
    memset(sample, 0, sizeof *sample);
}

int sample_read_inputs(struct sample *sample, FILE *file)
{
    uint64_t done = 0;
    for (int i = 0; i < description.input_count; i++) {
        size_t bytes = (size_t)description.inputs[i].bytes;
        size_t got = fread(sample->inputs[i], 1, bytes, file);
        done += got;
        if (got == bytes)
            continue;
        if (ferror(file)) {
            error_set("%s", strerror(errno));
            return -1;
        }
        if (done == 0)
            return 0;
        error_set("the last sample has %llu bytes instead of %llu", (unsigned long long)done,
                  (unsigned long long)sample->input_bytes);
        return -1;
    }
    return 1;
}

int sample_read_golden(struct sample *sample, int index)
{
    char name[64], path[BESIDE_BYTES];
    snprintf(name, sizeof name, "golden/%d.in", index);
    if (beside_executable(path, name) != 0)
        return 0;
    FILE *file = fopen(path, "rb");
    if (file == NULL && errno == ENOENT)
        return 0;
    if (file == NULL) {
        error_set("%s: %s", path, strerror(errno));
        return -1;
    }
    int got = sample_read_inputs(sample, file);
    int whole = got == 1 && fgetc(file) == EOF;
    fclose(file);
    if (whole || (got == 0 && sample->input_bytes == 0))
        return 1;
    error_set("%s does not hold %llu bytes", path, (unsigned long long)sample->input_bytes);
    return -1;
}

int sample_run(struct sample *sample)
{
    return model_run((const void *const *)sample->inputs, sample->outputs);
}
