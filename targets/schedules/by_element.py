"""Reductions whose products take one element of a register, as Neon's do.

A load of one input per pixel and step would cost as much as a product. So one load brings a whole
vector of inputs of a pixel, and each of its elements serves one step: `fmla v0.4s, v1.4s, v2.s[3]`,
`sdot v0.4s, v1.16b, v2.4b[3]`. Where the product has no such form, the element is repeated first.
"""

from __future__ import annotations

import numpy as np

from edgepress.targets.isa.base import Isa

_FEW_REGISTERS = 16  # 32-bit Arm: loads come one by one, and no fused product takes an element


def reach(isa: Isa, quantized: bool, step: int) -> int:
    """Return how many reduction steps of `step` inputs share one load."""
    element_bytes = np.dtype(isa.staged).itemsize if quantized else 4
    return max(isa.vector_bytes // element_bytes // step, 1) if isa.by_element else 1


def product_cost(rows: int, columns: float, isa: Isa, quantized: bool, step: int) -> float:
    """Count the instructions of one product of a tile: repetitions, loads, a share of the loop."""
    few = isa.vector_registers <= _FEW_REGISTERS
    products, repeats = (3, 2) if quantized and isa.by_pairs else (1, int(few))
    group = isa.group if quantized else 1
    shared = reach(isa, quantized, step) * step // group
    weights = columns * (1 if few else 0.5)
    return rows * (columns * products + repeats) + weights + (rows + 3) / shared


def store_cost(columns: float) -> float:
    """Count what storing the bytes of a pixel takes beyond one instruction per four vectors.

    Four vectors narrow to one of bytes; three of them leave in pieces.
    """
    return {1: 1.5, 2: 0.5, 3: 6.0}.get(int(columns) % 4, 0.0)
