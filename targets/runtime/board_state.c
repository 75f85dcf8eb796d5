#define _POSIX_C_SOURCE 200809L

#include "board_state.h"

#include <dirent.h>
#include <glob.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "json.h"
#include "sysfs.h"
#include "threads.h"

#define CPU SYS_FOLDER "/devices/system/cpu/cpu%d/"
#define THERMAL SYS_FOLDER "/class/thermal"
#define HWMON SYS_FOLDER "/class/hwmon"

/* Sensors that are off or broken say 0 K, 200 °C and more. */
static const double COLDEST = -40, HOTTEST = 150;

/* Add a core's governor to the list, unless it is there. */
static void add_governor(char *list, size_t bytes, const char *governor)
{
    if (strstr(list, governor) != NULL)
        return;
    size_t length = strlen(list);
    snprintf(list + length, bytes - length, "%s%s", length > 0 ? ", " : "", governor);
}

static void read_cores(struct board_state *state, const struct tasks *tasks)
{
    for (int i = 0; i < tasks->count; i++) {
        int core = tasks->list[i].core;
        char governor[32];
        if (core < 0)
            continue;
        sysfs_line(governor, sizeof governor, CPU "cpufreq/scaling_governor", core);
        add_governor(state->governor, sizeof state->governor, governor);
        if (tasks->list[i].id == getpid()) /* the others may rest while this one looks */
            state->frequency_khz = sysfs_number(CPU "cpufreq/scaling_cur_freq", core);
    }
}

/* Events of all cores that the threads may be moved to, and of their package. NAN without any. */
static double read_throttle_count(void)
{
    int cores[MODEL_MAX_THREADS];
    int count = threads_cores(cores, MODEL_MAX_THREADS);
    double of_cores = NAN, of_package = NAN;
    for (int i = 0; i < count; i++) {
        double events = sysfs_number(CPU "thermal_throttle/core_throttle_count", cores[i]);
        if (!isnan(events))
            of_cores = isnan(of_cores) ? events : of_cores + events;
        of_package =
            fmax(of_package, sysfs_number(CPU "thermal_throttle/package_throttle_count", cores[i]));
    }
    if (isnan(of_cores) || isnan(of_package))
        return fmax(of_cores, of_package);
    return of_cores + of_package;
}

/* Whether a cooling device slows CPUs down: those of cpufreq drivers and of ACPI do. A fan does not. */
static bool slows_cpus(const char *type)
{
    return strstr(type, "cpufreq") != NULL || strcmp(type, "Processor") == 0;
}

static void read_thermal(struct board_state *state)
{
    DIR *folder = opendir(THERMAL);
    if (folder == NULL)
        return;
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        const char *name = entry->d_name;
        if (strncmp(name, "thermal_zone", 12) == 0) {
            double celsius = sysfs_number(THERMAL "/%s/temp", name) / 1000;
            if (celsius > COLDEST && celsius < HOTTEST)
                state->temperature_celsius = fmax(state->temperature_celsius, celsius);
        } else if (strncmp(name, "cooling_device", 14) == 0) {
            char type[64];
            sysfs_line(type, sizeof type, THERMAL "/%s/type", name);
            if (slows_cpus(type))
                state->cooling_level =
                    fmax(state->cooling_level, sysfs_number(THERMAL "/%s/cur_state", name));
        }
    }
    closedir(folder);
}

/* Flags of a Raspberry Pi's firmware, in hexadecimal. */
static long read_firmware_flags(void)
{
    glob_t found = {0};
    long flags = -1;
    if (glob(SYS_FOLDER "/devices/platform/soc*/soc*:firmware/get_throttled", 0, NULL, &found) == 0) {
        char text[32], *end;
        sysfs_line(text, sizeof text, "%s", found.gl_pathv[0]);
        flags = strtol(text, &end, 16);
        if (end == text)
            flags = -1;
    }
    globfree(&found);
    return flags;
}

/* The one flag that kernels without the firmware's file have: the voltage is too low. */
static long read_voltage_alarm(void)
{
    glob_t found = {0};
    long flags = -1;
    if (glob(HWMON "/hwmon*/in0_lcrit_alarm", 0, NULL, &found) == 0)
        for (size_t i = 0; flags < 0 && i < found.gl_pathc; i++) {
            char name[32], *path = found.gl_pathv[i];
            double alarm = sysfs_number("%s", path);
            *strrchr(path, '/') = '\0';
            sysfs_line(name, sizeof name, "%s/name", path);
            if (strcmp(name, "rpi_volt") == 0 && !isnan(alarm))
                flags = alarm != 0;
        }
    globfree(&found);
    return flags;
}

void board_state_read(struct board_state *state, const struct tasks *tasks)
{
    *state = (struct board_state){
        .frequency_khz = NAN,
        .temperature_celsius = NAN,
        .cooling_level = NAN,
    };
    read_cores(state, tasks);
    read_thermal(state);
    state->throttle_count = read_throttle_count();
    state->throttle_flags = read_firmware_flags();
    if (state->throttle_flags < 0)
        state->throttle_flags = read_voltage_alarm();
}

void throttle_flags_print(long flags)
{
    if (flags < 0)
        printf("null");
    else
        printf("\"0x%lx\"", (unsigned long)flags);
}

void board_state_print(const struct board_state *state)
{
    printf("{\"governor\": ");
    json_string(state->governor[0] != '\0' ? state->governor : NULL);
    printf(", \"frequency_khz\": ");
    json_number(state->frequency_khz);
    printf(", \"temperature_celsius\": ");
    json_number(state->temperature_celsius);
    printf(", \"throttled\": ");
    throttle_flags_print(state->throttle_flags);
    printf(", \"throttle_count\": ");
    json_number(state->throttle_count);
    printf(", \"cooling_level\": ");
    json_number(state->cooling_level);
    putchar('}');
}
