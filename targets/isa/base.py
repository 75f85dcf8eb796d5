"""What a kernel generator may know about an instruction set.

An instruction set is one file in this folder that defines `ISA`. Generators ask it for the vector
width, the register plan and a few operations; everything else is plain vector arithmetic that LLVM
selects well everywhere.

Integer convention: activations are 8-bit in `storage` dtype and weights int8 in [-127, 127]. A dot
product multiplies `group` neighbouring inputs of one pixel with `group` weights of each output
channel and adds to int32 lanes, exactly: no saturating instruction is used. Sums may wrap on the
way: the last one fits. Where inputs or weights are int16, `for_operands` names the set to use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

Expr = Any


def widened_dot(accumulator: Expr, x: Expr, w: Expr) -> Expr:
    """Multiply lane by lane, for sets whose `group` is 1: LLVM sees that both sides are narrow."""
    dtype = accumulator.ty.dtype
    return accumulator + tirx.Cast(dtype, x) * tirx.Cast(dtype, w)


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    Attributes:
        name: the file's stem.
        vector_bytes: bytes of a vector register.
        vector_registers: how many there are.
        storage: dtype of quantized activations in memory, `uint8` or `int8`.
        staged: dtype that integer convolutions read; where it differs from `storage`, the input is
            widened once per call while it is padded.
        group: inputs per lane of one dot product.
        dot: `(accumulator, inputs, weights) -> accumulator`; int32 lanes, `group` staged inputs
            repeated for every lane, and int8 weights `[lanes, group]` (already widened to int16
            where `group` is 1). int16 weights where it is made for int16 operands.
        lane_dot: `(accumulator, x, w) -> accumulator`; int32 lanes, each of which multiplies its
            own `group` inputs in x, staged, with its own weights in w: int8 where `group` is 4,
            int16 otherwise. The vectors may be shorter than a register, down to 128 bits of x.
        nearest: float32 lanes to int32, half to even, exactly below 2**31. Beyond, the result is
            negative where the value is, and any where it is not. None: there is no instruction.
        pack: `(vectors, zero_point) -> outputs`: adds the zero point to int32 vectors and narrows
            them to `storage`, saturating; one vector whose order is that of the inputs which
            `interleaved` made the vectors' lanes of. None: there is no instruction.
        narrow: `(four vectors, zero_point) -> outputs`: the same of four int32 vectors, whose lanes
            keep their order.
        matrix: `(accumulator, pixels, weights) -> accumulator`: adds the product of int8 matrices
            [2, 8] and [2, 8] transposed to a matrix [2, 2] of int32, each in one vector of 128
            bits. None: there is no instruction.
        by_element: whether it multiplies by an element of a register, so that convolutions load
            whole vectors of inputs.
        by_pairs: whether `dot` takes weights ordered `[2][lanes][2]`, the first half of the group
            of every lane and then the second.
        temporaries: registers that integer products need besides what a tile holds.
        wide: what is different for int16 operands, whose `storage` and `staged` are int16; None
            where the same operations serve both.
        all_weights: what is different where a weight is -128; None where nothing is.
    """

    name: str
    vector_bytes: int
    vector_registers: int
    storage: str
    staged: str
    group: int
    dot: Callable[[Expr, Expr, Expr], Expr]
    lane_dot: Callable[[Expr, Expr, Expr], Expr] = widened_dot
    nearest: Callable[[Expr], Expr] | None = None
    pack: Callable[[Sequence[Expr], int], Expr] | None = None
    narrow: Callable[[Sequence[Expr], int], Expr] | None = None
    matrix: Callable[[Expr, Expr, Expr], Expr] | None = None
    by_element: bool = False
    by_pairs: bool = False
    temporaries: int = 0
    wide: Isa | None = None
    all_weights: Isa | None = None

    @property
    def lanes(self) -> int:
        """Lanes of 32 bits."""
        return self.vector_bytes // 4

    def for_weights(self, weights: npt.NDArray[Any]) -> Isa:
        """Return the set that is exact with these constant weights."""
        full = self.all_weights is not None and weights.dtype == np.int8 and weights.size
        return self.all_weights or self if full and weights.min() == -128 else self

    def for_operands(self, *dtypes: str) -> Isa:
        """Return the set that multiplies operands of these dtypes."""
        if "int16" not in dtypes:
            return self
        wide = self.wide or self
        return replace(
            wide, storage="int16", staged="int16", wide=None, all_weights=None, matrix=None
        )


def load_isa(name: str) -> Isa:
    """Import `targets/isa/NAME.py` and return its `ISA`."""
    isa = importlib.import_module(f"edgepress.targets.isa.{name}").ISA
    if not isinstance(isa, Isa):
        raise TypeError(f"targets/isa/{name}.py must define ISA")
    return isa
