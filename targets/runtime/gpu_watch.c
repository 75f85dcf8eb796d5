#define _POSIX_C_SOURCE 200809L

#include "gpu_watch.h"

#include <dlfcn.h>
#include <glob.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "sysfs.h"

/* Numbers of NVML: what it returns, kinds of clocks, sensors. */
enum { NVML_SUCCESS = 0, NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2, NVML_TEMPERATURE_GPU = 0 };

typedef struct nvmlDevice_st *nvmlDevice_t;

#define NVML_FUNCTIONS(FUNCTION)                                                                  \
    FUNCTION(nvmlInit_v2, (void))                                                                 \
    FUNCTION(nvmlShutdown, (void))                                                                \
    FUNCTION(nvmlSystemGetDriverVersion, (char *text, unsigned bytes))                            \
    FUNCTION(nvmlDeviceGetHandleByPciBusId_v2, (const char *id, nvmlDevice_t *device))            \
    FUNCTION(nvmlDeviceGetClockInfo, (nvmlDevice_t device, int kind, unsigned *mhz))              \
    FUNCTION(nvmlDeviceGetMaxClockInfo, (nvmlDevice_t device, int kind, unsigned *mhz))           \
    FUNCTION(nvmlDeviceGetTemperature, (nvmlDevice_t device, int sensor, unsigned *celsius))      \
    FUNCTION(nvmlDeviceGetPowerUsage, (nvmlDevice_t device, unsigned *milliwatts))                \
    FUNCTION(nvmlDeviceGetPerformanceState, (nvmlDevice_t device, int *state))                    \
    FUNCTION(nvmlDeviceGetCurrentClocksEventReasons,                                              \
             (nvmlDevice_t device, unsigned long long *reasons))                                  \
    FUNCTION(nvmlDeviceGetCurrentClocksThrottleReasons,                                           \
             (nvmlDevice_t device, unsigned long long *reasons))

#define NVML_MEMBER(name, parameters) int(*name) parameters;
static struct {
    NVML_FUNCTIONS(NVML_MEMBER)
} nvml;
#undef NVML_MEMBER

static const struct {
    const char *name;
    void *function;
} FUNCTIONS[] = {
#define ROW(function, parameters) {#function, &nvml.function},
    NVML_FUNCTIONS(ROW)
#undef ROW
};

/* Call a function of NVML, or fail where this version has none of the name. */
#define NVML(function, ...) (nvml.function != NULL ? nvml.function(__VA_ARGS__) : -1)

static void *library;
static bool ready;
static nvmlDevice_t device;
static char driver[80];

/* Folders of a Jetson's GPU and of its thermal zone; empty where there are none. */
static char jetson_clock[256], jetson_zone[256];

static void load_nvml(void)
{
    if (library == NULL)
        library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; library != NULL && i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++) {
        void *address = dlsym(library, FUNCTIONS[i].name);
        memcpy(FUNCTIONS[i].function, &address, sizeof address);
    }
}

/* Find the folder of a file whose path matches. */
static bool find_folder(char *folder, size_t bytes, const char *pattern)
{
    glob_t found = {0};
    bool there = glob(pattern, 0, NULL, &found) == 0 && strlen(found.gl_pathv[0]) < bytes;
    if (there) {
        strcpy(folder, found.gl_pathv[0]);
        *strrchr(folder, '/') = '\0';
    }
    globfree(&found);
    return there;
}

/* The names of the device are those of JetPack 6 and of JetPack 5. */
static void find_jetson(void)
{
    static const char *const CLOCKS[] = {SYS_FOLDER "/class/devfreq/*.gpu/cur_freq",
                                         SYS_FOLDER "/class/devfreq/*.ga10b/cur_freq"};
    glob_t found = {0};
    jetson_clock[0] = jetson_zone[0] = '\0';
    for (size_t i = 0; i < sizeof CLOCKS / sizeof *CLOCKS; i++)
        if (find_folder(jetson_clock, sizeof jetson_clock, CLOCKS[i]))
            break;
    if (jetson_clock[0] == '\0')
        return;
    if (glob(SYS_FOLDER "/class/thermal/thermal_zone*/type", 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++) {
            char type[64];
            sysfs_line(type, sizeof type, "%s", found.gl_pathv[i]);
            if (strncmp(type, "gpu", 3) == 0 || strncmp(type, "GPU", 3) == 0) {
                *strrchr(found.gl_pathv[i], '/') = '\0';
                snprintf(jetson_zone, sizeof jetson_zone, "%s", found.gl_pathv[i]);
            }
        }
    globfree(&found);
}

void gpu_watch_open(const char *pci_bus_id)
{
    driver[0] = '\0';
    load_nvml();
    if (!ready && NVML(nvmlInit_v2, ) == NVML_SUCCESS) {
        ready = NVML(nvmlDeviceGetHandleByPciBusId_v2, pci_bus_id, &device) == NVML_SUCCESS;
        if (NVML(nvmlSystemGetDriverVersion, driver, sizeof driver) != NVML_SUCCESS)
            driver[0] = '\0';
        if (!ready)
            (void)NVML(nvmlShutdown, );
    }
    if (driver[0] == '\0')
        sysfs_line(driver, sizeof driver, SYS_FOLDER "/module/nvidia/version");
    if (!ready)
        find_jetson();
}

static double number(int code, unsigned value)
{
    return code == NVML_SUCCESS ? value : NAN;
}

static void read_nvml(struct gpu_state *state)
{
    unsigned value = 0;
    int performance_state = 0;
    unsigned long long reasons = 0;
    int code = NVML(nvmlDeviceGetClockInfo, device, NVML_CLOCK_SM, &value);
    state->frequency_khz = 1e3 * number(code, value);
    code = NVML(nvmlDeviceGetMaxClockInfo, device, NVML_CLOCK_SM, &value);
    state->highest_khz = 1e3 * number(code, value);
    code = NVML(nvmlDeviceGetClockInfo, device, NVML_CLOCK_MEM, &value);
    state->memory_khz = 1e3 * number(code, value);
    code = NVML(nvmlDeviceGetTemperature, device, NVML_TEMPERATURE_GPU, &value);
    state->temperature_celsius = number(code, value);
    code = NVML(nvmlDeviceGetPowerUsage, device, &value);
    state->power_watts = 1e-3 * number(code, value);
    if (NVML(nvmlDeviceGetPerformanceState, device, &performance_state) == NVML_SUCCESS)
        state->performance_state = performance_state;
    if (NVML(nvmlDeviceGetCurrentClocksEventReasons, device, &reasons) == NVML_SUCCESS ||
        NVML(nvmlDeviceGetCurrentClocksThrottleReasons, device, &reasons) == NVML_SUCCESS)
        state->throttle_reasons = (long)(reasons & 0x7fffffff);
}

/* How far the system slows the GPU down: a Jetson's cooling devices for it have it in their type. */
static double read_cooling_level(void)
{
    glob_t found = {0};
    double level = NAN;
    if (glob(SYS_FOLDER "/class/thermal/cooling_device*/type", 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++) {
            char type[64];
            sysfs_line(type, sizeof type, "%s", found.gl_pathv[i]);
            if (strstr(type, "gpu") == NULL && strstr(type, "ga10b") == NULL)
                continue;
            *strrchr(found.gl_pathv[i], '/') = '\0';
            level = fmax(level, sysfs_number("%s/cur_state", found.gl_pathv[i]));
        }
    globfree(&found);
    return level;
}

/* Written after NVIDIA's documentation of JetPack, and not tried on a board. */
static void read_jetson(struct gpu_state *state)
{
    state->frequency_khz = sysfs_number("%s/cur_freq", jetson_clock) * 1e-3;
    state->highest_khz = sysfs_number("%s/max_freq", jetson_clock) * 1e-3;
    if (jetson_zone[0] != '\0')
        state->temperature_celsius = sysfs_number("%s/temp", jetson_zone) * 1e-3;
    state->cooling_level = read_cooling_level();
}

void gpu_watch_read(struct gpu_state *state)
{
    *state = (struct gpu_state){
        .frequency_khz = NAN,
        .highest_khz = NAN,
        .memory_khz = NAN,
        .temperature_celsius = NAN,
        .power_watts = NAN,
        .performance_state = NAN,
        .cooling_level = NAN,
        .throttle_reasons = -1,
    };
    if (ready)
        read_nvml(state);
    else if (jetson_clock[0] != '\0')
        read_jetson(state);
}

const char *gpu_watch_driver(void)
{
    return driver;
}
