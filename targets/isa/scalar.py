"""One lane and no vector register: any CPU, with or without a floating-point unit."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    return accumulator + tirx.Cast("int32", inputs) * tirx.Cast("int32", weights)


ISA = Isa(
    name="scalar",
    vector_bytes=4,
    vector_registers=12,
    storage="int8",
    staged="int8",
    group=1,
    dot=_dot,
)
