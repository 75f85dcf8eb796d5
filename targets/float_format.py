"""How a model's floats are to be stored and multiplied, as the pass `float-format` marks it.

`float32` is what every target does. `tf32` multiplies float32 with 10 bits of mantissa, and
`float16` also stores what lies between kernels so; both are for GPUs.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

FloatFormat = Literal["float32", "tf32", "float16"]
FORMATS: tuple[FloatFormat, ...] = ("float32", "tf32", "float16")
KEY = "edgepress.float_format"
"""Of the mark in the model's `metadata_props`; the pass has the same."""


def float_format(model: ir.Model) -> FloatFormat:
    """Return the format that a model is marked with.

    Raises:
        ValueError: it is marked with something else.
    """
    marked = model.metadata_props.get(KEY, "float32")
    for known in FORMATS:
        if marked == known:
            return known
    raise ValueError(f"{KEY} is {marked!r}, not one of {', '.join(FORMATS)}")
