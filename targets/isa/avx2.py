"""AVX2 with FMA: exact 16-bit pairs through `vpmaddwd`, never the saturating `vpmaddubsw`."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 8)
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x8",
        "llvm.x86.avx2.pmadd.wd",
        tirx.reinterpret("int16x16", repeated),
        tirx.Cast("int16x16", weights),
    )


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    if not str(accumulator.ty).endswith("x8"):
        return accumulator + x * w
    # x is zero-extended from 8 bits: the upper 16-bit product of every lane is zero.
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x8",
        "llvm.x86.avx2.pmadd.wd",
        tirx.reinterpret("int16x16", x),
        tirx.reinterpret("int16x16", w),
    )


ISA = Isa(
    name="avx2",
    vector_bytes=32,
    vector_registers=16,
    storage="uint8",
    staged="int16",
    group=2,
    dot=_dot,
    multiply_add=_multiply_add,
)
