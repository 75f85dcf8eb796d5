"""A fixed-point interpreter in plain NumPy: sums, shifts and rounding written out on their own.

It reads the QDQ graph and knows nothing of the code under test. Every scale is `2**-n`; a value is
held as int64 steps with its n, and becomes another format by one rounded shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array


def interpret(model: ir.Model, feed: Mapping[str, Array]) -> tuple[Array, int]:
    """Return the first output, and the largest magnitude that any sum had."""
    machine = _Machine(model, feed)
    for node in model.graph:
        machine.run(node)
    steps, places = machine.values[model.graph.outputs[0].name or ""]
    return np.ldexp(steps.astype(np.float64), -places).astype(np.float32), machine.largest


def shifted(steps: Array, places: Any) -> Array:
    """Divide integers by `2**places`, half to even; by arithmetic on whole numbers alone."""
    places = np.broadcast_to(np.asarray(places, np.int64), steps.shape)
    right = np.minimum(np.maximum(places, 0), 62)
    floor = steps >> right
    rest = steps - (floor << right)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    up = (rest > half) | ((rest == half) & (floor % 2 == 1) & (right > 0))
    # to the left, 22 bits already saturate all but 0
    left = np.minimum(np.maximum(-places, 0), 22)
    result: Array = (floor + up) << left
    return result


class _Machine:
    """Values by name: `(steps, n)`, n one number or one per channel."""

    def __init__(self, model: ir.Model, feed: Mapping[str, Array]) -> None:
        self.constants = {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        self.feed, self.largest = feed, 0
        self.bits = 16 if any(v.dtype == np.int16 for v in self.constants.values()) else 8
        self.values: dict[str, tuple[Array, Any]] = {}
        self.clips: dict[str, tuple[str, float, float]] = {}

    def run(self, node: ir.Node) -> None:
        names = [v.name or "" if v is not None else "" for v in node.inputs]
        result = node.outputs[0].name or ""
        kind = node.op_type
        if kind == "QuantizeLinear":
            self.values[result] = self.quantized(names)
        elif kind == "DequantizeLinear":
            places = -np.log2(self.constants[names[1]]).astype(np.int64)
            if names[0] in self.constants:
                self.values[result] = (self.constants[names[0]].astype(np.int64), places)
            else:
                self.values[result] = self.values[names[0]]
        elif kind in ("Relu", "Clip"):
            low, high = 0.0, np.inf
            if kind == "Clip":
                low, high = (float(self.constants[name]) for name in names[1:])
            self.clips[result] = (names[0], low, high)
        else:
            steps, places = getattr(self, kind.lower())(
                node, *map(self.values.get, filter(None, names))
            )
            self.largest = max(self.largest, int(np.abs(steps).max(initial=0)))
            self.values[result] = (steps, places)

    def quantized(self, names: list[str]) -> tuple[Array, int]:
        """Bring what an operator computed to the format that is asked for, clamped."""
        target = int(-np.log2(self.constants[names[1]]))
        width = self.constants[names[2]].dtype.itemsize * 8
        least, largest = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        bounds = [(float(least), float(largest))]
        name = names[0]
        while name in self.clips:
            name, low, high = self.clips[name]
            bounds.append(tuple(np.clip(np.rint(np.ldexp([low, high], target)), -1e9, 1e9)))
        if name in self.feed:
            with np.errstate(over="ignore"):
                steps = np.rint(np.ldexp(self.feed[name].astype(np.float64), target))
        else:
            source, places = self.values[name]
            if isinstance(places, Fraction):  # an average: steps are whole, their unit is not
                steps = _rounded(source, places * Fraction(2) ** target)
            else:
                axes = [1] * (source.ndim - 2 if source.ndim > 2 else 0)
                places = np.asarray(places).reshape(-1, *axes) if np.ndim(places) else places
                steps = shifted(source, places - target)
        for low, high in reversed(bounds):
            steps = np.clip(steps, low, high)
        return np.clip(steps, least, largest).astype(np.int64), target

    # Operators: each gets `(steps, n)` and returns them.

    def conv(self, node: ir.Node, x: Any, w: Any, b: Any = None) -> tuple[Array, Any]:
        pads = node.attributes.get_ints("pads", [0] * 4)
        groups = node.attributes.get_int("group", 1)
        padded = np.pad(x[0], ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w[0].shape[2:], (2, 3))
        per = w[0].shape[0] // groups
        parts = [
            np.einsum(
                "nchwij,ocij->nohw",
                windows[:, g * w[0].shape[1] : (g + 1) * w[0].shape[1]],
                w[0][g * per : (g + 1) * per],
            )
            for g in range(groups)
        ]
        total = np.concatenate(parts, axis=1)
        return total + (0 if b is None else b[0][:, None, None]), x[1] + w[1]

    def gemm(self, node: ir.Node, x: Any, w: Any, b: Any = None) -> tuple[Array, Any]:
        rows = w[0].T if node.attributes.get_int("transB", 0) else w[0]
        return x[0] @ rows + (0 if b is None else b[0]), x[1] + w[1]

    matmul = gemm

    def add(self, _node: ir.Node, a: Any, b: Any) -> tuple[Array, Any]:
        coarse = min(int(a[1]), int(b[1]))
        # as docs/integer.md has it: 21 bits between the two scales, or 15 where values have 16
        if self.bits == 8:
            factors = [int(np.rint(2.0 ** (21 - int(x[1]) + coarse))) for x in (a, b)]
            return a[0] * factors[0] + b[0] * factors[1], coarse + 21
        finer = Fraction(1, 2 ** abs(int(a[1]) - int(b[1]))).limit_denominator(2**15)
        own, other = (a[0], b[0]) if int(a[1]) == coarse else (b[0], a[0])
        places = finer.denominator.bit_length() - 1
        return own * finer.denominator + other * finer.numerator, coarse + places

    def mul(self, _node: ir.Node, a: Any, b: Any) -> tuple[Array, Any]:
        return a[0] * b[0], int(a[1]) + int(b[1])

    def concat(self, node: ir.Node, *parts: Any) -> tuple[Array, Any]:
        fine = max(int(part[1]) for part in parts)
        axis = node.attributes.get_int("axis", 1)
        return np.concatenate([p[0] << (fine - int(p[1])) for p in parts], axis), fine

    def globalaveragepool(self, _node: ir.Node, x: Any) -> tuple[Array, Any]:
        count = x[0].shape[2] * x[0].shape[3]
        return x[0].sum(axis=(2, 3), keepdims=True), Fraction(1, count) / Fraction(2) ** int(x[1])

    def maxpool(self, node: ir.Node, x: Any) -> tuple[Array, Any]:
        kernel = node.attributes.get_ints("kernel_shape", [])
        step = node.attributes.get_ints("strides", [1, 1])
        windows = np.lib.stride_tricks.sliding_window_view(x[0], kernel, (2, 3))
        return windows[:, :, :: step[0], :: step[1]].max(axis=(4, 5)), x[1]

    def flatten(self, _node: ir.Node, x: Any) -> tuple[Array, Any]:
        return x[0].reshape(len(x[0]), -1), x[1]


def _rounded(steps: Array, factor: Fraction) -> Array:
    """Multiply by a fraction and round half to even, exactly."""
    return np.array([round(int(s) * factor) for s in steps.ravel()], object).reshape(steps.shape)
