"""Activation functions become part of the product in front of them, whose registers compute them.

Exporters write GELU as five to nine operators and SiLU as two. Such a group of operators on one
value, or a single one like Sigmoid, is recognised by what it computes: a constant times the value
times one function of a polynomial of it, in whatever order. Where a Conv, Gemm or DynamicGemm makes
the value for nobody else, the function becomes its attributes `activation` and `parameters`; GELU
elsewhere becomes an `Activation` node, as its kernel is quicker than the operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of
from edgepress.targets.lowering.window import clip_bounds
from edgepress.targets.schedules.activations import Activation

_PRODUCTS = ("Conv", "Gemm", "DynamicGemm")
_ALONE = ("gelu", "gelu_tanh")  # worth a kernel of their own
_TOLERANCE = 1e-6  # of constants that exporters have rounded
_ROOT_HALF = {1: math.sqrt(0.5)}
_TANH_ARGUMENT = {1: math.sqrt(2 / math.pi), 3: 0.044715 * math.sqrt(2 / math.pi)}
_LARGEST_POWER = 3
_DEEPEST = 8  # operators between a value and a polynomial of it

Polynomial = dict[int, float]  # power of the value → coefficient


def fuse_activations(model: ir.Model) -> ir.Model:
    """Fuse every activation function that is recognised. Changes the model and returns it."""
    for node in list(model.graph):
        if node.graph is not model.graph or node.domain != "" or len(node.outputs) != 1:
            continue
        found = _recognised(node)
        if found is not None:
            _replace(found, node, model.graph)
    return model


@dataclass
class _Group:
    """Operators that together are one function of a value.

    Attributes:
        x: the value.
        activation: the function.
        nodes: the operators, the last one included.
    """

    x: ir.Value
    activation: Activation
    nodes: set[ir.Node]


def _replace(group: _Group, last: ir.Node, graph: ir.Graph) -> None:
    old, product = last.outputs[0], group.x.producer()
    attributes = [
        ir.AttrString("activation", group.activation.name),
        ir.AttrFloat32s("parameters", group.activation.parameters),
    ]
    replaced = [node for node in graph if node in group.nodes]
    if product is not None and _takes(product, group):
        op_type, inputs, replaced = product.op_type, list(product.inputs), [product, *replaced]
        kept, name = list(product.attributes.values()), product.name
    elif group.activation.name in _ALONE:
        op_type, inputs, kept, name = "Activation", [group.x], [], last.name
    else:
        return
    new = ir.Node(
        DOMAIN,
        op_type,
        inputs,
        [*kept, *attributes],
        name=name,
        outputs=[ir.Value(name=old.name, shape=old.shape, type=old.type)],
    )
    ir.convenience.replace_nodes_and_values(graph, last, replaced, [new], [old], list(new.outputs))


def _takes(product: ir.Node, group: _Group) -> bool:
    """Tell whether a product has nothing behind it but this function."""
    if product.domain != DOMAIN or product.op_type not in _PRODUCTS:
        return False
    clamped = any(
        math.isfinite(product.attributes.get_float(name, default))
        for name, default in (("low", -math.inf), ("high", math.inf))
    )
    if clamped or "activation" in product.attributes or group.x.is_graph_output():
        return False
    return all(user in group.nodes for user, _ in group.x.uses())


def _recognised(last: ir.Node) -> _Group | None:
    """Return the activation function that a node ends; None where it ends none."""
    output = last.outputs[0]
    if output.dtype != ir.DataType.FLOAT or output.shape is None or not output.shape.is_static():
        return None
    found = _single(last) or _product(last)
    if found is None or array_of(found.x) is not None or shape_of(found.x) != shape_of(output):
        return None
    inner = (value for node in found.nodes if node is not last for value in node.outputs)
    for value in inner:
        if value.is_graph_output() or any(user not in found.nodes for user, _ in value.uses()):
            return None
    return found


def _single(node: ir.Node) -> _Group | None:
    """Recognise an operator that is an activation function by itself."""
    x, get = node.inputs[0] if node.inputs else None, node.attributes.get_float
    if x is None:
        return None
    if node.op_type == "Gelu":
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        activation = Activation("gelu_tanh" if tanh else "gelu")
    elif node.op_type == "HardSigmoid":
        activation = Activation("hard_sigmoid", (get("alpha", 0.2), get("beta", 0.5)))
    elif node.op_type == "LeakyRelu":
        activation = Activation("leaky_relu", (get("alpha", 0.01),))
    elif node.op_type in ("HardSwish", "Sigmoid", "Tanh"):
        names = {"HardSwish": "hard_swish", "Sigmoid": "sigmoid", "Tanh": "tanh"}
        activation = Activation(names[node.op_type])
    else:
        return None
    return _Group(x, activation, {node})


@dataclass
class _Factors:
    """A value as a product: a constant times other values."""

    scale: float = 1.0
    values: list[ir.Value] = field(default_factory=list)
    nodes: set[ir.Node] = field(default_factory=set)


def _product(last: ir.Node) -> _Group | None:
    """Recognise a constant times a value times a function of it."""
    if last.op_type not in ("Mul", "Div"):
        return None
    factors = _Factors()
    _collect(last.outputs[0], last, factors)
    if len(factors.values) != 2:
        return None
    for x, function in (factors.values, factors.values[::-1]):
        nodes = set(factors.nodes)
        activation = _function_of(x, function, factors.scale, nodes)
        if activation is not None:
            return _Group(x, activation, nodes)
    return None


def _collect(value: ir.Value, last: ir.Node, factors: _Factors) -> None:
    """Add a value to the factors: what it is a product of, as long as nothing else reads that."""
    node, number = value.producer(), _number(value)
    if number is not None:
        factors.scale *= number
        return
    own = node is last or (len(list(value.uses())) == 1 and not value.is_graph_output())
    if node is not None and node.domain == "" and own and node.op_type in ("Mul", "Div"):
        first, second = node.inputs
        assert first is not None
        assert second is not None
        divisor = _number(second) if node.op_type == "Div" else None
        if node.op_type == "Mul":
            factors.nodes.add(node)
            _collect(first, last, factors)
            _collect(second, last, factors)
            return
        if divisor:
            factors.nodes.add(node)
            factors.scale /= divisor
            _collect(first, last, factors)
            return
    factors.values.append(value)


def _function_of(
    x: ir.Value, function: ir.Value, scale: float, nodes: set[ir.Node]
) -> Activation | None:
    """Tell what `scale * x * function` is; adds the nodes of the function."""
    node = function.producer()
    if node is None or node.domain != "":
        return None
    nodes.add(node)
    if node.op_type in ("Sigmoid", "HardSigmoid", "Clip"):
        return _gate(x, node, scale, nodes)
    if node.op_type != "Add" or not _close(scale, 0.5):
        return None
    one, rest = _number_and_value(node)
    inner = rest.producer() if rest is not None else None
    if inner is None or inner.domain != "" or one != 1:
        return None
    nodes.add(inner)
    wanted = {"Erf": _ROOT_HALF, "Tanh": _TANH_ARGUMENT}.get(inner.op_type)
    if wanted is None or not _same(_polynomial(inner.inputs[0], x, nodes), wanted):
        return None
    return Activation("gelu" if inner.op_type == "Erf" else "gelu_tanh")


def _gate(x: ir.Value, node: ir.Node, scale: float, nodes: set[ir.Node]) -> Activation | None:
    """Recognise SiLU and HardSwish by their second factor."""
    line = _polynomial(node.inputs[0], x, nodes)
    if line is None or not set(line) <= {0, 1}:
        return None
    if node.op_type == "Sigmoid":
        slope = line.get(1, 0.0)
        fits = _close(scale, 1) and _same(line, {1: slope}) and slope > 0
        return Activation("silu", (slope,)) if fits else None
    if node.op_type == "Clip":
        fits = clip_bounds(node) == (0, 6) and _same(line, {0: 3, 1: 1}) and _close(scale, 1 / 6)
    else:
        alpha, beta = (
            node.attributes.get_float(*given) for given in (("alpha", 0.2), ("beta", 0.5))
        )
        fits = _same(line, {1: 1}) and _close(scale, 1) and _close(alpha, 1 / 6) and beta == 0.5
    return Activation("hard_swish") if fits else None


def _polynomial(
    value: ir.Value | None, x: ir.Value, nodes: set[ir.Node], depth: int = 0
) -> Polynomial | None:
    """Return a value as a polynomial of x; None where it is none. Adds the nodes on the way."""
    if value is x:
        return {1: 1.0}
    number = _number(value)
    if number is not None:
        return {0: number}
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or depth == _DEEPEST:
        return None
    if node.op_type not in ("Add", "Mul", "Div", "Pow"):
        return None
    first, second = (_polynomial(operand, x, nodes, depth + 1) for operand in node.inputs)
    if first is None or second is None:
        return None
    nodes.add(node)
    if node.op_type == "Add":
        return {power: first.get(power, 0) + second.get(power, 0) for power in {*first, *second}}
    if node.op_type == "Mul":
        return _times(first, second)
    if set(second) != {0}:
        return None
    constant = second[0]
    if node.op_type == "Div":
        return {power: a / constant for power, a in first.items()} if constant else None
    result: Polynomial = {0: 1.0}
    if constant not in range(1, _LARGEST_POWER + 1):
        return None
    for _ in range(int(constant)):
        result = _times(result, first)
    return result


def _times(first: Polynomial, second: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for i, a in first.items():
        for j, b in second.items():
            product[i + j] = product.get(i + j, 0.0) + a * b
    return product


def _same(found: Polynomial | None, wanted: Polynomial) -> bool:
    """Tell whether polynomials are equal up to the rounding of constants."""
    if found is None or found.keys() != wanted.keys():
        return False
    return all(_close(found[power], wanted[power]) for power in wanted)


def _close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=_TOLERANCE)


def _number(value: ir.Value | None) -> float | None:
    """Return the float32 number that a constant of one element holds."""
    array = array_of(value)
    if array is None or array.size != 1 or array.dtype != np.float32:
        return None
    return float(array.item())


def _number_and_value(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    """Return a node's constant operand, and the other one."""
    first, second = node.inputs
    number = _number(second)
    return (number, first) if number is not None else (_number(first), second)
