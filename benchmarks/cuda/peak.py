"""What this GPU can do at most: copying memory, and the products of each kind of unit.

    python3 benchmarks/cuda/peak.py

Products of square matrices through PyTorch, that is cuBLAS, on random numbers; the median of some.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch

SIZE, COPY_BYTES = 8192, 2 << 30
REPEATS, WARM_UPS = 9, 3


def median_ms(call: Callable[[], object]) -> float:
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def copy_gb_per_s() -> float:
    """Return the bytes that a copy on the device reads and writes, per second."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(lambda: target.copy_(source)) / 1e6


def product_tops(kind: str) -> float:
    """Return the operations of a matrix product, two per multiply-accumulate, in 10^12 per s."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    if kind == "int8":
        a, b = (torch.randint(-128, 128, (SIZE, SIZE), dtype=torch.int8, device="cuda")
                for _ in range(2))  # fmt: skip
        b = b.t()  # column-major, which the int8 units want
        return _tops(lambda: torch._int_mm(a, b))
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    x, y = (torch.randn(SIZE, SIZE, device="cuda").to(dtype) for _ in range(2))
    return _tops(lambda: x @ y)


def _tops(call: Callable[[], object]) -> float:
    return 2 * SIZE**3 / median_ms(call) / 1e9


def peaks() -> dict[str, float | str | None]:
    """Return `cuda`, PyTorch's version of it, `copy_gb_per_s`, and the peak of each unit.

    What PyTorch cannot do is None.
    """
    found: dict[str, float | str | None] = {"cuda": torch.version.cuda}
    found["copy_gb_per_s"] = copy_gb_per_s()
    for kind in ("float16", "bfloat16", "tf32", "float32", "int8"):
        try:
            found[kind] = product_tops(kind)
        except RuntimeError:
            found[kind] = None
    return found


if __name__ == "__main__":
    print(json.dumps(peaks()))
