"""AArch64 NEON without dot product: bytes by pairs, `smlal` of 16-bit lanes by elements."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa._aarch64 import INTRINSICS, nearest
from edgepress.targets.isa._neon import by_pairs
from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    x = tirx.Cast("int32x4", tirx.Broadcast(inputs, 4))
    return accumulator + x * tirx.Cast("int32x4", weights)


#: For int16 operands.
WORDS = Isa(
    name="neon",
    vector_bytes=16,
    vector_registers=32,
    storage="int8",
    staged="int16",
    group=1,
    dot=_dot,
    nearest=nearest,
    by_element=True,
)
ISA = by_pairs(WORDS, INTRINSICS)
