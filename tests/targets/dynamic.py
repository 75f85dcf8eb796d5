"""Nets whose products are quantized row by row at run time, and rows that are hard to quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from edgepress.passes.base import Context
from edgepress.passes.quantize_dynamic import QuantizeDynamic
from edgepress.targets.program import Array
from tests.graphs import net
from tests.targets.qdq import shaped

LARGEST = float(np.finfo(np.float32).max)


def quantized(model: ir.Model) -> ir.Model:
    """What `quantize-dynamic` makes of a model, with all shapes."""
    return shaped(QuantizeDynamic().call(shaped(model), Context()).model)


def product_net(
    shape: Sequence[int], outputs: int, *, bias: bool = True, clamp: str = "", seed: int = 0
) -> ir.Model:
    """`y = clamp(x @ w + b)` with weights of very different columns."""
    random = np.random.default_rng(seed)
    weights = {"w": random.standard_normal((shape[-1], outputs)).astype(np.float32)}
    weights["w"] *= 10 ** random.uniform(-3, 1, outputs).astype(np.float32)
    weights["w"][:, :: max(outputs // 3, 2)] *= np.float32(1e-30)  # below the smallest step
    lines = ["y0 = MatMul(x, w)"]
    if bias:
        weights["b"] = random.standard_normal(outputs).astype(np.float32)
        weights["b"][0] = 1e-42  # subnormal
        lines.append("y1 = Add(b, y0)" if seed % 2 else "y1 = Add(y0, b)")
    last = "y1" if bias else "y0"
    if clamp == "Clip":
        weights |= {"low": np.array(-0.5, np.float32), "high": np.array(2, np.float32)}
        lines.append(f"y2 = Clip({last}, low, high)")
    elif clamp:
        lines.append(f"y2 = {clamp}({last})")
    last = "y2" if clamp else last
    dims = ",".join(map(str, shape))
    out = ",".join(map(str, (*shape[:-1], outputs)))
    return net(f"(float[{dims}] x) => (float[{out}] {last})", " ".join(lines), weights)


@st.composite
def dynamic_nets(draw: st.DrawFn) -> ir.Model:
    """One to three products of the same value, of any size, then a product of their sum."""
    rows = draw(st.sampled_from([(1,), (2, 3), (7,), (1, 33)]))
    width = draw(st.sampled_from([1, 3, 4, 16, 17, 35, 64, 129]))
    outputs = draw(st.sampled_from([1, 5, 16, 31, 48, 67]))
    branches = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    weights: dict[str, Array] = {}
    lines, values = [], []
    for i in range(branches):
        weights[f"w{i}"] = random.standard_normal((width, outputs)).astype(np.float32)
        lines.append(f"v{i} = MatMul(x, w{i})")
        values.append(f"v{i}")
        if draw(st.booleans()):
            weights[f"b{i}"] = random.standard_normal(outputs).astype(np.float32)
            lines.append(f"b_{i} = Add(v{i}, b{i})")
            values[-1] = f"b_{i}"
    if draw(st.booleans()):
        lines.append(f"r = Relu({values[-1]})")
        values[-1] = "r"
    lines.append(f"s = Sum({', '.join(values)})")
    weights["w"] = random.standard_normal((outputs, 6)).astype(np.float32)
    lines.append("y = MatMul(s, w)")
    dims = ",".join(map(str, (*rows, width)))
    out = ",".join(map(str, (*rows, 6)))
    ends = ", ".join([f"float[{out}] y", *(f"float {v}" for v in values)])
    return quantized(net(f"(float[{dims}] x) => ({ends})", " ".join(lines), weights))


def hostile_rows(rows: int, width: int, seed: int = 0) -> Array:
    """Rows that are usual, one-sided, all zero, tiny, huge, tied, or of a single value."""
    random = np.random.default_rng(seed)
    kinds: list[Callable[[Array], Array]] = [
        lambda x: x,
        np.abs,
        lambda x: -np.abs(x),
        lambda x: x * 0,
        lambda x: x * np.float32(1e-41),
        lambda x: x * np.float32(1e-19),
        lambda x: np.clip(x * np.float32(1e30), -1e38, 1e38),
        lambda x: np.rint(x * 50) / 2 * np.float32(255 / 254),
        lambda x: np.full_like(x, 3.7),
        lambda x: np.full_like(x, -1e-3),
        lambda x: np.where(np.arange(x.size) == 0, 1000, x),
        lambda x: np.sign(x) * np.float32(127.5),  # both ends round away from 0
    ]
    x = random.standard_normal((rows, width)).astype(np.float32)
    return np.stack([kinds[i % len(kinds)](row).astype(np.float32) for i, row in enumerate(x)])


def broken_rows(width: int) -> Array:
    """Rows with NaN, infinities or a range beyond float32, and usual ones between."""
    x = hostile_rows(8, width, 5)
    for row, value in enumerate((np.nan, np.inf, -np.inf, LARGEST)):
        x[2 * row] = 1
        x[2 * row, -1] = value
    x[6, 0] = -LARGEST
    return x
