/* A libnvidia-ml.so.1 that needs no GPU. Its answers are in the file that NVML_STUB names, a line
 * each, and are read anew at every call; what the file does not have is not supported.
 *
 *   clock_mhz 1500              memory_clock_mhz 2600
 *   most_clock_mhz 1980         most_memory_clock_mhz 2619
 *   temperature_celsius 40      power_milliwatts 70000      power_limit_milliwatts 700000
 *   performance_state 0         reasons 0                   driver 580.65.06
 *   init_error 9 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
};

#define NVML_EXPORT __attribute__((visibility("default")))

typedef struct nvmlDevice_st {
    int initialised;
} *nvmlDevice_t;

static struct nvmlDevice_st the_device;

static int answer(const char *name, char *text, size_t bytes)
{
    const char *path = getenv("NVML_STUB");
    FILE *file = path != NULL ? fopen(path, "r") : NULL;
    char line[256];
    int found = 0;
    while (file != NULL && !found && fgets(line, sizeof line, file) != NULL) {
        size_t length = strlen(name);
        found = strncmp(line, name, length) == 0 && line[length] == ' ';
        if (found) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(text, bytes, "%s", line + length + 1);
        }
    }
    if (file != NULL)
        fclose(file);
    return found ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

static int number(nvmlDevice_t device, const char *name, unsigned long long *value)
{
    char text[64];
    if (!the_device.initialised)
        return NVML_ERROR_UNINITIALIZED;
    if (device != &the_device)
        return NVML_ERROR_INVALID_ARGUMENT;
    int code = answer(name, text, sizeof text);
    if (code == NVML_SUCCESS)
        *value = strtoull(text, NULL, 0);
    return code;
}

static int unsigned_number(nvmlDevice_t device, const char *name, unsigned *value)
{
    unsigned long long wide = 0;
    int code = number(device, name, &wide);
    if (code == NVML_SUCCESS)
        *value = (unsigned)wide;
    return code;
}

NVML_EXPORT int nvmlInit_v2(void)
{
    char text[64];
    if (answer("init_error", text, sizeof text) == NVML_SUCCESS)
        return atoi(text);
    the_device.initialised++;
    return NVML_SUCCESS;
}

NVML_EXPORT int nvmlShutdown(void)
{
    if (!the_device.initialised)
        return NVML_ERROR_UNINITIALIZED;
    the_device.initialised--;
    return NVML_SUCCESS;
}

NVML_EXPORT const char *nvmlErrorString(int code)
{
    switch (code) {
    case NVML_SUCCESS: return "The operation was successful";
    case NVML_ERROR_UNINITIALIZED: return "NVML was not first initialized with nvmlInit()";
    case NVML_ERROR_NOT_SUPPORTED:
        return "The requested operation is not available on target device";
    default: return "Unknown Error";
    }
}

NVML_EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned bytes)
{
    return the_device.initialised ? answer("driver", text, bytes) : NVML_ERROR_UNINITIALIZED;
}

NVML_EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    if (!the_device.initialised)
        return NVML_ERROR_UNINITIALIZED;
    if (index != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *device = &the_device;
    return NVML_SUCCESS;
}

/* The driver stub's first device has this one; NVML writes the domain with eight digits or four. */
NVML_EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvmlDevice_t *device)
{
    if (strcmp(id, "0000:01:00.0") != 0 && strcmp(id, "00000000:01:00.0") != 0)
        return the_device.initialised ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
    return nvmlDeviceGetHandleByIndex_v2(0, device);
}

/* Kinds of clocks: 0 graphics, 1 multiprocessors, 2 memory, 3 video. */
NVML_EXPORT int nvmlDeviceGetClockInfo(nvmlDevice_t device, int kind, unsigned *mhz)
{
    return unsigned_number(device, kind == 2 ? "memory_clock_mhz" : "clock_mhz", mhz);
}

NVML_EXPORT int nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, int kind, unsigned *mhz)
{
    return unsigned_number(device, kind == 2 ? "most_memory_clock_mhz" : "most_clock_mhz", mhz);
}

NVML_EXPORT int nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius)
{
    if (sensor != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    return unsigned_number(device, "temperature_celsius", celsius);
}

NVML_EXPORT int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts)
{
    return unsigned_number(device, "power_milliwatts", milliwatts);
}

NVML_EXPORT int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts)
{
    return unsigned_number(device, "power_limit_milliwatts", milliwatts);
}

NVML_EXPORT int nvmlDeviceGetPerformanceState(nvmlDevice_t device, int *state)
{
    unsigned value = 0;
    int code = unsigned_number(device, "performance_state", &value);
    if (code == NVML_SUCCESS)
        *state = (int)value;
    return code;
}

/* Two names of one function: drivers before 535 have only the second. */
NVML_EXPORT int nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device,
                                                       unsigned long long *reasons)
{
    return number(device, "reasons", reasons);
}

NVML_EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device,
                                                          unsigned long long *reasons)
{
    return number(device, "reasons", reasons);
}
