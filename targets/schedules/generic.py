"""The schedule of every kernel that TVM writes: inline, vectorise, keep sums in registers.

Four kinds of block remain after cheap producers are inlined:

- element by element: neighbouring axes that all accesses walk through without a gap are fused, and
  the innermost is vectorised; a constant border is filled first, then the inside copied;
- reductions whose innermost result axis is contiguous (matrix products, pools over channels): a
  tile of results stays in vector registers while the reduction runs;
- reductions along contiguous memory (softmax, mean over the last axis): partial results per lane,
  combined at the end;
- anything else is left as TVM wrote it, and LLVM does what it can.

A block that resists one plan gets the next simpler one; results are equal up to the order in which
floats are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from edgepress.targets.base import Target
from edgepress.targets.isa.base import load_isa
from edgepress.targets.load import tvm_target
from edgepress.targets.lowering.tir import lower_functions
from edgepress.targets.schedules.accesses import BlockAccesses, block_accesses

_PARALLEL_FROM_OPERATIONS = 1 << 16
_FEWEST_LANES = 4
_ROWS = 4  # rows of a tile of results
_VECTORS = 2  # vectors in a row of a tile
_PARTIAL_VECTORS = 4  # partial sums, as many as hide the latency of an addition
_MAIN = "main"

Plan = Callable[["_Work", Any, BlockAccesses], None]


def schedule(function: Any, target: Target) -> Any:
    """Schedule a function of TVM for a target.

    Args:
        function: an s_tir `PrimFunc` of static shapes, one loop per block axis, unscheduled.
        target: decides the vector width, and whether loops run on several cores.

    Returns:
        An equivalent s_tir `PrimFunc`; the same function where it has no blocks.
    """
    try:
        work = _Work(function, target)
        _inline_producers(work)
        for block in work.blocks():
            _schedule_block(work, block)
        scheduled = work.schedule.mod[_MAIN]
        body = tvm_ffi.structural_map(scheduled.body, (s_tir.SBlockRealize, _likely))
        scheduled = scheduled.with_body(body)
        if not work.changed:
            return _on_one_core(function)
        lower_functions({_MAIN: scheduled}, tvm_target(target))
    except (RuntimeError, ValueError):  # such as a body that is no block
        return _on_one_core(function)
    return scheduled


def _on_one_core(function: Any) -> Any:
    """Undo what TVM's hand-written loops say of threads, which know no size of the work."""

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    def unmarked(statement: Any) -> Any:
        return statement.body if statement.attr_key == "pragma_scope" else statement

    changes = [(tirx.For, serial), (tirx.AttrStmt, unmarked)]
    return function.with_body(tvm_ffi.structural_map(function.body, changes))


def _likely(realize: Any) -> Any:
    """Mark the condition of a partly filled vector, so that LoopPartition cuts it off the loop."""
    if isinstance(realize.predicate, tirx.IntImm):
        return realize
    return s_tir.SBlockRealize(realize.iter_values, tirx.likely(realize.predicate), realize.block)


class _Work:
    """A schedule in progress."""

    def __init__(self, function: Any, target: Target) -> None:
        self.schedule = s_tir.Schedule(tvm.IRModule({_MAIN: function}))
        self.vector_bytes = load_isa(target.isa).vector_bytes
        self.cores = target.cores
        self.changed = False

    def blocks(self) -> list[str]:
        """Names of all blocks in order."""
        root = self.schedule.get_sblock("root")
        return [self.schedule.get(b).name_hint for b in self.schedule.get_child_blocks(root)]

    def accesses(self, block: Any) -> BlockAccesses | None:
        return block_accesses(self.schedule.get(self.schedule.get_sblock(block)))

    def lanes(self, accesses: BlockAccesses) -> int:
        """Lanes of a vector of the widest element."""
        return max(_FEWEST_LANES, self.vector_bytes // max(accesses.item_bytes, 4))

    def worth_threads(self, accesses: BlockAccesses) -> bool:
        return self.cores > 1 and accesses.operations >= _PARALLEL_FROM_OPERATIONS


def _inline_producers(work: _Work) -> None:
    """Compute what is cheap where it is used."""
    schedule = work.schedule
    for name in work.blocks():
        producer = work.accesses(name)
        consumers = [
            work.accesses(schedule.get(block).name_hint)
            for block in schedule.get_consumers(schedule.get_sblock(name))
        ]
        if producer is None or None in consumers or not consumers or producer.reduction:
            continue
        if all(_worth_inlining(producer, consumer) for consumer in consumers if consumer):
            try:
                schedule.compute_inline(schedule.get_sblock(name))
                work.changed = True
            except RuntimeError:  # such as a store that is no plain assignment
                continue


def _worth_inlining(producer: BlockAccesses, consumer: BlockAccesses) -> bool:
    computed_again = consumer.operations > producer.operations
    if producer.expensive and computed_again:
        return False
    if consumer.reduction:
        linear = all(None not in load.strides.values() for load in producer.loads)
        return linear and not producer.branches
    return True


def _schedule_block(work: _Work, name: str) -> None:
    """Apply the first plan that fits and that TVM accepts."""
    accesses = work.accesses(name)
    if accesses is None or not accesses.stores or not accesses.spatial | accesses.reduction:
        return
    for plan in _plans(accesses):
        before = work.schedule.copy()
        try:
            plan(work, name, accesses)
            work.changed = True
            return
        except (RuntimeError, ValueError):
            work.schedule = before


def _plans(accesses: BlockAccesses) -> list[Plan]:
    if not accesses.reduction:
        plans: list[Plan] = [_padding] if accesses.branches and len(accesses.loads) == 1 else []
        return [*plans, _elementwise, _outer_parallel]
    plans = []
    inner, extent = _last(accesses.spatial)
    along, length = _last(accesses.reduction)
    if extent >= _FEWEST_LANES and accesses.contiguous(inner):
        plans.append(_tile_of_results)
    if length >= _FEWEST_LANES and accesses.contiguous(along) and len(accesses.stores) == 1:
        plans.append(_partial_results)
    # Strided loads are worth it where more is done than loading.
    if extent >= _FEWEST_LANES and len(accesses.loads) > 1 and None not in accesses.strides(inner):
        plans.append(_tile_of_results)
    return [*plans, _outer_parallel]


def _last(axes: dict[Any, int]) -> tuple[Any, int]:
    return list(axes.items())[-1] if axes else (None, 0)


def _padding(work: _Work, name: str, _accesses: BlockAccesses) -> None:
    """Fill everything with the constant of a border, then copy the inside: two plain blocks."""
    schedule = work.schedule
    block = schedule.get_sblock(name)
    border = schedule.decompose_padding(block, schedule.get_loops(block)[0])
    for part in (schedule.get(border).name_hint, name):
        found = work.accesses(part)
        if found is None or found.branches:
            raise ValueError("a border is left in the block")
        _elementwise(work, part, found)


def _elementwise(work: _Work, name: str, accesses: BlockAccesses) -> None:
    schedule = work.schedule
    block = schedule.get_sblock(name)
    axes, loops = list(accesses.spatial), list(schedule.get_loops(block))
    extent = _fuse_gapless(schedule, accesses, axes, loops, accesses.spatial)
    lanes = work.lanes(accesses)
    gathers = any(stride not in (0, 1) for stride in accesses.strides(axes[-1]))
    if accesses.branches or (gathers and not accesses.expensive) or extent < _FEWEST_LANES:
        _parallel(work, accesses, loops)
        return
    if extent >= lanes:
        outer, inner = schedule.split(loops.pop(), [None, lanes])
        loops += [outer]
    else:
        inner = loops.pop()
    schedule.vectorize(inner)
    if extent % lanes == 0 or len(loops) > 1:
        _parallel(work, accesses, loops)


def _tile_of_results(work: _Work, name: str, accesses: BlockAccesses) -> None:
    schedule = work.schedule
    block = schedule.get_sblock(name)
    count = len(accesses.spatial)
    if len(accesses.stores) > 1:
        raise ValueError("a reduction of two results at once has no tile")
    copy = schedule.cache_write(block, 0, "local")
    loops = list(schedule.get_loops(block))
    spatial, reduction = loops[:count], loops[count:]
    axes = list(accesses.spatial)
    lanes = min(work.lanes(accesses), 1 << (accesses.spatial[axes[-1]].bit_length() - 1))
    vectors = _VECTORS if accesses.spatial[axes[-1]] % (lanes * _VECTORS) == 0 else 1
    column, group, lane = schedule.split(spatial.pop(), [None, vectors, lanes])
    inner = [group, lane]
    rows = _row_axis(accesses, axes)
    if rows is not None:
        factor = next(f for f in (_ROWS, 3, 2) if accesses.spatial[axes[rows]] % f == 0)
        spatial[rows], row = schedule.split(spatial[rows], [None, factor])
        inner.insert(0, row)
    schedule.reorder(*spatial, column, *reduction, *inner)
    schedule.reverse_compute_at(copy, column)
    schedule.vectorize(lane)
    for loop in inner[:-1]:
        schedule.unroll(loop)
    copied = schedule.get_loops(copy)
    last = schedule.get(copied[-1])
    if int(last.extent) == lanes:
        schedule.vectorize(copied[-1])
    elif int(last.extent) == lanes * vectors:
        schedule.vectorize(schedule.split(copied[-1], [None, lanes])[1])
    whole = accesses.spatial[axes[-1]] % (lanes * vectors) == 0
    _parallel(work, accesses, [*spatial, column] if whole else spatial)
    schedule.decompose_reduction(block, reduction[0])


def _row_axis(accesses: BlockAccesses, axes: list[Any]) -> int | None:
    """Find an axis whose neighbours share a vector load: rows of a tile of a matrix product."""
    column = axes[-1]
    for place in reversed(range(len(axes) - 1)):
        axis = axes[place]
        shares = any(
            load.strides[column] == 1 and load.strides[axis] == 0 for load in accesses.loads
        )
        if shares and any(accesses.spatial[axis] % factor == 0 for factor in (2, 3)):
            return place
    return None


def _partial_results(work: _Work, name: str, accesses: BlockAccesses) -> None:
    schedule = work.schedule
    block = schedule.get_sblock(name)
    loops = list(schedule.get_loops(block))
    count = len(accesses.spatial)
    axes, spatial, reduction = list(accesses.reduction), loops[:count], loops[count:]
    extent = _fuse_gapless(schedule, accesses, axes, reduction, accesses.reduction)
    lanes = min(work.lanes(accesses), 1 << (extent.bit_length() - 1))
    vectors = _PARTIAL_VECTORS if extent % (lanes * _PARTIAL_VECTORS) == 0 else 1
    _, inner = schedule.split(reduction.pop(), [None, lanes * vectors])
    partial = schedule.rfactor(inner, count)
    schedule.set_scope(partial, 0, "local")
    loops = list(schedule.get_loops(partial))
    spatial, reduction, lane = loops[:count], loops[count:-1], loops[-1]
    if spatial:  # not compute_at: it would lose the condition of the last, partly filled vector
        schedule.reverse_compute_at(block, spatial[-1])
    if vectors > 1:
        group, lane = schedule.split(lane, [vectors, lanes])
        schedule.unroll(group)
    schedule.vectorize(lane)
    _parallel(work, accesses, spatial)
    schedule.decompose_reduction(partial, reduction[0])


def _outer_parallel(work: _Work, name: str, accesses: BlockAccesses) -> None:
    loops = list(work.schedule.get_loops(work.schedule.get_sblock(name)))
    _parallel(work, accesses, loops[: len(accesses.spatial)])


def _parallel(work: _Work, accesses: BlockAccesses, loops: list[Any]) -> None:
    """Run the outermost loops on all cores, where the work outweighs waking them."""
    if loops and work.worth_threads(accesses):
        work.schedule.parallel(work.schedule.fuse(*loops))


def _fuse_gapless(
    schedule: Any,
    accesses: BlockAccesses,
    axes: list[Any],
    loops: list[Any],
    extents: dict[Any, int],
) -> int:
    """Fuse the last loop with those around it while every access goes on where it stopped.

    `axes` and `loops` shrink to what is left; returns the extent of the last loop.
    """
    touched = (*accesses.loads, *accesses.stores)
    extent = extents[axes[-1]]
    while len(axes) > 1:
        inner, outer = axes[-1], axes[-2]
        for access in touched:
            step = access.strides[inner]
            if step is None or access.strides[outer] != step * extent:
                return extent
        loops[-2:] = [schedule.fuse(*loops[-2:])]
        extent *= extents[outer]
        axes.pop(-2)
    return extent
