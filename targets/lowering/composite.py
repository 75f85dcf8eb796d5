"""Sub-graphs of element-wise operators that are a function of one quantized value.

Exporters write GELU as Div, Erf, Add, Mul and Mul, SiLU as Sigmoid and Mul. Where all of them read
one dequantized value and constants that are single numbers, the whole is a function of that value
alone: it is evaluated in float64 for each value that the storage can hold and becomes one table,
with one rounding instead of one per operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.tables import FUNCTIONS

Array = npt.NDArray[Any]
#: A node's operator on its inputs; one that the node leaves out is None.
Operator = Callable[..., Array]


@dataclass(frozen=True)
class Function:
    """A value that depends on one quantized value only.

    Attributes:
        source: the float value that a DequantizeLinear makes.
        result: the value that is a function of it, float32 or bool, of the same shape.
        nodes: what computes the result from the source, in order.
        constants: the single numbers that they read.
    """

    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]
    constants: Mapping[ir.Value, float]

    def evaluate(self, x: Array) -> Array:
        """Return the result for float64 values of the source."""
        values: dict[Any, Any] = {None: None, self.source: x, **self.constants}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                operands = [values[value] for value in node.inputs]
                values[node.outputs[0]] = OPERATORS[node.op_type](node, *operands)
            return np.broadcast_to(values[self.result], x.shape)


def function_of(
    node: ir.Node,
    functions: Mapping[ir.Value, Function],
    is_source: Callable[[ir.Value], bool],
    number_of: Callable[[ir.Value], float | None],
) -> Function | None:
    """Recognise a node that computes a function of one quantized value.

    Args:
        node: any.
        functions: those that were found before.
        is_source: whether a value is dequantized.
        number_of: the single number that a constant holds; None for anything else.
    """
    if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
        return None
    sources: set[ir.Value] = set()
    before: dict[ir.Node, None] = {}
    constants: dict[ir.Value, float] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value in functions:
            inner = functions[value]
            sources.add(inner.source)
            before |= dict.fromkeys(inner.nodes)
            constants |= inner.constants
        elif is_source(value):
            sources.add(value)
        elif (number := number_of(value)) is not None:
            constants[value] = number
        else:
            return None
    if len(sources) != 1 or len(node.outputs) != 1:
        return None
    (source,), result = sources, node.outputs[0]
    same = shape_of(result) == shape_of(source) and dtype_of(result) in ("float32", "bool")
    return Function(source, result, (*before, node), constants) if same else None


def _clip(node: ir.Node, x: Array, low: float | None = None, high: float | None = None) -> Array:
    low = node.attributes.get_float("min", -np.inf) if low is None else low
    high = node.attributes.get_float("max", np.inf) if high is None else high
    return np.minimum(np.maximum(x, low), high)


def _celu(node: ir.Node, x: Array) -> Array:
    alpha = node.attributes.get_float("alpha", 1.0)
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(np.minimum(x, 0) / alpha), 0)


def _shrink(node: ir.Node, x: Array) -> Array:
    bias = node.attributes.get_float("bias", 0.0)
    limit = node.attributes.get_float("lambd", 0.5)
    return np.where(x < -limit, x + bias, np.where(x > limit, x - bias, 0))


def _swish(node: ir.Node, x: Array) -> Array:
    return np.asarray(x * FUNCTIONS["Sigmoid"](node.attributes.get_float("alpha", 1.0) * x, node))


def _thresholded_relu(node: ir.Node, x: Array) -> Array:
    return np.where(x > node.attributes.get_float("alpha", 1.0), x, 0)


def _plain(function: Callable[..., Any], _node: ir.Node, *operands: Any) -> Array:
    return np.asarray(function(*operands))


def _fold(function: Callable[[Any, Any], Any], _node: ir.Node, *operands: Any) -> Array:
    return np.asarray(reduce(function, operands))


def _tabulated(name: str, node: ir.Node, x: Array) -> Array:
    return FUNCTIONS[name](x, node)


_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Div": np.true_divide,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Identity": np.asarray,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Log": np.log,
    "Mul": np.multiply,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "PRelu": lambda x, slope: np.where(x < 0, slope * x, x),
    "Pow": np.power,
    "Reciprocal": lambda x: 1.0 / x,
    "Relu": lambda x: np.maximum(x, 0),
    "Round": np.rint,
    "Sign": np.sign,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Where": np.where,
}
_OF_SEVERAL: dict[str, Callable[[Any, Any], Any]] = {
    "Max": np.maximum,
    "Min": np.minimum,
    "Sum": np.add,
}

#: What may be part of a function: float64 arrays and numbers in, a float64 or bool array out.
OPERATORS: dict[str, Operator] = {
    **{name: partial(_tabulated, name) for name in FUNCTIONS},
    "Celu": _celu,
    "Clip": _clip,
    "Shrink": _shrink,
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
    **{name: partial(_plain, function) for name, function in _NUMPY.items()},
    **{name: partial(_fold, function) for name, function in _OF_SEVERAL.items()},
}
