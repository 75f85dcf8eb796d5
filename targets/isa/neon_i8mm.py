"""AArch64 NEON with i8mm: `smmla` multiplies 2×8 by 8×2 bytes; `sdot` where that does not fit."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from edgepress.targets.isa.base import Expr
from edgepress.targets.isa.neon_dotprod import ISA as DOT_PRODUCT


def _matrix(accumulator: Expr, pixels: Expr, weights: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(
        "int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", accumulator, pixels, weights
    )


ISA = replace(DOT_PRODUCT, name="neon_i8mm", matrix=_matrix)
