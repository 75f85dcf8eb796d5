#include <stdio.h>

#include "commands.h"
#include "cpu.h"
#include "description.h"
#include "json.h"
#include "machine.h"
#include "threads.h"
#include "weights_cache.h"

static void print_tensors(const struct model_tensor *tensors, int count, const double *tolerances)
{
    for (int i = 0; i < count; i++) {
        printf("%s{\"name\": ", i > 0 ? ", " : "");
        json_string(tensors[i].name);
        printf(", \"dtype\": \"%s\", \"shape\": [", tensors[i].dtype);
        for (int axis = 0; axis < tensors[i].rank; axis++)
            printf("%s%lld", axis > 0 ? ", " : "", (long long)tensors[i].shape[axis]);
        printf("], \"bytes\": %llu", (unsigned long long)tensors[i].bytes);
        if (tolerances != NULL) {
            printf(", \"tolerance\": ");
            json_number(tolerances[i]);
        }
        putchar('}');
    }
}

/* How the weights are stored. */
static void print_weights(const struct options *options)
{
    static const char *const STATES[] = {"unused", "read", "written"};
    printf(", \"weights\": {\"coded_bytes\": %llu, \"decoded_bytes\": %llu, \"cache\": ",
           (unsigned long long)description.coded_bytes,
           (unsigned long long)description.decoded_bytes);
    json_string(options->cache != NULL ? STATES[cache_in_use()] : NULL);
    putchar('}');
}

int info_command(const struct options *options)
{
    if (options->cache != NULL) {
        int code = open_model(options);
        if (code != MODEL_OK)
            return code;
    }
    int available = threads_available();
    int threads = available < description.threads ? available : description.threads;
    bool supported = true;
    threads_set(options->threads > 0 ? options->threads : threads);
    printf("{\"name\": ");
    json_string(description.name);
    printf(", \"target\": ");
    json_string(description.target);
    printf(", \"inputs\": [");
    print_tensors(description.inputs, description.input_count, NULL);
    printf("], \"outputs\": [");
    print_tensors(description.outputs, description.output_count, description.tolerances);
    printf("], \"threads\": %d", threads_count());
    printf(", \"calls\": %d", description.call_count);
    printf(", \"arena_bytes\": %llu, \"workspace_bytes\": %llu, \"weight_bytes\": %llu",
           (unsigned long long)description.arena_bytes,
           (unsigned long long)description.workspace_bytes,
           (unsigned long long)description.weight_bytes);
    print_weights(options);
    printf(", \"features\": {");
    for (int i = 0; description.features[i] != NULL; i++) {
        bool present = cpu_has(description.features[i]);
        supported = supported && present;
        printf("%s", i > 0 ? ", " : "");
        json_string(description.features[i]);
        printf(": %s", present ? "true" : "false");
    }
    putchar('}');
    supported = machine_print_needs() && supported;
    printf(", \"supported\": %s}\n", supported ? "true" : "false");
    return MODEL_OK;
}
