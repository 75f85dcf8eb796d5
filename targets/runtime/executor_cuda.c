/* executor.h on a GPU: one CUDA graph per inference, which copies the inputs to the GPU, runs all
 * kernels one after the other, and copies the outputs back. */
#include "executor.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "cuda_kernels.h"
#include "cuda_memory.h"
#include "description.h"
#include "error.h"
#include "executor_cuda.h"

const bool executor_copies_weights = true;

/* As many pointers as CUDA passes to a kernel. */
enum { MOST_ARGUMENTS = 512 };

/* What is captured: an inference, and what only measuring runs, with events in between whose times
 * the GPU takes. Those are made when they are wanted. */
enum kind { INFERENCE, TIMED_KERNELS, TIMED_COPIES, TIMED_CALLS, KINDS };

static struct {
    struct gpu gpu;
    bool overlapping; /* kernels may start before the one before has ended */
    bool retained; /* the context */
    CUcontext context;
    CUstream stream;
    struct cuda_kernels kernels;
    struct cuda_memory memory;
    CUgraphExec graphs[KINDS];
    CUevent *events;
    int event_count; /* that exist */
} executor;

int executor_check(void)
{
    if (cpu_check(description.features) != 0)
        return MODEL_WRONG_CPU;
    return gpu_find(&executor.gpu);
}

/* Whatever context the calling thread has, use ours in between. 0, or -1 with error_text() set. */
static int enter(void)
{
    return CUDA(cuCtxPushCurrent_v2, executor.context);
}

static void leave(void)
{
    CUcontext ours;
    (void)cuda.cuCtxPopCurrent_v2(&ours);
}

/* Let the GPU note the time. */
static int mark(int event)
{
    return CUDA(cuEventRecordWithFlags, executor.events[event], executor.stream,
                CU_EVENT_RECORD_EXTERNAL);
}

static int copy_inputs(void)
{
    const struct cuda_exchange *inputs = &executor.memory.inputs;
    return inputs->bytes == 0 ? 0 : CUDA(cuMemcpyHtoDAsync_v2, inputs->device, inputs->host,
                                         (size_t)inputs->bytes, executor.stream);
}

static int copy_outputs(void)
{
    const struct cuda_exchange *outputs = &executor.memory.outputs;
    return outputs->bytes == 0 ? 0 : CUDA(cuMemcpyDtoHAsync_v2, outputs->host, outputs->device,
                                          (size_t)outputs->bytes, executor.stream);
}

/* Whether a driver captures launches that overlap: from CUDA 12.3 on. The GPU's part of it begins
 * with compute capability 9.0. */
static bool can_overlap(void)
{
    const char *wish = getenv("EDGEPRESS_CUDA_OVERLAP");
    if (wish != NULL && strcmp(wish, "0") == 0)
        return false;
    return executor.gpu.major >= 9 && cuda_launch_extended != NULL && cuda_version() >= 12030;
}

static int launch_overlapping(const struct launch *launch, CUfunction function, void **parameters)
{
    struct cuda_launch_attribute attribute = {
        .id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, .value = {.allowed = 1}};
    struct cuda_launch_config config = {.shared_bytes = launch->shared_bytes,
                                        .stream = executor.stream,
                                        .attributes = &attribute,
                                        .attribute_count = 1};
    memcpy(config.grid, launch->grid, sizeof config.grid);
    memcpy(config.block, launch->block, sizeof config.block);
    return cuda_check(cuda_launch_extended(&config, function, parameters, NULL),
                      "cuLaunchKernelEx");
}

/* `behind_kernel`: what is before it on the stream is a kernel. */
static int launch_kernel(const struct launch *launch, CUfunction function, bool behind_kernel)
{
    CUdeviceptr values[MOST_ARGUMENTS];
    void *parameters[MOST_ARGUMENTS];
    int count = 0;
    for (; count < launch->place_count; count++)
        values[count] = cuda_place(&executor.memory, &places[launch->first_place + count]);
    if (launch->counters > 0)
        values[count++] = executor.memory.counters;
    for (int i = 0; i < count; i++)
        parameters[i] = &values[i];
    if (launch->overlaps && behind_kernel && executor.overlapping)
        return launch_overlapping(launch, function, parameters);
    return CUDA(cuLaunchKernel, function, launch->grid[0], launch->grid[1], launch->grid[2],
                launch->block[0], launch->block[1], launch->block[2], launch->shared_bytes,
                executor.stream, parameters, NULL);
}

static int run_call(int call, bool marked)
{
    const struct launch *launch = &launches[call];
    bool behind_kernel = !marked && call > 0 && launches[call - 1].kernel != NULL;
    if (launch->kernel != NULL)
        return launch_kernel(launch, executor.kernels.of_call[call], behind_kernel);
    CUdeviceptr to = cuda_place(&executor.memory, &places[launch->first_place]);
    CUdeviceptr from = cuda_place(&executor.memory, &places[launch->first_place + 1]);
    return launch->copied_bytes == 0 ? 0 : CUDA(cuMemcpyDtoDAsync_v2, to, from,
                                                (size_t)launch->copied_bytes, executor.stream);
}

/* Run all calls, with marks in between from `event` on where it is not 0. */
static int run_calls(int event)
{
    for (int call = 0; call < description.call_count; call++) {
        if (run_call(call, event > 0) != 0) {
            char why[ERROR_TEXT_BYTES];
            strcpy(why, error_text());
            error_set("%s: %s", description.nodes[call], why);
            return -1;
        }
        if (event > 0 && mark(event + call) != 0)
            return -1;
    }
    return 0;
}

static int enqueue(enum kind kind)
{
    switch (kind) {
    case TIMED_KERNELS: return mark(0) != 0 || run_calls(0) != 0 ? -1 : mark(1);
    case TIMED_CALLS: return mark(0) != 0 ? -1 : run_calls(1);
    case TIMED_COPIES:
        if (mark(0) != 0 || copy_inputs() != 0 || mark(1) != 0 || run_calls(0) != 0 ||
            mark(2) != 0 || copy_outputs() != 0)
            return -1;
        return mark(3);
    default: return copy_inputs() != 0 || run_calls(0) != 0 ? -1 : copy_outputs();
    }
}

/* Make the graph of a kind. 0, or -1 with error_text() set. */
static int capture(enum kind kind)
{
    CUgraph graph = NULL;
    if (CUDA(cuStreamBeginCapture_v2, executor.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) != 0)
        return -1;
    int code = enqueue(kind);
    CUresult ended = cuda.cuStreamEndCapture(executor.stream, &graph);
    if (code == 0)
        code = cuda_check(ended, "cuStreamEndCapture");
    if (code == 0)
        code = CUDA(cuGraphInstantiateWithFlags, &executor.graphs[kind], graph, 0);
    if (code != 0)
        executor.graphs[kind] = NULL;
    if (graph != NULL)
        (void)cuda.cuGraphDestroy(graph);
    return code;
}

static int open_in_context(const void *const *weights)
{
    if (CUDA(cuStreamCreate, &executor.stream, CU_STREAM_NON_BLOCKING) != 0) {
        executor.stream = NULL;
        return MODEL_UNUSABLE;
    }
    int code = cuda_kernels_open(&executor.kernels, &executor.gpu);
    if (code != MODEL_OK)
        return code;
    if (cuda_memory_open(&executor.memory, weights, executor.stream) != 0 ||
        capture(INFERENCE) != 0)
        return MODEL_UNUSABLE;
    return MODEL_OK;
}

int executor_open(const void *const *weights)
{
    CUdevice device = executor.gpu.device;
    /* Waiting awake ends some tens of microseconds earlier. The context is one that others in the
     * process may have, too, and then it is theirs to say how to wait. */
    (void)cuda.cuDevicePrimaryCtxSetFlags_v2(device, CU_CTX_SCHED_SPIN);
    if (CUDA(cuDevicePrimaryCtxRetain, &executor.context, device) != 0)
        return MODEL_UNUSABLE;
    executor.retained = true;
    executor.overlapping = can_overlap();
    int code = MODEL_UNUSABLE;
    if (enter() == 0) {
        code = open_in_context(weights);
        leave();
    }
    if (code != MODEL_OK)
        executor_close();
    return code;
}

int executor_set_threads(int threads)
{
    (void)threads;
    return 0;
}

/* Run a graph to its end, in our context. MODEL_OK, or an error code with error_text() set. */
static int run_graph(enum kind kind)
{
    if (CUDA(cuGraphLaunch, executor.graphs[kind], executor.stream) != 0 ||
        CUDA(cuStreamSynchronize, executor.stream) != 0)
        return MODEL_FAILED;
    return MODEL_OK;
}

int executor_run(const void *const *inputs, void *const *outputs)
{
    struct cuda_memory *memory = &executor.memory;
    error_set("%s", "");
    for (int i = 0; i < description.input_count; i++)
        if (description.inputs[i].bytes > 0)
            memcpy(memory->inputs.host + memory->inputs.offsets[i], inputs[i],
                   (size_t)description.inputs[i].bytes);
    if (enter() != 0)
        return MODEL_FAILED;
    int code = run_graph(INFERENCE);
    leave();
    for (int i = 0; code == MODEL_OK && i < description.output_count; i++)
        if (description.outputs[i].bytes > 0)
            memcpy(outputs[i], memory->outputs.host + memory->outputs.offsets[i],
                   (size_t)description.outputs[i].bytes);
    return code;
}

/* Have as many events as any kind of graph marks. 0, or -1 with error_text() set. */
static int make_events(void)
{
    int wanted = description.call_count + 1 > 4 ? description.call_count + 1 : 4;
    if (executor.events == NULL)
        executor.events = calloc((size_t)wanted, sizeof *executor.events);
    if (executor.events == NULL) {
        error_set("no memory");
        return -1;
    }
    for (; executor.event_count < wanted; executor.event_count++)
        if (CUDA(cuEventCreate, &executor.events[executor.event_count], CU_EVENT_DEFAULT) != 0)
            return -1;
    return 0;
}

/* Run a timed graph, and read the times between `count` + 1 events. */
static int time_graph(enum kind kind, double *ms, int count)
{
    if (enter() != 0)
        return MODEL_FAILED;
    int code = MODEL_OK;
    if (executor.graphs[kind] == NULL && (make_events() != 0 || capture(kind) != 0))
        code = MODEL_UNUSABLE;
    if (code == MODEL_OK)
        code = run_graph(kind);
    for (int i = 0; code == MODEL_OK && i < count; i++) {
        float elapsed_ms = 0;
        if (CUDA(cuEventElapsedTime, &elapsed_ms, executor.events[i], executor.events[i + 1]) != 0)
            code = MODEL_FAILED;
        ms[i] = (double)elapsed_ms;
    }
    leave();
    return code;
}

int executor_time_kernels(double *ms)
{
    return time_graph(TIMED_KERNELS, ms, 1);
}

int executor_time_copies(double *ms)
{
    double parts[3] = {0};
    int code = time_graph(TIMED_COPIES, parts, 3);
    *ms = parts[0] + parts[2];
    return code;
}

int executor_time_calls(double *ms)
{
    return time_graph(TIMED_CALLS, ms, description.call_count);
}

const struct gpu *executor_gpu(void)
{
    return &executor.gpu;
}

uint64_t executor_gpu_bytes(void)
{
    return executor.memory.bytes;
}

static void close_in_context(void)
{
    for (int kind = 0; kind < KINDS; kind++)
        if (executor.graphs[kind] != NULL)
            (void)cuda.cuGraphExecDestroy(executor.graphs[kind]);
    for (int event = 0; event < executor.event_count; event++)
        (void)cuda.cuEventDestroy_v2(executor.events[event]);
    cuda_memory_close(&executor.memory);
    cuda_kernels_close(&executor.kernels);
    if (executor.stream != NULL)
        (void)cuda.cuStreamDestroy_v2(executor.stream);
}

void executor_close(void)
{
    if (!executor.retained)
        return;
    char why[ERROR_TEXT_BYTES];
    strcpy(why, error_text()); /* of what failed, where something did */
    bool entered = enter() == 0;
    close_in_context();
    if (entered)
        leave();
    (void)cuda.cuDevicePrimaryCtxRelease_v2(executor.gpu.device);
    free(executor.events);
    memset(&executor, 0, sizeof executor);
    error_set("%s", why);
}
