"""AArch64 NEON without dot product: `smlal` of 16-bit lanes."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    x = tirx.Cast("int32x4", tirx.Broadcast(inputs, 4))
    return accumulator + x * tirx.Cast("int32x4", weights)


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    return accumulator + x * w


ISA = Isa(
    name="neon",
    vector_bytes=16,
    vector_registers=32,
    storage="int8",
    staged="int16",
    group=1,
    dot=_dot,
    multiply_add=_multiply_add,
)
