/* A libcuda.so.1 that needs no GPU: memory, streams and graphs as the CUDA driver API has them, and
 * kernels that run in the emulator. What the parts of it share.
 *
 * Work in streams is done as late as is allowed, when somebody waits for it, so that a missing wait
 * shows. Device memory is at addresses that the host cannot read.
 *
 * Environment variables:
 *   CUDA_STUB_KERNELS        the library of emulated kernels
 *   CUDA_STUB_FAIL           FUNCTION:CODE or FUNCTION:CODE:N, comma-separated: the function (its
 *                            Nth call) returns the code; `execute` is the work of a kernel
 *   CUDA_STUB_CAPABILITY     of the device, 9.0 unless set
 *   CUDA_STUB_NAME, CUDA_STUB_VERSION, CUDA_STUB_MULTIPROCESSORS, CUDA_STUB_INTEGRATED
 *   CUDA_STUB_MEMORY_BYTES   of the device
 *   CUDA_STUB_DEVICES        how many there are, 1 unless set
 *   CUDA_STUB_LOG            a file that gets the name of every function as it is called, and at
 *                            the end what was not given back: lines `left: WHAT COUNT` */
#ifndef STUB_DRIVER_H
#define STUB_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef STUB_WITH_CUDA_H /* compare the declarations with NVIDIA's */
#include <cuda.h>
#else
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef int CUdevice_attribute;
typedef int CUfunction_attribute;
typedef int CUstreamCaptureMode;
typedef int CUjit_option;
typedef struct {
    int id;
    char padding[8 - sizeof(int)];
    char value[64];
} CUlaunchAttribute;
typedef struct {
    unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
    CUstream hStream;
    CUlaunchAttribute *attrs;
    unsigned numAttrs;
} CUlaunchConfig;
enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_DEINITIALIZED = 4,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_LAUNCH_TIMEOUT = 702,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_SYSTEM_NOT_READY = 802,
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_UNKNOWN = 999,
};
#endif

#define STUB_EXPORT __attribute__((visibility("default"))) CUresult

/* What begins every function: one at a time, and those that the environment makes fail, fail. */
bool stub_lock(void);
void stub_unlock(const bool *locked);
CUresult stub_enter(const char *function, bool needs_context);
#define STUB_ENTER_AS(needs_context)                                                               \
    __attribute__((cleanup(stub_unlock), unused)) bool locked = stub_lock();                       \
    do {                                                                                           \
        CUresult entered = stub_enter(__func__, needs_context);                                    \
        if (entered != CUDA_SUCCESS)                                                               \
            return entered;                                                                        \
    } while (0)
#define STUB_ENTER STUB_ENTER_AS(true)
#define STUB_ENTER_WITHOUT_CONTEXT STUB_ENTER_AS(false)

/* The code that the environment gives the next call of a function. */
CUresult stub_injected(const char *function);
/* Say on stderr what went wrong, and return the code. */
CUresult stub_complain(CUresult code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* From now on every call returns this code, as after a fault of a kernel. */
void stub_break(CUresult code);
long long stub_number(const char *variable, long long otherwise);
int stub_capability(void); /* 90 for 9.0 */
size_t stub_memory_bytes(void);
int stub_shared_limit_bytes(void);
void stub_count(const char *what, int change); /* of what is to be given back */

/* Device memory. The host's view of it, or NULL with a complaint: out of bounds, freed. */
void *stub_host_view(CUdeviceptr memory, size_t bytes, const char *what);
bool stub_is_pinned(const void *memory, size_t bytes);
CUresult stub_check_guards(void);

/* Kernels. `parameters` have been copied; run now. */
struct CUfunc_st {
    char name[256];
    CUmodule module;
    const char *(*run)(void **arguments, const unsigned *grid, const unsigned *block,
                       unsigned shared_bytes);
    unsigned parameter_count;
    int static_shared_bytes, dynamic_limit_bytes;
    struct CUfunc_st *next;
};

struct stub_launch {
    CUfunction function;
    unsigned grid[3], block[3], shared_bytes;
    CUdeviceptr *parameters;
};

CUresult stub_check_launch(const struct stub_launch *launch);
CUresult stub_run(const struct stub_launch *launch);

/* Streams. */
struct stub_operation {
    enum { STUB_COPY_IN, STUB_COPY_OUT, STUB_COPY, STUB_SET, STUB_LAUNCH, STUB_RECORD } kind;
    CUdeviceptr device, source;
    void *host;
    size_t bytes;
    uint32_t value;
    unsigned value_bytes;
    struct stub_launch launch;
    CUevent event;
    struct stub_operation *next;
};

/* Wait for everything. */
CUresult stub_drain(void);
/* Whether this thread captures, which forbids what is not an operation of a stream. */
bool stub_capturing(void);

#endif
