"""How a gradient flows back through one node, per operator.

A rule gets the tape, the node and the gradient of its first output (for Split, of each output),
appends what computes the gradients of its inputs and returns these. Inputs that it leaves out at
the end have no gradient that is known. `dx` and `dy` stand for the gradients of `x` and `y`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepress.passes import _gradient_axes as axes
from edgepress.passes import _gradient_windows as windows
from edgepress.passes._gradient_tape import NoGradient, Tape, fixed, given
from edgepress.passes._shapes import shape_of

Rule = Callable[..., Sequence[ir.Value | None]]


def _pointwise(function: Callable[[Tape, ir.Node, ir.Value, ir.Value, ir.Value], ir.Value]) -> Rule:
    """Make a rule of a function of tape, node, x, y and dy, where y depends on x elementwise."""

    def rule(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
        return [function(t, node, given(node.inputs[0]), node.outputs[0], dy)]

    return rule


def _leaky(t: Tape, node: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    alpha = node.attributes.get_float("alpha", 0.01)
    return t.op("Where", t.op("Less", x, 0.0), t.op("Mul", dy, alpha), dy)


def _elu(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    slope = t.op("Add", y, node.attributes.get_float("alpha", 1.0))
    return t.op("Where", t.op("Less", x, 0.0), t.op("Mul", dy, slope), dy)


def _selu(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    # y is γ α (exp(x) - 1) below 0, and γ x above
    alpha = node.attributes.get_float("alpha", 1.67326319217681884765625)
    gamma = node.attributes.get_float("gamma", 1.05070102214813232421875)
    slope = t.op("Where", t.op("Less", x, 0.0), t.op("Add", y, alpha * gamma), gamma)
    return t.op("Mul", dy, slope)


def _prelu(t: Tape, node: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    return t.op("Where", t.op("Less", x, 0.0), t.op("Mul", dy, node.inputs[1]), dy)


def _clip(t: Tape, _: ir.Node, x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    return t.op("Where", t.op("Equal", x, y), dy, 0.0)


def _sigmoid(t: Tape, _: ir.Node, _x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    return t.op("Mul", dy, t.op("Mul", y, t.op("Sub", 1.0, y)))


def _hard_sigmoid(t: Tape, node: ir.Node, _x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    # where it is flat, y is 0 or 1 and y (1 - y) vanishes
    slope = t.op("Sign", t.op("Mul", y, t.op("Sub", 1.0, y)))
    return t.op("Mul", t.op("Mul", dy, slope), node.attributes.get_float("alpha", 0.2))


def _hard_swish(t: Tape, _: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    # y is x (x + 3) / 6 between -3 and 3, then 0 or x
    slope = t.op("Add", t.op("Div", x, 3.0), 0.5)
    inside = t.op("Less", t.op("Abs", x), 3.0)
    return t.op("Mul", dy, t.op("Where", inside, slope, t.op("Relu", t.op("Sign", x))))


def _swish(t: Tape, node: ir.Node, x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    # y is x s with s = sigmoid(α x), and s' is α s (1 - s)
    alpha = node.attributes.get_float("alpha", 1.0)
    s = t.op("Sigmoid", t.op("Mul", x, alpha))
    rest = t.op("Mul", t.op("Mul", y, alpha), t.op("Sub", 1.0, s))
    return t.op("Mul", dy, t.op("Add", s, rest))


def _mish(t: Tape, _: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    # y is x f with f = tanh(softplus(x)), and f' is (1 - f²) sigmoid(x)
    f = t.op("Tanh", t.op("Softplus", x))
    slope = t.op("Mul", t.op("Sub", 1.0, t.op("Mul", f, f)), t.op("Sigmoid", x))
    return t.op("Mul", dy, t.op("Add", f, t.op("Mul", x, slope)))


def _tanh(t: Tape, _: ir.Node, _x: ir.Value, y: ir.Value, dy: ir.Value) -> ir.Value:
    return t.op("Mul", dy, t.op("Sub", 1.0, t.op("Mul", y, y)))


def _erf(t: Tape, _: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    bell = t.op("Exp", t.op("Neg", t.op("Mul", x, x)))
    return t.op("Mul", dy, t.op("Mul", bell, 2 / math.sqrt(math.pi)))


def _gelu(t: Tape, node: ir.Node, x: ir.Value, _y: ir.Value, dy: ir.Value) -> ir.Value:
    # y is x (1 + f(x)) / 2 with f(x) = erf(x / √2), or approximately tanh(u(x))
    square = t.op("Mul", x, x)
    if node.attributes.get_string("approximate", "none") == "tanh":
        root, cubic = math.sqrt(2 / math.pi), 0.044715
        u = t.op("Mul", t.op("Mul", x, root), t.op("Add", t.op("Mul", square, cubic), 1.0))
        f = t.op("Tanh", u)
        du = t.op("Mul", t.op("Add", t.op("Mul", square, 3 * cubic), 1.0), root)
        df = t.op("Mul", du, t.op("Sub", 1.0, t.op("Mul", f, f)))
    else:
        f = t.op("Erf", t.op("Mul", x, math.sqrt(0.5)))
        df = t.op("Mul", t.op("Exp", t.op("Mul", square, -0.5)), math.sqrt(2 / math.pi))
    twice = t.op("Add", t.op("Add", f, t.op("Mul", x, df)), 1.0)
    return t.op("Mul", t.op("Mul", dy, twice), 0.5)


def _pow(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """For y = x^p, the slope is p x^(p-1), and 0 for p = 0, even where x is 0."""
    x, power = given(node.inputs[0]), given(fixed(node, 1)).astype(np.float64)
    slope = t.op("Mul", t.op("Pow", x, np.where(power == 0, 0, power - 1)), power)
    return [t.unbroadcast(t.op("Mul", dy, slope), shape_of(node.outputs[0]), shape_of(x))]


def _add(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    return _unbroadcast(t, node, [dy] * len(node.inputs))


def _mean(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    return _add(t, node, t.op("Div", dy, len(node.inputs)))


def _sub(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    return _unbroadcast(t, node, [dy, t.op("Neg", dy)])


def _mul(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    a, b = node.inputs
    return _unbroadcast(t, node, [t.op("Mul", dy, b), t.op("Mul", dy, a)])


def _div(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    da = t.op("Div", dy, node.inputs[1])
    return _unbroadcast(t, node, [da, t.op("Neg", t.op("Mul", da, node.outputs[0]))])


def _extreme(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Max and Min hand the gradient to the input that they chose; several equal ones share it."""
    y = node.outputs[0]
    to = given(y.dtype).value
    chosen = [t.op("Cast", t.op("Equal", value, y), to=to) for value in node.inputs]
    share = t.op("Div", dy, t.op("Sum", *chosen))
    return _unbroadcast(t, node, [t.op("Mul", here, share) for here in chosen])


def _where(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value | None]:
    here = node.inputs[0]
    return [
        None,
        *_unbroadcast(t, node, [t.op("Where", here, dy, 0.0), t.op("Where", here, 0.0, dy)]),
    ]


def _unbroadcast(t: Tape, node: ir.Node, gradients: Sequence[ir.Value]) -> list[ir.Value]:
    """Bring gradients in the output's shape to the shapes of the last inputs."""
    shape = shape_of(node.outputs[0])
    pairs = zip(gradients, node.inputs[-len(gradients) :], strict=True)
    return [t.unbroadcast(gradient, shape, shape_of(value)) for gradient, value in pairs]


def _matmul(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Y = A B gives dA = dY Bᵀ and dB = Aᵀ dY, summed over matrices that were repeated."""
    a, b = map(given, node.inputs)
    # a vector is a matrix of one row on the left, of one column on the right
    left = shape_of(a) if len(shape_of(a)) > 1 else (1, *shape_of(a))
    right = shape_of(b) if len(shape_of(b)) > 1 else (*shape_of(b), 1)
    batch = np.broadcast_shapes(left[:-2], right[:-2])
    full = t.reshape(dy, (*batch, left[-2], right[-1]))
    da = t.op("MatMul", full, _flipped(t, t.reshape(b, right), len(right)))
    db = t.op("MatMul", _flipped(t, t.reshape(a, left), len(left)), full)
    da = t.unbroadcast(da, (*batch, *left[-2:]), left)
    db = t.unbroadcast(db, (*batch, *right[-2:]), right)
    return [t.reshape(da, shape_of(a)), t.reshape(db, shape_of(b))]


def _flipped(t: Tape, matrices: ir.Value, rank: int) -> ir.Value:
    return t.op("Transpose", matrices, perm=[*range(rank - 2), rank - 1, rank - 2])


def _gemm(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Y = α A B + β C is as MatMul, where A and B may be transposed first."""
    (a, b, *biases), attributes = node.inputs, node.attributes
    flip_a, flip_b = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    if flip_a:
        da = t.op("Gemm", b, dy, alpha=alpha, transA=flip_b, transB=1)
    else:
        da = t.op("Gemm", dy, b, alpha=alpha, transB=1 - flip_b)
    if flip_b:
        db = t.op("Gemm", dy, a, alpha=alpha, transA=1, transB=flip_a)
    else:
        db = t.op("Gemm", a, dy, alpha=alpha, transA=1 - flip_a)
    shape, dc = shape_of(node.outputs[0]), t.op("Mul", dy, beta)
    return [da, db, *(t.unbroadcast(dc, shape, shape_of(c)) for c in biases if c is not None)]


def _softmax(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Return dx = y (dy - Σ y dy), the sum along the axis."""
    y, axis = node.outputs[0], node.attributes.get_int("axis", -1)
    return [t.op("Mul", y, t.op("Sub", dy, t.total(t.op("Mul", y, dy), [axis])))]


def _log_softmax(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Return dx = dy - exp(y) Σ dy, the sum along the axis."""
    y, axis = node.outputs[0], node.attributes.get_int("axis", -1)
    return [t.op("Sub", dy, t.op("Mul", t.op("Exp", y), t.total(dy, [axis])))]


def _layer_norm(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    rank = len(shape_of(node.inputs[0]))
    inner = range(node.attributes.get_int("axis", -1) % rank, rank)
    centre = node.op_type == "LayerNormalization"
    return [_normalized(t, node, t.op("Mul", dy, node.inputs[1]), inner, centre=centre)]


def _instance_norm(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    inner = range(2, len(shape_of(node.inputs[0])))
    scale = t.reshape(given(node.inputs[1]), [-1, *(1 for _ in inner)])
    return [_normalized(t, node, t.op("Mul", dy, scale), inner, centre=True)]


def _normalized(t: Tape, node: ir.Node, dz: ir.Value, inner: range, *, centre: bool) -> ir.Value:
    """Return dx = (dz - mean(dz) - z mean(z dz)) / σ for z = (x - μ) / σ.

    The mean μ and the deviation σ are over the inner axes and depend on x, too (Ioffe and Szegedy,
    2015, section 3). Without centring, μ is 0 and mean(dz) left out.
    """
    x = given(node.inputs[0])
    part = 1 / math.prod(shape_of(x)[axis] for axis in inner)

    def mean(value: ir.Value) -> ir.Value:
        return t.op("Mul", t.total(value, inner), part)

    if centre:
        x, dz = t.op("Sub", x, mean(x)), t.op("Sub", dz, mean(dz))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    sigma = t.op("Sqrt", t.op("Add", mean(t.op("Mul", x, x)), epsilon))
    z = t.op("Div", x, sigma)
    return t.op("Div", t.op("Sub", dz, t.op("Mul", z, mean(t.op("Mul", z, dz)))), sigma)


def _batch_norm(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """At inference it is a constant scale per channel."""
    if node.attributes.get_int("training_mode", 0):
        raise NoGradient("it trains")
    x, scale, _, _, variance = map(given, node.inputs)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    factor = t.op("Div", scale, t.op("Sqrt", t.op("Add", variance, epsilon)))
    return [t.op("Mul", dy, t.reshape(factor, [-1] + [1] * (len(shape_of(x)) - 2)))]


def _dropout(_: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """At inference it does nothing."""
    training = fixed(node, 2)
    if training is not None and training.any():
        raise NoGradient("it trains")
    return [dy]


def _cast(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    return [t.op("Cast", dy, to=given(given(node.inputs[0]).dtype).value)]


#: Rules by operator of ONNX's own domain.
GRADIENTS: dict[str, Rule] = {
    "Abs": _pointwise(lambda t, _, x, _y, dy: t.op("Mul", dy, t.op("Sign", x))),
    "Add": _add,
    "AveragePool": windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _pointwise(_clip),
    "Concat": axes.concat,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "DepthToSpace": axes.depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _pointwise(_elu),
    "Erf": _pointwise(_erf),
    "Exp": _pointwise(lambda t, _, _x, y, dy: t.op("Mul", dy, y)),
    "Expand": axes.expand,
    "Flatten": axes.reshape,
    "Gather": axes.moved,
    "Gelu": _pointwise(_gelu),
    "Gemm": _gemm,
    "GlobalAveragePool": axes.reduce_mean,
    "GlobalMaxPool": axes.reduce_extreme,
    "HardSigmoid": _pointwise(_hard_sigmoid),
    "HardSwish": _pointwise(_hard_swish),
    "Identity": lambda _, _node, dy: [dy],
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _pointwise(_leaky),
    "Log": _pointwise(lambda t, _, x, _y, dy: t.op("Div", dy, x)),
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _extreme,
    "MaxPool": windows.max_pool,
    "Mean": _mean,
    "Min": _extreme,
    "Mish": _pointwise(_mish),
    "Mul": _mul,
    "Neg": _pointwise(lambda t, _, _x, _y, dy: t.op("Neg", dy)),
    "PRelu": _pointwise(_prelu),
    "Pad": axes.pad,
    "Pow": _pow,
    "Reciprocal": _pointwise(
        lambda t, _, _x, y, dy: t.op("Neg", t.op("Mul", dy, t.op("Mul", y, y)))
    ),
    "ReduceL2": axes.reduce_l2,
    "ReduceMax": axes.reduce_extreme,
    "ReduceMean": axes.reduce_mean,
    "ReduceMin": axes.reduce_extreme,
    "ReduceSum": axes.reduce_sum,
    "RMSNormalization": _layer_norm,
    "Relu": _pointwise(lambda t, _, _x, y, dy: t.op("Mul", dy, t.op("Sign", y))),
    "Reshape": axes.reshape,
    "Resize": axes.resize,
    "Selu": _pointwise(_selu),
    "Sigmoid": _pointwise(_sigmoid),
    "Slice": axes.moved,
    "Softmax": _softmax,
    "Softplus": _pointwise(lambda t, _, x, _y, dy: t.op("Mul", dy, t.op("Sigmoid", x))),
    "SpaceToDepth": axes.space_to_depth,
    "Split": axes.split,
    "Sqrt": _pointwise(lambda t, _, _x, y, dy: t.op("Mul", t.op("Div", dy, y), 0.5)),
    "Squeeze": axes.reshape,
    "Sub": _sub,
    "Sum": _add,
    "Swish": _pointwise(_swish),
    "Tanh": _pointwise(_tanh),
    "Tile": axes.moved,
    "Transpose": axes.transpose,
    "Unsqueeze": axes.reshape,
    "Where": _where,
}
