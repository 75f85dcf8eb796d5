"""AVX-512 with VNNI: `vpdpbusd` multiplies four u8 by four s8 per lane, without saturation.

`vpdpwssd` does the same with pairs of s16.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 16)
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpbusd.512",
        accumulator,
        tirx.reinterpret("uint8x64", repeated),
        weights,
    )


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    if not str(accumulator.ty).endswith("x16"):
        return accumulator + x * w
    # x is zero-extended from 8 bits: the upper 16-bit product of every lane is zero.
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpwssd.512",
        accumulator,
        tirx.reinterpret("int16x32", x),
        tirx.reinterpret("int16x32", w),
    )


def _wide_dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 16)
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpwssd.512",
        accumulator,
        tirx.reinterpret("int16x32", repeated),
        tirx.Cast("int16x32", weights),
    )


def _wide_multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    if not str(accumulator.ty).endswith("x16"):
        return accumulator + x * w
    # Only w's lower 16 bits are left, so that the upper product of every lane is zero again.
    return _multiply_add(accumulator, x, w & tirx.Broadcast(tirx.const(0xFFFF, "int32"), 16))


_NARROW = Isa(
    name="avx512_vnni",
    vector_bytes=64,
    vector_registers=32,
    storage="uint8",
    staged="uint8",
    group=4,
    dot=_dot,
    multiply_add=_multiply_add,
)
ISA = replace(
    _NARROW, wide=replace(_NARROW, group=2, dot=_wide_dot, multiply_add=_wide_multiply_add)
)
