"""What instructions do, on x86-64, AArch64 and 32-bit Arm."""

from __future__ import annotations

import pytest

from edgepress.targets.instructions import FLOAT_KINDS, KINDS, Instruction, kind_of, products_of

INTEGER, FLOAT = "vector_integer_multiply", "vector_float_multiply"
SCALAR, SCALAR_FLOAT = "scalar_integer_multiply", "scalar_float_multiply"


def parsed(line: str) -> Instruction:
    mnemonic, _, operands = line.partition(" ")
    return Instruction(mnemonic, operands)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        # x86-64, AT&T syntax: the last operand is written
        ("vpdpbusd (%rsi,%rax), %zmm1, %zmm2", INTEGER),
        ("vpdpwssd %ymm0, %ymm1, %ymm2", INTEGER),
        ("vpmaddwd %ymm0, %ymm1, %ymm2", INTEGER),
        ("vpmaddubsw %ymm0, %ymm1, %ymm2", INTEGER),
        ("vpmulld %ymm0, %ymm1, %ymm2", INTEGER),
        ("pmulhrsw %xmm0, %xmm1", INTEGER),
        ("imulq $24, %rax, %rcx", SCALAR),
        ("imull %ecx, %edx", SCALAR),
        ("mulq %rcx", SCALAR),
        ("vfmadd231ps (%rdi){1to16}, %zmm1, %zmm2", FLOAT),
        ("vfnmadd213pd %ymm0, %ymm1, %ymm2", FLOAT),
        ("vmulps %zmm0, %zmm1, %zmm2", FLOAT),
        ("vfmadd213ss %xmm0, %xmm1, %xmm2", SCALAR_FLOAT),
        ("mulsd %xmm0, %xmm1", SCALAR_FLOAT),
        ("vaddps %zmm0, %zmm1, %zmm2", "vector_float"),
        ("vcmpltps %zmm0, %zmm1, %k1", "vector_float"),
        ("vdivss %xmm0, %xmm1, %xmm2", "scalar_float"),
        ("vucomiss %xmm0, %xmm1", "scalar_float"),
        ("vcvtdq2ps %zmm4, %zmm5", "conversion"),
        ("vcvttss2si %xmm0, %eax", "conversion"),
        ("vxorps %xmm2, %xmm2, %xmm2", "vector_other"),
        ("vpaddd %zmm0, %zmm1, %zmm2", "vector_other"),
        ("vmovaps %zmm0, %zmm1", "vector_other"),
        ("vmovups (%rdi,%rax,4), %zmm0", "load"),
        ("vpmovzxbd -12000(%rcx,%r8), %zmm5", "load"),
        ("vbroadcastss .LCPI0_1(%rip), %zmm3", "load"),
        ("movzbl (%rdi), %eax", "load"),
        ("vmovups %zmm0, (%rdi)", "store"),
        ("vpmovdb %zmm5, (%rdx,%rsi)", "store"),
        ("vmovups %zmm0, (%rdi) {%k1}", "store"),
        ("movb %al, (%rdi)", "store"),
        ("cmpb $0, (%rdi)", "other"),
        ("leaq (%rdi,%rax,4), %rcx", "other"),
        ("pushq %rbp", "other"),
        ("addq $16, %rcx", "other"),
        ("retq", "other"),
        ("callq *%rax", "call"),
        ("jne .LBB0_2", "jump"),
        ("jmp .LBB0_2", "jump"),
        # AArch64
        ("sdot v0.4s, v1.16b, v2.4b[0]", INTEGER),
        ("udot v0.2s, v1.8b, v2.8b", INTEGER),
        ("smmla v0.4s, v1.16b, v2.16b", INTEGER),
        ("smlal v0.4s, v1.4h, v2.4h", INTEGER),
        ("smlal2 v0.4s, v1.8h, v2.h[3]", INTEGER),
        ("smull v0.8h, v1.8b, v2.8b", INTEGER),
        ("mul v0.4s, v1.4s, v2.4s", INTEGER),
        ("mla v0.4s, v1.4s, v2.4s", INTEGER),
        ("sqrdmulh v0.4s, v1.4s, v2.4s", INTEGER),
        ("mul x0, x1, x2", SCALAR),
        ("madd x0, x1, x2, x3", SCALAR),
        ("smull x0, w1, w2", SCALAR),
        ("smaddl x0, w1, w2, x3", SCALAR),
        ("umulh x0, x1, x2", SCALAR),
        ("fmla v0.4s, v1.4s, v2.s[0]", FLOAT),
        ("fmul v0.4s, v1.4s, v2.4s", FLOAT),
        ("fmadd s0, s1, s2, s3", SCALAR_FLOAT),
        ("fmul s0, s1, s2", SCALAR_FLOAT),
        ("fadd v0.4s, v1.4s, v2.4s", "vector_float"),
        ("fmaxnm v0.4s, v1.4s, v2.4s", "vector_float"),
        ("fdiv s0, s1, s2", "scalar_float"),
        ("fcmp s0, s1", "scalar_float"),
        ("scvtf v0.4s, v1.4s", "conversion"),
        ("fcvtns v0.4s, v1.4s", "conversion"),
        ("sshll v7.8h, v7.8b, #0", "vector_other"),
        ("movi v3.2d, #0000000000000000", "vector_other"),
        ("fmov s0, w0", "vector_other"),
        ("ldr q0, [x0, #16]", "load"),
        ("ldp q0, q1, [x0]", "load"),
        ("ld1r { v0.4s }, [x0]", "load"),
        ("ldurb w0, [x1, #-3]", "load"),
        ("str q0, [x0]", "store"),
        ("st1 { v0.16b }, [x0]", "store"),
        ("stp x29, x30, [sp, #-16]!", "store"),
        ("mov x10, x0", "other"),
        ("ret", "other"),
        ("bl memcpy", "call"),
        ("blr x8", "call"),
        ("b.ne .LBB0_2", "jump"),
        ("b .LBB0_2", "jump"),
        ("cbnz w0, .LBB0_2", "jump"),
        ("tbz w0, #3, .LBB0_2", "jump"),
        # 32-bit Arm
        ("vmlal.s16 q0, d2, d3[1]", INTEGER),
        ("vmull.u8 q0, d2, d3", INTEGER),
        ("vmul.i32 q0, q1, q2", INTEGER),
        ("vmla.i16 q0, q1, q2", INTEGER),
        ("vqrdmulh.s32 q0, q1, q2", INTEGER),
        ("vmul.f32 q0, q1, q2", FLOAT),
        ("vmla.f32 d0, d1, d2[0]", FLOAT),
        ("vfma.f32 q0, q1, q2", FLOAT),
        ("vmul.f32 s0, s1, s2", SCALAR_FLOAT),
        ("vmulgt.f32 s0, s1, s2", SCALAR_FLOAT),
        ("vmul.f64 d0, d1, d2", SCALAR_FLOAT),
        ("vnmul.f32 s0, s1, s2", SCALAR_FLOAT),
        ("mul r0, r1, r2", SCALAR),
        ("mla r0, r1, r2, r3", SCALAR),
        ("mulne r0, r1, r2", SCALAR),
        ("smull r0, r1, r2, r3", SCALAR),
        ("smlabb r0, r1, r2, r3", SCALAR),
        ("smulbb r0, r1, r2", SCALAR),
        ("smmul r0, r1, r2", SCALAR),
        ("vadd.f32 q10, q10, q11", "vector_float"),
        ("vcgt.f32 q12, q11, q10", "vector_float"),
        ("vdiv.f32 s0, s1, s2", "scalar_float"),
        ("vadd.f64 d0, d1, d2", "scalar_float"),
        ("vcvt.f32.s32 q10, q10", "conversion"),
        ("vadd.i32 q10, q10, q11", "vector_other"),
        ("vbif q10, q11, q12", "vector_other"),
        ("vmov.i16 d18, #0x80", "vector_other"),
        ("vld1.32 {d16[], d17[]}, [r1:32]", "load"),
        ("vldr s0, [r1]", "load"),
        ("vldmia r0, {d16, d17}", "load"),
        ("ldrb r0, [r1], #1", "load"),
        ("vst1.8 {d16, d17}, [lr]!", "store"),
        ("strh r0, [r1]", "store"),
        ("push {r4, lr}", "other"),
        ("vpush {d8, d9}", "other"),
        ("blx r3", "call"),
        ("blne memcpy", "call"),
        ("ble .LBB0_1", "jump"),
        ("blo .LBB0_1", "jump"),
        ("blt .LBB0_1", "jump"),
        ("bls .LBB0_1", "jump"),
        ("bx lr", "jump"),
        ("subs r7, r7, #1", "other"),
    ],
)
def test_every_kind(line: str, kind: str) -> None:
    assert kind_of(parsed(line)) == kind
    assert kind in KINDS


@pytest.mark.parametrize(
    ("line", "products"),
    [
        ("vpdpbusd %zmm0, %zmm1, %zmm2", 64),
        ("vpdpbusd %xmm0, %xmm1, %xmm2", 16),
        ("vpmaddwd %ymm0, %ymm1, %ymm2", 16),
        ("vfmadd231ps %zmm0, %zmm1, %zmm2", 16),
        ("vmulss %xmm0, %xmm1, %xmm2", 1),
        ("imulq %rax, %rcx", 1),
        ("sdot v0.4s, v1.16b, v2.16b", 16),
        ("sdot v0.2s, v1.8b, v2.8b", 8),
        ("smlal v0.4s, v1.4h, v2.4h", 4),
        ("fmul v0.2s, v1.2s, v2.2s", 2),
        ("fmadd s0, s1, s2, s3", 1),
        ("vmlal.s16 q0, d2, d3", 4),
        ("vmul.f32 d0, d1, d2", 2),
        ("mul r0, r1, r2", 1),
    ],
)
def test_products(line: str, products: int) -> None:
    assert products_of(parsed(line)) == products


@pytest.mark.parametrize(
    ("line", "in_vectors"),
    [
        ("vmovups (%rdi), %zmm0", True),
        ("movb %al, (%rdi)", False),
        ("ldr q0, [x0]", True),
        ("ldrb w0, [x1]", False),
        ("mov v0.16b, v1.16b", True),
        ("vld1.8 {d16, d17}, [r0]", True),
        ("ldr r0, [r1]", False),
    ],
)
def test_vectors_are_told_by_their_registers(line: str, in_vectors: bool) -> None:
    assert parsed(line).in_vectors == in_vectors


def test_float_kinds_are_kinds() -> None:
    assert set(FLOAT_KINDS) < set(KINDS)
