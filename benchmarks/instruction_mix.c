/* A plugin for qemu's user mode: counts the instructions that the guest executes, and how many of
 * them multiply and add in vectors. It prints the counts on stderr before every write of the guest
 * to its own stderr, and when the guest ends: "edgepress-mix ALL SDOT SMMLA SMLAL FMLA". Like
 * targets/devices/instructions.c it declares what it needs of qemu-plugin.h, which distributions
 * do not package. Counts are exact for one guest thread.
 *
 * Patterns: Arm Architecture Reference Manual, "Advanced SIMD three same", "... extension",
 * "... different" and "vector x indexed element" (A64); "Advanced SIMD data-processing" (A32, T32). */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

/* The first member of what qemu tells a plugin about itself. */
struct qemu_info {
    const char *target_name;
};

typedef void (*block_callback)(unsigned cpu, void *data);
typedef void (*syscall_callback)(plugin_id id, unsigned cpu, int64_t number, uint64_t a1,
                                 uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6,
                                 uint64_t a7, uint64_t a8);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block,
                                                        size_t index);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
extern size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *instruction);
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

int qemu_plugin_version = 1;

enum { ALL, SDOT, SMMLA, SMLAL, FMLA, KINDS };

/* What one translated block holds of every kind. */
struct block_counts {
    uint32_t of[KINDS];
};

struct pattern {
    uint32_t mask, value;
    int kind;
};

static const struct pattern A64[] = {
    {0x9fe0fc00, 0x0e809400, SDOT},  /* sdot, udot */
    {0xbfe0fc00, 0x0e809c00, SDOT},  /* usdot */
    {0x9fc0f400, 0x0f80e000, SDOT},  /* sdot, udot by element */
    {0xbf40f400, 0x0f00f000, SDOT},  /* usdot, sudot by element */
    {0xdfe0f400, 0x4e80a400, SMMLA}, /* smmla, ummla, usmmla */
    {0x9f20dc00, 0x0e208000, SMLAL}, /* smlal, umlal, smlsl, umlsl */
    {0x9f20fc00, 0x0e20c000, SMLAL}, /* smull, umull */
    {0x9f00b400, 0x0f002000, SMLAL}, /* smlal, smlsl and unsigned by element */
    {0x9f00f400, 0x0f00a000, SMLAL}, /* smull, umull by element */
    {0x9f20fc00, 0x0e209400, SMLAL}, /* mla, mls */
    {0xbf00b400, 0x2f000000, SMLAL}, /* mla, mls by element */
    {0xbf20fc00, 0x0e20cc00, FMLA},  /* fmla */
    {0xbf80f400, 0x0f801000, FMLA},  /* fmla by element */
};

/* 32-bit Arm, as A32 writes it. */
static const struct pattern A32[] = {
    {0xfe800d50, 0xf2800800, SMLAL}, /* vmlal, vmlsl */
    {0xfe800f50, 0xf2800c00, SMLAL}, /* vmull */
    {0xfe800b50, 0xf2800240, SMLAL}, /* vmlal, vmlsl by scalar */
    {0xfe800f50, 0xf2800a40, SMLAL}, /* vmull by scalar */
    {0xff800f10, 0xf2000900, SMLAL}, /* vmla of integers */
    {0xfe800f50, 0xf2800040, SMLAL}, /* vmla of integers by scalar */
    {0xffa00f10, 0xf2000d10, FMLA},  /* vmla.f32 */
    {0xffa00f10, 0xf2000c10, FMLA},  /* vfma.f32 */
    {0xfe800f50, 0xf2800140, FMLA},  /* vmla.f32 by scalar */
};

static int narrow; /* 32-bit Arm */
static uint64_t counts[KINDS];

static int kind_of(uint32_t word, const struct pattern *patterns, size_t count)
{
    if ((word & 0xfeb00000) == 0xf2b00000) /* 32-bit Arm: vext, vtrn and others of no size */
        return ALL;
    for (size_t i = 0; i < count; ++i)
        if ((word & patterns[i].mask) == patterns[i].value)
            return patterns[i].kind;
    return ALL;
}

/* An instruction of 4 bytes as a word; T32 holds the two halves in order and moves the U bit. */
static int kind_of_instruction(const struct qemu_plugin_insn *instruction)
{
    uint16_t half[2];
    uint32_t word;
    if (qemu_plugin_insn_size(instruction) != 4)
        return ALL;
    memcpy(&word, qemu_plugin_insn_data(instruction), 4);
    if (!narrow)
        return kind_of(word, A64, sizeof A64 / sizeof *A64);
    memcpy(half, &word, 4);
    if ((half[0] & 0xef00) == 0xef00)
        word = 0xf2000000 | (uint32_t)(half[0] & 0x1000) << 12 | (uint32_t)(half[0] & 0xff) << 16 |
               half[1];
    return kind_of(word, A32, sizeof A32 / sizeof *A32);
}

static void block_runs(unsigned cpu, void *data)
{
    const struct block_counts *block = data;
    (void)cpu;
    for (int kind = 0; kind < KINDS; ++kind)
        counts[kind] += block->of[kind];
}

static void block_translated(plugin_id id, struct qemu_plugin_tb *block)
{
    /* Never freed: the callback may run as long as the guest does. */
    struct block_counts *found = calloc(1, sizeof *found);
    (void)id;
    if (found == NULL)
        abort();
    found->of[ALL] = (uint32_t)qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < found->of[ALL]; ++i) {
        int kind = kind_of_instruction(qemu_plugin_tb_get_insn(block, i));
        if (kind != ALL)
            ++found->of[kind];
    }
    qemu_plugin_register_vcpu_tb_exec_cb(block, block_runs, 0, found);
}

static void print_counts(void)
{
    fprintf(stderr, "\nedgepress-mix");
    for (int kind = 0; kind < KINDS; ++kind)
        fprintf(stderr, " %" PRIu64, counts[kind]);
    fputc('\n', stderr);
}

static void guest_calls_system(plugin_id id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2,
                               uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                               uint64_t a8)
{
    (void)id, (void)cpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number == (narrow ? 4 : 64) && a1 == 2)
        print_counts();
}

static void guest_ends(plugin_id id, void *data)
{
    (void)id, (void)data;
    print_counts();
}

int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int count, char **arguments)
{
    (void)count, (void)arguments;
    narrow = strcmp(info->target_name, "arm") == 0;
    qemu_plugin_register_vcpu_tb_trans_cb(id, block_translated);
    qemu_plugin_register_vcpu_syscall_cb(id, guest_calls_system);
    qemu_plugin_register_atexit_cb(id, guest_ends, NULL);
    return 0;
}
