"""32-bit Arm NEON: bytes by pairs, `vmlal.s16` of 16-bit lanes by elements."""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa._neon import Intrinsics, by_pairs, joined, lanes_of
from edgepress.targets.isa.base import Expr, Isa

_LARGEST = 2.0**22  # beyond any output, and still rounded exactly by an addition
_ROUNDING = 1.5 * 2.0**23  # the sum's last mantissa bit is worth 1
_ROUNDING_BITS = 0x4B400000


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    # LLVM makes vmlal of the sum and this intrinsic, but not of a product of widened lanes.
    return accumulator + tirx.call_llvm_pure_intrin(
        "int32x4",
        "llvm.arm.neon.vmulls.v4i32",
        tirx.Broadcast(inputs, 4),
        tirx.Cast("int16x4", weights),
    )


def _add_pairs(accumulator: Expr, words: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(
        "int32x4", "llvm.arm.neon.vpadals.v4i32.v8i16", accumulator, words
    )


def _pairs(first: Expr, second: Expr) -> Expr:
    """`vpadd` exists for 64 bits only."""
    dtype, lanes = str(first.ty.dtype).split("x")
    half = int(lanes) // 2
    sums = [
        tirx.call_llvm_pure_intrin(
            f"{dtype}x{half}",
            "llvm.arm.neon.vpadd",
            lanes_of(value, range(half)),
            lanes_of(value, range(half, 2 * half)),
        )
        for value in (first, second)
    ]
    return joined(sums[0], sums[1], 2 * half)


def _nearest(value: Expr) -> Expr:
    """Round half to even: there is no instruction, but what is clamped an addition rounds."""
    limits = (tirx.Broadcast(tirx.const(v, "float32"), 4) for v in (-_LARGEST, _LARGEST))
    low, high = limits
    clamped = tirx.Max(tirx.Min(value, high), low)
    rounded = clamped + tirx.Broadcast(tirx.const(_ROUNDING, "float32"), 4)
    return tirx.reinterpret("int32x4", rounded) - tirx.Broadcast(
        tirx.const(_ROUNDING_BITS, "int32"), 4
    )


_INTRINSICS = Intrinsics(
    multiply="llvm.arm.neon.vmulls.v8i16",
    high_halves=False,
    temporaries=5,
    add_pairs=_add_pairs,
    pairs=_pairs,
    narrow_words="llvm.arm.neon.vqmovns.v4i16",
    narrow_bytes="llvm.arm.neon.vqmovns.v8i8",
)
_WORDS = Isa(
    name="neon_armv7",
    vector_bytes=16,
    vector_registers=16,
    storage="int8",
    staged="int16",
    group=1,
    dot=_dot,
    nearest=_nearest,
    by_element=True,
)
ISA = by_pairs(_WORDS, _INTRINSICS)
