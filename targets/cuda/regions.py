"""Functions of TVM → kernels for GPUs: what edgepress has no kernel for.

A function becomes one kernel per nest of loops. What TVM keeps between them becomes memory of the
program. A nest that is bound to no threads, as those are that TVM wrote by hand, runs on one
thread, or where TVM says that its outermost loop may run in any order, on one thread per turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.region_nests import FlatFunction, Memory
from edgepress.targets.cuda.region_schedule import schedule
from edgepress.targets.cuda.region_source import HEADERS, kernel_sources


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is called with.

    Attributes:
        kernel: the kernel.
        arguments: places among the function's parameters and, after them, its scratch tensors.
        written: those arguments that it is the first to write.
    """

    kernel: CudaKernel
    arguments: tuple[int, ...]
    written: tuple[int, ...]


@dataclass(frozen=True)
class RegionKernels:
    """What a function became.

    Attributes:
        launches: in execution order.
        scratch: memory that only these kernels use.
    """

    launches: tuple[Launch, ...]
    scratch: tuple[Memory, ...]


def region_kernels(name: str, function: Any, outputs: int) -> RegionKernels:
    """Write a function of TVM as kernels.

    Args:
        name: how the names of the kernels begin.
        function: an s_tir `PrimFunc` of static shapes, unscheduled, whose parameters are buffers.
        outputs: how many of the last parameters it writes.

    Raises:
        NotImplementedError, RuntimeError, ValueError: TVM cannot write it.
    """
    try:
        return _kernels(name, schedule(function), outputs)
    except (RuntimeError, ValueError):  # such as a body that is no block
        return _kernels(name, function, outputs)


def _kernels(name: str, function: Any, outputs: int) -> RegionKernels:
    flat = FlatFunction(function)
    nests = {f"{name}_{number}": nest for number, nest in enumerate(flat.nests)}
    sources = kernel_sources({symbol: nest.function for symbol, nest in nests.items()})
    launches, written = list[Launch](), set[int]()
    for symbol, nest in nests.items():
        grid, block = (nest.blocks, 1, 1), (nest.threads, 1, 1)
        kernel = CudaKernel(symbol, sources[symbol], HEADERS, grid, block, overlaps=True)
        first = tuple(place for place in nest.written if place not in written)
        launches.append(Launch(kernel, nest.arguments, first))
        written.update(first)
    count = len(function.params)
    for place in range(count - outputs, count):
        if place not in written:  # it holds no element
            launches.append(_nothing(f"{name}_{len(launches)}", place))
    return RegionKernels(tuple(launches), tuple(flat.scratch))


def _nothing(symbol: str, place: int) -> Launch:
    """Call something for an output without elements: every output is written by a call."""
    source = f'extern "C" __global__ void {symbol}(void *) {{}}\n'
    return Launch(CudaKernel(symbol, source, (), (1, 1, 1), (1, 1, 1)), (place,), (place,))
