"""AArch64: intrinsics that every one of its sets uses."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa._neon import Intrinsics
from edgepress.targets.isa.base import Expr


def _add_pairs(accumulator: Expr, words: Expr) -> Expr:
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", words
    )


def _pairs(first: Expr, second: Expr) -> Expr:
    kind = str(first.ty.dtype)
    return tirx.call_llvm_pure_intrin(kind, "llvm.aarch64.neon.addp", first, second)


def nearest(value: Expr) -> Expr:
    """Round float32 lanes half to even by `fcvtns`."""
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.fcvtns.v4i32.v4f32", value)


INTRINSICS = Intrinsics(
    multiply="llvm.aarch64.neon.smull.v8i16",
    high_halves=True,
    temporaries=6,
    add_pairs=_add_pairs,
    pairs=_pairs,
    narrow_words="llvm.aarch64.neon.sqxtn.v4i16",
    narrow_bytes="llvm.aarch64.neon.sqxtn.v8i8",
)
