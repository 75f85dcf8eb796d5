"""Groups of element-wise operators that are a function of one value, to be quantized as one.

GELU written as Div, Erf, Add, Mul and Mul reads one activation and constants that are single
numbers. Quantized operator by operator it would round five times; as a whole it is a table of the
input's 256 values. Inside such a group nothing gets a scale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import constant

#: What may be part of a function: `targets/lowering/composite.py` evaluates these and more. What
#: jumps (Round, Sign) is not here, for half a step of input could move the result by a whole jump.
ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "And", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "Greater",
        "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log",
        "Max", "Min", "Mish", "Mul", "Neg", "Not", "Or", "Pow", "PRelu", "Reciprocal", "Relu",
        "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "Where",
    }
)  # fmt: skip
#: Rectifiers fold into the sum or layer before them, which then takes the range of their output.
RECTIFIERS = ("Relu", "Clip")
RECTIFIED = ("Add", "Conv", "Gemm", "MatMul", "Sub")
_FLOAT = ir.DataType.FLOAT
#: Never below 0, so that 1 more is a divisor that amplifies nothing.
_NOT_NEGATIVE = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softplus")


@dataclass(frozen=True)
class Functions:
    """The members of all groups.

    Attributes:
        sources: every member, and the activation that its group is a function of.
        inner: values that only members of their group read.
    """

    sources: dict[ir.Node, ir.Value]
    inner: set[ir.Value]


def find_functions(order: Sequence[ir.Node], alone: Collection[str]) -> Functions:
    """Find the largest groups.

    Args:
        order: candidates, in graph order.
        alone: operators that have an integer form of their own: a group of one of them is none.
    """
    candidates = {node for node in order if _is_candidate(node)}
    read_outside: set[ir.Value] = set()
    while True:
        sources, inner = _members(order, candidates, read_outside)
        outside = {
            value
            for value in inner
            if value.is_graph_output() or any(user not in sources for user in value.consumers())
        }
        booleans = {
            node
            for node in sources
            if node.outputs[0].dtype == ir.DataType.BOOL and node.outputs[0] not in inner
        }
        if not outside and not booleans:
            break
        read_outside |= outside
        candidates -= booleans
    members = {
        node: source
        for node, source in sources.items()
        if node.op_type not in alone or _has_neighbour(node, inner)
    }
    return Functions(members, inner)


def _members(
    order: Sequence[ir.Node], candidates: Collection[ir.Node], read_outside: Collection[ir.Value]
) -> tuple[dict[ir.Node, ir.Value], set[ir.Value]]:
    """Return nodes with their only source, and the values through which that is so."""
    origins: dict[ir.Value, ir.Value] = {}
    sources: dict[ir.Node, ir.Value] = {}
    for node in order:
        if node not in candidates or _folds(node, sources):
            continue
        read = [value for value in node.inputs if value is not None and constant(value) is None]
        found = {origins.get(value, value) for value in read}
        if len(found) != 1:
            continue
        (source,), result = found, node.outputs[0]
        if source.shape is None or source.shape != result.shape or source.dtype != _FLOAT:
            continue
        sources[node] = source
        if result not in read_outside:
            origins[result] = source
    return sources, set(origins)


def _has_neighbour(node: ir.Node, inner: Collection[ir.Value]) -> bool:
    """Whether a member hands a value to another one, or takes one from it."""
    return node.outputs[0] in inner or any(value in inner for value in node.inputs)


def _folds(node: ir.Node, sources: Collection[ir.Node]) -> bool:
    """Whether this is a rectifier that narrows the clamp of the sum or layer before it."""
    if node.op_type not in RECTIFIERS or (value := node.inputs[0]) is None:
        return False
    producer = value.producer()
    if producer is None or producer.op_type not in RECTIFIED or producer in sources:
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_candidate(node: ir.Node) -> bool:
    """Whether the operator is one of them, its constants are numbers, and it is not too steep."""
    if node.op_type not in ELEMENTWISE or node.domain or len(node.outputs) != 1:
        return False
    constants = [array for value in node.inputs if (array := constant(value)) is not None]
    if not all(array.size == 1 and not np.isnan(array).any() for array in constants):
        return False
    if len(constants) == sum(value is not None for value in node.inputs):
        return False
    return _is_smooth(node)


def _is_smooth(node: ir.Node) -> bool:
    """Whether a small error of the input stays small: not so for 1 / x or log x near 0."""
    if node.op_type in ("Log", "Reciprocal", "Sqrt"):
        return _is_at_least_one(node.inputs[0])
    if node.op_type == "Div":
        divisor = _number(node.inputs[1])
        return _is_at_least_one(node.inputs[1]) if divisor is None else divisor != 0
    if node.op_type == "Pow":
        base, exponent = map(_number, node.inputs)
        return base > 0 if base is not None else exponent is not None and exponent >= 1
    return True


def _is_at_least_one(value: ir.Value | None) -> bool:
    """Whether the value is the sum of 1 or more and what is never negative."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Add":
        return False
    for number, other in (producer.inputs, reversed(producer.inputs)):
        least, maker = _number(number), other.producer() if other is not None else None
        if least is not None and least >= 1 and maker is not None:
            return maker.op_type in _NOT_NEGATIVE
    return False


def _number(value: ir.Value | None) -> float | None:
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.item())
