"""Resizes of images, on channels-last tensors."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.launch import (
    blocks_for,
    common_lanes,
    flat_kernel,
    lanes_of,
    spread_lanes,
)
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import constant_of, operand_of
from edgepress.targets.schedules.resize import ResizeShape

_HEADERS = ("types.cuh", "vectors.cuh", "resize.cuh")


def resize(name: str, shape: ResizeShape, dtypes: tuple[str, str], processors: int) -> CudaKernel:
    """Generate the kernel.

    Arguments of the kernel: x, rows `[out_height, taps]` and columns `[out_width, taps]` int32,
    which are offsets in elements, where there is more than one tap the weights of both, float32 of
    the same shapes, y. `dtypes` are those of x and y in memory: floats unless there is one tap.
    """
    pixels = shape.batch * shape.out_height * shape.out_width
    size = pixels * shape.channels
    lanes = common_lanes(lanes_of(*dtypes), shape.channels)
    lanes = min(lanes, spread_lanes(lanes, size, dtypes[0], processors))
    tables, weights = [("int32", "rows"), ("int32", "columns")], "nullptr, nullptr"
    if shape.taps != (1, 1):
        tables += [("float32", "row_weights"), ("float32", "column_weights")]
        weights = "row_weights, column_weights"
    image = shape.height * shape.width * shape.channels
    sizes = (shape.batch, image, shape.out_height, shape.out_width, shape.channels)
    constants = ", ".join(map(str, (*sizes, *shape.taps, lanes)))
    return flat_kernel(
        name,
        [(dtypes[0], "x"), *tables, (dtypes[1], "y")],
        f"resize<{constants}>(x, rows, columns, {weights}, y);",
        _HEADERS,
        blocks_for(size // lanes, processors),
    )


def call_resize(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Resize` node."""
    x = operand_of(node.inputs[0])
    batch, height, width, channels = shape_of(x)
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    rows, columns = constant_of(node, 1), constant_of(node, 2)
    taps = (rows.shape[1], columns.shape[1])
    shape = ResizeShape(batch, height, width, channels, out_height, out_width, taps)
    y = assembly.declare(node.outputs[0])
    dtypes = (assembly.storage(x), assembly.storage(node.outputs[0]))
    name = assembly.kernel("resize", resize, shape, dtypes, assembly.multiprocessors)
    label = node.name or name
    packed = {"rows": rows * (width * channels), "columns": columns * channels}
    if len(node.inputs) > 3:
        packed |= {"row_weights": constant_of(node, 3), "column_weights": constant_of(node, 4)}
    constants = [assembly.constant(f"{label}.{key}", array) for key, array in packed.items()]
    assembly.call(name, [assembly.tensor(x), *constants], y, label)
