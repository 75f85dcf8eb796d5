"""Float operators that have kernels of their own become `edgepress` nodes.

Convolutions, matrix products with constant weights and pools take their bias and a following ReLU
or Clip along. The rest stays plain ONNX and is compiled through Relax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import Builder, array_of, dtype_of, shape_of
from edgepress.targets.lowering.softmax import softmax_axes
from edgepress.targets.lowering.window import (
    clip_bounds,
    global_window,
    overhangs,
    pool_factors,
    reduces_space,
    window_attributes,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Claim:
    """A node of the `edgepress` domain that takes the place of others.

    Attributes:
        op_type: of the new node.
        x: what it reads.
        constants: what it reads beside, by what they are.
        attributes: of the new node.
        last: the node whose output it gives.
        followers: further nodes that it does the work of.
    """

    op_type: str
    x: ir.Value | None
    constants: dict[str, Array]
    attributes: dict[str, Any]
    last: ir.Node
    followers: list[ir.Node]


def claim_float_operators(model: ir.Model) -> ir.Model:
    """Replace the float operators that edgepress has kernels for. The model is not changed."""
    return claim(model, _CLAIMS)


def claim(model: ir.Model, claims: Mapping[str, Callable[[ir.Node], Claim | None]]) -> ir.Model:
    """Replace the nodes that somebody claims, by their operator. The model is not changed."""
    builder = Builder()
    values: dict[ir.Value, ir.Value] = {}
    taken: set[ir.Node] = set()
    inputs = []
    for value in model.graph.inputs:
        copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
        builder.unique(value.name or "input")
        inputs.append(copy)
        values[value] = copy

    def get(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value not in values:
            array = array_of(value)
            if array is None:
                raise ValueError(f"{value.name!r} has no producer")
            values[value] = builder.constant(value.name or "constant", array)
        return values[value]

    for node in model.graph:
        if node in taken:
            continue
        try_claim = claims.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        claimed = try_claim(node) if try_claim else None
        if claimed is None:
            outputs = builder.copy(node, [get(value) for value in node.inputs])
            values.update(zip(node.outputs, outputs, strict=True))
            continue
        operands = [get(claimed.x)]
        for name, array in claimed.constants.items():
            operands.append(builder.constant(f"{node.name}_{name}", array))
        output = claimed.last.outputs[0]
        values[output] = builder.node(
            claimed.op_type,
            operands,
            claimed.attributes,
            output.name or "out",
            dtype_of(output),
            shape_of(output),
            label=node.name,
        )
        taken.update(claimed.followers)
    outputs = []
    for value in model.graph.outputs:
        result = get(value)
        assert result is not None
        if result.producer() is not None and result.name != value.name:
            builder.free(value.name or "")
            result.name = value.name
        outputs.append(result)
    return builder.model(model, inputs, outputs)


def sole_user(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value, where it reads it once and nothing else does."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    return uses[0][0]


def clamped_by(node: ir.Node) -> tuple[ir.Node, list[ir.Node], dict[str, float]]:
    """Follow a node's output through one ReLU or Clip."""
    user = sole_user(node.outputs[0])
    if user is not None and user.op_type in ("Relu", "Clip") and user.domain == "":
        bounds = clip_bounds(user)
        if bounds is not None and user.inputs[0] is node.outputs[0]:
            return user, [user], {"low": bounds[0], "high": bounds[1]}
    return node, [], {"low": -np.inf, "high": np.inf}


def _is_float(value: ir.Value | None, rank: int | None = None) -> bool:
    if value is None or dtype_of(value) != "float32":
        return False
    return rank is None or len(shape_of(value)) == rank


def _conv(node: ir.Node) -> Claim | None:
    weights = array_of(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = array_of(given)
    if not _is_float(node.inputs[0], 4) or weights is None or (given is not None and bias is None):
        return None
    last, followers, bounds = clamped_by(node)
    bias = np.zeros(weights.shape[0], np.float32) if bias is None else bias
    attributes = {
        **window_attributes(node, weights.shape[2:]),
        "group": node.attributes.get_int("group", 1),
        **bounds,
    }
    constants = {"weights": weights, "bias": bias}
    return Claim("Conv", node.inputs[0], constants, attributes, last, followers)


def _gemm(node: ir.Node) -> Claim | None:
    weights = array_of(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = array_of(given)
    if not _is_float(node.inputs[0], 2) or weights is None or (given is not None and bias is None):
        return None
    if node.attributes.get_int("transA", 0):
        return None
    if not node.attributes.get_int("transB", 0):
        weights = weights.T
    weights = weights * np.float32(node.attributes.get_float("alpha", 1.0))
    if bias is None:
        bias = np.zeros(weights.shape[0], np.float32)
    if bias.size not in (1, weights.shape[0]) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
        return None
    bias = bias * np.float32(node.attributes.get_float("beta", 1.0))
    last, followers, bounds = clamped_by(node)
    constants = {"weights": weights, "bias": np.broadcast_to(bias.ravel(), weights.shape[:1])}
    return Claim("Gemm", node.inputs[0], constants, dict(bounds), last, followers)


def _matmul(node: ir.Node) -> Claim | None:
    weights = array_of(node.inputs[1])
    x = node.inputs[0]
    if not _is_float(x) or weights is None or weights.ndim != 2 or len(shape_of(x)) < 2:  # type: ignore[arg-type]
        return None
    weights = weights.T
    bias = np.zeros(weights.shape[0], np.float32)
    last, followers = node, []
    user = sole_user(node.outputs[0])
    if user is not None and user.op_type == "Add" and user.domain == "":
        other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
        addend = array_of(other)
        if addend is not None and addend.shape == bias.shape:
            bias, last, followers = addend, user, [user]
    last, more, bounds = (
        clamped_by(last) if last is not node else (node, [], {"low": -np.inf, "high": np.inf})
    )
    constants = {"weights": weights, "bias": bias}
    return Claim("Gemm", x, constants, dict(bounds), last, followers + more)


def _max_pool(node: ir.Node) -> Claim | None:
    if not _is_float(node.inputs[0], 4) or (len(node.outputs) > 1 and node.outputs[1].uses()):
        return None
    window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
    return Claim("MaxPool", node.inputs[0], {}, window, node, [])


def _average_pool(node: ir.Node) -> Claim | None:
    if not _is_float(node.inputs[0], 4) or overhangs(node):
        return None
    window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
    factors = pool_factors(node, window).astype(np.float32)
    return Claim("AveragePool", node.inputs[0], {"factors": factors}, window, node, [])


def _global_average(node: ir.Node) -> Claim | None:
    x = node.inputs[0]
    if not _is_float(x, 4) or x is None or len(shape_of(node.outputs[0])) != 4:
        return None
    if node.op_type == "ReduceMean" and not reduces_space(node):
        return None
    height, width = shape_of(x)[2:]
    factors = np.full((1, 1), 1.0 / (height * width), np.float32)
    return Claim("AveragePool", x, {"factors": factors}, global_window(shape_of(x)), node, [])


def _softmax(node: ir.Node) -> Claim | None:
    x = node.inputs[0]
    if x is None or not _is_float(x) or not shape_of(x) or 0 in shape_of(x):
        return None
    first, stop = softmax_axes(node)
    return Claim("Softmax", x, {}, {"axes": (first, stop)}, node, [])


_CLAIMS: dict[str, Callable[[ir.Node], Claim | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "ReduceMean": _global_average,
    "Softmax": _softmax,
}
