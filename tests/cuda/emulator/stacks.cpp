// Stacks: save the registers that a function must keep, and go on where another stack was left.
#include "scheduler.h"

#if defined(__x86_64__)

asm(R"(
    .text
    .globl switch_stacks
    .type switch_stacks, @function
switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size switch_stacks, . - switch_stacks
    .section .note.GNU-stack, "", @progbits
    .text
)");

namespace emulator {

static const unsigned SAVED = 6;

// A function starts with its stack 8 bytes below a multiple of 16: the caller's address is there.
void *prepare_stack(void *highest, void (*function)())
{
    void **stack = (void **)((uintptr_t)highest & ~(uintptr_t)15);
    *--stack = nullptr;
    *--stack = (void *)function;
    for (unsigned i = 0; i < SAVED; ++i)
        *--stack = nullptr;
    return stack;
}

} // namespace emulator

#elif defined(__aarch64__)

asm(R"(
    .text
    .globl switch_stacks
    .type switch_stacks, %function
switch_stacks:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size switch_stacks, . - switch_stacks
)");

namespace emulator {

void *prepare_stack(void *highest, void (*function)())
{
    void **stack = (void **)((uintptr_t)highest & ~(uintptr_t)15) - 20;
    for (unsigned i = 0; i < 20; ++i)
        stack[i] = nullptr;
    stack[11] = (void *)function; // x30, the address to return to
    return stack;
}

} // namespace emulator

#else
#error "the emulator has no stacks for this machine; add switch_stacks() and prepare_stack()"
#endif
