"""What products of dynamically quantized rows must answer, in NumPy (docs/integer.md, "Rows")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.program import Array

STEPS = 255  # of a row, between its lowest and highest value
SMALLEST_STEP = 2.0**-60


def quantised_rows(x: Array) -> tuple[Array, Array, Array]:
    """Return steps uint8 like x `[…, width]`, the size of a step and the zero point, both `[…, 1]`.

    A row with NaN or infinity, or a range beyond float32, has a step of NaN or infinity.
    """
    with np.errstate(all="ignore"):
        high = np.maximum(x.max(axis=-1, keepdims=True), np.float32(0))
        low = np.minimum(x.min(axis=-1, keepdims=True), np.float32(0))
        size = np.maximum((high - low) / np.float32(STEPS), np.float32(SMALLEST_STEP))
        inverse = np.float32(1) / size
        point = np.clip(np.rint(-low * inverse), 0, STEPS)
        steps = np.rint(np.clip(x * inverse, -point, STEPS - point)) + point
        finite = np.isfinite(x).all(axis=-1, keepdims=True)
        steps, point = (np.where(np.isfinite(v), v, 0) for v in (steps, point))
        size = np.where(finite, size, np.float32(np.nan))
    return steps.astype(np.uint8), size, point.astype(np.int32)


def dynamic_gemm(
    node: ir.Node,
    x: Array,
    weights: Array,
    scales: Array,
    bias: Array,
    factors: Array | None = None,
) -> Array:
    """Return the float32 product of x `[…, inputs]` with weights int8 `[outputs, inputs]`.

    `factors` `[inputs]` multiply x first.
    """
    if factors is not None:
        with np.errstate(all="ignore"):
            x = x * factors
    steps, size, point = quantised_rows(x)
    centred = steps.astype(np.float64) - point  # float64 holds these sums exactly
    total = (centred @ weights.T.astype(np.float64)).astype(np.int64)
    low, high = (np.float32(node.attributes[name].as_float()) for name in ("low", "high"))
    with np.errstate(over="ignore", invalid="ignore"):
        real = total.astype(np.int32).astype(np.float32) * size * scales + bias
        real = np.where(real > low, real, low) if low != -np.inf else real
        return np.asarray(np.where(real < high, real, high) if high != np.inf else real)
