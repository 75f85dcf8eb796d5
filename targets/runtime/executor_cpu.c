/* executor.h on the CPU: calls C functions, on a pool of threads. */
#include "executor.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu.h"
#include "description.h"
#include "error.h"
#include "profile.h"
#include "threads.h"
#include "workspace.h"

const bool executor_copies_weights = false;

static const void *const *weight_data;
static uint8_t *arena;

void (*profile_after_call)(int call);

int executor_check(void)
{
    return cpu_check(description.features) == 0 ? MODEL_OK : MODEL_WRONG_CPU;
}

int executor_open(const void *const *weights)
{
    uint64_t bytes = description.arena_bytes;
    if (bytes > 0 && bytes <= SIZE_MAX)
        arena = aligned_alloc(MODEL_ALIGNMENT, (size_t)bytes);
    if (bytes > 0 && arena == NULL) {
        error_set("no memory for %llu bytes of activations", (unsigned long long)bytes);
        return MODEL_UNUSABLE;
    }
    if (executor_set_threads(threads_count()) != 0) {
        executor_close();
        return MODEL_UNUSABLE;
    }
    weight_data = weights;
    return MODEL_OK;
}

int executor_set_threads(int threads)
{
    return workspace_open(description.workspace_bytes, threads);
}

int executor_run(const void *const *inputs, void *const *outputs)
{
    workspace_begin_run();
    error_set("%s", "");
    threads_begin_run();
    int32_t code = 0;
    for (int call = 0; call < description.call_count && code == 0; call++) {
        code = driver_call(call, arena, weight_data, inputs, outputs);
        if (code != 0) {
            char why[ERROR_TEXT_BYTES];
            snprintf(why, sizeof why, "%s", error_text());
            error_set("%s failed with code %d: %s", description.nodes[call], (int)code,
                      why[0] != '\0' ? why : "the kernel gave no reason");
        } else if (profile_after_call != NULL)
            profile_after_call(call);
    }
    threads_end_run();
    return code == 0 ? MODEL_OK : MODEL_FAILED;
}

void executor_close(void)
{
    threads_stop();
    workspace_close();
    free(arena);
    arena = NULL;
    weight_data = NULL;
}
