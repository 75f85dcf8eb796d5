/* Streams, their captures, graphs and events. An operation is done when somebody waits for it. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 }; /* CUlaunchAttributeID */

struct queue {
    struct stub_operation *first, *last;
};

struct CUstream_st {
    struct queue queue;
    bool non_blocking, capturing, invalidated;
    struct CUstream_st *next;
};

struct CUgraph_st {
    struct queue queue;
};

struct CUgraphExec_st {
    struct queue queue;
};

struct CUevent_st {
    bool recorded, done;
    struct timespec at;
};

static struct CUstream_st default_stream;
static CUstream streams;
static int captures;

bool stub_capturing(void)
{
    return captures != 0;
}

/* Operations ----------------------------------------------------------------------------------- */

static void append(struct queue *queue, const struct stub_operation *operation)
{
    struct stub_operation *copy = malloc(sizeof *copy);
    *copy = *operation;
    copy->next = NULL;
    if (operation->kind == STUB_LAUNCH) {
        size_t bytes = operation->launch.function->parameter_count * sizeof(CUdeviceptr);
        copy->launch.parameters = malloc(bytes + 1);
        memcpy(copy->launch.parameters, operation->launch.parameters, bytes);
    }
    if (queue->first == NULL)
        queue->first = copy;
    else
        queue->last->next = copy;
    queue->last = copy;
}

static void append_all(struct queue *queue, const struct queue *from)
{
    for (const struct stub_operation *each = from->first; each != NULL; each = each->next)
        append(queue, each);
}

static void free_operation(struct stub_operation *operation)
{
    if (operation->kind == STUB_LAUNCH)
        free(operation->launch.parameters);
    free(operation);
}

static void clear(struct queue *queue)
{
    while (queue->first != NULL) {
        struct stub_operation *gone = queue->first;
        queue->first = gone->next;
        free_operation(gone);
    }
}

static CUresult set(const struct stub_operation *operation)
{
    unsigned char *memory = stub_host_view(operation->device, operation->bytes, "cuMemset");
    if (memory == NULL)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t at = 0; at < operation->bytes; at += operation->value_bytes)
        memcpy(memory + at, &operation->value, operation->value_bytes);
    return CUDA_SUCCESS;
}

static CUresult copy(const struct stub_operation *operation)
{
    void *device = stub_host_view(operation->device, operation->bytes, "cuMemcpy");
    if (device == NULL)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (operation->kind == STUB_COPY_IN) {
        memcpy(device, operation->host, operation->bytes);
    } else if (operation->kind == STUB_COPY_OUT) {
        memcpy(operation->host, device, operation->bytes);
    } else {
        void *source = stub_host_view(operation->source, operation->bytes, "cuMemcpy");
        if (source == NULL)
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        memmove(device, source, operation->bytes);
    }
    return CUDA_SUCCESS;
}

static CUresult perform(const struct stub_operation *operation)
{
    switch (operation->kind) {
    case STUB_LAUNCH: return stub_run(&operation->launch);
    case STUB_SET: return set(operation);
    case STUB_RECORD:
        operation->event->done = true;
        clock_gettime(CLOCK_MONOTONIC, &operation->event->at);
        return CUDA_SUCCESS;
    default: return copy(operation);
    }
}

static CUresult drain(struct queue *queue)
{
    CUresult result = CUDA_SUCCESS;
    while (queue->first != NULL) {
        struct stub_operation *operation = queue->first;
        if (result == CUDA_SUCCESS)
            result = perform(operation);
        queue->first = operation->next;
        free_operation(operation);
    }
    if (result != CUDA_SUCCESS)
        stub_break(result);
    return result;
}

CUresult stub_drain(void)
{
    CUresult result = drain(&default_stream.queue);
    for (CUstream each = streams; each != NULL; each = each->next)
        if (result == CUDA_SUCCESS && !each->capturing)
            result = drain(&each->queue);
    return result;
}

static bool known(CUstream stream)
{
    CUstream each = streams;
    while (each != NULL && each != stream)
        each = each->next;
    return stream == NULL || each != NULL;
}

/* Put an operation into a stream. The default stream waits for others, and others for it. */
static CUresult enqueue(CUstream stream, const struct stub_operation *operation)
{
    if (!known(stream))
        return stub_complain(CUDA_ERROR_INVALID_HANDLE, "a stream that is gone");
    if (stream == NULL && captures != 0)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream != NULL && stream->invalidated)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    CUresult result = CUDA_SUCCESS;
    if (stream == NULL) {
        for (CUstream each = streams; each != NULL && result == CUDA_SUCCESS; each = each->next)
            if (!each->non_blocking)
                result = drain(&each->queue);
    } else if (!stream->non_blocking) {
        result = drain(&default_stream.queue);
    }
    append(stream != NULL ? &stream->queue : &default_stream.queue, operation);
    return result;
}

/* Streams -------------------------------------------------------------------------------------- */

STUB_EXPORT cuStreamCreate(CUstream *stream, unsigned flags)
{
    STUB_ENTER;
    if (flags > 1)
        return CUDA_ERROR_INVALID_VALUE;
    *stream = calloc(1, sizeof **stream);
    (*stream)->non_blocking = flags == 1;
    (*stream)->next = streams;
    streams = *stream;
    stub_count("streams", 1);
    return CUDA_SUCCESS;
}

/* Returns at once; what is in the stream is done all the same. */
STUB_EXPORT cuStreamDestroy_v2(CUstream stream)
{
    STUB_ENTER;
    for (CUstream *each = &streams; *each != NULL; each = &(*each)->next) {
        if (*each != stream)
            continue;
        *each = stream->next;
        captures -= stream->capturing;
        if (!stream->capturing)
            drain(&stream->queue);
        clear(&stream->queue);
        free(stream);
        stub_count("streams", -1);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_HANDLE;
}

STUB_EXPORT cuStreamSynchronize(CUstream stream)
{
    STUB_ENTER;
    if (!known(stream))
        return CUDA_ERROR_INVALID_HANDLE;
    if (stream != NULL && stream->capturing) {
        stream->invalidated = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return drain(stream != NULL ? &stream->queue : &default_stream.queue);
}

STUB_EXPORT cuStreamQuery(CUstream stream)
{
    STUB_ENTER;
    if (!known(stream))
        return CUDA_ERROR_INVALID_HANDLE;
    struct queue *queue = stream != NULL ? &stream->queue : &default_stream.queue;
    if (queue->first == NULL)
        return CUDA_SUCCESS;
    CUresult result = drain(queue); /* done by the next time */
    return result == CUDA_SUCCESS ? CUDA_ERROR_NOT_READY : result;
}

STUB_EXPORT cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode)
{
    STUB_ENTER;
    (void)mode;
    if (stream == NULL || !known(stream))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capturing)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = drain(&stream->queue);
    stream->capturing = true;
    captures++;
    return result;
}

STUB_EXPORT cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    STUB_ENTER;
    *graph = NULL;
    if (stream == NULL || !known(stream) || !stream->capturing)
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    bool invalidated = stream->invalidated;
    stream->capturing = stream->invalidated = false;
    captures--;
    if (invalidated) {
        clear(&stream->queue);
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    *graph = calloc(1, sizeof **graph);
    (*graph)->queue = stream->queue;
    stream->queue = (struct queue){NULL, NULL};
    stub_count("graphs", 1);
    return CUDA_SUCCESS;
}

/* Graphs --------------------------------------------------------------------------------------- */

STUB_EXPORT cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph,
                                        unsigned long long flags)
{
    STUB_ENTER;
    (void)flags;
    *executable = calloc(1, sizeof **executable);
    append_all(&(*executable)->queue, &graph->queue);
    stub_count("executable graphs", 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuGraphDestroy(CUgraph graph)
{
    STUB_ENTER;
    clear(&graph->queue);
    free(graph);
    stub_count("graphs", -1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuGraphExecDestroy(CUgraphExec executable)
{
    STUB_ENTER;
    clear(&executable->queue);
    free(executable);
    stub_count("executable graphs", -1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuGraphUpload(CUgraphExec executable, CUstream stream)
{
    STUB_ENTER;
    (void)executable;
    return known(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

STUB_EXPORT cuGraphLaunch(CUgraphExec executable, CUstream stream)
{
    STUB_ENTER;
    CUresult result = CUDA_SUCCESS;
    const struct stub_operation *each = executable->queue.first;
    for (; each != NULL && result == CUDA_SUCCESS; each = each->next) {
        if (each->kind == STUB_RECORD)
            each->event->done = false;
        result = enqueue(stream, each);
    }
    return result;
}

/* Operations of streams ------------------------------------------------------------------------ */

STUB_EXPORT cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                           unsigned block_x, unsigned block_y, unsigned block_z,
                           unsigned shared_bytes, CUstream stream, void **parameters, void **extra)
{
    STUB_ENTER;
    struct stub_operation operation = {.kind = STUB_LAUNCH};
    operation.launch = (struct stub_launch){
        function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, NULL};
    CUresult result = stub_check_launch(&operation.launch);
    if (result != CUDA_SUCCESS)
        return result;
    if (extra != NULL || (parameters == NULL && function->parameter_count != 0))
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "%s: no parameters", function->name);
    CUdeviceptr copied[64];
    if (function->parameter_count > sizeof copied / sizeof *copied)
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < function->parameter_count; i++)
        memcpy(&copied[i], parameters[i], sizeof *copied);
    operation.launch.parameters = copied;
    return enqueue(stream, &operation);
}

/* With attributes; in the log it is a cuLaunchKernel, too. Here kernels run one after the other, so
 * that whether one may start early does not matter. */
STUB_EXPORT cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                             void **extra)
{
    {
        STUB_ENTER;
        for (unsigned i = 0; i < config->numAttrs; i++)
            if ((int)config->attrs[i].id != PROGRAMMATIC_STREAM_SERIALIZATION)
                return stub_complain(CUDA_ERROR_INVALID_VALUE, "no launch attribute %d",
                                     (int)config->attrs[i].id);
    }
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                          config->blockDimX, config->blockDimY, config->blockDimZ,
                          config->sharedMemBytes, config->hStream, parameters, extra);
}

/* Copies of memory that is not pinned are over when the call returns, as NVIDIA's are. */
static CUresult copy_between(struct stub_operation operation, CUstream stream)
{
    bool pinned = stub_is_pinned(operation.host, operation.bytes);
    CUresult result = enqueue(stream, &operation);
    if (result != CUDA_SUCCESS || pinned || (stream != NULL && stream->capturing))
        return result;
    return drain(stream != NULL ? &stream->queue : &default_stream.queue);
}

STUB_EXPORT cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    STUB_ENTER;
    return copy_between((struct stub_operation){.kind = STUB_COPY_IN, .device = to,
                                                .host = (void *)(uintptr_t)from, .bytes = bytes},
                        stream);
}

STUB_EXPORT cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    STUB_ENTER;
    return copy_between(
        (struct stub_operation){.kind = STUB_COPY_OUT, .device = from, .host = to, .bytes = bytes},
        stream);
}

STUB_EXPORT cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    STUB_ENTER;
    struct stub_operation operation = {
        .kind = STUB_COPY, .device = to, .source = from, .bytes = bytes};
    return enqueue(stream, &operation);
}

STUB_EXPORT cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes)
{
    CUresult result = cuMemcpyHtoDAsync_v2(to, from, bytes, NULL);
    return result == CUDA_SUCCESS ? cuStreamSynchronize(NULL) : result;
}

STUB_EXPORT cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes)
{
    CUresult result = cuMemcpyDtoHAsync_v2(to, from, bytes, NULL);
    return result == CUDA_SUCCESS ? cuStreamSynchronize(NULL) : result;
}

STUB_EXPORT cuMemsetD8Async(CUdeviceptr memory, unsigned char value, size_t bytes, CUstream stream)
{
    STUB_ENTER;
    struct stub_operation operation = {
        .kind = STUB_SET, .device = memory, .bytes = bytes, .value = value, .value_bytes = 1};
    return enqueue(stream, &operation);
}

STUB_EXPORT cuMemsetD32Async(CUdeviceptr memory, unsigned value, size_t words, CUstream stream)
{
    STUB_ENTER;
    struct stub_operation operation = {
        .kind = STUB_SET, .device = memory, .bytes = 4 * words, .value = value, .value_bytes = 4};
    return enqueue(stream, &operation);
}

/* Events --------------------------------------------------------------------------------------- */

STUB_EXPORT cuEventCreate(CUevent *event, unsigned flags)
{
    STUB_ENTER;
    if (flags > 7)
        return CUDA_ERROR_INVALID_VALUE;
    *event = calloc(1, sizeof **event);
    stub_count("events", 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuEventDestroy_v2(CUevent event)
{
    STUB_ENTER;
    CUresult drained = stub_drain();
    free(event);
    stub_count("events", -1);
    return drained;
}

/* An event inside a graph must be recorded as an external one, or nobody outside may ask for it. */
STUB_EXPORT cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags)
{
    STUB_ENTER;
    bool captured = stream != NULL && known(stream) && stream->capturing;
    if (flags > 1 || (flags == 1 && !captured))
        return CUDA_ERROR_INVALID_VALUE;
    if (captured && flags == 0)
        return CUDA_SUCCESS;
    event->recorded = true;
    event->done = false;
    struct stub_operation operation = {.kind = STUB_RECORD, .event = event};
    return enqueue(stream, &operation);
}

STUB_EXPORT cuEventRecord(CUevent event, CUstream stream)
{
    return cuEventRecordWithFlags(event, stream, 0);
}

STUB_EXPORT cuEventQuery(CUevent event)
{
    STUB_ENTER;
    if (!event->recorded || event->done)
        return CUDA_SUCCESS;
    CUresult result = stub_drain(); /* done by the next time */
    return result == CUDA_SUCCESS ? CUDA_ERROR_NOT_READY : result;
}

STUB_EXPORT cuEventSynchronize(CUevent event)
{
    STUB_ENTER;
    return event->recorded && !event->done ? stub_drain() : CUDA_SUCCESS;
}

STUB_EXPORT cuEventElapsedTime(float *ms, CUevent start, CUevent end)
{
    STUB_ENTER;
    if (!start->recorded || !end->recorded)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!start->done || !end->done)
        return CUDA_ERROR_NOT_READY;
    *ms = (float)((double)(end->at.tv_sec - start->at.tv_sec) * 1e3 +
                  (double)(end->at.tv_nsec - start->at.tv_nsec) / 1e6);
    return CUDA_SUCCESS;
}
