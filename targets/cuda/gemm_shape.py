"""Geometry of a convolution or matrix product on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepress.targets.cuda.window import Window

CHUNK_BYTES = 16
"""What is copied at once: rows of weights are whole chunks."""

ELEMENTS = {"float32": "float32", "tf32": "float32", "float16": "float16", "int8": "int8"}
"""Dtype in memory of the operands of each kind of product."""

PRODUCTS = {
    "float32": "Float32Product",
    "tf32": "Tf32Product",
    "float16": "Float16Product",
    "int8": "Int8Product",
}
"""What `kernels/gemm.cuh` calls them."""


@dataclass(frozen=True)
class GemmShape(Window):
    """A convolution or product on tensor cores.

    Attributes:
        fill: what lies outside the image.
    """

    fill: int = 0


def row_elements(shape: GemmShape, element: str) -> int:
    """Return the elements of a row of weights: whole chunks."""
    lanes = CHUNK_BYTES // np.dtype(element).itemsize
    return -(-shape.kernel[0] * shape.kernel[1] * shape.channels // lanes) * lanes
