"""AArch64 NEON with dot product: `sdot` multiplies four s8 by four s8 per lane; `smlal` for s16."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa._aarch64 import INTRINSICS, nearest
from edgepress.targets.isa._neon import narrow
from edgepress.targets.isa.base import Expr, Isa
from edgepress.targets.isa.neon import WORDS


def lane_dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    """Multiply four bytes of every lane by four others."""
    return tirx.call_llvm_pure_intrin(
        "int32x4",
        "llvm.aarch64.neon.sdot.v4i32.v16i8",
        accumulator,
        *(tirx.reinterpret("int8x16", value) for value in (w, x)),
    )


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 4)
    return lane_dot(accumulator, repeated, weights)


ISA = Isa(
    name="neon_dotprod",
    vector_bytes=16,
    vector_registers=32,
    storage="int8",
    staged="int8",
    group=4,
    dot=_dot,
    lane_dot=lane_dot,
    nearest=nearest,
    pack=narrow(INTRINSICS),
    narrow=narrow(INTRINSICS),
    by_element=True,
    wide=WORDS,
)
