"""What every x86 instruction set here shares: rounding, and packing with saturation.

All of it works on vectors of 128, 256 or 512 bits, by their number of 32-bit lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from edgepress.targets.isa.base import Expr

_ROUND = {4: "llvm.x86.sse2.cvtps2dq", 8: "llvm.x86.avx.cvt.ps2dq.256"}
_ROUND_512 = "llvm.x86.avx512.mask.cvtps2dq.512"
_CURRENT_ROUNDING = 4  # of MXCSR, which is half to even
_WORDS = {
    4: "llvm.x86.sse2.packssdw.128",
    8: "llvm.x86.avx2.packssdw",
    16: "llvm.x86.avx512.packssdw.512",
}
_BYTES = {
    4: "llvm.x86.sse2.packuswb.128",
    8: "llvm.x86.avx2.packuswb",
    16: "llvm.x86.avx512.packuswb.512",
}


def lanes_in(value: Expr) -> int:
    """Return how many lanes a vector has."""
    return int(value.ty.dtype.lanes)


def nearest(value: Expr) -> Expr:
    """Round float32 lanes half to even by `vcvtps2dq`."""
    lanes = lanes_in(value)
    if lanes < 16:
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", _ROUND[lanes], value)
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        _ROUND_512,
        value,
        tirx.Broadcast(tirx.const(0, "int32"), 16),
        tirx.const(-1, "int16"),
        tirx.const(_CURRENT_ROUNDING, "int32"),
    )


def words(low: Expr, high: Expr) -> Expr:
    """Narrow two int32 vectors to one of int16, saturating, 128 bits at a time: `vpackssdw`."""
    lanes = lanes_in(low)
    return tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", _WORDS[lanes], low, high)


def pack_pairs(vectors: Sequence[Expr], zero_point: int) -> Expr:
    """Narrow two int32 vectors to uint8: `Isa.pack` where `group` is 2 and inputs are int16."""
    first, second = vectors
    lanes = 2 * lanes_in(first)
    limits = (tirx.const(limit - zero_point, "int16") for limit in (0, 255))
    low, high = (tirx.Broadcast(limit, lanes) for limit in limits)
    inside = tirx.Min(tirx.Max(words(first, second), low), high)
    return tirx.Cast(f"uint8x{lanes}", inside + _words_of(zero_point, lanes))


def pack_fours(vectors: Sequence[Expr], zero_point: int) -> Expr:
    """Narrow four int32 vectors to uint8: `Isa.pack` where `group` is 4."""
    lanes = lanes_in(vectors[0])
    halves = [words(*vectors[:2]), words(*vectors[2:])]
    if zero_point:
        point = _words_of(zero_point, 2 * lanes)
        kind = f"int16x{2 * lanes}"
        halves = [tirx.call_llvm_pure_intrin(kind, "llvm.sadd.sat", half, point) for half in halves]
    return tirx.call_llvm_pure_intrin(f"uint8x{4 * lanes}", _BYTES[lanes], *halves)


def narrow_in_order(vectors: Sequence[Expr], zero_point: int) -> Expr:
    """Narrow four int32 vectors to uint8, one after the other: `Isa.narrow`.

    Every 128 bits of the packed vector hold four lanes of each: one permutation sorts them.
    """
    lanes = lanes_in(vectors[0])
    segments = lanes // 4
    order = [segment * 4 + vector for vector in range(4) for segment in range(segments)]
    packed = tirx.reinterpret(f"int32x{lanes}", pack_fours(vectors, zero_point))
    sorted_lanes = tirx.Shuffle([packed], [tirx.const(index, "int32") for index in order])
    return tirx.reinterpret(f"uint8x{4 * lanes}", sorted_lanes)


def _words_of(value: int, lanes: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "int16"), lanes)


def dot_by_width(dtype: str, names: dict[int, str]) -> Callable[[Expr, Expr, Expr], Expr]:
    """Return a product of lanes with an intrinsic for every width.

    Args:
        dtype: of what the intrinsic multiplies, x and w alike.
        names: by 32-bit lanes. They take and return an accumulator, if their name has a `dp`.
    """
    group = 4 if dtype == "int8" else 2

    def dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        lanes = lanes_in(accumulator)
        operands = [tirx.reinterpret(f"{dtype}x{group * lanes}", value) for value in (x, w)]
        kind = f"int32x{lanes}"
        if "vpdp" in names[lanes]:
            return tirx.call_llvm_pure_intrin(kind, names[lanes], accumulator, *operands)
        return accumulator + tirx.call_llvm_pure_intrin(kind, names[lanes], *operands)

    return dot
