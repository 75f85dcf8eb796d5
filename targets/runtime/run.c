#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "commands.h"
#include "description.h"
#include "error.h"
#include "sample.h"

static int write_outputs(const struct sample *sample, FILE *file)
{
    for (int i = 0; i < description.output_count; i++) {
        size_t bytes = (size_t)description.outputs[i].bytes;
        if (fwrite(sample->outputs[i], 1, bytes, file) != bytes)
            return -1;
    }
    return 0;
}

/* Refuse a file of a wrong size before it is answered in part. */
static int check_size(FILE *file, const char *path, uint64_t sample_bytes)
{
    struct stat status;
    if (fstat(fileno(file), &status) != 0 || !S_ISREG(status.st_mode))
        return 0;
    uint64_t bytes = (uint64_t)status.st_size;
    if (sample_bytes == 0 ? bytes == 0 : bytes % sample_bytes == 0)
        return 0;
    return complain("%s: %llu bytes are not a whole number of samples of %llu bytes", path,
                    (unsigned long long)bytes, (unsigned long long)sample_bytes);
}

static int answer(struct sample *sample, FILE *input, const char *input_path, FILE *output,
                  const char *output_path)
{
    for (;;) {
        int got = sample_read_inputs(sample, input);
        if (got < 0)
            return complain("%s: %s", input_path, error_text());
        if (got == 0)
            return MODEL_OK;
        int code = sample_run(sample);
        if (code != MODEL_OK) {
            complain("%s", error_text());
            return code;
        }
        if (write_outputs(sample, output) != 0)
            return complain("%s: %s", output_path, strerror(errno));
        if (sample->input_bytes == 0) /* a model without inputs has one answer */
            return MODEL_OK;
    }
}

static int run_files(struct sample *sample, const char *input_path, const char *output_path)
{
    FILE *input = strcmp(input_path, "-") == 0 ? stdin : fopen(input_path, "rb");
    if (input == NULL)
        return complain("%s: %s", input_path, strerror(errno));
    int code = check_size(input, input_path, sample->input_bytes);
    FILE *output = NULL;
    if (code == MODEL_OK) {
        output = strcmp(output_path, "-") == 0 ? stdout : fopen(output_path, "wb");
        if (output == NULL)
            code = complain("%s: %s", output_path, strerror(errno));
    }
    if (output != NULL) {
        /* Tensors are large enough to go to the kernel without another copy. */
        setvbuf(input, NULL, _IONBF, 0);
        setvbuf(output, NULL, _IONBF, 0);
        code = answer(sample, input, input_path, output, output_path);
        if (fclose(output) != 0 && code == MODEL_OK)
            code = complain("%s: %s", output_path, strerror(errno));
    }
    fclose(input);
    return code;
}

int run_command(const struct options *options, const char *input_path, const char *output_path)
{
    int code = open_model(options);
    if (code != MODEL_OK)
        return code;
    struct sample sample = {0};
    if (sample_open(&sample) != 0)
        return complain("%s", error_text());
    code = run_files(&sample, input_path, output_path);
    sample_close(&sample);
    return code;
}
