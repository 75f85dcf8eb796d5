/* A plugin for qemu's user mode: counts the instructions that the guest executes and prints them on
 * stderr when it ends. It declares the few functions it needs itself, because distributions do not
 * package qemu-plugin.h; they are the same in all versions of the interface so far, of which
 * PLUGIN_VERSION names the one that qemu shall check. Counts are exact for one guest thread. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;

/* Calls back before a translated block runs; `flags` 0: the callback reads no registers. */
typedef void (*block_callback)(unsigned cpu, void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
                                                  void (*callback)(plugin_id,
                                                                   struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block,
                                                 block_callback callback, int flags, void *data);
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*callback)(plugin_id, void *),
                                           void *data);

extern int qemu_plugin_version;
extern int qemu_plugin_install(plugin_id id, const void *info, int count, char **arguments);

int qemu_plugin_version = PLUGIN_VERSION;

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

static void guest_ends(plugin_id id, void *data)
{
    (void)id, (void)data;
    fprintf(stderr, "edgepress-instructions %" PRIu64 "\n", instructions);
}

int qemu_plugin_install(plugin_id id, const void *info, int count, char **arguments)
{
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, block_translated);
    qemu_plugin_register_atexit_cb(id, guest_ends, NULL);
    return 0;
}
