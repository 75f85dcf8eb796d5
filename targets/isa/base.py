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
from collections.abc import Callable
from dataclasses import dataclass, replace
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
            where `group` is 1). int16 weights where it is made for int16 operands.
        multiply_add: `(accumulator, x, w) -> accumulator`, int32 lanes all; x holds 8-bit and w
            16-bit values, sign- or zero-extended. x holds 16-bit values where it is made for them.
        wide: what is different for int16 operands, whose `storage` and `staged` are int16; None
            where the same operations serve both.
    """

    name: str
    vector_bytes: int
    vector_registers: int
    storage: str
    staged: str
    group: int
    dot: Callable[[Expr, Expr, Expr], Expr]
    multiply_add: Callable[[Expr, Expr, Expr], Expr]
    wide: Isa | None = None

    @property
    def lanes(self) -> int:
        """Lanes of 32 bits."""
        return self.vector_bytes // 4

    def for_operands(self, *dtypes: str) -> Isa:
        """Return the set that multiplies operands of these dtypes."""
        if "int16" not in dtypes:
            return self
        return replace(self.wide or self, storage="int16", staged="int16", wide=None)


def load_isa(name: str) -> Isa:
    """Import `targets/isa/NAME.py` and return its `ISA`."""
    isa = importlib.import_module(f"edgepress.targets.isa.{name}").ISA
    if not isinstance(isa, Isa):
        raise TypeError(f"targets/isa/{name}.py must define ISA")
    return isa
