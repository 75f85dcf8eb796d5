"""What the nodes of an integer graph say to kernel generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, dtype_of
from edgepress.targets.schedules.activations import Activation
from edgepress.targets.schedules.epilogue import Added, Clip, Epilogue, Requantise, Shift

Array = npt.NDArray[Any]


def integer_of(node: ir.Node, name: str) -> int:
    """Return an integer attribute."""
    return int(node.attributes[name].as_int())


def float_of(node: ir.Node, name: str) -> float:
    """Return a float attribute."""
    return float(node.attributes[name].as_float())


def pair_of(node: ir.Node, name: str) -> tuple[int, int]:
    """Return an attribute of two integers."""
    first, second = node.attributes[name].as_ints()
    return int(first), int(second)


def residual_of(node: ir.Node) -> ir.Value | None:
    """Return the tensor that a product adds to its outputs: the input behind its constants."""
    constants = {"Conv": 3, "Gemm": 3, "QConv": 4, "QGemm": 4}.get(node.op_type)
    if constants is None or len(node.inputs) <= constants:
        return None
    return node.inputs[constants]


def epilogue_of(node: ir.Node) -> Epilogue:
    """Return how a node's outputs leave the accumulators."""
    residual = residual_of(node)
    if residual is not None:
        return _added_of(node, dtype_of(residual))
    if dtype_of(node.outputs[0]) == "float32":
        return clip_of(node)
    return requantise_of(node)


def activation_of(node: ir.Node) -> Activation | None:
    """Return the activation function that a node applies to its own result; see `activations`."""
    if "activation" not in node.attributes:
        return None
    parameters = node.attributes.get_floats("parameters", [])
    return Activation(node.attributes["activation"].as_string(), tuple(map(float, parameters)))


def clip_of(node: ir.Node, prefix: str = "") -> Clip:
    """Return how the float outputs of a node leave, or those of the sum it takes along."""
    activation = None if prefix else activation_of(node)
    if f"{prefix}low" not in node.attributes:
        return Clip(activation=activation)
    bounds = (float_of(node, f"{prefix}low"), float_of(node, f"{prefix}high"))
    return Clip(*bounds, activation=activation)


def _added_of(node: ir.Node, residual: str) -> Added:
    """Return what a product does that carries a residual; see `fusion.fuse_residuals`."""
    dtype = dtype_of(node.outputs[0])
    if dtype == "float32":
        return Added(clip_of(node), clip_of(node, "sum_"))
    sum_point, low, high = (
        integer_of(node, f"sum_{name}") for name in ("zero_point", "low", "high")
    )
    factor: float
    final: Requantise
    if "sum_shift" in node.attributes:
        factor, final = integer_of(node, "sum_shift"), Shift(dtype, sum_point, low, high)
    else:
        factor = float_of(node, "sum_multiplier")
        final = Requantise(dtype, sum_point, low, high, fits=factor < 1)
    own, other, point = (
        integer_of(node, name) for name in ("sum_factor", "residual_factor", "residual_zero_point")
    )
    return Added(
        requantise_of(node, node.attributes["inner_dtype"].as_string()),
        final,
        residual,
        point,
        (own, other),
        factor,
    )


def requantise_of(node: ir.Node, dtype: str | None = None) -> Requantise:
    """Return how integer outputs leave the accumulators: by multipliers or by shifts.

    `dtype` is that of the output, unless given.
    """
    dtype = dtype or dtype_of(node.outputs[0])
    point, low, high = (integer_of(node, name) for name in ("zero_point", "low", "high"))
    if "shift" in node.attributes:
        return Shift(dtype, point, low, high)
    factors = array_of(node.inputs[3]) if node.op_type in ("QConv", "QGemm") else None
    if factors is not None and factors.dtype.kind == "i":
        return Shift(dtype, point, low, high, left=bool((factors < 0).any()))
    largest = node.attributes.get_float("multiplier", np.inf)
    if factors is not None:
        largest = float(np.abs(factors).max(initial=0))
    return Requantise(dtype, point, low, high, fits=largest < 1)


def factor_of(node: ir.Node) -> float:
    """Return a node's single factor: the places to shift by, or a multiplier."""
    return integer_of(node, "shift") if "shift" in node.attributes else float_of(node, "multiplier")


def operand_of(value: ir.Value | None) -> ir.Value:
    """Return an input that must be there."""
    assert value is not None
    return value


def constant_of(node: ir.Node, index: int) -> Array:
    """Return an input that must be constant."""
    array = array_of(node.inputs[index])
    assert array is not None
    return array
