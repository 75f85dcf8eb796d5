"""What kernels of windows and matrix products read: padded inputs, centred biases, constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    operand_of,
    pair_of,
    residual_of,
)
from edgepress.targets.schedules.stage import StageShape, stage

Array = npt.NDArray[Any]


def staged(
    assembly: Assembly, node: ir.Node, channels: int, groups: int, dtype: str, fill: float
) -> tuple[str, int, int]:
    """Pad the input of a window if it needs it; return its name, height and width.

    `channels` per group and `dtype` are what the kernel reads.
    """
    x = operand_of(node.inputs[0])
    batch, height, width, given = shape_of(x)
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    need_height = (out_height - 1) * strides[0] + (kernel[0] - 1) * dilations[0] + 1
    need_width = (out_width - 1) * strides[1] + (kernel[1] - 1) * dilations[1] + 1
    inside = top == left == 0 and need_height <= height and need_width <= width
    if inside and channels * groups == given and dtype == dtype_of(x):
        return assembly.tensor(x), height, width
    shape = StageShape(
        batch, height, width, given // groups, top, left, need_height, need_width, channels, groups
    )
    padded = assembly.scratch(
        f"{node.outputs[0].name}_staged", dtype, (batch, need_height, need_width, channels * groups)
    )
    kernel_name = assembly.kernel("stage", stage, shape, assembly.isa, (dtype_of(x), dtype), fill)
    assembly.call(kernel_name, [assembly.tensor(x)], padded, f"{node.name} (padding)")
    return padded, need_height, need_width


def isa_for(assembly: Assembly, node: ir.Node) -> Isa:
    """Return the instruction set for a node's input and weights."""
    operands = (dtype_of(operand_of(value)) for value in node.inputs[:2])
    return assembly.isa.for_operands(*operands).for_weights(constant_of(node, 1))


def call_window(
    assembly: Assembly, node: ir.Node, kernel: str, x: str, label: str, packed: dict[str, Array]
) -> None:
    """Append a call that reads x, constants named after the node, and a residual if it has one."""
    constants = [assembly.constant(f"{label}.{key}", array) for key, array in packed.items()]
    residual = residual_of(node)
    added = [] if residual is None else [assembly.tensor(residual)]
    assembly.call(kernel, [x, *constants, *added], assembly.declare(node.outputs[0]), label)


def centred_bias(bias: Array, weights: Array, zero_point: int) -> Array:
    """Fold the input's zero point into the bias: the sum of w * (x - z) is one of w * x."""
    sums = weights.reshape(weights.shape[0], -1).sum(axis=1, dtype=np.int64)
    folded = bias.astype(np.int64) - zero_point * sums
    # Wrapping is exact: the final sum fits int32 and addition is modular.
    return np.asarray(folded.astype(np.uint64).astype(np.uint32).view(np.int32))
