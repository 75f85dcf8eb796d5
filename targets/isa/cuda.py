"""Any NVIDIA GPU: only how tensors are stored, since generators of CPU kernels do not serve it."""

from __future__ import annotations

from edgepress.targets.isa.base import Isa, widened_dot

ISA = Isa(
    name="cuda",
    vector_bytes=4,
    vector_registers=12,
    storage="int8",
    staged="int8",
    group=1,
    dot=widened_dot,
)
