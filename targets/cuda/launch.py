"""How element-wise kernels are launched: lanes per thread, threads per block, blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel

THREADS = 128
_ACCESS_BYTES = 16  # the widest load and store
_WAVES = 2  # more blocks than run at once only start later; threads take further elements instead
_BLOCKS_PER_MULTIPROCESSOR = 16  # of `THREADS` each
_START = "wait_for_previous();\n    let_next_start();"  # so that launches cost no time


def lanes_of(*dtypes: str) -> int:
    """Return how many elements a thread takes at once: the widest dtype fills one access.

    >>> lanes_of("int8", "int8"), lanes_of("float32", "int8")
    (16, 4)
    """
    return _ACCESS_BYTES // max(np.dtype(dtype).itemsize for dtype in dtypes)


def common_lanes(lanes: int, *steps: int) -> int:
    """Return the most lanes, at most so many, with which every one of these steps is aligned.

    >>> common_lanes(16, 24, 64), common_lanes(16, 0), common_lanes(4, 7)
    (8, 16, 1)
    """
    return math.gcd(lanes, *steps)


def spread_lanes(lanes: int, size: int, dtype: str, multiprocessors: int) -> int:
    """Return fewer lanes, of four bytes at least, where more threads keep the whole GPU busy."""
    least = max(4 // np.dtype(dtype).itemsize, 1)
    while lanes > least and size // lanes < multiprocessors * 2 * THREADS:
        lanes //= 2
    return lanes


def blocks_for(threads: int, multiprocessors: int) -> int:
    """Return how many blocks of `THREADS` share the work of so many threads."""
    most = multiprocessors * _BLOCKS_PER_MULTIPROCESSOR * _WAVES
    return max(min(-(-threads // THREADS), most), 1)


def flat_kernel(
    name: str,
    parameters: Sequence[tuple[str, str]],
    body: str,
    headers: tuple[str, ...],
    blocks: int,
    *,
    before: str = "",
    threads: int = THREADS,
) -> CudaKernel:
    """Return a kernel of blocks in a row.

    Args:
        name: of the function.
        parameters: dtypes and names of the tensors; the last one is written.
        body: statements.
        headers: what they need.
        blocks: how many.
        before: what stands before the function.
        threads: of a block.
    """
    *read, written = [(C_TYPES[dtype], parameter) for dtype, parameter in parameters]
    declared = [f"const {kind} *__restrict__ {parameter}" for kind, parameter in read]
    declared.append(f"{written[0]} *__restrict__ {written[1]}")
    source = (
        f'{before}extern "C" __global__ void __launch_bounds__({threads})\n'
        f"{name}({', '.join(declared)})\n{{\n    {_START}\n    {body}\n}}\n"
    )
    return CudaKernel(name, source, headers, (blocks, 1, 1), (threads, 1, 1), overlaps=True)
