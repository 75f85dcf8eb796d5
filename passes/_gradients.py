"""Reverse-mode differentiation of a graph, as a graph that onnxruntime runs.

Nodes are visited against execution order, and a rule per operator (`_gradient_rules`) appends the
nodes that turn gradients of its outputs into gradients of its inputs: the chain rule, as in
Griewank and Walther, "Evaluating Derivatives", 2008, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from itertools import zip_longest

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgepress.calibration.base import Array
from edgepress.passes._gradient_rules import GRADIENTS
from edgepress.passes._gradient_tape import NoGradient, Tape, given, is_float
from edgepress.passes._reads import reads
from edgepress.passes._shapes import shape_of, static_shape
from edgepress.passes._taps import open_session
from edgepress.passes.base import PassRefused

#: From a feed by input name and directions by output name to `(value, gradient)` by value name.
Gradients = Callable[[dict[str, Array], dict[str, Array]], dict[str, tuple[Array, Array]]]

#: From here on ScatterElements can add.
_LEAST_OPSET = 16
_ADVICE = "choose an importance without gradients, such as l1"
#: Integers up to this wide are taken for quantized numbers and their sums; counts and indices,
#: which have no gradient, are wider.
_QUANTIZED_BITS = 32


def open_gradients(
    pass_name: str, model: ir.Model, values: list[ir.Value], advice: str = _ADVICE
) -> Gradients:
    """Return a function that differentiates a weighted sum of the model's outputs.

    The function maps a feed by input name, and directions by output name, to `(a, gradient)` by
    value name. The directions `v` have the shapes of the outputs `y`; every floating output that
    depends on one of the values needs one. The gradient is that of `Σ v·y` with respect to the
    value `a`, zeros where it does not reach an output. Both are float32 in the value's shape.

    What goes through a condition, a count or an index is constant almost everywhere and has no
    gradient; what goes through quantized numbers is refused.

    Args:
        pass_name: for refusals.
        model: with fixed shapes and opset 13 or newer; it is not changed.
        values: floating inputs and intermediate values of the model.
        advice: what to do where a gradient is not known, for refusals.

    Raises:
        PassRefused: no output is a float, between a value and an output is an operator whose
            gradient is not known, or onnxruntime cannot load the model; from the function:
            onnxruntime cannot run it, or a value or gradient is NaN or infinite.
    """
    copy = model.clone()
    graph = copy.graph
    if not any(is_float(value) for value in graph.outputs):
        raise PassRefused(pass_name, "model", f"none of its outputs is a float; {advice}")
    _raise_opset(graph)
    by_name = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    sources = [by_name[given(value.name)] for value in dict.fromkeys(values)]
    directions, slopes = _append_gradients(pass_name, graph, sources, advice)
    outputs = [*(v for v in sources if v.producer() is not None), *slopes.values()]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(copy)
    session = open_session(pass_name, copy, outputs) if outputs else None
    names = [given(value.name) for value in outputs]

    def differentiate(
        feed: dict[str, Array], chosen: dict[str, Array]
    ) -> dict[str, tuple[Array, Array]]:
        found = feed | {
            given(value.name): np.asarray(chosen[name], given(value.dtype).numpy())
            for name, value in directions.items()
        }
        if session:
            try:
                found |= dict(zip(names, session.run(names, found), strict=True))
            except Exception as error:  # onnxruntime's errors have no class of their own
                why = f"onnxruntime cannot compute its gradients: {error}"
                raise PassRefused(pass_name, "model", why) from error
        result = {}
        for value in sources:
            name = given(value.name)
            array = np.asarray(found[name], np.float32)
            slope = slopes.get(value)
            gradient = np.zeros_like(array) if slope is None else found[given(slope.name)]
            result[name] = array, np.asarray(gradient, np.float32)
            if not all(np.isfinite(part).all() for part in result[name]):
                why = f"it or its gradient is NaN or infinite for a sample; {advice}"
                raise PassRefused(pass_name, f"value {name!r}", why)
        return result

    return differentiate


def _raise_opset(graph: ir.Graph) -> None:
    """Let ScatterElements add up; from 13 to 16 only RoiAlign changed what it means."""
    if graph.opset_imports[""] >= _LEAST_OPSET:
        return
    graph.opset_imports[""] = _LEAST_OPSET
    for node in graph.all_nodes():
        if node.op_type == "RoiAlign":
            node.attributes.add(
                ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
            )


def _append_gradients(
    pass_name: str, graph: ir.Graph, sources: list[ir.Value], advice: str
) -> tuple[dict[str, ir.Value], dict[ir.Value, ir.Value]]:
    """Append what computes the gradients.

    Returns:
        The graph inputs that take the directions, by output name, and the gradients, by source;
        a source that reaches no output has none.
    """
    path, nodes, tape = _path(graph, sources), list(graph), Tape(graph)
    parts: dict[ir.Value, list[ir.Value]] = {value: [] for value in path}
    directions = {}
    for output in dict.fromkeys(graph.outputs):
        if output in path:
            direction = ir.Value(name=tape.name(), shape=output.shape, type=output.type)
            graph.inputs.append(direction)
            directions[given(output.name)] = direction
            parts[output].append(direction)

    def total(value: ir.Value) -> ir.Value:
        """Sum what came back from all readers, which have all been visited by now."""
        if len(parts[value]) > 1:
            parts[value] = [tape.op("Sum", *parts[value])]
        return parts[value][0]

    for node in reversed(nodes):
        if path.isdisjoint(node.outputs) or path.isdisjoint(reads(node)):
            continue
        try:
            for value, gradient in _pull_back(tape, node, path, total):
                parts[value].append(gradient)
        except NoGradient as reason:
            why = (
                f"it lies on the way to an output, and the gradient of {node.op_type} is not known "
                f"({reason}); {advice}"
            )
            raise PassRefused(pass_name, f"node {node.name!r}", why) from reason
    # An Identity each, as values may share a gradient, and a direction is one itself.
    slopes = {value: tape.op("Identity", total(value)) for value in sources if value in path}
    return directions, slopes


def _path(graph: ir.Graph, sources: list[ir.Value]) -> set[ir.Value]:
    """Return the values on the way from a source to a floating output, both ends included."""
    dependent = {value for value in sources if _carries(value)}
    for node in graph:
        if not dependent.isdisjoint(reads(node)):
            dependent.update(value for value in node.outputs if _carries(value))
    reaching = {value for value in graph.outputs if is_float(value)}
    for node in reversed(graph):
        if not reaching.isdisjoint(node.outputs):
            reaching.update(value for value in reads(node) if _carries(value))
    return dependent & reaching


def _carries(value: ir.Value) -> bool:
    """Tell whether a value is a float, or quantized and stands for one."""
    dtype = value.dtype
    if dtype is None or is_float(value):
        return True
    return dtype.is_integer() and dtype.bitwidth <= _QUANTIZED_BITS


def _pull_back(
    tape: Tape, node: ir.Node, path: Set[ir.Value], total: Callable[[ir.Value], ir.Value]
) -> list[tuple[ir.Value, ir.Value]]:
    """Append what turns the gradients of a node's outputs into those of its inputs.

    Args:
        tape: appends to the graph.
        node: with an output and an input on the path.
        path: values that have a gradient.
        total: gives the gradient of an output on the path.

    Returns:
        Every input on the path with its gradient; one that the node reads twice is there twice.

    Raises:
        NoGradient: it is not known for this node, and why.
    """
    if node.domain:
        raise NoGradient(f"it is an operator of {node.domain}")
    named = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    for value in named:
        if value in path and not is_float(value):
            raise NoGradient(f"{value.name!r} holds quantized numbers")
    if node.op_type not in GRADIENTS:
        raise NoGradient("there is no rule for it")
    for value in named:
        if static_shape(value) is None:
            raise NoGradient(f"the shape of {value.name!r} is not fixed")
    if node.op_type == "Split":
        totals = [
            total(value) if value in path else tape.full(shape_of(value), 0, value)
            for value in node.outputs
        ]
    else:
        for value in node.outputs[1:]:
            if value in path:
                raise NoGradient(f"its output {value.name!r} is read, too")
        totals = [total(node.outputs[0])]
    pairs = []
    for read, gradient in zip_longest(node.inputs, GRADIENTS[node.op_type](tape, node, *totals)):
        if read is None or read not in path:
            continue
        if gradient is None:
            raise NoGradient(f"that of its input {read.name!r}")
        pairs.append((read, gradient))
    return pairs
