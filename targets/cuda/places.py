"""Where strided operands of products lie, as the types `Place` of `fragments.cuh`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly

_ACCESS_BYTES = 16  # the widest load


@dataclass(frozen=True)
class CudaPlace:
    """Where a `[batch, heads, rows, columns]` tensor lies in another, in elements.

    Attributes:
        dtype: in memory.
        start: of the first element.
        strides: how far apart neighbours are, by batch, head, row and column.
        vector: neighbouring columns that can be read at once, wherever a run of them starts.
    """

    dtype: str
    start: int
    strides: tuple[int, int, int, int]
    vector: int

    @property
    def source(self) -> str:
        """The type in CUDA C++."""
        return f"Place<{', '.join(map(str, (self.start, *self.strides, self.vector)))}>"


def place(
    dtype: str, start: int, strides: tuple[int, int, int, int], sizes: tuple[int, int, int, int]
) -> CudaPlace:
    """Describe a place; `sizes` are those of the four axes.

    >>> place("float32", 0, (0, 32, 384, 1), (1, 12, 128, 32)).vector
    4
    >>> place("float16", 6, (0, 32, 384, 1), (1, 12, 128, 32)).vector
    2
    """
    vector = _ACCESS_BYTES // np.dtype(dtype).itemsize
    if strides[3] != 1:
        vector = 1
    apart = [stride for stride, size in zip(strides[:3], sizes, strict=False) if size > 1]
    while any(number % vector for number in (start, sizes[3], *apart)):
        vector //= 2
    return CudaPlace(dtype, start, strides, vector)


def operand_place(
    assembly: CudaAssembly,
    node: ir.Node,
    name: str,
    value: ir.Value,
    sizes: tuple[int, int, int, int],
    *,
    turned: bool = False,
) -> CudaPlace:
    """Return where an operand lies, as an attribute of the node says.

    Of one that is `turned`, the columns are seen as rows.
    """
    start, batch, head, row, column = (int(n) for n in node.attributes[name].as_ints())
    if turned:
        row, column, sizes = column, row, (sizes[0], sizes[1], sizes[3], sizes[2])
    return place(assembly.storage(value), start, (batch, head, row, column), sizes)
