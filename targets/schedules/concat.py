"""Concatenation along any axis: runs of neighbouring elements, copied in turn."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Kernel, chunks, load

_PARALLEL_BYTES = 64 * 1024  # below this, handing over a part costs more than it saves


def concat(name: str, outer: int, runs: tuple[int, ...], dtype: str, isa: Isa) -> Any:
    """Generate the kernel: arguments x0, x1, …, y.

    Input i is `[outer, runs[i]]`, the output `[outer, sum(runs)]`.
    """
    kernel = Kernel(name)
    inputs = [kernel.argument(f"x{i}", dtype, outer * run) for i, run in enumerate(runs)]
    line = sum(runs)
    y = kernel.argument("y", dtype, outer * line)
    item = np.dtype(dtype).itemsize
    lanes = isa.vector_bytes // item
    with kernel.loop("outer", outer, parallel=outer * line * item >= _PARALLEL_BYTES) as index:
        start = kernel.let("start", index * line)
        for i, (x, run) in enumerate(zip(inputs, runs, strict=True)):
            source, target = kernel.let("source", index * run), start + sum(runs[:i])
            for first, width, count in chunks(run, lanes):
                with kernel.loop("i", count) as step:
                    at = step * width + first
                    kernel.store(y, target + at, load(x, source + at, width), width)
    return kernel.finish()
