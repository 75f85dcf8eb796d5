"""What every Arm set here shares: narrowing with saturation, and products of pairs of bytes.

Without dot product, the fastest exact way from bytes to int32 sums is two products of neighbours
that are added in 16 bits, then a pairwise addition to the accumulators: `smull`, `smlal`, `sadalp`,
or `vmull.s8`, `vmlal.s8`, `vpadal.s16`: three instructions for 16 products. Two products fit 16
bits unless both are (-128)², so a layer with a weight of -128 takes a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa

_LANES = 4


@dataclass(frozen=True)
class Intrinsics:
    """What both architectures have, under different names.

    Attributes:
        multiply: LLVM's name of eight bytes times eight bytes, to int16.
        high_halves: whether products take the high halves of registers too.
        temporaries: registers that a product needs besides its operands, and some more that
            LLVM needs to keep a tile in registers.
        add_pairs: `(int32x4, int16x8)`: adds neighbours to the accumulators.
        pairs: `(first, second)`, int16x8 or int32x4 both: the sums of neighbours of the first
            vector, then those of the second.
        narrow_words, narrow_bytes: LLVM's names of narrowing with saturation, int32x4 to int16x4
            and int16x8 to int8x8.
    """

    multiply: str
    high_halves: bool
    temporaries: int
    add_pairs: Callable[[Expr, Expr], Expr]
    pairs: Callable[[Expr, Expr], Expr]
    narrow_words: str
    narrow_bytes: str


def lanes_of(value: Expr, indices: Sequence[int]) -> Expr:
    """Take lanes of a vector, by their numbers."""
    return tirx.Shuffle([value], [tirx.const(index, "int32") for index in indices])


def joined(low: Expr, high: Expr, lanes: int) -> Expr:
    """Put two vectors behind each other; `lanes` in all."""
    return tirx.Shuffle([low, high], [tirx.const(index, "int32") for index in range(lanes)])


def narrow(names: Intrinsics) -> Callable[[Sequence[Expr], int], Expr]:
    """Return `Isa.narrow`; it serves as `Isa.pack` too, since vectors have 128 bits."""

    def narrowed(vectors: Sequence[Expr], zero_point: int) -> Expr:
        words = [tirx.call_llvm_pure_intrin("int16x4", names.narrow_words, v) for v in vectors]
        halves = []
        for low, high in zip(words[::2], words[1::2], strict=True):
            half = joined(low, high, 8)
            if zero_point:
                point = tirx.Broadcast(tirx.const(zero_point, "int16"), 8)
                half = tirx.call_llvm_pure_intrin("int16x8", "llvm.sadd.sat", half, point)
            halves.append(tirx.call_llvm_pure_intrin("int8x8", names.narrow_bytes, half))
        return joined(halves[0], halves[1], 16)

    return narrowed


def by_pairs(isa: Isa, names: Intrinsics) -> Isa:
    """Return the set with products of bytes by pairs; `isa` serves int16 operands."""

    def multiply(x: Expr, w: Expr) -> Expr:
        return tirx.call_llvm_pure_intrin("int16x8", names.multiply, x, w)

    def products(x: Expr, w: Expr) -> list[Expr]:
        """Multiply the low halves of two vectors of bytes, and the high halves."""
        halves = (range(8), range(8, 16))
        return [multiply(lanes_of(x, half), lanes_of(w, half)) for half in halves]

    def repeated_products(x: Expr, w: Expr) -> list[Expr]:
        """Multiply the first two inputs, repeated, with the low half of w; the others likewise."""
        found = []
        for first, half in ((0, range(8)), (2, range(8, 16))):
            pair = tirx.reinterpret("int16", lanes_of(x, range(first, first + 2)))
            if names.high_halves:
                inputs = tirx.reinterpret("int8x16", tirx.Broadcast(pair, 2 * _LANES))
                inputs = lanes_of(inputs, half)
            else:
                inputs = tirx.reinterpret("int8x8", tirx.Broadcast(pair, _LANES))
            found.append(multiply(inputs, lanes_of(w, half)))
        return found

    def dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        first, second = repeated_products(x, w)
        return names.add_pairs(accumulator, first + second)

    def full_dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        for product in repeated_products(x, w):
            accumulator = names.add_pairs(accumulator, product)
        return accumulator

    def bytes_of(*values: Expr) -> list[Expr]:
        return [tirx.reinterpret("int8x16", value) for value in values]

    def lane_dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        first, second = products(*bytes_of(x, w))
        return names.add_pairs(accumulator, names.pairs(first, second))

    def full_lane_dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        nothing = tirx.Broadcast(tirx.const(0, "int32"), _LANES)
        first, second = (names.add_pairs(nothing, one) for one in products(*bytes_of(x, w)))
        return accumulator + names.pairs(first, second)

    full = replace(
        isa,
        staged="int8",
        group=4,
        dot=full_dot,
        lane_dot=full_lane_dot,
        pack=narrow(names),
        narrow=narrow(names),
        by_pairs=True,
        temporaries=names.temporaries,
        wide=isa,
    )
    return replace(full, dot=dot, lane_dot=lane_dot, all_weights=full)
