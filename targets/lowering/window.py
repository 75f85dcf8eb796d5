"""What the attributes of ONNX convolutions, pools and clips mean, with defaults resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, shape_of

Array = npt.NDArray[Any]


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip node; None where they are not constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for i, name in enumerate(("min", "max")):
        if name in node.attributes:
            bounds[i] = node.attributes[name].as_float()
        elif len(node.inputs) > i + 1 and node.inputs[i + 1] is not None:
            array = array_of(node.inputs[i + 1])
            if array is None or array.size != 1:
                return None
            bounds[i] = float(array.item())
    return bounds[0], bounds[1]


def window_attributes(node: ir.Node, kernel: Sequence[int]) -> dict[str, Any]:
    """Return kernel, strides, dilations and pads `[top, left, bottom, right]` of a 2-D window."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    strides = list(node.attributes.get_ints("strides", [1, 1]))
    dilations = list(node.attributes.get_ints("dilations", [1, 1]))
    pads = list(node.attributes.get_ints("pads", [0, 0, 0, 0]))
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic.startswith("SAME"):
        before, after = [], []
        for size, out, k, s, d in zip(
            shape_of(x)[2:], shape_of(y)[2:], kernel, strides, dilations, strict=True
        ):
            total = max((out - 1) * s + (k - 1) * d + 1 - size, 0)
            small = total // 2
            before.append(small if automatic == "SAME_UPPER" else total - small)
            after.append(total - before[-1])
        pads = before + after
    elif automatic == "VALID":
        pads = [0, 0, 0, 0]
    return {"kernel": list(kernel), "strides": strides, "dilations": dilations, "pads": pads}


def global_window(shape: Sequence[int]) -> dict[str, Any]:
    """Return the window that covers a whole `[n, c, h, w]` tensor."""
    return {
        "kernel": list(shape[2:]),
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [0, 0, 0, 0],
    }


def overhangs(node: ir.Node) -> bool:
    """Tell whether ceil_mode makes the last window of a pool start beyond what the pads cover."""
    x = node.inputs[0]
    assert x is not None
    window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
    for i, (size, out) in enumerate(
        zip(shape_of(x)[2:], shape_of(node.outputs[0])[2:], strict=True)
    ):
        covered = (out - 1) * window["strides"][i] + (window["kernel"][i] - 1) * window[
            "dilations"
        ][i]
        if covered + 1 > size + window["pads"][i] + window["pads"][i + 2]:
            return True
    return False


def reduces_space(node: ir.Node) -> bool:
    """Tell whether a ReduceMean averages the two spatial axes of a 4-D tensor."""
    axes = node.attributes.get_ints("axes", None)
    if axes is None and len(node.inputs) > 1:
        array = array_of(node.inputs[1])
        axes = None if array is None else [int(axis) for axis in array]
    return axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]


def pool_factors(node: ir.Node, window: dict[str, Any]) -> Array:
    """Return one over the number of averaged pixels, float64 `[out_height, out_width]`."""
    x = node.inputs[0]
    assert x is not None
    include = node.attributes.get_int("count_include_pad", 0)
    counts = []
    for i, size in enumerate(shape_of(x)[2:]):
        out = shape_of(node.outputs[0])[2 + i]
        before, after = window["pads"][i], window["pads"][i + 2]
        positions = np.arange(out)[:, None] * window["strides"][i]
        taps = positions + np.arange(window["kernel"][i]) * window["dilations"][i] - before
        real = (taps >= (-before if include else 0)) & (taps < size + (after if include else 0))
        counts.append(real.sum(1))
    return np.asarray(1.0 / (counts[0][:, None] * counts[1][None, :]), np.float64)
