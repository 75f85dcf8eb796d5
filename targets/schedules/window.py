"""The geometry of a window that slides over the channels of an NHWC tensor."""

from __future__ import annotations

from dataclasses import dataclass

from edgepress.targets.schedules.emit import Expr


@dataclass(frozen=True)
class WindowShape:
    """Every channel has its own window; the input is already padded.

    `kernel`, `strides` and `dilations` are (height, width).
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)

    @property
    def lines(self) -> int:
        """Output rows over the whole batch."""
        return self.batch * self.out_height

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def reads(self) -> int:
        """Elements read over all window positions; the multiply-accumulates of a depthwise one."""
        return self.lines * self.out_width * self.channels * self.taps

    def corner(self, line: Expr, column: Expr) -> Expr:
        """Index of the first channel under the window's first tap."""
        image, row = line // self.out_height, line % self.out_height
        top = image * self.height + row * self.strides[0]
        return (top * self.width + column * self.strides[1]) * self.channels

    def tap(self, row: Expr, column: Expr) -> Expr:
        """Distance of a tap from the corner."""
        return (row * (self.dilations[0] * self.width) + column * self.dilations[1]) * self.channels
