"""Convolution in groups of few channels: several groups share a vector.

A group with fewer outputs than a vector has lanes would leave the rest of it empty. Here a vector
holds the outputs of as many whole groups as fit. Lane by lane, its inputs differ, so they are not
one value for all lanes, as in `schedules.conv`: the inputs of all those groups are loaded at once,
and one shuffle for each input of a group brings it to the lanes of that group. A lane has its own
weights, and a multiplication its own lanes, as in a depthwise convolution, which is the case of one
channel a group.

    groups of 2, eight lanes:   x    = a0 a1 b0 b1 c0 c1 d0 d1
        first input of a group: x[0] = a0 a0 b0 b0 c0 c0 d0 d0  ·  weights [lanes]
        second:                 x[1] = a1 a1 b1 b1 c1 c1 d1 d1  ·  weights [lanes]

Where a lane of integers multiplies several neighbouring inputs, those are moved as one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import ConvShape, Tile, TileWriter
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, cast, load
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, first_step

Array = npt.NDArray[Any]
_MOST_LOADED_VECTORS = 4  # inputs of one pixel and place of the window, in vectors
_ROWS = 8  # pixels of a tile: as many sums as hide how long a multiplication takes
_FEW_REGISTERS = 16


def groups_together(shape: ConvShape, isa: Isa, quantized: bool) -> int:
    """Return how many groups share a vector; 1 where it would hold no two."""
    outputs = shape.out_channels // shape.groups
    input_bytes = shape.channels * (np.dtype(isa.staged).itemsize if quantized else 4)
    fitting = min(isa.lanes // outputs, _MOST_LOADED_VECTORS * isa.vector_bytes // input_bytes)
    return max((n for n in range(1, fitting + 1) if shape.groups % n == 0), default=1)


def together(shape: ConvShape, groups: int) -> ConvShape:
    """Return the shape with so many groups as one."""
    return replace(shape, channels=shape.channels * groups, groups=shape.groups // groups)


def grouped_tile(shape: ConvShape, isa: Isa) -> Tile:
    """Choose how many pixels a tile has; it is one vector wide."""
    most = _ROWS if isa.vector_registers > _FEW_REGISTERS else _ROWS - 2
    width = shape.flattened().out_width
    return Tile(-(-width // -(-width // most)), 1)


def pack_weights(weights: Array, shape: ConvShape, isa: Isa) -> Array:
    """Pack `[out, in / groups, kh, kw]` weights lane by lane.

    The result is `[vectors][kh][kw][steps][lanes][group]`, where `group` inputs are one
    multiplication and `steps` such make the inputs of a group; zeros fill both up.
    """
    out, given, height, width = weights.shape
    group = 1 if weights.dtype == np.float32 else isa.group
    packed = together(shape, groups_together(shape, isa, weights.dtype != np.float32))
    vectors, held = packed.groups, out // packed.groups
    padded = np.zeros((vectors, isa.lanes, shape.channels, height, width), weights.dtype)
    padded[:, :held, :given] = weights.reshape(vectors, held, given, height, width)
    steps = padded.reshape(vectors, isa.lanes, -1, group, height, width)
    return np.ascontiguousarray(steps.transpose(0, 4, 5, 2, 1, 3)).ravel()


def grouped(
    name: str,
    shape: ConvShape,
    isa: Isa,
    epilogue: Epilogue,
    tile: Tile,
    weights_dtype: str = "int8",
) -> Any:
    """Generate the kernel.

    Arguments are those of `conv.conv`. Biases and multipliers are packed for `together(shape, …)`.
    """
    quantized = isinstance(first_step(epilogue), Requantise)
    isa = replace(isa, matrix=None)  # matrix instructions multiply lanes with those of others
    kernel = Kernel(name)
    count = groups_together(shape, isa, quantized)
    packed = together(shape, count).flattened()
    dtype = weights_dtype if quantized else "float32"
    _GroupedWriter(kernel, packed, isa, epilogue, tile, dtype, count).tiles(tile)
    return kernel.finish()


class _GroupedWriter(TileWriter):
    """Tiles of one vector of output channels, whose lanes belong to several groups."""

    narrows_last = False

    def __init__(
        self,
        kernel: Kernel,
        shape: ConvShape,
        isa: Isa,
        epilogue: Epilogue,
        tile: Tile,
        weights_dtype: str,
        together: int,
    ) -> None:
        self.together = together
        super().__init__(kernel, shape, isa, epilogue, tile, weights_dtype)
        self.step, self.steps = self.inputs_per_lane(), 1
        self.window_columns = shape.kernel[1]

    def inputs_per_lane(self) -> int:
        return self.shape.channels // self.together

    def reduce(
        self,
        held: list[list[Buffer]],
        x_index: Expr,
        w_index: Expr,
        steps: int,  # noqa: ARG002 - a place of the window is one step
    ) -> None:
        """Emit one place of the window: every input of a group times a vector of weights."""
        kernel, lanes, group = self.kernel, self.isa.lanes, self.group
        stride = self.shape.strides[1] * self.pitch
        x_index, w_index = kernel.let("x_at", x_index), kernel.let("w_at", w_index)
        weights = [
            kernel.let("w", self._weights(w_index + step * lanes * group))
            for step in range(self.step // group)
        ]
        for row, (accumulator,) in enumerate(held):
            x = kernel.let("x", load(self.x, x_index + row * stride, self.shape.channels))
            for step, w in enumerate(weights):
                total = load(accumulator, 0, lanes)
                own = self._own_inputs(x, step)
                total = self.isa.lane_dot(total, own, w) if self.quantized else total + own * w
                kernel.store(accumulator, 0, total, lanes)

    def _weights(self, index: Expr) -> Expr:
        """Load a vector of weights, as wide as the instruction wants them."""
        width = self.isa.lanes * self.group
        w = load(self.weights, index, width)
        narrow = self.weights_dtype == "int8" and self.group != 4
        return cast(w, "int16", width) if narrow else w

    def _own_inputs(self, x: Expr, step: int) -> Expr:
        """Bring number `step` of the inputs of each group to the lanes of that group."""
        outputs = self.shape.out_channels // self.shape.groups // self.together
        places: list[int] = []
        for lane in range(self.isa.lanes):
            owner = min(lane // outputs, self.together - 1)  # lanes beyond the last are not stored
            first = owner * self.step + step * self.group
            places += range(first, first + self.group)
        # A shuffle may not give more than it takes.
        sources = [x] * -(-len(places) // self.shape.channels)
        return tirx.Shuffle(sources, [tirx.const(place, "int32") for place in places])
