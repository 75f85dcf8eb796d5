/* machine.h where a GPU runs the model. */
#include "machine.h"

#include <math.h>
#include <stdio.h>

#include "conditions.h"
#include "error.h"
#include "executor_cuda.h"
#include "gpu_watch.h"
#include "json.h"
#include "launches.h"
#include "model.h"
#include "statistics.h"
#include "timing.h"

/* What the times of kernels leave out is a median of so many runs, fewer where they take long. */
enum { FEWEST_RUNS = 5, MOST_RUNS = 101, LONG_MS = 500 };

static double wall_ms = NAN, copies_ms = NAN;

int machine_prepare(struct sample *sample)
{
    gpu_watch_open(executor_gpu()->pci_bus_id);
    conditions_read_gpu = gpu_watch_read;
    return sample_run(sample); /* puts its inputs where the timed kernels find them */
}

int machine_time_runs(struct sample *sample, long runs, double *ms)
{
    (void)sample;
    int code = MODEL_OK;
    *ms = 0;
    for (long i = 0; code == MODEL_OK && i < runs; i++) {
        double once_ms = 0;
        code = executor_time_kernels(&once_ms);
        *ms += once_ms;
    }
    return code;
}

int machine_time_calls(struct sample *sample, double *ms)
{
    (void)sample;
    return executor_time_calls(ms);
}

static int time_wall(struct sample *sample, double *ms)
{
    double start = now_ms();
    int code = sample_run(sample);
    *ms = now_ms() - start;
    return code;
}

static int time_copies(struct sample *sample, double *ms)
{
    (void)sample;
    return executor_time_copies(ms);
}

static int median(int (*time)(struct sample *sample, double *ms), struct sample *sample, double *ms)
{
    double times[MOST_RUNS], start = now_ms();
    int code = time(sample, &times[0]); /* the first does not count */
    size_t count = 0;
    while (code == MODEL_OK && count < MOST_RUNS &&
           (count < FEWEST_RUNS || now_ms() - start < LONG_MS))
        code = time(sample, &times[count++]);
    sort_ascending(times, count);
    *ms = count > 0 ? quantile(times, count, 0.5) : NAN;
    return code;
}

int machine_time_rest(struct sample *sample)
{
    int code = median(time_wall, sample, &wall_ms);
    return code == MODEL_OK ? median(time_copies, sample, &copies_ms) : code;
}

static void print_text(const char *key, const char *text)
{
    printf("\"%s\": ", key);
    json_string(text[0] != '\0' ? text : NULL);
}

static void print_gpu(const struct gpu *gpu)
{
    print_text("name", gpu->name);
    printf(", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d, \"memory_bytes\": %llu",
           gpu->major, gpu->minor, gpu->multiprocessors, (unsigned long long)gpu->memory_bytes);
    printf(", \"integrated\": %s, ", gpu->integrated ? "true" : "false");
    print_text("pci_bus_id", gpu->pci_bus_id);
    printf(", \"driver_cuda\": \"%d.%d\"", cuda_version() / 1000, cuda_version() % 1000 / 10);
}

void machine_print(bool refused)
{
    printf(", \"gpu\": {");
    print_gpu(executor_gpu());
    printf(", ");
    print_text("driver", gpu_watch_driver());
    printf(", \"used_bytes\": %llu}, \"wall_p50_ms\": ", (unsigned long long)executor_gpu_bytes());
    json_number(refused ? NAN : wall_ms);
    printf(", \"copies_ms\": ");
    json_number(refused ? NAN : copies_ms);
}

bool machine_print_needs(void)
{
    struct gpu gpu;
    bool usable = gpu_find(&gpu) == MODEL_OK;
    printf(", \"gpu\": {");
    print_text("architecture", kernel_architecture);
    printf(", ");
    print_text("compiler", kernel_compiler);
    printf(", \"usable\": %s, ", usable ? "true" : "false");
    print_text("why", usable ? "" : error_text());
    if (gpu.name[0] != '\0') {
        printf(", ");
        print_gpu(&gpu);
    }
    putchar('}');
    return usable;
}
