#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "beside.h"
#include "cores.h"
#include "description.h"
#include "error.h"
#include "executor.h"
#include "model.h"
#include "threads.h"
#include "weights.h"

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static bool is_open;
static bool threads_chosen;
static struct weights weights;
static char *cache_path;
static enum cache_state cache_state;
static const void **weight_data;

static void close_weights(void)
{
    weights_close(&weights);
    free(weight_data);
    weight_data = NULL;
}

static void close_all(void)
{
    executor_close();
    close_weights();
    is_open = false;
}

/* Whether the weights file belongs to this code. */
static int check_weights(const char *path)
{
    bool fits = weights.checksum == description.weights_checksum &&
                weights.count == (uint32_t)description.weight_count;
    for (int i = 0; fits && i < description.weight_count; i++)
        fits = weights.tensors[i].bytes == description.weight_sizes[i];
    if (fits)
        return 0;
    error_set("%s holds the weights of another model than %s. Copy the bundle again as a whole.",
              path, description.name);
    return -1;
}

static int open_weights(const char *path)
{
    char found[BESIDE_BYTES];
    if (path == NULL) {
        if (beside_executable(found, "weights.epw") != 0 || access(found, R_OK) != 0)
            strcpy(found, "weights.epw");
        path = found;
    }
    if (weights_open(&weights, path) != 0 || check_weights(path) != 0 ||
        weights_decode(&weights, cache_path) != 0)
        return -1;
    weight_data = calloc((size_t)description.weight_count + 1, sizeof *weight_data);
    if (weight_data == NULL) {
        error_set("no memory");
        return -1;
    }
    for (int i = 0; i < description.weight_count; i++)
        weight_data[i] = weights.tensors[i].data;
    cache_state = weights.cache.state;
    return 0;
}

static int open_locked(const char *path)
{
    if (is_open) {
        error_set("the model is open already");
        return MODEL_UNUSABLE;
    }
    error_set("%s", "");
    int code = executor_check();
    if (code != MODEL_OK)
        return code;
    if (!threads_chosen) {
        int available = threads_available();
        threads_set(available < description.threads ? available : description.threads);
    }
    code = open_weights(path) == 0 ? executor_open(weight_data) : MODEL_UNUSABLE;
    if (code != MODEL_OK || executor_copies_weights)
        close_weights();
    is_open = code == MODEL_OK;
    return code;
}

static int check_pointers(const char *what, const void *const *pointers,
                          const struct model_tensor *tensors, int count)
{
    for (int i = 0; i < count; i++) {
        if (tensors[i].bytes == 0)
            continue;
        if (pointers[i] == NULL || (uintptr_t)pointers[i] % MODEL_ALIGNMENT != 0) {
            error_set("the memory of %s %s must be aligned to %d bytes", what, tensors[i].name,
                      MODEL_ALIGNMENT);
            return -1;
        }
    }
    return 0;
}

static int run_locked(const void *const *inputs, void *const *outputs)
{
    if (!is_open) {
        error_set("the model is not open: call model_open first");
        return MODEL_UNUSABLE;
    }
    if (check_pointers("input", inputs, description.inputs, description.input_count) != 0 ||
        check_pointers("output", (const void *const *)outputs, description.outputs,
                       description.output_count) != 0)
        return MODEL_UNUSABLE;
    return executor_run(inputs, outputs);
}

int model_open(const char *weights_path)
{
    pthread_mutex_lock(&turn);
    int code = open_locked(weights_path);
    pthread_mutex_unlock(&turn);
    return code;
}

int model_run(const void *const *inputs, void *const *outputs)
{
    pthread_mutex_lock(&turn);
    int code = run_locked(inputs, outputs);
    pthread_mutex_unlock(&turn);
    return code;
}

static int set_threads_locked(int threads)
{
    threads_set(threads);
    threads_chosen = true;
    if (!is_open || executor_set_threads(threads) == 0)
        return MODEL_OK;
    close_all();
    return MODEL_UNUSABLE;
}

int model_set_threads(int threads)
{
    if (threads < 1 || threads > MODEL_MAX_THREADS) {
        error_set("%d threads: must be 1 to %d", threads, MODEL_MAX_THREADS);
        return MODEL_UNUSABLE;
    }
    pthread_mutex_lock(&turn);
    int code = set_threads_locked(threads);
    pthread_mutex_unlock(&turn);
    return code;
}

int model_set_cache(const char *path)
{
    char *copy = path != NULL ? strdup(path) : NULL;
    if (path != NULL && copy == NULL) {
        error_set("no memory");
        return MODEL_UNUSABLE;
    }
    pthread_mutex_lock(&turn);
    free(cache_path);
    cache_path = copy;
    pthread_mutex_unlock(&turn);
    return MODEL_OK;
}

enum cache_state cache_in_use(void)
{
    return cache_state;
}

int model_set_cores(const char *cores)
{
    static int chosen[MODEL_MAX_THREADS];
    pthread_mutex_lock(&turn);
    int count = cores_choose(cores, chosen, MODEL_MAX_THREADS);
    int code = count > 0 && threads_pin(chosen, count) == 0 ? MODEL_OK : MODEL_UNUSABLE;
    if (code == MODEL_OK && !threads_chosen)
        code = set_threads_locked(count);
    pthread_mutex_unlock(&turn);
    return code;
}

void model_close(void)
{
    pthread_mutex_lock(&turn);
    close_all();
    pthread_mutex_unlock(&turn);
}

const char *model_last_error(void)
{
    return error_text();
}
