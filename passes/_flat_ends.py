"""Ranges without the ends at which all that reads a value is flat.

Behind a hard-swish everything below -3 is 0, behind a GELU everything below -4 nearly so. An
activation that nothing else reads needs no steps down there: its range may end where the functions
stop changing, and the steps that are left become finer.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgepress.calibration.base import Array, Range
from edgepress.passes._int8_rules import Plan

#: Single operators that are functions of one value, besides groups of operators.
_UNARY = ("Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Sigmoid", "Tanh")
_POINTS = 4097
_TOLERANCE = 0.25  # by how many of its 8-bit steps a result may move
_IR_VERSION = 8


def without_flat_ends(
    ranges: dict[ir.Value, Range],
    roots: dict[ir.Value, ir.Value],
    planned: Plan,
    opset: int,
    kept: Collection[ir.Value] = (),
) -> dict[ir.Value, Range]:
    """Narrow the ranges of activations that only functions of one value read.

    Args:
        ranges: of every value that decides a scale.
        roots: every quantized activation, and the value that decides its scale.
        planned: says which nodes are part of a function.
        opset: of the default domain.
        kept: values whose ranges stay, and those of whatever they are functions of.
    """
    narrowed = dict(ranges)
    for value, found in ranges.items():
        members = _readers(value, planned)
        if not members or value.is_graph_output() or value in kept:
            continue
        results = [out for node in members for out in node.outputs if out in roots]
        if not results or any(roots[result] in kept for result in results):
            continue
        grid = np.linspace(min(found.low, 0.0), max(found.high, 0.0), _POINTS, dtype=np.float32)
        curves = _evaluate(value, members, results, grid, opset)
        steps = [_span(ranges[roots[result]]) / 255 for result in results]
        if all(np.isfinite(curve).all() for curve in curves):
            narrowed[value] = _narrowed(grid, curves, steps)
    return narrowed


def _readers(value: ir.Value, planned: Plan) -> list[ir.Node]:
    """Return the functions of a value, node by node; nothing where anything else reads it."""
    members = [
        node
        for node in planned.nodes
        if planned.functions.get(node) is value
        or (node.op_type in _UNARY and node.inputs[0] is value and node not in planned.functions)
    ]
    return members if set(value.consumers()) <= set(members) else []


def _span(found: Range) -> float:
    return max(found.high, 0.0) - min(found.low, 0.0)


def _narrowed(grid: Array, curves: list[Array], steps: list[float]) -> Range:
    """Return the shortest range outside of which no curve leaves the value at its end."""
    low_ends, high_ends = grid <= 0, grid >= 0
    for curve, step in zip(curves, steps, strict=True):
        low_ends &= _is_flat_before(curve, _TOLERANCE * step)
        high_ends &= _is_flat_before(curve[::-1], _TOLERANCE * step)[::-1]
    low, high = grid[np.flatnonzero(low_ends)[-1]], grid[np.flatnonzero(high_ends)[0]]
    return Range(float(low), float(high))


def _is_flat_before(curve: Array, tolerance: float) -> Array:
    """Whether all values before each one are within a tolerance of it."""
    above = np.maximum.accumulate(curve) - curve
    below = curve - np.minimum.accumulate(curve)
    flat: Array = np.maximum(above, below) <= tolerance
    return flat


def _evaluate(
    value: ir.Value, members: list[ir.Node], results: list[ir.Value], grid: Array, opset: int
) -> list[Array]:
    """Return every result for the values of the grid, in float64."""
    copies: dict[ir.Value, ir.Value] = {
        value: ir.val(value.name, ir.DataType.FLOAT, list(grid.shape))
    }
    initializers: dict[ir.Value, None] = {}
    nodes = []
    for node in members:
        for given in node.inputs:
            if given is not None and given not in copies:
                copies[given] = ir.Value(name=given.name, const_value=given.const_value)
                copies[given].shape, copies[given].type = given.shape, given.type
                initializers[copies[given]] = None
        outputs = [ir.Value(name=out.name, type=out.type) for out in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        inputs = [None if given is None else copies[given] for given in node.inputs]
        attributes = list(node.attributes.values())
        nodes.append(ir.Node("", node.op_type, inputs, attributes, outputs=outputs))
    graph = ir.Graph(
        [copies[value]], [copies[result] for result in results], nodes=nodes,
        initializers=list(initializers), opset_imports={"": opset}, name="functions",
    )  # fmt: skip
    content = ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION)).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    answers = session.run(None, {value.name or "": grid})
    return [np.asarray(answer, np.float64).reshape(-1) for answer in answers]
