"""Rules for arithmetic: formulas that lose no accuracy, and types that TVM refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, attributes_of

_MOST_MULTIPLICATIONS = 8
_SERIES_TERMS = 8  # of atanh up to 1/3: the next term is below 1e-9


def _softplus_of(graph: Rewriting, x: str, output: str | None = None) -> str:
    """Add max(x, 0) + log1p(exp(-|x|)); log1p(u) is 2 atanh(u / (u + 2)), a short series."""
    dtype = graph.dtype(x)

    def constant(value: float) -> str:
        return graph.add_constant(value, dtype)

    u = graph.emit("Exp", graph.emit("Neg", graph.emit("Abs", x)))
    z = graph.emit("Div", u, graph.emit("Add", u, constant(2)))
    square = graph.emit("Mul", z, z)
    series = constant(1 / (2 * _SERIES_TERMS + 1))
    for term in reversed(range(_SERIES_TERMS)):
        scaled = graph.emit("Mul", series, square)
        series = graph.emit("Add", scaled, constant(1 / (2 * term + 1)))
    double = graph.emit("Mul", graph.emit("Mul", z, series), constant(2))
    return graph.emit("Add", graph.emit("Relu", x), double, output=output)


def _softplus(graph: Rewriting, node: onnx.NodeProto) -> bool:
    _softplus_of(graph, node.input[0], node.output[0])
    return True


def _mish(graph: Rewriting, node: onnx.NodeProto) -> bool:
    gate = graph.emit("Tanh", _softplus_of(graph, node.input[0]))
    graph.emit("Mul", node.input[0], gate, output=node.output[0])
    return True


def _pow(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Multiplications, where the exponent is one small whole number; else a power of floats."""
    base, exponent = node.input
    power = graph.constant(exponent)
    if power is not None and power.size == 1 and _small_whole(float(power.item())):
        shape = np.broadcast_shapes(graph.shape(base), power.shape)
        _multiplied(graph, base, int(power.item()), shape, node.output[0])
        return True
    kinds = graph.dtype(base).kind, graph.dtype(exponent).kind
    if kinds == ("f", "f") or kinds[0] != "f":
        return False
    graph.emit("Pow", base, graph.cast(exponent, graph.dtype(base)), output=node.output[0])
    return True


def _small_whole(power: float) -> bool:
    return power.is_integer() and 1 <= power <= _MOST_MULTIPLICATIONS


def _multiplied(
    graph: Rewriting, base: str, power: int, shape: tuple[int, ...], output: str
) -> None:
    product = base
    for _ in range(power - 1):
        product = graph.emit("Mul", product, base)
    if shape == graph.shape(base):
        graph.emit("Identity", product, output=output)
    else:
        graph.reshape(product, shape, output)


def _is_inf(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Equality with the infinities that are asked for."""
    attributes = attributes_of(node)
    dtype = graph.dtype(node.input[0])
    wanted = [
        sign * np.inf
        for sign, name in ((1, "detect_positive"), (-1, "detect_negative"))
        if attributes.get(name, 1)
    ]
    found = [graph.emit("Equal", node.input[0], graph.add_constant(v, dtype)) for v in wanted]
    if not found:
        never = graph.add_constant(np.zeros(graph.shape(node.input[0])), np.bool_)
        graph.emit("Identity", never, output=node.output[0])
    elif len(found) == 1:
        graph.emit("Identity", found[0], output=node.output[0])
    else:
        graph.emit("Or", *found, output=node.output[0])
    return True


def _cosh(graph: Rewriting, node: onnx.NodeProto) -> bool:
    graph.emit("Mul", _half(graph, node), _exponentials(graph, node, "Add"), output=node.output[0])
    return True


def _sinh(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Half the difference of exponentials; below 1, where they cancel, a series."""
    x = node.input[0]
    dtype = graph.dtype(x)
    one = graph.add_constant(1, dtype)
    square = graph.emit("Mul", x, x)
    series = one
    for divisor in (72, 42, 20, 6):
        part = graph.emit("Mul", square, graph.add_constant(1 / divisor, dtype))
        series = graph.emit("Add", one, graph.emit("Mul", part, series))
    small = graph.emit("Mul", x, series)
    large = graph.emit("Mul", _half(graph, node), _exponentials(graph, node, "Sub"))
    is_small = graph.emit("Less", graph.emit("Abs", x), one)
    graph.emit("Where", is_small, small, large, output=node.output[0])
    return True


def _half(graph: Rewriting, node: onnx.NodeProto) -> str:
    return graph.add_constant(0.5, graph.dtype(node.input[0]))


def _exponentials(graph: Rewriting, node: onnx.NodeProto, op_type: str) -> str:
    """Combine exp(x) and exp(-x)."""
    x = node.input[0]
    return graph.emit(op_type, graph.emit("Exp", x), graph.emit("Exp", graph.emit("Neg", x)))


def _lp_normalization(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """X divided by its norm, 0 where that is 0."""
    attributes = attributes_of(node)
    axis, power = attributes.get("axis", -1), attributes.get("p", 2)
    x = node.input[0]
    zero = graph.add_constant(0, graph.dtype(x))
    norm = graph.emit_axes("ReduceL1" if power == 1 else "ReduceL2", x, [axis], keepdims=1)
    is_zero = graph.emit("Equal", norm, zero)
    safe = graph.emit("Where", is_zero, graph.add_constant(1, graph.dtype(x)), norm)
    graph.emit("Where", is_zero, zero, graph.emit("Div", x, safe), output=node.output[0])
    return True


def _det(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """The formula for matrices of two rows."""
    shape = graph.shape(node.input[0])
    if shape[-1] != 2:
        return False
    flat = graph.reshape(node.input[0], [*shape[:-2], 4])
    a, b, c, d = (
        graph.emit("Gather", flat, graph.add_constant(i, np.int64), axis=-1) for i in range(4)
    )
    products = graph.emit("Mul", a, d), graph.emit("Mul", b, c)
    graph.emit("Sub", *products, output=node.output[0])
    return True


def _reduce_bool(op_type: str) -> Callable[[Rewriting, onnx.NodeProto], bool]:
    """Reduce booleans as bytes."""

    def rule(graph: Rewriting, node: onnx.NodeProto) -> bool:
        if graph.dtype(node.input[0]) != np.bool_ or 0 in graph.shape(node.input[0]):
            return False
        data = graph.cast(node.input[0], np.int32)
        reduced = graph.emit(op_type, data, *node.input[1:], **attributes_of(node))
        graph.cast(reduced, np.bool_, node.output[0])
        return True

    return rule


RULES = {
    "Cosh": _cosh,
    "Det": _det,
    "IsInf": _is_inf,
    "LpNormalization": _lp_normalization,
    "Mish": _mish,
    "Pow": _pow,
    "ReduceMax": _reduce_bool("ReduceMax"),
    "ReduceMin": _reduce_bool("ReduceMin"),
    "Sinh": _sinh,
    "Softplus": _softplus,
}
