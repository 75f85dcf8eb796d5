#define _POSIX_C_SOURCE 200809L

#include "facts.h"

#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>

#include "json.h"
#include "sysfs.h"
#include "threads.h"

/* `model name` on x86, `Model` of some Arm boards. */
static void read_cpu_name(char *text, int bytes)
{
    char line[256];
    text[0] = '\0';
    FILE *file = fopen(PROC_FOLDER "/cpuinfo", "r");
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

void facts_print_constant(void)
{
    struct utsname system;
    char cpu[256], board[256];
    int known = uname(&system) == 0;
    read_cpu_name(cpu, sizeof cpu);
    sysfs_line(board, sizeof board, PROC_FOLDER "/device-tree/model");
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
    FILE *status = fopen(PROC_FOLDER "/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL)
        if (sscanf(line, "VmHWM: %llu", &kib) == 1)
            break;
    if (status != NULL)
        fclose(status);
    return kib * 1024;
}
