"""What each operator of ONNX computes, in torch, per operator.

A rule reads the attributes, the fixed shapes and the constants of a node once and returns a
function from the node's input tensors to its first output; an input that the node leaves out is
None. Shapes are those of the model: `_torch_graph` maps the function over a batch.

This module imports torch: import it inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgepress.passes._constants import Array, constant
from edgepress.passes._shapes import shape_of

Operator = Callable[..., Tensor]
Rule = Callable[[ir.Node], Operator]

_AVERAGES: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_MAXIMA: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}


class NotInTorch(Exception):
    """This form of an operator has no rule, and why."""


def _pointwise(operator: Operator) -> Rule:
    """Make a rule of a torch function that needs the inputs alone."""
    return lambda _node: operator


def _leaky_relu(node: ir.Node) -> Operator:
    alpha = node.attributes.get_float("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


def _elu(node: ir.Node) -> Operator:
    alpha = node.attributes.get_float("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


def _gelu(node: ir.Node) -> Operator:
    approximate = node.attributes.get_string("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


def _hard_sigmoid(node: ir.Node) -> Operator:
    alpha = node.attributes.get_float("alpha", 0.2)
    beta = node.attributes.get_float("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _clip(node: ir.Node) -> Operator:
    low, high = (_fixed(node, index) for index in (1, 2))
    least = None if low is None else float(low)
    most = None if high is None else float(high)
    if least is None and most is None:
        return lambda x, *_: x
    return lambda x, *_: torch.clamp(x, least, most)


def _sum(_node: ir.Node) -> Operator:
    return lambda *parts: reduce(torch.add, parts)


def _gemm(node: ir.Node) -> Operator:
    """Compute Y = α A B + β C, where A and B may be transposed first."""
    attributes = node.attributes
    flip_a, flip_b = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)

    def operator(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if flip_a else a, b.t() if flip_b else b
        if c is None:
            return alpha * (a @ b)
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)

    return operator


def _conv(node: ir.Node) -> Operator:
    rank = len(shape_of(node.inputs[1])) - 2
    kernel = shape_of(node.inputs[1])[2:]
    strides, dilations = _steps(node, rank)
    pads = _window_pads(node, kernel, strides, dilations)
    groups = node.attributes.get_int("group", 1)
    none = [0] * rank

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = functional.pad(x, pads) if any(pads) else x
        return torch.convolution(x, weight, bias, strides, none, dilations, False, none, groups)

    return operator


def _conv_transpose(node: ir.Node) -> Operator:
    """Spread every input over all that its window reaches, then cut out the part that is asked for.

    Where `output_padding` asks for more, the rest is the bias alone.
    """
    kernel = shape_of(node.inputs[1])[2:]
    rank, attributes = len(kernel), node.attributes
    strides, dilations = _steps(node, rank)
    inner, outer = shape_of(node.inputs[0])[2:], shape_of(node.outputs[0])[2:]
    full = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(
        strides, inner, dilations, kernel, strict=True)]  # fmt: skip
    padding = attributes.get_string("auto_pad", "NOTSET")
    if padding in ("NOTSET", "VALID") and "output_shape" not in attributes:
        begins = list(attributes.get_ints("pads", (0,) * rank)[:rank])
    else:
        more = attributes.get_ints("output_padding", (0,) * rank)
        totals = [max(f + m - n, 0) for f, m, n in zip(full, more, outer, strict=True)]
        begins = [t // 2 if padding == "SAME_UPPER" else t - t // 2 for t in totals]
    ends = [begin + n - f for begin, n, f in zip(begins, outer, full, strict=True)]
    window = _last_axis_first([-begin for begin in begins], ends)
    groups = attributes.get_int("group", 1)
    none = [0] * rank

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.convolution(x, weight, None, strides, none, dilations, True, none, groups)
        y = functional.pad(y, window) if any(window) else y
        return y if bias is None else y + bias.reshape(-1, *([1] * rank))

    return operator


def _max_pool(node: ir.Node) -> Operator:
    kernel = node.attributes["kernel_shape"].as_ints()
    strides, dilations = _steps(node, len(kernel))
    pads = _window_pads(node, kernel, strides, dilations)
    pool = _MAXIMA[len(kernel)]

    def operator(x: Tensor) -> Tensor:
        x = functional.pad(x, pads, value=-math.inf) if any(pads) else x
        return pool(x, list(kernel), list(strides), 0, list(dilations))

    return operator


def _average_pool(node: ir.Node) -> Operator:
    """Average over a window with zeros around the input, then mend what it was divided by."""
    kernel = node.attributes["kernel_shape"].as_ints()
    strides, dilations = _steps(node, len(kernel))
    if set(dilations) != {1}:
        raise NotInTorch("its windows are dilated")
    pads = _window_pads(node, kernel, strides, dilations)
    pool, ratios = _AVERAGES[len(kernel)], _ratios(node, kernel, strides, pads)
    if np.all(ratios == 1):
        return lambda x: pool(functional.pad(x, pads) if any(pads) else x, kernel, strides)
    mend = torch.from_numpy(ratios)
    return lambda x: pool(functional.pad(x, pads), kernel, strides) * mend.to(x.dtype)


def _ratios(
    node: ir.Node, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]
) -> Array:
    """Return the size of a window over the count of positions that it averages.

    Returns:
        `[*spatial axes of the output]` float64. Pads that are asked for count with
        `count_include_pad`; what `ceil_mode` reaches beyond them never does.
    """
    x, y = shape_of(node.inputs[0])[2:], shape_of(node.outputs[0])[2:]
    counts = []
    for axis, (k, stride, n, extent) in enumerate(zip(kernel, strides, y, x, strict=True)):
        begin, end = pads[2 * (len(kernel) - 1 - axis) :][:2]
        low, high = 0, extent
        if node.attributes.get_int("count_include_pad", 0):
            asked = node.attributes.get_ints("pads", ())
            low = -begin
            high = extent + (asked[len(kernel) + axis] if asked else max(end, 0))
        read = np.arange(n)[:, None] * stride - begin + np.arange(k)
        counts.append(((read >= low) & (read < high)).sum(axis=1))
    count = np.maximum(reduce(np.multiply.outer, counts), 1)
    return np.asarray(math.prod(kernel) / count, np.float64)


def _steps(node: ir.Node, rank: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return strides and dilations."""
    ones = (1,) * rank
    return node.attributes.get_ints("strides", ones), node.attributes.get_ints("dilations", ones)


def _window_pads(
    node: ir.Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Return pads, as torch orders them, by which windows over the input give just the output.

    They follow from the shapes, so that auto_pad and ceil_mode need no cases of their own; a
    negative one at the end cuts off what no window reaches.
    """
    x, y = shape_of(node.inputs[0])[2:], shape_of(node.outputs[0])[2:]
    over = [s * (n - 1) + d * (k - 1) + 1 - extent for s, n, d, k, extent in zip(
        strides, y, dilations, kernel, x, strict=True)]  # fmt: skip
    match node.attributes.get_string("auto_pad", "NOTSET"):
        case "SAME_UPPER":
            begins = [max(total, 0) // 2 for total in over]
        case "SAME_LOWER":
            begins = [(max(total, 0) + 1) // 2 for total in over]
        case _:
            begins = list(node.attributes.get_ints("pads", (0,) * len(kernel))[: len(kernel)])
    return _last_axis_first(begins, [t - begin for t, begin in zip(over, begins, strict=True)])


def _last_axis_first(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Order pads as torch does: begin and end of the last axis, then of the axis before.

    >>> _last_axis_first([1, 2], [3, 4])
    [2, 4, 1, 3]
    """
    return [pad for pair in zip(begins[::-1], ends[::-1], strict=True) for pad in pair]


def _pad(node: ir.Node) -> Operator:
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant":
        raise NotInTorch(f"it pads with mode {mode!r}")
    asked, number, chosen = (_fixed(node, index) for index in (1, 2, 3))
    if asked is None:
        raise NotInTorch("it has no pads")
    rank = len(shape_of(node.inputs[0]))
    axes = range(rank) if chosen is None else [int(axis) % rank for axis in chosen]
    begins, ends = [0] * rank, [0] * rank
    for axis, begin, end in zip(axes, *asked.reshape(2, -1).tolist(), strict=True):
        begins[axis], ends[axis] = begin, end
    pads, value = _last_axis_first(begins, ends), 0.0 if number is None else float(number)
    return lambda x, *_: functional.pad(x, pads, value=value)


def _reshape(node: ir.Node) -> Operator:
    """Reshape, Flatten, Squeeze and Unsqueeze differ only in how they name the shape."""
    shape = shape_of(node.outputs[0])
    return lambda x, *_: x.reshape(shape)


def _expand(node: ir.Node) -> Operator:
    shape = shape_of(node.outputs[0])
    return lambda x, *_: x.expand(shape)


def _transpose(node: ir.Node) -> Operator:
    reverse = range(len(shape_of(node.inputs[0])))[::-1]
    order = list(node.attributes.get_ints("perm", tuple(reverse)))
    return lambda x: x.permute(order)


def _concat(node: ir.Node) -> Operator:
    axis = node.attributes["axis"].as_int()
    return lambda *parts: torch.cat(parts, axis)


def _softmax(function: Callable[..., Tensor]) -> Rule:
    def rule(node: ir.Node) -> Operator:
        axis = node.attributes.get_int("axis", -1)
        return lambda x: function(x, axis)

    return rule


def _reduce_mean(node: ir.Node) -> Operator:
    array, attributes = _fixed(node, 1), node.attributes
    axes = list(attributes.get_ints("axes", ()) if array is None else array.tolist())
    if not axes and attributes.get_int("noop_with_empty_axes", 0) != 0:
        return lambda x, *_: x
    axes = axes or list(range(len(shape_of(node.inputs[0]))))
    keep = attributes.get_int("keepdims", 1)
    return lambda x, *_: x.mean(axes, keepdim=keep != 0)


def _global_average(node: ir.Node) -> Operator:
    axes = list(range(2, len(shape_of(node.inputs[0]))))
    return lambda x: x.mean(axes, keepdim=True)


def _layer_norm(node: ir.Node) -> Operator:
    shape = shape_of(node.inputs[0])
    inner = shape[node.attributes.get_int("axis", -1) % len(shape) :]
    epsilon = node.attributes.get_float("epsilon", 1e-5)

    def operator(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        y = functional.layer_norm(x, inner, eps=epsilon) * scale
        return y if bias is None else y + bias

    return operator


def _batch_norm(node: ir.Node) -> Operator:
    """At inference it is a constant scale and shift per channel."""
    if node.attributes.get_int("training_mode", 0):
        raise NotInTorch("it takes its statistics from the batch; export the model for inference")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    ones = [1] * (len(shape_of(node.inputs[0])) - 2)

    def operator(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        factor = scale / torch.sqrt(variance + epsilon)
        shift = bias - mean * factor
        return x * factor.reshape(-1, *ones) + shift.reshape(-1, *ones)

    return operator


def _dropout(node: ir.Node) -> Operator:
    training = _fixed(node, 2)
    if training is not None and training.any():
        raise NotInTorch("it drops values; export the model for inference")
    return lambda x, *_: x


def _fixed(node: ir.Node, index: int) -> Array | None:
    """Return the array of a constant input, or None where the node leaves it out.

    Raises NotInTorch where the input is computed.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    array = constant(value)
    if array is None:
        raise NotInTorch(f"its input {value.name!r} is not constant")
    return array


#: Rules by operator of ONNX's own domain, in the forms of opset 13 and newer.
OPERATORS: dict[str, Rule] = {
    "Add": _pointwise(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _pointwise(torch.div),
    "Dropout": _dropout,
    "Elu": _elu,
    "Erf": _pointwise(torch.erf),
    "Expand": _expand,
    "Flatten": _reshape,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _pointwise(functional.hardswish),
    "Identity": _pointwise(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _pointwise(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _pointwise(torch.mul),
    "PRelu": _pointwise(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _pointwise(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _pointwise(torch.sigmoid),
    "Softmax": _softmax(torch.softmax),
    "Squeeze": _reshape,
    "Sub": _pointwise(torch.sub),
    "Sum": _sum,
    "Tanh": _pointwise(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
