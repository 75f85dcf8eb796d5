"""Brings an image to where a convolution reads it: planes become padded pixels in one pass."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.epilogue import HEADERS
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, float_literal
from edgepress.targets.cuda.launch import blocks_for, flat_kernel
from edgepress.targets.cuda.quantised import quantised_output, quantised_value
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import float_of, integer_of, operand_of
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.stage import StageShape

_HEADERS = (*HEADERS, "vectors.cuh", "elementwise.cuh", "intake.cuh")


def intake(
    name: str,
    shape: StageShape,
    dtypes: tuple[str, str],
    fill: float,
    scale: float | None,
    epilogue: Requantise | None,
    processors: int,
) -> CudaKernel:
    """Generate the kernel: arguments x `[batch, channels, height, width]` and y, padded NHWC.

    Args:
        name: of the kernel.
        shape: of the image and of the padded one.
        dtypes: of x and y in memory.
        fill: the value of the border and of channels beyond the real ones.
        scale: where floats are quantized, what they are divided by.
        epilogue: and how the quotients become integers.
        processors: multiprocessors of the GPU.
    """
    given, made = (C_TYPES[dtype] for dtype in dtypes)
    value, border = f"Converted<{made}, {given}>::of(x)", f"({made})({int(fill)})"
    if epilogue is not None and scale is not None:
        value = quantised_value(scale, epilogue, made)
    elif dtypes[1] in ("float16", "float32"):
        border = f"from_float<{made}>({float_literal(fill)})"
    sizes = (shape.batch, shape.channels, shape.height, shape.width, shape.top, shape.left)
    padded = (shape.out_height, shape.out_width, shape.out_channels)
    function = f"[]({given} x) -> {made} {{ return {value}; }}"
    return flat_kernel(
        name,
        [(dtypes[0], "x"), (dtypes[1], "y")],
        f"intake<{', '.join(map(str, sizes + padded))}>(x, y, {border}, {function});",
        _HEADERS,
        blocks_for(shape.batch * shape.out_height * shape.out_width, processors),
    )


def call_intake(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel that makes padded pixels of planes."""
    x, y = operand_of(node.inputs[0]), node.outputs[0]
    batch, channels, height, width = shape_of(x)
    _, out_height, out_width, out_channels = shape_of(y)
    border = integer_of(node, "top"), integer_of(node, "left")
    shape = StageShape(batch, height, width, channels, *border, out_height, out_width, out_channels)
    output = assembly.declare(y)
    dtypes = (assembly.storage(x), assembly.storage(y))
    scale = epilogue = None
    if dtype_of(x) != dtype_of(y):
        scale, epilogue = float_of(node, "scale"), quantised_output(node)
    arguments = (shape, dtypes, integer_of(node, "fill"), scale, epilogue)
    kernel = assembly.kernel("intake", intake, *arguments, assembly.multiprocessors)
    assembly.call(kernel, [assembly.tensor(x)], output, node.name or kernel)
