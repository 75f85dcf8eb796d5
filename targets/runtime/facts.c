#define _POSIX_C_SOURCE 200809L

#include "facts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

#include "json.h"
#include "threads.h"

#define CPU0 "/sys/devices/system/cpu/cpu0/"

/* First line of a file, or an empty text. */
static void read_line(const char *path, char *text, int bytes)
{
    FILE *file = fopen(path, "r");
    if (file == NULL || fgets(text, bytes, file) == NULL)
        text[0] = '\0';
    if (file != NULL)
        fclose(file);
    text[strcspn(text, "\n")] = '\0';
}

static double read_number(const char *path)
{
    char text[FACT_TEXT_BYTES], *end;
    read_line(path, text, sizeof text);
    double number = strtod(text, &end);
    return end == text ? NAN : number;
}

/* `model name` on x86, `Model` of some Arm boards. */
static void read_cpu_name(char *text, int bytes)
{
    char line[256];
    text[0] = '\0';
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file != NULL && text[0] == '\0' && fgets(line, sizeof line, file) != NULL) {
        char *colon = strchr(line, ':');
        if (colon != NULL &&
            (strncmp(line, "model name", 10) == 0 || strncmp(line, "Model", 5) == 0))
            snprintf(text, (size_t)bytes, "%s", colon + 1 + strspn(colon + 1, " "));
    }
    if (file != NULL)
        fclose(file);
    text[strcspn(text, "\n")] = '\0';
}

static void print_text(const char *key, const char *text)
{
    printf("\"%s\": ", key);
    json_string(text[0] != '\0' ? text : NULL);
}

static void print_number(const char *key, double number)
{
    printf("\"%s\": ", key);
    json_number(number);
}

void facts_print_constant(void)
{
    struct utsname system;
    char cpu[256], board[256];
    int known = uname(&system) == 0;
    read_cpu_name(cpu, sizeof cpu);
    read_line("/proc/device-tree/model", board, sizeof board);
    print_text("kernel", known ? system.release : "");
    printf(", ");
    print_text("machine", known ? system.machine : "");
    printf(", ");
    print_text("cpu", cpu);
    printf(", ");
    print_text("board", board);
    printf(", \"cpus_available\": %d", threads_available());
}

unsigned long long facts_peak_memory_bytes(void)
{
    /* Not getrusage: it counts what the process was before exec, too. */
    unsigned long long kib = 0;
    char line[128];
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL)
        if (sscanf(line, "VmHWM: %llu", &kib) == 1)
            break;
    if (status != NULL)
        fclose(status);
    return kib * 1024;
}

struct facts facts_now(void)
{
    struct facts facts;
    read_line(CPU0 "cpufreq/scaling_governor", facts.governor, sizeof facts.governor);
    facts.frequency_khz = read_number(CPU0 "cpufreq/scaling_cur_freq");
    facts.temperature_celsius = read_number("/sys/class/thermal/thermal_zone0/temp") / 1000;
    read_line("/sys/devices/platform/soc/soc:firmware/get_throttled", facts.throttled,
              sizeof facts.throttled);
    facts.throttle_count = read_number(CPU0 "thermal_throttle/core_throttle_count");
    return facts;
}

void facts_print(const struct facts *facts)
{
    putchar('{');
    print_text("governor", facts->governor);
    printf(", ");
    print_number("frequency_khz", facts->frequency_khz);
    printf(", ");
    print_number("temperature_celsius", facts->temperature_celsius);
    printf(", ");
    print_text("throttled", facts->throttled);
    printf(", ");
    print_number("throttle_count", facts->throttle_count);
    putchar('}');
}
