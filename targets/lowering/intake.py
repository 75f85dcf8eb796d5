"""The image that a network starts from is quantized, transposed and padded in one pass.

Where the NHWC input of a convolution comes from planes of two to four channels, and nothing else
reads it, one kernel makes the padded pixels of the planes: `Intake`. The convolution then needs no
border, and has a fourth input channel, with zero weights, where 8-bit pixels have one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import DOMAIN, array_of, dtype_of, shape_of
from edgepress.targets.lowering.floats import sole_user
from edgepress.targets.lowering.node_attributes import (
    float_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.quantization import LIMITS, fixed_point_exponent
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.intake import PIXEL_BYTES, intake
from edgepress.targets.schedules.stage import StageShape

_MOST_CHANNELS = PIXEL_BYTES


def fuse_intakes(model: ir.Model, widen_floats: bool = False) -> ir.Model:
    """Give every convolution that reads an image its padded pixels. Changes the model.

    `widen_floats` tells whether pixels of floats get a fourth channel too.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in ("Conv", "QConv"):
            planes = _planes(node)
            if planes is not None:
                _fuse(node, planes, model.graph, widen_floats)
    return model


def _planes(node: ir.Node) -> ir.Value | None:
    """Return the NCHW image that a convolution reads, if it can be taken in one pass."""
    pixels = operand_of(node.inputs[0])
    swap = pixels.producer()
    if swap is None or swap.domain != DOMAIN or swap.op_type != "Transpose":
        return None
    _, height, width, channels = shape_of(pixels)
    given = (integer_of(swap, "rows"), integer_of(swap, "columns"))
    fits = 2 <= channels <= _MOST_CHANNELS and given == (channels, height * width)
    if not fits or integer_of(node, "group") != 1 or sole_user(pixels) is None:
        return None
    return swap.inputs[0] if dtype_of(pixels) in ("float32", "uint8", "int8") else None


def _fuse(node: ir.Node, planes: ir.Value, graph: ir.Graph, widen_floats: bool) -> None:
    pixels = operand_of(node.inputs[0])
    dtype, (batch, _, _, channels) = dtype_of(pixels), shape_of(pixels)
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    size = [
        (out - 1) * stride + (kernel - 1) * dilation + 1
        for out, stride, kernel, dilation in zip(
            shape_of(node.outputs[0])[1:3],
            *(pair_of(node, name) for name in ("strides", "kernel", "dilations")),
            strict=True,
        )
    ]
    padded = PIXEL_BYTES if widen_floats or dtype != "float32" else channels
    fill = 0 if dtype == "float32" else integer_of(node, "x_zero_point")
    attributes: dict[str, Any] = {"top": top, "left": left, "fill": fill}
    source, replaced = planes, [operand_of(pixels).producer()]
    maker = planes.producer()
    if maker is not None and _is_fused(maker, planes):
        source, attributes = operand_of(maker.inputs[0]), attributes | dict(maker.attributes)
        replaced.append(maker)
    taken = ir.Node(
        DOMAIN,
        "Intake",
        [source],
        ir.convenience.convert_attributes(attributes),
        name=f"{node.name} (input)",
        outputs=[
            ir.Value(name=pixels.name, shape=ir.Shape((batch, *size, padded)), type=pixels.type)
        ],
    )
    graph.insert_before(node, taken)
    node.replace_input_with(0, taken.outputs[0])
    node.attributes.add(ir.AttrInt64s("pads", [0, 0, 0, 0]))
    if padded > channels:
        node.replace_input_with(1, _widened(operand_of(node.inputs[1]), padded, graph))
    graph.remove([old for old in replaced if old is not None], safe=True)


def _is_fused(maker: ir.Node, planes: ir.Value) -> bool:
    """Tell whether the quantization of the planes can be done on the way."""
    if maker.domain != DOMAIN or maker.op_type != "Quantize" or sole_user(planes) is None:
        return False
    # Fixed point has kernels without a float instruction.
    scale, point, dtype = (
        float_of(maker, "scale"),
        integer_of(maker, "zero_point"),
        dtype_of(planes),
    )
    return fixed_point_exponent(scale, point, dtype) is None


def _widened(weights: ir.Value, channels: int, graph: ir.Graph) -> ir.Value:
    """Return weights `[out, channels, kh, kw]` whose further input channels are zero."""
    array = array_of(weights)
    assert array is not None
    more = ((0, 0), (0, channels - array.shape[1]), (0, 0), (0, 0))
    name = f"{weights.name}_pixels"
    tensor = ir.Tensor(np.pad(array, more), name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=weights.type, const_value=tensor)
    graph.register_initializer(value)
    return value


def call_intake(assembly: Assembly, node: ir.Node) -> None:
    """Call the kernel that makes padded pixels of planes."""
    x, y = operand_of(node.inputs[0]), node.outputs[0]
    batch, channels, height, width = shape_of(x)
    _, out_height, out_width, out_channels = shape_of(y)
    border = integer_of(node, "top"), integer_of(node, "left")
    shape = StageShape(batch, height, width, channels, *border, out_height, out_width, out_channels)
    dtypes = (dtype_of(x), dtype_of(y))
    arguments: list[Any] = [shape, assembly.isa, dtypes, integer_of(node, "fill")]
    if dtypes[0] != dtypes[1]:
        low, high = (
            node.attributes.get_int(name, limit)
            for name, limit in zip(("low", "high"), LIMITS[dtypes[1]], strict=True)
        )
        point = integer_of(node, "zero_point")
        arguments += [float_of(node, "scale"), Requantise(dtypes[1], point, low, high)]
    kernel = assembly.kernel("intake", intake, *arguments)
    assembly.call(kernel, [assembly.tensor(x)], assembly.declare(y), node.name or kernel)
