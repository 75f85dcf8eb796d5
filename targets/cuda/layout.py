"""What moves elements without computing: transposes, concatenations, phases, broadcasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.launch import blocks_for, common_lanes, flat_kernel, lanes_of
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import integer_of, operand_of, pair_of
from edgepress.targets.schedules.interlace import InterlaceShape

_HEADERS = ("types.cuh", "vectors.cuh", "layout.cuh")
_FEW = 8  # rows or columns that one thread moves
_WORD_BYTES = 4
_SECTOR_BYTES = 32  # the least that memory reads and writes
_TILE_THREADS = 256


# Boxes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a box: its size, and the distance of neighbours in source and target."""

    size: int
    source: int
    target: int


@dataclass(frozen=True)
class Box:
    """Elements to copy: axes from the slowest to the fastest, and where the first one goes."""

    axes: tuple[Axis, ...]
    start: int = 0

    def joined(self) -> Box:
        """Return the same with axes joined that lie as one in both memories."""
        axes: list[Axis] = []
        for axis in (axis for axis in self.axes if axis.size != 1):
            size, last = axis.size, axes[-1] if axes else None
            if last and (last.source, last.target) == (size * axis.source, size * axis.target):
                axes[-1] = replace(axis, size=last.size * size)
            else:
                axes.append(axis)
        return Box(tuple(axes) or (Axis(1, 1, 1),), self.start)

    def lanes(self, most: int) -> int:
        """Return how many elements move at once."""
        *outer, run = self.axes
        if (run.source, run.target) != (1, 1):
            return 1
        steps = [step for axis in outer for step in (axis.source, axis.target)]
        return common_lanes(most, run.size, self.start, *steps)


def boxes_kernel(
    name: str, boxes: Sequence[Box], dtypes: Sequence[str], processors: int
) -> CudaKernel:
    """Generate the copy of one box out of each input: x0, x1, …, y; `dtypes` in this order."""
    parts, blocks = [], 0
    for i, (box, dtype) in enumerate(zip(map(Box.joined, boxes), dtypes[:-1], strict=True)):
        lanes = box.lanes(lanes_of(dtype, dtypes[-1]))
        units = math.prod(axis.size for axis in box.axes) // lanes
        if not units:
            continue
        count = blocks_for(units, processors)
        source, target = (_offset(box, lanes, key) for key in ("source", "target"))
        parts.append(
            f"if (blockIdx.x < {blocks + count})\n"
            f"        copy_each<{units}, {lanes}>(blockIdx.x - {blocks}, {count}, x{i}, y,\n"
            f"            [](int unit) {{ return {source}; }},\n"
            f"            [](int unit) {{ return {box.start} + {target}; }});"
        )
        blocks += count
    parameters = [*((dtype, f"x{i}") for i, dtype in enumerate(dtypes[:-1])), (dtypes[-1], "y")]
    return flat_kernel(name, parameters, "\n    else ".join(parts), _HEADERS, blocks)


def _offset(box: Box, lanes: int, side: str) -> str:
    """Return C++ of where a unit of `lanes` elements lies, by its number."""
    terms, inner = [], 1
    sizes = [axis.size for axis in box.axes[:-1]] + [box.axes[-1].size // lanes]
    for place, (axis, size) in reversed(list(enumerate(zip(box.axes, sizes, strict=True)))):
        step = getattr(axis, side) * (lanes if axis is box.axes[-1] else 1)
        index = "unit" if inner == 1 else f"unit / {inner}"
        index = index if place == 0 else f"{index} % {size}"
        if step:
            terms.append(f"{index} * {step}")
        inner *= size
    return " + ".join(terms) or "unit * 0"


def concat(
    name: str, outer: int, runs: tuple[int, ...], dtypes: tuple[str, ...], processors: int
) -> CudaKernel:
    """Generate the kernel: input i is `[outer, runs[i]]`, the output `[outer, sum(runs)]`."""
    line = sum(runs)
    boxes = [
        Box((Axis(outer, run, line), Axis(run, 1, 1)), sum(runs[:i])) for i, run in enumerate(runs)
    ]
    return boxes_kernel(name, boxes, dtypes, processors)


def interlace(
    name: str, shape: InterlaceShape, dtypes: tuple[str, ...], processors: int
) -> CudaKernel:
    """Generate the kernel: arguments are the phases, row by row, and y."""
    (down, across), run = shape.strides, shape.channels
    line = shape.width * run
    boxes = []
    for i, j in np.ndindex(down, across):
        rows, pitch = shape.rows(i), shape.columns(j) * run
        columns = -(-(shape.width - j) // across)  # those inside the output
        axes = (
            Axis(shape.batch, rows * pitch, shape.height * line),
            Axis(rows, pitch, down * line),
            Axis(columns, run, across * run),
            Axis(run, 1, 1),
        )
        boxes.append(Box(axes, i * line + j * run))
    return boxes_kernel(name, boxes, dtypes, processors)


def expand(
    name: str, given: tuple[int, ...], shape: tuple[int, ...], dtype: str, processors: int
) -> CudaKernel:
    """Generate a broadcast of x `given` to y `shape` as NumPy defines it: x and y."""
    given = (1,) * (len(shape) - len(given)) + given
    axes = tuple(
        Axis(
            size,
            math.prod(given[i + 1 :]) if given[i] > 1 else 0,
            math.prod(shape[i + 1 :]),
        )
        for i, size in enumerate(shape)
    )
    return boxes_kernel(name, [Box(axes)], (dtype, dtype), processors)


# Transposes ----------------------------------------------------------------------------------


def transpose(
    name: str, batch: int, rows: int, columns: int, dtypes: tuple[str, str], processors: int
) -> CudaKernel:
    """Generate the kernel: x `[batch, rows, columns]` and y `[batch, columns, rows]`."""
    sizes = f"{batch}, {rows}, {columns}"
    few, many = min(rows, columns), max(rows, columns)
    parameters = [(dtypes[0], "x"), (dtypes[1], "y")]
    if few <= _FEW:
        function = "interleave_rows" if rows <= columns else "separate_columns"
        blocks = blocks_for(batch * many, processors)
        return flat_kernel(name, parameters, f"{function}<{sizes}>(x, y);", _HEADERS, blocks)
    item = np.dtype(dtypes[1]).itemsize
    lanes = common_lanes(max(_WORD_BYTES // item, 1), rows, columns)
    side = 32  # words along a side of a tile
    while (
        side * lanes * item > _SECTOR_BYTES
        and side > 8
        and batch * _tiles(rows, columns, lanes * side) < processors
    ):
        side //= 2
    tiles = batch * _tiles(rows, columns, lanes * side)
    return flat_kernel(
        name,
        parameters,
        f"transpose_tiles<{sizes}, {lanes}, {side}, {_TILE_THREADS}>(x, y);",
        _HEADERS,
        min(tiles, processors * 16),
        threads=_TILE_THREADS,
    )


def _tiles(rows: int, columns: int, side: int) -> int:
    return -(-rows // side) * -(-columns // side)


# Calls ---------------------------------------------------------------------------------------


def call_concat(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Concat` node."""
    shapes = [shape_of(operand_of(value)) for value in node.inputs]
    axis = node.attributes.get_int("axis", 0) % len(shapes[0])
    runs = tuple(math.prod(shape[axis:]) for shape in shapes)
    outer = math.prod(shapes[0][:axis])
    _call(assembly, node, "concat", concat, outer, runs)


def call_interlace(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of an `Interlace` node."""
    batch, height, width, channels = shape_of(node.outputs[0])
    strides, joined = pair_of(node, "strides"), integer_of(node, "joined")
    shape = InterlaceShape(batch, height, width, channels, strides, joined)
    _call(assembly, node, "interlace", interlace, shape)


def call_transpose(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Transpose` node."""
    sizes = [integer_of(node, name) for name in ("batch", "rows", "columns")]
    _call(assembly, node, "transpose", transpose, *sizes)


def _call(
    assembly: CudaAssembly,
    node: ir.Node,
    kind: str,
    generate: Callable[..., CudaKernel],
    *geometry: Any,
) -> None:
    """Call a kernel whose arguments are the node's inputs and its output."""
    output = assembly.declare(node.outputs[0])
    inputs = [operand_of(value) for value in node.inputs]
    dtypes = tuple(assembly.storage(value) for value in (*inputs, node.outputs[0]))
    name = assembly.kernel(kind, generate, *geometry, dtypes, assembly.multiprocessors)
    assembly.call(name, [assembly.tensor(value) for value in inputs], output, node.name or name)
