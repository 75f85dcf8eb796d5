"""Element by element: a value of each, such as the same number in another float dtype."""

from __future__ import annotations

from edgepress.targets.cuda import epilogue
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel
from edgepress.targets.cuda.launch import blocks_for, flat_kernel, lanes_of

HEADERS = (*epilogue.HEADERS, "vectors.cuh", "elementwise.cuh")
"""What functions of single elements need."""


def map_kernel(
    name: str, size: int, dtypes: tuple[str, str], value: str, processors: int, before: str = ""
) -> CudaKernel:
    """Generate `y = value(x)`, C++ of one element: arguments x and y."""
    lanes = lanes_of(*dtypes)
    kinds = [C_TYPES[dtype] for dtype in dtypes]
    function = f"[](const {kinds[0]} x) -> {kinds[1]} {{ return {value}; }}"
    return flat_kernel(
        name,
        [(dtypes[0], "x"), (dtypes[1], "y")],
        f"map_each<{size}, {lanes}>(x, y, {function});",
        HEADERS,
        blocks_for(-(-size // lanes), processors),
        before=before,
    )


def cast(name: str, size: int, dtypes: tuple[str, str], processors: int) -> CudaKernel:
    """Generate a copy, from one float dtype to another or of any dtype as it is: x and y."""
    value = "x" if dtypes[0] == dtypes[1] else f"from_float<{C_TYPES[dtypes[1]]}>(to_float(x))"
    return map_kernel(name, size, dtypes, value, processors)
