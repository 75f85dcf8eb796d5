"""How a TIR block touches memory: strides of its loads and stores along each of its axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.sym import detect_linear_equation

_DATA_PARALLEL, _REDUCTION = 0, 2
# Costs more than what it saves to compute again.
_EXPENSIVE = frozenset(
    f"tirx.{name}"
    for name in [
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "erf",
        "exp",
        "exp2",
        "exp10",
        "log",
        "log1p",
        "log2",
        "log10",
        "pow",
        "rsqrt",
        "sigmoid",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ]
)


@dataclass(frozen=True)
class Access:
    """One load or store.

    Attributes:
        strides: elements between neighbours along each axis, None where the offset is not linear
            in the axis.
        item_bytes: bytes of an element.
    """

    strides: dict[Any, int | None]
    item_bytes: int


@dataclass(frozen=True)
class BlockAccesses:
    """What a block reads and writes.

    Attributes:
        spatial: variables of the data-parallel axes with their extents, outermost first.
        reduction: the same of the reduction axes.
        loads: without those of what the block accumulates.
        stores: outside the initialisation.
        expensive: whether it calls functions such as exp.
        branches: whether it holds an `if_then_else`, whose sides must not be evaluated together.
    """

    spatial: dict[Any, int]
    reduction: dict[Any, int]
    loads: tuple[Access, ...]
    stores: tuple[Access, ...]
    expensive: bool
    branches: bool

    @property
    def operations(self) -> int:
        """How often the body runs."""
        return math.prod([*self.spatial.values(), *self.reduction.values()])

    @property
    def item_bytes(self) -> int:
        """Bytes of the widest element that is touched."""
        return max(access.item_bytes for access in (*self.loads, *self.stores))

    def strides(self, axis: Any) -> list[int | None]:
        """Strides of all loads along an axis."""
        return [load.strides[axis] for load in self.loads]

    def contiguous(self, axis: Any) -> bool:
        """Whether every load walks one by one along an axis, or stands still, and one walks."""
        strides = self.strides(axis)
        return set(strides) <= {0, 1} and 1 in strides


def block_accesses(block: Any) -> BlockAccesses | None:
    """Analyse a block; None where it has another kind of axis or a shape that is not constant."""
    axes = [(axis.var, int(axis.dom.extent), int(axis.iter_type)) for axis in block.iter_vars]
    if any(kind not in (_DATA_PARALLEL, _REDUCTION) for _, _, kind in axes):
        return None
    loads: list[Any] = []
    stores: list[Any] = []
    calls: set[str] = set()
    tvm_ffi.structural_walk(
        block.body,
        [
            (tvm.ir.TensorLoad, loads.append),
            (tirx.BufferStore, stores.append),
            (tvm.ir.Call, lambda call: calls.add(getattr(call.op, "name", ""))),
        ],
    )
    written = [store.buffer for store in stores]
    variables = [variable for variable, _, _ in axes]
    loads = [load for load in loads if not any(load.source.same_as(b) for b in written)]
    return BlockAccesses(
        spatial={var: extent for var, extent, kind in axes if kind == _DATA_PARALLEL},
        reduction={var: extent for var, extent, kind in axes if kind == _REDUCTION},
        loads=tuple(_access(load.source, load.indices, variables) for load in loads),
        stores=tuple(_access(store.buffer, store.indices, variables) for store in stores),
        expensive=bool(calls & _EXPENSIVE),
        branches="prim.if_then_else" in calls,
    )


def _access(buffer: Any, indices: Any, variables: list[Any]) -> Access:
    offset: Any = 0
    for index, size in zip(indices, buffer.ty.shape, strict=True):
        offset = offset * int(size) + index
    return Access(
        strides={variable: _stride(offset, variable) for variable in variables},
        item_bytes=(buffer.ty.dtype.dtype.bits + 7) // 8,
    )


def _stride(offset: Any, variable: Any) -> int | None:
    if isinstance(offset, int):
        return 0
    coefficients = detect_linear_equation(offset, [variable])
    if not coefficients or not isinstance(coefficients[0], tirx.IntImm):
        return None
    return int(coefficients[0])
