"""32-bit Arm NEON: `vmlal.s16` of 16-bit lanes."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    # LLVM makes vmlal of the sum and this intrinsic, but not of a product of widened lanes.
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x4",
        "llvm.arm.neon.vmulls.v4i32",
        tirx.Broadcast(inputs, 4),
        tirx.Cast("int16x4", weights),
    )


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    return accumulator + x * w


ISA = Isa(
    name="neon_armv7",
    vector_bytes=16,
    vector_registers=16,
    storage="int8",
    staged="int16",
    group=1,
    dot=_dot,
    multiply_add=_multiply_add,
)
