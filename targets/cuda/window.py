"""The geometry of convolutions, and of products as convolutions of one tap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import operand_of, pair_of


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution over NHWC pixels.

    Attributes:
        batch, height, width, channels: of the input.
        out_height, out_width, out_channels: of the output.
        kernel, strides, dilations: `(height, width)`.
        pads: rows above and columns to the left of the image where the first window starts; how
            many are below and to the right follows.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)

    @property
    def macs(self) -> int:
        """Multiplications of one inference."""
        return self.rows * self.out_channels * math.prod(self.kernel) * self.channels

    @property
    def rows(self) -> int:
        """Output pixels."""
        return self.batch * self.out_height * self.out_width

    @property
    def is_padded(self) -> bool:
        """Whether some window leaves the image."""
        sizes = zip(
            self.pads, self.kernel, self.strides, self.dilations,
            (self.out_height, self.out_width), (self.height, self.width), strict=True,
        )  # fmt: skip
        return any(
            start > 0 or (out - 1) * stride - start + (taps - 1) * dilation >= size
            for start, taps, stride, dilation, out, size in sizes
        )


def window_of(node: ir.Node) -> Window:
    """Return the geometry of a convolution."""
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    batch, height, width, channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    return Window(
        batch,
        height,
        width,
        channels,
        out_height,
        out_width,
        out_channels,
        kernel,
        strides,
        dilations,
        (top, left),
    )
