"""The schedule of kernels that TVM writes: equal results, in vector code."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx, topi

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.load import load_target
from edgepress.targets.schedules.generic import schedule
from tests.targets.te_programs import answer, program_of, random_feeds

X86 = load_target("x86-64-v3")
PACKED = r"\bv(?:fmadd\w+|add|mul|max|sub)ps\b"
A, B = te.placeholder((3, 20, 50), name="A"), te.placeholder((3, 20, 50), name="B")
ROW, SQUARE = te.placeholder((50,), name="ROW"), te.placeholder((3, 50, 32), name="SQUARE")
IMAGE, KERNEL = te.placeholder((1, 5, 9, 16), name="IMAGE"), te.placeholder((6, 5, 3, 3), name="K")

CASES: dict[str, Any] = {
    "add": lambda: [A, B, topi.add(A, B)],
    "add with tail and broadcast": lambda: [A, ROW, topi.add(A, ROW)],
    "softmax": lambda: [A, topi.nn.softmax(A)],
    "softmax over rows": lambda: [A, topi.nn.softmax(A, axis=1)],
    "sum of the last axis": lambda: [A, topi.sum(A, axis=2)],
    "sum of everything": lambda: [A, topi.sum(A)],
    "sum of a middle axis": lambda: [A, topi.sum(A, axis=1)],
    "max of two axes": lambda: [A, topi.max(A, axis=(1, 2))],
    "matrix product": lambda: [A, SQUARE, topi.nn.batch_matmul(A, SQUARE, transpose_b=False)],
    "matrix product, transposed": lambda: [A, B, topi.nn.batch_matmul(A, B)],
    "convolution": lambda: [IMAGE, KERNEL, topi.nn.conv2d_nchw(IMAGE, KERNEL, 1, 1, 1)],
    "max pool": lambda: [
        IMAGE,
        topi.nn.pool2d(IMAGE, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "max"),
    ],
    "average pool with stride": lambda: [
        IMAGE,
        topi.nn.pool2d(IMAGE, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "avg"),
    ],
    "tanh of a sum": lambda: [A, B, topi.tanh(topi.add(A, B))],
}
MOVES: dict[str, Any] = {
    "transpose": lambda: [A, topi.transpose(A, (2, 0, 1))],
    "pad": lambda: [A, topi.nn.pad(A, (0, 1, 1))],
    "concatenate": lambda: [A, B, topi.concatenate((A, B), 2)],
    "argmax": lambda: [A, topi.argmax(A, 2)],
    "cumulative sum": lambda: [A, topi.cumsum(A, 1)],
    "gather": lambda: [A, topi.take(A, te.compute((4,), lambda i: i % 3), 0)],
}


def compare(tensors: list[Any]) -> str:
    """Check that the schedule changes no result; return the assembly of the scheduled kernel."""
    plain = te.create_prim_func(tensors)
    before, after = program_of(plain), program_of(schedule(plain, X86))
    feeds = random_feeds(before)
    wanted, got = answer(before, X86, feeds), answer(after, X86, feeds)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert after.workspace_bytes <= before.workspace_bytes
    return kernel_assembly(after, X86)


@pytest.mark.parametrize("name", CASES)
def test_it_vectorises_arithmetic(name: str) -> None:
    assert re.search(PACKED, compare(CASES[name]()))


@pytest.mark.parametrize("name", MOVES)
def test_it_keeps_what_other_operators_compute(name: str) -> None:
    compare(MOVES[name]())


@settings(deadline=None, max_examples=8)
@given(
    rows=st.integers(1, 9),
    inner=st.integers(1, 40),
    columns=st.integers(1, 40),
    transposed=st.booleans(),
)
def test_matrix_products_of_any_size(rows: int, inner: int, columns: int, transposed: bool) -> None:
    x = te.placeholder((1, rows, inner), name="x")
    w = te.placeholder((1, columns, inner) if transposed else (1, inner, columns), name="w")
    compare([x, w, topi.nn.batch_matmul(x, w, transpose_b=transposed)])


@settings(deadline=None, max_examples=8)
@given(
    shape=st.lists(st.integers(1, 21), min_size=1, max_size=3),
    axis=st.integers(0, 2),
)
def test_softmax_and_mean_of_any_shape(shape: list[int], axis: int) -> None:
    x = te.placeholder(shape, name="x")
    axis %= len(shape)
    total = topi.sum(x, axis=axis, keepdims=True)
    compare([x, topi.subtract(topi.nn.softmax(x, axis=axis), total)])


def test_expensive_values_are_not_computed_twice() -> None:
    x = te.placeholder((64, 64), name="x")
    grown = te.compute((64, 64), lambda i, j: tirx.erf(x[i, j]), "grown")
    function = te.create_prim_func([x, topi.nn.matmul(grown, grown)])
    assert str(schedule(function, X86)).count("T.erf") == 1
    assert "grown = T.sblock_alloc_buffer" in str(schedule(function, X86))


def test_only_big_work_runs_on_several_cores() -> None:
    def threads(size: int) -> bool:
        x = te.placeholder((size, size), name="x")
        scheduled = schedule(te.create_prim_func([x, topi.nn.relu(x)]), X86)
        return "T.parallel" in str(scheduled)

    assert threads(512)
    assert not threads(32)
