"""Layers of sliding windows, random operands for them, and what NumPy says they answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.strip_operands import Operands
from edgepress.targets.cuda.window import Window
from edgepress.targets.lowering.operands import centred_bias
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.schedules.epilogue import Added, Clip, Epilogue, Requantise
from tests.cuda.emulation import emulate
from tests.targets.kernels import eight_bit, finished, fitting_factors, largest_weight

TOLERANCES = {"float32": 1e-5, "float16": 2e-3}  # of the largest value
RELU6 = Clip(0.0, 6.0)


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments and what it must write after them."""

    kernel: CudaKernel
    arguments: tuple[Array, ...]
    wanted: Array
    what: str


def layer(
    size: tuple[int, int],
    channels: int,
    out_channels: int,
    kernel: tuple[int, int] = (1, 1),
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    batch: int = 1,
) -> Window:
    """A layer whose pads are given as ONNX does: top, left, bottom, right."""
    out = [
        (n + before + after - (k - 1) * d - 1) // s + 1
        for n, before, after, k, d, s in zip(
            size, pads[:2], pads[2:], kernel, dilations, strides, strict=True
        )
    ]
    assert min(out) > 0
    return Window(
        batch, *size, channels, out[0], out[1], out_channels, kernel, strides, dilations, pads[:2]
    )


@dataclass(frozen=True)
class Values:
    """Operands of a layer, and its outputs.

    Attributes:
        x: NHWC.
        weights: `[out, in / groups, kh, kw]`.
        bias: as given, without the zero point.
        centred: bias with the zero point folded in.
        factors: multipliers or shifts.
        residual: what is added, NHWC.
        y: outputs, NHWC.
    """

    x: Array
    weights: Array
    bias: Array
    centred: Array
    factors: Array
    residual: Array
    y: Array


def values_of(
    window: Window, groups: int, operands: Operands, epilogue: Epilogue, seed: int
) -> Values:
    """Return random operands and the outputs by NumPy."""
    random = np.random.default_rng(seed)
    first = epilogue.inner if isinstance(epilogue, Added) else epilogue
    x_shape = (window.batch, window.height, window.width, window.channels)
    w_shape = (window.out_channels, window.channels // groups, *window.kernel)
    y_shape = (window.batch, window.out_height, window.out_width, window.out_channels)
    factors: Array = np.zeros(0, np.float32)
    if isinstance(first, Requantise):
        x = eight_bit(random, x_shape, operands.x)
        largest = largest_weight(operands.x, operands.weights, math.prod(w_shape[1:]))
        weights = random.integers(-largest, largest + 1, w_shape).astype(operands.weights)
        bias = random.integers(-5000, 5000, window.out_channels).astype(np.int32)
    else:
        x = random.standard_normal(x_shape).astype(operands.x)
        weights = random.standard_normal(w_shape).astype(operands.weights).astype(np.float32)
        bias = random.standard_normal(window.out_channels).astype(np.float32)
    residual: Array = np.zeros(0, np.float32)
    if isinstance(epilogue, Added):
        dtype = operands.residual
        residual = (
            random.standard_normal(y_shape).astype(dtype)
            if dtype.startswith("float")
            else eight_bit(random, y_shape, dtype)
        )
    total = sums(x.astype(np.float64) - operands.zero_point, weights, window, groups) + bias
    if operands.quantized:
        assert isinstance(first, Requantise)
        total = np.rint(total).astype(np.int64)
        factors = fitting_factors(random, total, first)
    y = finished(total, factors, epilogue, residual).astype(operands.y)
    centred = centred_bias(bias, weights, operands.centred_at) if operands.quantized else bias
    return Values(x, weights, bias, centred, factors, residual, y)


def sums(x: Array, weights: Array, window: Window, groups: int) -> Array:
    """Sums of a grouped convolution in float64, of x less its zero point, without the bias."""
    (top, left), (kernel_height, kernel_width) = window.pads, window.kernel
    needed = [
        (out - 1) * stride + (taps - 1) * dilation + 1
        for out, stride, taps, dilation in zip(
            (window.out_height, window.out_width),
            window.strides,
            window.kernel,
            window.dilations,
            strict=True,
        )
    ]
    room = np.zeros(
        (
            window.batch,
            max(needed[0], top + window.height),
            max(needed[1], left + window.width),
            window.channels,
        )
    )
    room[:, top : top + window.height, left : left + window.width] = x
    per_in, per_out = window.channels // groups, window.out_channels // groups
    outputs = (window.batch, window.out_height, window.out_width)
    total = np.zeros((*outputs, groups, per_out))
    ordered = weights.reshape(groups, per_out, per_in, kernel_height, kernel_width)
    for row, column in np.ndindex(kernel_height, kernel_width):
        rows = row * window.dilations[0] + np.arange(window.out_height) * window.strides[0]
        columns = column * window.dilations[1] + np.arange(window.out_width) * window.strides[1]
        seen = room[:, rows][:, :, columns].reshape(*outputs, groups, per_in)
        taps = ordered[..., row, column].astype(np.float64)
        total += np.einsum("nhwgi,goi->nhwgo", seen, taps)
    return total.reshape(*outputs, window.out_channels)


def check(cases: Sequence[Case]) -> None:
    """Run kernels, all in one program, and compare."""
    program, feeds = Program(), dict[str, Array]()
    for index, case in enumerate(cases):
        names = [f"{index}_{number}" for number in range(len(case.arguments))]
        output = f"{index}_out"
        first = case.arguments[0]
        program.tensors[names[0]] = Tensor(names[0], str(first.dtype), first.shape)
        program.tensors[output] = Tensor(output, str(case.wanted.dtype), case.wanted.shape)
        program.constants.update(zip(names[1:], case.arguments[1:], strict=True))
        program.kernels[case.kernel.name] = case.kernel
        arguments = (*names, output)
        program.calls.append(Call(case.kernel.name, arguments, (output,), case.what))
        feeds[names[0]] = first
    program.inputs = tuple(feeds)
    program.outputs = tuple(f"{index}_out" for index in range(len(cases)))
    answers = emulate(program, feeds)
    for index, case in enumerate(cases):
        answer, wanted = answers[f"{index}_out"], case.wanted
        if wanted.dtype.kind == "f":
            limit = TOLERANCES[str(wanted.dtype)] * max(1.0, float(np.abs(wanted).max(initial=0)))
            np.testing.assert_allclose(answer, wanted, 0, limit, err_msg=case.what)
        else:
            np.testing.assert_array_equal(answer, wanted, case.what)
