"""AArch64 NEON with dot product: `sdot` multiplies four s8 by four s8 per lane; `smlal` for s16."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa
from edgepress.targets.isa.neon import ISA as NEON


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 4)
    return tirx.call_llvm_pure_intrin(
        "int32x4",
        "llvm.aarch64.neon.sdot.v4i32.v16i8",
        accumulator,
        weights,
        tirx.reinterpret("int8x16", repeated),
    )


def _multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    return accumulator + x * w


ISA = Isa(
    name="neon_dotprod",
    vector_bytes=16,
    vector_registers=32,
    storage="int8",
    staged="int8",
    group=4,
    dot=_dot,
    multiply_add=_multiply_add,
    wide=NEON,
)
