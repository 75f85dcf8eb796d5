/* The driver itself: initialisation, the device, contexts, and failures on demand. */
#include "driver.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_CONTEXTS = 32 };

struct CUctx_st {
    int retained;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static bool initialised;
static CUresult broken = CUDA_SUCCESS;
static struct CUctx_st primary;
static _Thread_local CUcontext contexts[MOST_CONTEXTS];
static _Thread_local int depth;

/* Failures on demand --------------------------------------------------------------------------- */

bool stub_lock(void)
{
    pthread_mutex_lock(&mutex);
    return true;
}

void stub_unlock(const bool *locked)
{
    (void)locked;
    pthread_mutex_unlock(&mutex);
}

long long stub_number(const char *variable, long long otherwise)
{
    const char *text = getenv(variable);
    return text != NULL && *text != '\0' ? strtoll(text, NULL, 0) : otherwise;
}

static void note(const char *text, int number)
{
    const char *path = getenv("CUDA_STUB_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file == NULL)
        return;
    if (number >= 0)
        fprintf(file, "%s %d\n", text, number);
    else
        fprintf(file, "%s\n", text);
    fclose(file);
}

struct calls {
    const char *name;
    int count;
    struct calls *next;
};

static int calls_so_far(const char *function)
{
    static struct calls *all;
    struct calls *calls = all;
    while (calls != NULL && strcmp(calls->name, function) != 0)
        calls = calls->next;
    if (calls == NULL) {
        calls = calloc(1, sizeof *calls);
        *calls = (struct calls){function, 0, all};
        all = calls;
    }
    return ++calls->count;
}

CUresult stub_injected(const char *function)
{
    int count = calls_so_far(function);
    size_t length = strlen(function);
    const char *rule = getenv("CUDA_STUB_FAIL");
    while (rule != NULL && *rule != '\0') {
        if (strncmp(rule, function, length) == 0 && rule[length] == ':') {
            char *end;
            long code = strtol(rule + length + 1, &end, 10);
            if (*end != ':' || strtol(end + 1, NULL, 10) == count)
                return (CUresult)code;
        }
        rule = strchr(rule, ',');
        rule = rule != NULL ? rule + 1 : NULL;
    }
    return CUDA_SUCCESS;
}

CUresult stub_enter(const char *function, bool needs_context)
{
    note(function, -1);
    CUresult injected = stub_injected(function);
    if (injected != CUDA_SUCCESS)
        return injected;
    if (!initialised && strcmp(function, "cuInit") != 0)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (broken != CUDA_SUCCESS)
        return broken;
    if (needs_context && (depth == 0 || contexts[depth - 1] == NULL || primary.retained == 0))
        return CUDA_ERROR_INVALID_CONTEXT;
    return CUDA_SUCCESS;
}

CUresult stub_complain(CUresult code, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("stub driver: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    return code;
}

void stub_break(CUresult code)
{
    if (broken == CUDA_SUCCESS)
        broken = code;
}

static struct {
    const char *name;
    int left;
} counted[16];

void stub_count(const char *what, int change)
{
    int i = 0;
    while (counted[i].name != NULL && strcmp(counted[i].name, what) != 0)
        i++;
    counted[i].name = what;
    counted[i].left += change;
}

__attribute__((destructor)) static void say_what_is_left(void)
{
    char text[64];
    for (int i = 0; i < 16 && counted[i].name != NULL; i++) {
        snprintf(text, sizeof text, "left: %s", counted[i].name);
        if (counted[i].left != 0)
            note(text, counted[i].left);
    }
}

/* The driver and its errors -------------------------------------------------------------------- */

STUB_EXPORT cuInit(unsigned flags)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (stub_number("CUDA_STUB_DEVICES", 1) == 0)
        return CUDA_ERROR_NO_DEVICE;
    initialised = true;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDriverGetVersion(int *version)
{
    *version = (int)stub_number("CUDA_STUB_VERSION", 13000);
    return CUDA_SUCCESS;
}

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
#define ERROR(name, text) {name, #name, text}
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    ERROR(CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
          "the provided PTX was compiled with an unsupported toolchain."),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized"),
    ERROR(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
          "system has unsupported display driver / cuda driver combination"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
          "operation not permitted when stream is capturing"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
          "operation failed due to a previous error during capture"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not initiated in this stream"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef ERROR
};

STUB_EXPORT cuGetErrorName(CUresult code, const char **name)
{
    *name = NULL;
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == (int)code)
            *name = ERRORS[i].name;
    return *name != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

STUB_EXPORT cuGetErrorString(CUresult code, const char **text)
{
    *text = NULL;
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == (int)code)
            *text = ERRORS[i].text;
    return *text != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* The device ----------------------------------------------------------------------------------- */

int stub_capability(void)
{
    const char *text = getenv("CUDA_STUB_CAPABILITY");
    int major = 9, minor = 0;
    if (text != NULL && sscanf(text, "%d.%d", &major, &minor) != 2)
        stub_complain(CUDA_ERROR_INVALID_VALUE, "CUDA_STUB_CAPABILITY is %s", text);
    return major * 10 + minor;
}

/* CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". */
int stub_shared_limit_bytes(void)
{
    switch (stub_capability()) {
    case 80:
    case 87: return 163 * 1024;
    case 90: return 227 * 1024;
    default: return 99 * 1024;
    }
}

size_t stub_memory_bytes(void)
{
    return (size_t)stub_number("CUDA_STUB_MEMORY_BYTES", 4LL << 30);
}

STUB_EXPORT cuDeviceGetCount(int *count)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    *count = (int)stub_number("CUDA_STUB_DEVICES", 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDeviceGet(CUdevice *device, int index)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (index < 0 || index >= stub_number("CUDA_STUB_DEVICES", 1))
        return CUDA_ERROR_INVALID_DEVICE;
    *device = index;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDeviceGetName(char *name, int bytes, CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    const char *own = getenv("CUDA_STUB_NAME");
    (void)device;
    snprintf(name, (size_t)bytes, "%s", own != NULL ? own : "Emulated GPU");
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    (void)device;
    *bytes = stub_memory_bytes();
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDeviceGetPCIBusId(char *id, int bytes, CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (bytes < 13)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(id, (size_t)bytes, "0000:%02X:00.0", device + 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    (void)device;
    switch ((int)attribute) {
    case 1: *value = 1024; break;                                 /* MAX_THREADS_PER_BLOCK */
    case 8: *value = 48 * 1024; break;                            /* MAX_SHARED_MEMORY_PER_BLOCK */
    case 10: *value = 32; break;                                  /* WARP_SIZE */
    case 13: *value = 1500000; break;                             /* CLOCK_RATE, kHz */
    case 16: *value = (int)stub_number("CUDA_STUB_MULTIPROCESSORS", 132); break;
    case 18: *value = (int)stub_number("CUDA_STUB_INTEGRATED", 0); break;
    case 38: *value = 50 << 20; break;                            /* L2_CACHE_SIZE */
    case 39: *value = 2048; break;                                /* …_THREADS_PER_MULTIPROCESSOR */
    case 75: *value = stub_capability() / 10; break;
    case 76: *value = stub_capability() % 10; break;
    case 81: *value = stub_shared_limit_bytes() + 1024; break;    /* …_PER_MULTIPROCESSOR */
    case 97: *value = stub_shared_limit_bytes(); break;           /* …_PER_BLOCK_OPTIN */
    default:
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "no device attribute %d", (int)attribute);
    }
    return CUDA_SUCCESS;
}

/* Contexts ------------------------------------------------------------------------------------- */

STUB_EXPORT cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    (void)device;
    return flags > 0x1f ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

STUB_EXPORT cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (device < 0 || device >= stub_number("CUDA_STUB_DEVICES", 1))
        return CUDA_ERROR_INVALID_DEVICE;
    primary.retained++;
    stub_count("contexts", 1);
    *context = &primary;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    (void)device;
    if (primary.retained == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    primary.retained--;
    stub_count("contexts", -1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuCtxSetCurrent(CUcontext context)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (depth == 0)
        depth = 1;
    contexts[depth - 1] = context;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuCtxGetCurrent(CUcontext *context)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    *context = depth != 0 ? contexts[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuCtxPushCurrent_v2(CUcontext context)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (context != &primary || depth == MOST_CONTEXTS)
        return CUDA_ERROR_INVALID_CONTEXT;
    contexts[depth++] = context;
    stub_count("pushed contexts", 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuCtxPopCurrent_v2(CUcontext *context)
{
    STUB_ENTER_WITHOUT_CONTEXT;
    if (depth == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    depth--;
    stub_count("pushed contexts", -1);
    if (context != NULL)
        *context = contexts[depth];
    return CUDA_SUCCESS;
}

STUB_EXPORT cuCtxSynchronize(void)
{
    STUB_ENTER;
    return stub_capturing() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : stub_drain();
}
