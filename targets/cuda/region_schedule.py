"""The schedule of every kernel that TVM writes for a GPU: one result per thread.

Cheap producers are computed where they are used. Neighbouring threads compute neighbouring results,
and a reduction runs within its thread, its sum in a register. Where results are few and reductions
long, as in a mean over a whole picture, several threads share a reduction: each leaves a part of
the sum in memory, and a second block adds the parts. What follows a reduction element by element is
computed by the thread that reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from edgepress.targets.schedules.accesses import BlockAccesses, block_accesses

THREADS = 256
_ENOUGH_THREADS = 1 << 13  # more of them would not make a memory-bound kernel faster
_ENOUGH_ROWS = 1 << 16  # a row to a thread reads memory in bits and pieces
_SHORT_REDUCTION = 64
_FEWEST_PARTS, _MOST_PARTS = 16, 1024
_FEW_LOADS = 8  # of a block that may be written out wherever its result is used
_MAIN = "main"


def schedule(function: Any) -> Any:
    """Bind the blocks of a function of TVM to threads.

    Args:
        function: an s_tir `PrimFunc` of static shapes, one loop per block axis, unscheduled.

    Returns:
        An equivalent s_tir `PrimFunc`. Loops that resist, such as those that TVM wrote by hand, are
        bound to no threads.

    Raises:
        RuntimeError, ValueError: the body is no block.
    """
    work = _Work(function)
    _inline_producers(work)
    for name in work.blocks():
        work.attempt(_wrap_scalar, name)
    for name in work.blocks():
        work.attempt(_share_reduction, name)
    for name in reversed(work.blocks()):
        work.attempt(_follow_consumer, name)
    for name in work.blocks():
        work.attempt(_bind, name)
    for name in work.blocks():
        work.attempt(_start_before_loops, name)
    return work.schedule.mod[_MAIN]


class _Work:
    """A schedule in progress.

    Attributes:
        leaders: of blocks that lie within the loops of one that uses their results, that one.
    """

    def __init__(self, function: Any) -> None:
        self.schedule = s_tir.Schedule(tvm.IRModule({_MAIN: function}))
        self.leaders: dict[str, str] = {}

    def blocks(self) -> list[str]:
        """Names of all blocks in order."""
        root = self.schedule.get_sblock("root")
        return [self.schedule.get(b).name_hint for b in self.schedule.get_child_blocks(root)]

    def accesses(self, name: str) -> BlockAccesses | None:
        """What a block touches; None for one that holds loops, which TVM wrote by hand."""
        block = self.schedule.get(self.schedule.get_sblock(name))
        loops: list[Any] = []
        tvm_ffi.structural_walk(block.body, (tirx.For, loops.append))
        return None if loops else block_accesses(block)

    def consumers(self, name: str) -> list[str]:
        blocks = self.schedule.get_consumers(self.schedule.get_sblock(name))
        return [self.schedule.get(block).name_hint for block in blocks]

    def loops(self, name: str) -> list[Any]:
        """All loops around a block, outermost first."""
        return list(self.schedule.get_loops(self.schedule.get_sblock(name)))

    def attempt(self, plan: Callable[[_Work, str, BlockAccesses], bool], name: str) -> None:
        """Apply a plan to a block; leave everything as it was where the plan or TVM refuses."""
        accesses = self.accesses(name)
        if accesses is None or not accesses.stores:
            return
        before = self.schedule.copy()
        try:
            if plan(self, name, accesses):
                return
        except (RuntimeError, ValueError):
            pass
        self.schedule = before


def _inline_producers(work: _Work) -> None:
    """Compute where it is used what costs no more there."""
    for name in work.blocks():
        producer = work.accesses(name)
        consumers = [work.accesses(consumer) for consumer in work.consumers(name)]
        if producer is None or producer.reduction or not consumers:
            continue
        if any(consumer is None or _costs_more(producer, consumer) for consumer in consumers):
            continue
        if len(producer.loads) > _FEW_LOADS and _uses(work, name) > 1:
            continue
        try:
            work.schedule.compute_inline(work.schedule.get_sblock(name))
        except RuntimeError:  # such as a store that is no plain assignment
            continue


def _costs_more(producer: BlockAccesses, consumer: BlockAccesses) -> bool:
    """Tell whether a producer is worth memory of its own."""
    return producer.expensive and consumer.operations > producer.operations


def _uses(work: _Work, name: str) -> int:
    """Count where a block's result stands in others: inlined, its text would stand there too."""
    schedule = work.schedule
    result = schedule.get(schedule.get_sblock(name)).writes[0].source
    uses: list[Any] = []

    def note(load: Any) -> None:
        if load.source.same_as(result):
            uses.append(load)

    for consumer in work.consumers(name):
        body = schedule.get(schedule.get_sblock(consumer)).body
        tvm_ffi.structural_walk(body, (tvm.ir.TensorLoad, note))
    return len(uses)


def _wrap_scalar(work: _Work, name: str, accesses: BlockAccesses) -> bool:
    """Put a loop around a single result, to be bound."""
    loops = work.loops(name)
    if len(loops) <= len(accesses.reduction):
        work.schedule.add_unit_loop(loops[0] if loops else work.schedule.get_sblock(name))
    return True


def _share_reduction(work: _Work, name: str, accesses: BlockAccesses) -> bool:
    """Split a long reduction of few results over threads."""
    results = math.prod(accesses.spatial.values())
    length = math.prod(accesses.reduction.values())
    # Neighbouring threads read neighbouring elements: of a result's row, or of several results.
    across = bool(accesses.spatial) and accesses.contiguous(list(accesses.spatial)[-1])
    enough = _ENOUGH_THREADS if across else _ENOUGH_ROWS
    if not results or length < _SHORT_REDUCTION or results >= enough:
        return False
    parts = 1 << math.ceil(math.log2(length) / 2)
    parts = min(max(parts, _FEWEST_PARTS), _MOST_PARTS)
    schedule = work.schedule
    count = _result_loops(accesses)
    reduction = schedule.fuse(*work.loops(name)[count:])
    _, part = schedule.split(reduction, [None, parts])
    partial = schedule.rfactor(part, 0 if across else len(accesses.spatial))
    *results_loops, step, part = schedule.get_loops(partial)
    threads = [part, *results_loops] if across else [*results_loops, part]
    schedule.reorder(*threads, step)
    _keep_in_register(schedule, partial, threads)
    _bind_loops(schedule, threads)
    return True


def _follow_consumer(work: _Work, name: str, accesses: BlockAccesses) -> bool:
    """Compute in the thread that uses the result, where no other does."""
    leaders = {work.leaders.get(consumer, consumer) for consumer in work.consumers(name)}
    if len(leaders) != 1 or _is_bound(work, name):
        return False
    leader = leaders.pop()
    leading = work.accesses(leader)
    if leading is None or leading.reduction or _is_bound(work, leader):
        return False
    if leading.operations != math.prod(accesses.spatial.values()):
        return False
    schedule = work.schedule
    block = schedule.get_sblock(name)
    depth = _result_loops(leading)
    schedule.compute_at(block, work.loops(leader)[depth - 1])
    for buffer in range(len(schedule.get(block).writes)):
        schedule.set_scope(block, buffer, "local")
    length = math.prod(int(schedule.get(loop).extent) for loop in work.loops(name)[depth:])
    if length != math.prod(accesses.reduction.values()):
        return False
    work.leaders[name] = leader
    return True


def _bind(work: _Work, name: str, accesses: BlockAccesses) -> bool:
    """Give every result a thread."""
    if _is_bound(work, name) or name in work.leaders:
        return False
    threads = work.loops(name)[: _result_loops(accesses)]
    if accesses.reduction:
        _keep_in_register(work.schedule, work.schedule.get_sblock(name), threads)
    _bind_loops(work.schedule, threads)
    return True


def _result_loops(accesses: BlockAccesses) -> int:
    return max(len(accesses.spatial), 1)


def _is_bound(work: _Work, name: str) -> bool:
    return any(work.schedule.get(loop).thread_binding is not None for loop in work.loops(name))


def _bind_loops(schedule: Any, loops: list[Any]) -> None:
    loop = schedule.fuse(*loops)
    extent = int(schedule.get(loop).extent)
    block, thread = schedule.split(loop, [None, min(THREADS, max(extent, 1))])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")


def _keep_in_register(schedule: Any, block: Any, loops: list[Any]) -> None:
    """Add in a register, and store at the end: both in the innermost of these loops.

    To be done before they are fused and split: TVM would forget that the last block of threads is
    not full.
    """
    for buffer in range(len(schedule.get(block).writes)):
        copy = schedule.cache_write(block, buffer, "local")
        schedule.reverse_compute_at(copy, loops[-1])


def _start_before_loops(work: _Work, name: str, accesses: BlockAccesses) -> bool:
    """Write what a reduction starts from before its loops, not in their first turn."""
    loops = work.loops(name)
    bound = [work.schedule.get(loop).thread_binding is not None for loop in loops]
    if not accesses.reduction or True not in bound:
        return False
    inside = loops[len(bound) - bound[::-1].index(True) :]
    if not inside:  # a reduction of one element
        return False
    work.schedule.decompose_reduction(work.schedule.get_sblock(name), inside[0])
    return True
