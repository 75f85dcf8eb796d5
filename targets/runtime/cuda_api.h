/* The functions of the NVIDIA driver that a model on a GPU needs, found in libcuda.so.1 when it
 * opens.
 *
 * The types and numbers are those of the driver API, which stays compatible: a bundle is built
 * without CUDA's headers, and starts on machines without a driver. What must be there is in CUDA
 * 11.4. */
#ifndef CUDA_API_H
#define CUDA_API_H

#include <stddef.h>
#include <stdint.h>

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

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803,
};

/* CUdevice_attribute */
enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum { CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1 };              /* CUfunction_attribute: static */
enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
enum { CU_CTX_SCHED_SPIN = 1 };                                /* CUctx_flags */
enum { CU_STREAM_NON_BLOCKING = 1 };                           /* CUstream_flags */
enum { CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1 };              /* CUstreamCaptureMode */
enum { CU_EVENT_DEFAULT = 0 };                                 /* CUevent_flags: with a time */
enum { CU_EVENT_RECORD_EXTERNAL = 1 };                         /* CUevent_record_flags */

/* CUlaunchConfig, and the one attribute that we set: the launch need not wait for the kernel before
 * to end; the kernel that is launched waits for that itself. */
struct cuda_launch_attribute {
    int id;
    int padding;
    union {
        char bytes[64];
        int allowed;
    } value;
};
enum { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
struct cuda_launch_config {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    CUstream stream;
    struct cuda_launch_attribute *attributes;
    unsigned attribute_count;
};

/* Name and parameters of every function, as libcuda.so.1 exports it. */
#define CUDA_FUNCTIONS(FUNCTION)                                                                  \
    FUNCTION(cuInit, (unsigned flags))                                                            \
    FUNCTION(cuDriverGetVersion, (int *version))                                                  \
    FUNCTION(cuGetErrorName, (CUresult code, const char **name))                                  \
    FUNCTION(cuGetErrorString, (CUresult code, const char **text))                                \
    FUNCTION(cuDeviceGetCount, (int *count))                                                      \
    FUNCTION(cuDeviceGet, (CUdevice *device, int index))                                          \
    FUNCTION(cuDeviceGetName, (char *name, int bytes, CUdevice device))                           \
    FUNCTION(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                  \
    FUNCTION(cuDeviceTotalMem_v2, (size_t *bytes, CUdevice device))                               \
    FUNCTION(cuDeviceGetPCIBusId, (char *id, int bytes, CUdevice device))                         \
    FUNCTION(cuDevicePrimaryCtxSetFlags_v2, (CUdevice device, unsigned flags))                    \
    FUNCTION(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device))                     \
    FUNCTION(cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                     \
    FUNCTION(cuCtxGetCurrent, (CUcontext *context))                                               \
    FUNCTION(cuCtxPushCurrent_v2, (CUcontext context))                                            \
    FUNCTION(cuCtxPopCurrent_v2, (CUcontext *context))                                            \
    FUNCTION(cuModuleLoadData, (CUmodule *module, const void *image))                             \
    FUNCTION(cuModuleUnload, (CUmodule module))                                                   \
    FUNCTION(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name))      \
    FUNCTION(cuFuncGetAttribute, (int *value, int attribute, CUfunction function))                \
    FUNCTION(cuFuncSetAttribute, (CUfunction function, int attribute, int value))                 \
    FUNCTION(cuMemGetInfo_v2, (size_t *free_bytes, size_t *total_bytes))                          \
    FUNCTION(cuMemAlloc_v2, (CUdeviceptr *memory, size_t bytes))                                  \
    FUNCTION(cuMemFree_v2, (CUdeviceptr memory))                                                  \
    FUNCTION(cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags))                       \
    FUNCTION(cuMemFreeHost, (void *memory))                                                       \
    FUNCTION(cuMemsetD8Async,                                                                     \
             (CUdeviceptr memory, unsigned char value, size_t bytes, CUstream stream))            \
    FUNCTION(cuMemcpyHtoDAsync_v2,                                                                \
             (CUdeviceptr to, const void *from, size_t bytes, CUstream stream))                   \
    FUNCTION(cuMemcpyDtoHAsync_v2, (void *to, CUdeviceptr from, size_t bytes, CUstream stream))   \
    FUNCTION(cuMemcpyDtoDAsync_v2,                                                                \
             (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))                   \
    FUNCTION(cuStreamCreate, (CUstream *stream, unsigned flags))                                  \
    FUNCTION(cuStreamDestroy_v2, (CUstream stream))                                               \
    FUNCTION(cuStreamSynchronize, (CUstream stream))                                              \
    FUNCTION(cuStreamBeginCapture_v2, (CUstream stream, int mode))                                \
    FUNCTION(cuStreamEndCapture, (CUstream stream, CUgraph *graph))                               \
    FUNCTION(cuLaunchKernel,                                                                      \
             (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,             \
              unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,        \
              CUstream stream, void **parameters, void **extra))                                  \
    FUNCTION(cuGraphInstantiateWithFlags,                                                         \
             (CUgraphExec *executable, CUgraph graph, unsigned long long flags))                  \
    FUNCTION(cuGraphDestroy, (CUgraph graph))                                                     \
    FUNCTION(cuGraphExecDestroy, (CUgraphExec executable))                                        \
    FUNCTION(cuGraphLaunch, (CUgraphExec executable, CUstream stream))                            \
    FUNCTION(cuEventCreate, (CUevent *event, unsigned flags))                                     \
    FUNCTION(cuEventDestroy_v2, (CUevent event))                                                  \
    FUNCTION(cuEventRecordWithFlags, (CUevent event, CUstream stream, unsigned flags))            \
    FUNCTION(cuEventElapsedTime, (float *ms, CUevent start, CUevent end))

#define CUDA_MEMBER(name, parameters) CUresult(*name) parameters;
struct cuda_api {
    CUDA_FUNCTIONS(CUDA_MEMBER)
};
#undef CUDA_MEMBER

/* cuLaunchKernelEx, which drivers from CUDA 11.8 on have; else NULL. */
extern CUresult (*cuda_launch_extended)(const struct cuda_launch_config *config,
                                        CUfunction function, void **parameters, void **extra);

/* Filled by cuda_load(). */
extern struct cuda_api cuda;

/* Find the driver's functions. 0, or -1 with error_text() set: no driver, or too old a one. */
int cuda_load(void);

/* 0 where the code is CUDA_SUCCESS, else -1 with error_text() set:
 * "WHAT failed: CUDA_ERROR_…: why". */
int cuda_check(CUresult code, const char *what);

/* Call a function of the driver: 0, or -1 with error_text() set. */
#define CUDA(function, ...) cuda_check(cuda.function(__VA_ARGS__), #function)

/* The newest CUDA that the driver knows, as major * 1000 + minor * 10; 0 where it does not say. */
int cuda_version(void);

#endif
