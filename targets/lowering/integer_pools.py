"""Integer forms of max pools and averages over windows or all of space."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.integers import Integers, Pending, Rule
from edgepress.targets.lowering.quantization import (
    Quantization,
    Quantized,
    are_powers_of_two,
    multiplier,
    output_attributes,
)
from edgepress.targets.lowering.window import (
    global_window,
    overhangs,
    pool_factors,
    reduces_space,
    window_attributes,
)

_LARGEST_FACTOR = 2.0**20  # saturates every sum but 0
_MOST_RIGHT = 62  # of a product of two int32


def _accepts_pool(state: Integers, node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or not state.has_operand(x) or len(shape_of(x)) != 4:
        return False
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
        return False
    if node.op_type == "ReduceMean" and not reduces_space(node):
        return False
    windowed = node.op_type in ("MaxPool", "AveragePool")
    # A window that hangs over the padded edge (ceil_mode) is left to the float path.
    if windowed and node.attributes.get_int("ceil_mode", 0) != 0 and overhangs(node):
        return False
    return node.op_type == "MaxPool" or _fits(state, node)


def _fits(state: Integers, node: ir.Node) -> bool:
    """Tell whether no int32 sum of a window can overflow."""
    x = state.operand(node.inputs[0])
    assert x is not None
    if node.op_type == "AveragePool":
        taps = math.prod(node.attributes.get_ints("kernel_shape", []))
    else:
        taps = math.prod(shape_of(x.value)[2:])
    low, high = x.reach
    return low * taps >= -(2**31) and high * taps < 2**31


def fixed_point_factors(ratios: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int32], int]:
    """Return int32 m and n with `m / 2**n` next to the ratios: 31 bits of the largest.

    >>> fixed_point_factors(np.array([0.25, 1 / 9]))
    (array([1073741824,  477218588], dtype=int32), 32)
    """
    limited = np.minimum(ratios, _LARGEST_FACTOR)
    places = min(31 - math.frexp(float(limited.max()))[1], _MOST_RIGHT)
    factors = np.rint(limited * 2.0**places)
    if factors.max() >= 2**31:
        places -= 1
        factors = np.rint(limited * 2.0**places)
    return factors.astype(np.int32), places


def _emit_max_pool(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    pooled = state.builder.node(
        "MaxPool",
        [x.value],
        window_attributes(node, node.attributes.get_ints("kernel_shape", [])),
        f"{name}_pooled",
        x.quantization.dtype,
        shape_of(node.outputs[0]),
        label=node.name,
    )
    source = Quantized(pooled, x.quantization)
    return state.rescale(source, target, name, pending.low, pending.high)


def _emit_average(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    shape, given = shape_of(node.outputs[0]), shape_of(x.value)
    if node.op_type == "AveragePool":
        window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
        factors = pool_factors(node, window)
    else:
        window = global_window(given)
        factors = np.full((1, 1), 1.0 / (given[2] * given[3]))
    ratios = factors * (np.float64(x.quantization.scale) / np.float64(target.scale))
    attributes = {
        **window,
        "x_zero_point": x.quantization.zero_point,
        **output_attributes(target, target.clamp(pending.low, pending.high)),
    }
    if are_powers_of_two(x.quantization.scale, target.scale):
        constant, attributes["shift"] = fixed_point_factors(ratios)
    else:
        constant = multiplier(ratios)
    pooled_shape = (*given[:2], *factors.shape)
    pooled = state.builder.node(
        "QAveragePool",
        [x.value, state.builder.constant(f"{name}_factors", constant)],
        attributes,
        name,
        target.dtype,
        pooled_shape,
        label=node.name,
    )
    if pooled_shape == shape:
        return pooled
    wanted = state.builder.constant(f"{name}_shape", np.array(shape, np.int64))
    return state.builder.node(
        "Reshape", [pooled, wanted], {}, f"{name}_squeezed", target.dtype, shape, ""
    )


POOLS: dict[str, Rule] = {
    "MaxPool": Rule(_accepts_pool, _emit_max_pool),
    "AveragePool": Rule(_accepts_pool, _emit_average),
    "GlobalAveragePool": Rule(_accepts_pool, _emit_average),
    "ReduceMean": Rule(_accepts_pool, _emit_average),
}
