/* A plugin for qemu's user mode: counts the instructions that the guest executes. It prints the
 * count on stderr whenever the guest reads the clock, and when it ends. It declares the few functions
 * it needs itself, because distributions do not package qemu-plugin.h; they are the same in all
 * versions of the interface so far, of which PLUGIN_VERSION names the one that qemu shall check.
 * Counts are exact for one guest thread. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;

/* The first member of what qemu tells a plugin about itself. */
struct qemu_info {
    const char *target_name;
};

/* Calls back before a translated block runs; `flags` 0: the callback reads no registers. */
typedef void (*block_callback)(unsigned cpu, void *data);
/* Calls back before a system call, whose block has run by then. */
typedef void (*syscall_callback)(plugin_id id, unsigned cpu, int64_t number, uint64_t a1,
                                 uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6,
                                 uint64_t a7, uint64_t a8);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
                                                  void (*callback)(plugin_id,
                                                                   struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block,
                                                 block_callback callback, int flags, void *data);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, syscall_callback callback);
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void *),
                                           void *data);

extern int qemu_plugin_version;
extern int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int count,
                               char **arguments);

int qemu_plugin_version = PLUGIN_VERSION;

/* Numbers of Linux's clock_gettime: of 64-bit Arm, or of 32-bit Arm with 32- and 64-bit times. */
static const int64_t CLOCK_64[] = {113, 113}, CLOCK_32[] = {263, 403};
static const int64_t *clock_numbers;

static uint64_t instructions;

static void block_runs(unsigned cpu, void *block_instructions)
{
    (void)cpu;
    instructions += (uintptr_t)block_instructions;
}

static void block_translated(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, block_runs, 0,
                                         (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void guest_calls_system(plugin_id id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2,
                               uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                               uint64_t a8)
{
    (void)id, (void)cpu, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7;
    (void)a8;
    if (number == clock_numbers[0] || number == clock_numbers[1])
        fprintf(stderr, "edgepress-clock %" PRIu64 "\n", instructions);
}

static void guest_ends(plugin_id id, void *data)
{
    (void)id, (void)data;
    fprintf(stderr, "edgepress-instructions %" PRIu64 "\n", instructions);
}

int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int count, char **arguments)
{
    (void)count, (void)arguments;
    clock_numbers = strcmp(info->target_name, "arm") == 0 ? CLOCK_32 : CLOCK_64;
    qemu_plugin_register_vcpu_tb_trans_cb(id, block_translated);
    qemu_plugin_register_vcpu_syscall_cb(id, guest_calls_system);
    qemu_plugin_register_atexit_cb(id, guest_ends, NULL);
    return 0;
}
