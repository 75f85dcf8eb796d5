"""What the nodes of an integer graph say to kernel generators."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, dtype_of
from edgepress.targets.schedules.epilogue import Clip, Epilogue, Requantise, Shift

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


def epilogue_of(node: ir.Node) -> Epilogue:
    """Return how a node's outputs leave the accumulators."""
    dtype = dtype_of(node.outputs[0])
    if dtype == "float32":
        if "low" not in node.attributes:
            return Clip()
        return Clip(float_of(node, "low"), float_of(node, "high"))
    return requantise_of(node)


def requantise_of(node: ir.Node) -> Requantise:
    """Return how integer outputs leave the accumulators: by multipliers or by shifts."""
    dtype = dtype_of(node.outputs[0])
    point, low, high = (integer_of(node, name) for name in ("zero_point", "low", "high"))
    if "shift" in node.attributes:
        return Shift(dtype, point, low, high)
    factors = array_of(node.inputs[3]) if node.op_type in ("QConv", "QGemm") else None
    if factors is not None and factors.dtype.kind == "i":
        return Shift(dtype, point, low, high, left=bool((factors < 0).any()))
    return Requantise(dtype, point, low, high)


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
