"""A function of one quantized value becomes a node that looks it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import Builder, shape_of
from edgepress.targets.lowering.interpolation import interpolated_table
from edgepress.targets.lowering.quantization import Quantization, Quantized
from edgepress.targets.lowering.tables import entries_of

Array = npt.NDArray[Any]


def emit_function(
    builder: Builder,
    function: Callable[[Array], Array],
    x: Quantized,
    target: Quantization,
    name: str,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    label: str | None = None,
) -> ir.Value:
    """Emit a table of a function of one quantized value: every result, or points between.

    Args:
        builder: of the graph that grows.
        function: of float64 values.
        x: the argument.
        target: of the result.
        name: of the result.
        bounds: what a ReLU or Clip behind the function leaves of its values.
        label: of the node.
    """
    attributes: dict[str, Any] = {}
    if x.quantization.dtype == "int16":
        table = interpolated_table(function, x.quantization, target, bounds)
        entries, attributes = table.entries, {"bits": table.bits, "fraction": table.fraction}
    else:
        entries = entries_of(function, x.quantization, target, bounds)
    operands = [x.value, builder.constant(f"{name}_table", entries)]
    shape = shape_of(x.value)
    return builder.node("Table", operands, attributes, name, target.dtype, shape, label=label)
