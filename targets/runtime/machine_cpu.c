/* machine.h where the CPU runs the model. */
#include "machine.h"

#include "profile.h"
#include "timing.h"

static struct {
    double *ms; /* per call */
    double start_ms;
} calls;

int machine_prepare(struct sample *sample)
{
    (void)sample;
    return MODEL_OK;
}

int machine_time_runs(struct sample *sample, long runs, double *ms)
{
    int code = MODEL_OK;
    double start = now_ms();
    for (long i = 0; code == MODEL_OK && i < runs; i++)
        code = sample_run(sample);
    *ms = now_ms() - start;
    return code;
}

static void add_call_time(int call)
{
    calls.ms[call] = now_ms() - calls.start_ms;
    calls.start_ms = now_ms();
}

int machine_time_calls(struct sample *sample, double *ms)
{
    calls.ms = ms;
    profile_after_call = add_call_time;
    calls.start_ms = now_ms();
    int code = sample_run(sample);
    profile_after_call = NULL;
    return code;
}

int machine_time_rest(struct sample *sample)
{
    (void)sample;
    return MODEL_OK;
}

void machine_print(bool refused)
{
    (void)refused;
}

bool machine_print_needs(void)
{
    return true;
}
