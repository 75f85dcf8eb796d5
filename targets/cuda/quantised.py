"""Floats that become integers, where a QuantizeLinear stands alone or an image comes in."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.cuda.kernel import float_literal
from edgepress.targets.lowering.dialect import dtype_of
from edgepress.targets.lowering.node_attributes import integer_of
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.schedules.epilogue import Requantise


def quantised_value(scale: float, epilogue: Requantise, kind: str) -> str:
    """Return C++ of a float `x`, quantized: it divides, as ONNX's QuantizeLinear does."""
    point = epilogue.zero_point
    limits = ", ".join(float_literal(v - point) for v in (epilogue.low, epilogue.high))
    return f"({kind})(quantised(to_float(x), {float_literal(scale)}, {limits}) + ({point}))"


def quantised_output(node: ir.Node) -> Requantise:
    """Return dtype, zero point and limits of a node that quantizes floats."""
    dtype = dtype_of(node.outputs[0])
    low, high = (
        node.attributes.get_int(name, limit)
        for name, limit in zip(("low", "high"), LIMITS[dtype], strict=True)
    )
    return Requantise(dtype, integer_of(node, "zero_point"), low, high)
