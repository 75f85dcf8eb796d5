"""AVX-512 (F, BW, DQ, VL) without VNNI: exact 16-bit pairs through `vpmaddwd`."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 16)
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.pmaddw.d.512",
        tirx.reinterpret("int16x32", repeated),
        tirx.Cast("int16x32", weights),
    )


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    if not str(accumulator.ty).endswith("x16"):
        return accumulator + x * w
    # x is zero-extended from 8 bits: the upper 16-bit product of every lane is zero.
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.pmaddw.d.512",
        tirx.reinterpret("int16x32", x),
        tirx.reinterpret("int16x32", w),
    )


ISA = Isa(
    name="avx512",
    vector_bytes=64,
    vector_registers=32,
    storage="uint8",
    staged="int16",
    group=2,
    dot=_dot,
    multiply_add=_multiply_add,
)
