"""Geometry of a convolution or matrix product on tensor cores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHUNK_BYTES = 16
"""What is copied at once: rows of weights are whole chunks."""

ELEMENTS = {"float32": "float32", "tf32": "float32", "float16": "float16", "int8": "int8"}
"""Dtype in memory of the operands of each kind of product."""


@dataclass(frozen=True, kw_only=True)
class GemmShape:
    """A convolution over NHWC pixels, as far as its kernel depends on it.

    Attributes:
        batch, height, width, channels: of the input.
        out_height, out_width, out_channels: of the output.
        kernel, strides, dilations: along height and width.
        corner: rows above and columns left of the image where the first window starts.
        fill: what lies outside the image.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    corner: tuple[int, int] = (0, 0)
    fill: int = 0

    @property
    def macs(self) -> int:
        """Multiplications of one inference."""
        return self.rows * self.out_channels * math.prod(self.kernel) * self.channels

    @property
    def rows(self) -> int:
        """Output pixels."""
        return self.batch * self.out_height * self.out_width

    @property
    def is_padded(self) -> bool:
        """Whether some window leaves the image."""
        sizes = zip(
            self.corner, self.kernel, self.strides, self.dilations,
            (self.out_height, self.out_width), (self.height, self.width), strict=True,
        )  # fmt: skip
        return any(
            start > 0 or (out - 1) * stride - start + (taps - 1) * dilation >= size
            for start, taps, stride, dilation, out, size in sizes
        )


def row_elements(shape: GemmShape, element: str) -> int:
    """Return the elements of a row of weights: whole chunks."""
    lanes = CHUNK_BYTES // np.dtype(element).itemsize
    return -(-shape.kernel[0] * shape.kernel[1] * shape.channels // lanes) * lanes
