"""Layer normalisation becomes one node, whether exporters wrote one operator or nine.

Recognised are ONNX's LayerNormalization and RMSNormalization, and the operators that they stand
for, over the last axis::

    d = x - mean(x)        y = d / sqrt(mean(d * d) + epsilon) * scale + shift

with Pow or Mul for the square, a division by the root or a product with its reciprocal, and
without the mean (root-mean-square normalisation), the scale or the shift. They become a `LayerNorm`
of the `edgepress` domain: inputs x, scale, shift and a residual that is added to x first, each of
the last three or none; attributes `axis`, `epsilon` and `centred`; outputs the result and, where
somebody reads it, the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of, take_name
from edgepress.targets.lowering.floats import sole_user
from edgepress.targets.program import Array

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")  # not to be decomposed before


@dataclass
class _Norm:
    """A normalisation that was found, and the nodes that it is made of."""

    x: ir.Value
    axis: int
    epsilon: float
    centred: bool
    scale: Array | None = None
    shift: Array | None = None
    nodes: list[ir.Node] = field(default_factory=list)


class _Mismatch(Exception):
    """The nodes are not the ones of a normalisation."""


def fuse_normalizations(model: ir.Model) -> ir.Model:
    """Replace every layer normalisation that is recognised. Changes the model and returns it."""
    for node in reversed(list(model.graph)):
        if node.graph is not model.graph or node.domain != "":
            continue
        recognise = _FORMS.get(node.op_type)
        if recognise is None:
            continue
        try:
            norm = recognise(node)
            _check(norm, node)
        except _Mismatch:
            continue
        _replace(norm, node, model.graph)
    return model


def fuse_summed_rows(model: ir.Model) -> ir.Model:
    """Let normalisations add what they normalise. Changes the model and returns it.

    An Add of two tensors of one shape in front of a `LayerNorm` becomes part of it; the sum is an
    output of its own where others read it.
    """
    for norm in [n for n in model.graph if n.domain == DOMAIN and n.op_type == "LayerNorm"]:
        x = norm.inputs[0]
        add = x.producer() if x is not None else None
        if x is None or add is None or add.op_type != "Add" or add.domain != "":
            continue
        shape = shape_of(x)
        if any(v is None or array_of(v) is not None or shape_of(v) != shape for v in add.inputs):
            continue
        old, new = [norm.outputs[0]], [_like(norm.outputs[0])]
        if sole_user(x) is None:
            old.append(x)
            new.append(_like(x))
        fused = ir.Node(
            DOMAIN,
            norm.op_type,
            [add.inputs[0], *[*norm.inputs[1:], None, None][:2], add.inputs[1]],
            list(norm.attributes.values()),
            outputs=new,
            name=norm.name,
        )
        # behind the Add everything is there that the normalisation reads
        ir.convenience.replace_nodes_and_values(model.graph, add, [norm, add], [fused], old, new)
    return model


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def _replace(norm: _Norm, last: ir.Node, graph: ir.Graph) -> None:
    old, width = last.outputs[0], math.prod(shape_of(norm.x)[norm.axis :])
    constants = [
        _constant(f"{last.name or old.name}_{what}", array, width, graph)
        for what, array in (("scale", norm.scale), ("shift", norm.shift))
    ]
    fused = ir.Node(
        DOMAIN,
        "LayerNorm",
        [norm.x, *constants, None],
        [
            ir.AttrInt64("axis", norm.axis),
            ir.AttrFloat32("epsilon", norm.epsilon),
            ir.AttrInt64("centred", int(norm.centred)),
        ],
        outputs=[_like(old)],
        name=last.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, last, norm.nodes, [fused], [old], list(fused.outputs)
    )


def _constant(name: str, array: Array | None, width: int, graph: ir.Graph) -> ir.Value | None:
    if array is None:
        return None
    taken = {value.name or "" for node in graph for value in node.outputs}
    name = take_name(name, taken | graph.initializers.keys())
    full = np.ascontiguousarray(np.broadcast_to(array.ravel(), (width,)), np.float32)
    value = ir.Value(
        name=name,
        shape=ir.Shape(full.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(full, name=name),
    )
    graph.initializers[name] = value
    return value


def _check(norm: _Norm, last: ir.Node) -> None:
    """Refuse what is of another type, or of which something else reads a part."""
    x, output = norm.x, last.outputs[0]
    _demand(x.dtype == output.dtype == ir.DataType.FLOAT and array_of(x) is None)
    _demand(x.shape is not None and x.shape.is_static() and math.prod(shape_of(x)) > 0)
    _demand(output.shape is not None and shape_of(x) == shape_of(output))
    normal = shape_of(x)[norm.axis :]
    for array in (norm.scale, norm.shift):
        _demand(array is None or (array.dtype == np.float32 and _fits(array, normal)))
    for node in norm.nodes:
        for value in (v for v in node.outputs if v is not output):
            _demand(not value.is_graph_output())
            _demand(all(user in norm.nodes for user, _ in value.uses()))


def _fits(array: Array, shape: tuple[int, ...]) -> bool:
    """Tell whether a constant is one number, or one per normalised value, of every row."""
    shapes = [(1,) * ones + shape for ones in range(max(array.ndim - len(shape), 0) + 1)]
    return array.size == 1 or array.shape in shapes


def _whole(node: ir.Node) -> _Norm:
    """Read an operator of ONNX."""
    x, *constants = node.inputs
    _demand(x is not None and all(not value.uses() for value in node.outputs[1:]))
    assert x is not None
    arrays = [array_of(value) for value in constants]
    _demand(all(v is None or a is not None for v, a in zip(constants, arrays, strict=True)))
    axis = node.attributes.get_int("axis", -1) % len(shape_of(x))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    centred = node.op_type == "LayerNormalization"
    scale, shift = [*arrays, None, None][:2]
    return _Norm(x, axis, epsilon, centred, scale, shift, [node])


def _written_out(last: ir.Node) -> _Norm:
    """Read the operators from the last one on: the shift, the scale, the division by the root."""
    nodes, shift, scale = [last], None, None
    node = last
    if node.op_type == "Add":
        value, shift = _with_constant(node)
        node = _maker(value, nodes)
    if node.op_type == "Mul" and any(array_of(value) is not None for value in node.inputs):
        value, scale = _with_constant(node)
        node = _maker(value, nodes)
    centred_value, root = _quotient(node, nodes)
    variance, epsilon = _with_constant(_maker(root, nodes, "Add"))
    _demand(epsilon.size == 1 and epsilon.dtype == np.float32)
    squared = _squared(_averaged(variance, nodes), nodes)
    x, centred = centred_value, False
    minuend = _centred(centred_value, nodes)
    if minuend is not None:
        x, centred = minuend, True
        if squared is not centred_value:  # some exporters write the subtraction twice
            _demand(_centred(squared, nodes) is x)
    else:
        _demand(squared is x)
    _demand(x.shape is not None and x.shape.is_static())
    axis = len(shape_of(x)) - 1
    return _Norm(x, axis, float(epsilon.item()), centred, scale, shift, list(dict.fromkeys(nodes)))


def _quotient(node: ir.Node, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """Return what a node divides, and the value of whose root, however it says so."""
    _demand(node.op_type in ("Div", "Mul"))
    first, second = node.inputs
    if node.op_type == "Div":
        return _given(first), _under_root(second, nodes)
    for value, factor in ((first, second), (second, first)):
        inverse = _given(factor).producer()
        if inverse is None or inverse.domain != "":
            continue
        divisor = inverse.inputs[-1]
        if inverse.op_type == "Div" and not _is_number(inverse.inputs[0], 1):
            continue
        if inverse.op_type in ("Div", "Reciprocal"):
            nodes.append(inverse)
            return _given(value), _under_root(divisor, nodes)
        if inverse.op_type == "Pow" and _is_number(inverse.inputs[1], -0.5):
            nodes.append(inverse)
            return _given(value), _given(inverse.inputs[0])
    raise _Mismatch


def _under_root(value: ir.Value | None, nodes: list[ir.Node]) -> ir.Value:
    node = _maker(value, nodes)
    _demand(node.op_type == "Sqrt" or (node.op_type == "Pow" and _is_number(node.inputs[1], 0.5)))
    return _given(node.inputs[0])


def _averaged(value: ir.Value | None, nodes: list[ir.Node]) -> ir.Value:
    """Return what a value is the mean of, over the last axis."""
    node = _maker(value, nodes, "ReduceMean")
    x = _given(node.inputs[0])
    given: Sequence[int] = node.attributes.get_ints("axes", [])
    if len(node.inputs) > 1:
        axes = array_of(node.inputs[1])
        _demand(axes is not None)
        assert axes is not None
        given = axes.tolist()
    _demand(x.shape is not None and node.attributes.get_int("keepdims", 1) == 1)
    assert x.shape is not None
    _demand(list(given) in ([-1], [len(x.shape) - 1]))
    return x


def _squared(value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    node = _maker(value, nodes)
    _demand(node.op_type in ("Mul", "Pow"))
    first, second = node.inputs
    _demand(
        (node.op_type == "Mul" and first is second)
        or (node.op_type == "Pow" and _is_number(second, 2))
    )
    return _given(first)


def _centred(value: ir.Value, nodes: list[ir.Node]) -> ir.Value | None:
    """Return what a value is without its mean; None where it is no such difference."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Sub":
        return None
    x, mean = node.inputs
    passed: list[ir.Node] = []
    try:
        same = _averaged(mean, passed) is x
    except _Mismatch:
        return None
    if not same:
        return None
    nodes += [node, *passed]
    return x


def _maker(value: ir.Value | None, nodes: list[ir.Node], op_type: str | None = None) -> ir.Node:
    """Return the node that made a value, and count it among the nodes."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or op_type not in (None, node.op_type):
        raise _Mismatch
    _demand(0 < len(node.inputs) <= 2)
    nodes.append(node)
    return node


def _with_constant(node: ir.Node) -> tuple[ir.Value, Array]:
    """Return the operand of a node that is no constant, and the constant one."""
    for value, other in (node.inputs, node.inputs[::-1]):
        array = array_of(other)
        if array is not None:
            return _given(value), array
    raise _Mismatch


def _is_number(value: ir.Value | None, number: float) -> bool:
    array = array_of(value)
    return array is not None and array.size == 1 and float(array.item()) == number


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise _Mismatch
    return value


def _demand(condition: bool) -> None:
    if not condition:
        raise _Mismatch


_FORMS: dict[str, Callable[[ir.Node], _Norm]] = {
    **dict.fromkeys(NORMALIZATIONS, _whole),
    **dict.fromkeys(("Add", "Mul", "Div"), _written_out),
}
