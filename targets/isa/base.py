"""What a kernel generator may know about an instruction set.

An instruction set is one file in this folder that defines `ISA`. Generators ask it for the vector
width, the register plan and a few operations; everything else is plain vector arithmetic that LLVM
selects well everywhere.

Integer convention: activations are 8-bit in `storage` dtype and weights int8 in [-127, 127]. A dot
product multiplies `group` neighbouring inputs of one pixel with `group` weights of each output
channel and adds to int32 lanes, exactly: no saturating instruction is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Expr = Any


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
            where `group` is 1).
        multiply_add: `(accumulator, x, w) -> accumulator`, int32 lanes all; x holds 8-bit and w
            16-bit values, sign- or zero-extended.
    """

    name: str
    vector_bytes: int
    vector_registers: int
    storage: str
    staged: str
    group: int
    dot: Callable[[Expr, Expr, Expr], Expr]
    multiply_add: Callable[[Expr, Expr, Expr], Expr]

    @property
    def lanes(self) -> int:
        """Lanes of 32 bits."""
        return self.vector_bytes // 4


def load_isa(name: str) -> Isa:
    """Import `targets/isa/NAME.py` and return its `ISA`."""
    isa = importlib.import_module(f"edgepress.targets.isa.{name}").ISA
    if not isinstance(isa, Isa):
        raise TypeError(f"targets/isa/{name}.py must define ISA")
    return isa
