"""Finds kernels that no schedule reached: code that computes one element at a time.

Every schedule of edgepress writes vectors, either as TIR nodes of several lanes or as loops that
are marked for vectorisation. What remains scalar is what TVM wrote and `schedules/generic.py` could
not improve, or a generator that has no vector form. LLVM may still vectorise some of it, so the
count says where to look, not how slow a kernel is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from edgepress.targets.program import Program

_LANES = re.compile(r"x(\d+)$")


@dataclass(frozen=True)
class Work:
    """How many elements the stores of a kernel write in one run, registers included.

    Attributes:
        scalar: one at a time.
        vector: in vectors.
    """

    scalar: int = 0
    vector: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.scalar + other.scalar, self.vector + other.vector)


def work_of(function: Any) -> Work:
    """Count what a kernel stores, before TVM lowers it.

    Both sides of a branch count, what starts a sum does not.
    """
    return _work(function.body, 1, 1)


def scalar_kernels(program: Program, operations: int) -> Mapping[str, Work]:
    """Return the kernels that do at least so many operations, and most of them one at a time."""
    found = {name: work_of(kernel) for name, kernel in program.kernels.items()}
    return {
        name: work
        for name, work in sorted(found.items())
        if work.scalar >= operations and work.scalar > work.vector
    }


def _work(statement: Any, times: int, lanes: int) -> Work:
    """Count a statement that runs `times` times, within a vector of `lanes`."""
    if isinstance(statement, tirx.BufferStore):
        found = _LANES.search(str(statement.value.ty))
        width = lanes * (int(found[1]) if found else 1)
        return Work(scalar=times) if width == 1 else Work(vector=times * width)
    if isinstance(statement, tirx.For):
        extent = _size(statement.extent)
        if statement.kind == tirx.ForKind.VECTORIZED:
            return _work(statement.body, times, lanes * extent)
        return _work(statement.body, times * extent, lanes)
    if isinstance(statement, s_tir.SBlockRealize):
        return _work(statement.block.body, times, lanes)
    total = Work()
    for child in _children(statement):
        total += _work(child, times, lanes)
    return total


def _size(extent: Any) -> int:
    return int(extent) if isinstance(extent, tirx.IntImm | int) else 1


def _children(statement: Any) -> list[Any]:
    """Return the statements right inside another."""
    if isinstance(statement, tirx.SeqStmt):
        return list(statement.seq)
    if isinstance(statement, tirx.IfThenElse):
        return [s for s in (statement.then_case, statement.else_case) if s is not None]
    body = getattr(statement, "body", None)
    return [] if body is None else [body]
