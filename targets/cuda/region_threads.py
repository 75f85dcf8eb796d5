"""Loops that TVM wrote by hand, on threads: what it says may run in any order does so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

EXTENT = "thread_extent"
"""The key of a statement that binds threads."""
_FEW_THREADS = 32  # of a block where each thread has much to do
_MANY_THREADS = 512  # of the only block
_THREAD_INDEX = 1  # a kind of axis


def is_parallel(statement: Any) -> bool:
    """Tell whether a statement is a loop whose turns may run in any order."""
    if not isinstance(statement, tirx.For) or not isinstance(statement.extent, tirx.IntImm):
        return False
    if allocated(statement):
        return False
    return statement.kind == tirx.ForKind.PARALLEL or _stores_in_order(statement)


def _stores_in_order(loop: Any) -> bool:
    """Tell whether each turn of a loop stores its own element, and reads none of the others."""
    store = loop.body
    if not isinstance(store, tirx.BufferStore) or len(store.indices) != 1:
        return False
    read: list[Any] = []
    tvm_ffi.structural_walk(store.value, (tvm.ir.TensorLoad, lambda load: read.append(load.source)))
    own = isinstance(store.indices[0], tvm.ir.Var) and store.indices[0].same_as(loop.loop_var)
    return own and not any(buffer.same_as(store.buffer) for buffer in read)


def over_threads(loop: Any) -> Any:
    """Give each turn of a parallel loop a thread."""
    extent = int(loop.extent)
    size = max(1, min(_FEW_THREADS, extent))
    block, thread = _index("blockIdx.x"), _index("threadIdx.x")
    body = _turn(loop, block.var * size + thread.var)
    return _threads(block, max(1, math.ceil(extent / size)), _threads(thread, size, body))


def on_one_block(statements: list[Any]) -> Any:
    """Run statements one after the other: parallel loops on all threads, the rest on the first."""
    thread = _index("threadIdx.x")
    parallel: list[Any] = []

    def share(statement: Any) -> list[Any]:
        if is_parallel(statement):
            parallel.append(statement)
            step = tirx.Var("step", "int32")
            turn = step * _MANY_THREADS + thread.var
            steps = math.ceil(int(statement.extent) / _MANY_THREADS)
            return [_serial(step, steps, _turn(statement, turn)), _barrier()]
        if isinstance(statement, tirx.For) and is_parallel(statement.body):
            inner = tirx.SeqStmt(share(statement.body))
            extent = (statement.min, statement.extent)
            return [tirx.For(statement.loop_var, *extent, tirx.ForKind.SERIAL, inner)]
        return [tirx.IfThenElse(thread.var.equal(0), statement, None), _barrier()]

    shared = [part for statement in statements for part in share(statement)]
    if not parallel:
        return _only(_index("blockIdx.x"), _only(thread, _sequence(statements)))
    body = _threads(thread, _MANY_THREADS, _sequence(shared))
    return _only(_index("blockIdx.x"), body)


def allocated(statement: Any) -> list[Any]:
    """Return the buffers that a statement allocates."""
    buffers: list[Any] = []
    tvm_ffi.structural_walk(
        statement, (tirx.AllocBuffer, lambda allocation: buffers.append(allocation.buffer))
    )
    return buffers


def _turn(loop: Any, turn: Any) -> Any:
    """Return the body of a loop for one turn, if there is such a turn."""
    place = tirx.Cast("int32", loop.min) + turn
    named: Callable[[Any], Any] = lambda v: place if v.same_as(loop.loop_var) else v  # noqa: E731
    body = tvm_ffi.structural_map(loop.body, (tvm.ir.Var, named))
    return tirx.IfThenElse(turn < int(loop.extent), body, None)


def _serial(variable: Any, extent: int, body: Any) -> Any:
    zero = tirx.const(0, "int32")
    return tirx.For(variable, zero, tirx.const(extent, "int32"), tirx.ForKind.SERIAL, body)


def _barrier() -> Any:
    return tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


def _sequence(statements: list[Any]) -> Any:
    return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]


def _index(tag: str) -> Any:
    return tirx.IterVar(None, tag.replace(".", "_"), _THREAD_INDEX, tag)


def _threads(index: Any, extent: int, body: Any) -> Any:
    return tirx.AttrStmt(index, EXTENT, tirx.const(extent, "int32"), body)


def _only(index: Any, body: Any) -> Any:
    return _threads(index, 1, body)
