"""A function of TVM → its nests of loops, each a function of its own over pointers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from edgepress.targets.cuda.region_threads import (
    EXTENT,
    allocated,
    is_parallel,
    on_one_block,
    over_threads,
)
from edgepress.targets.lowering.plain import plain_function
from edgepress.targets.lowering.tir import without_offsets

Memory = tuple[str, tuple[int, ...]]
"""The dtype and shape of a tensor."""

_INDEX_BITS = 32
_TARGET = {"kind": "cuda", "arch": "sm_80", "host": {"kind": "llvm"}}


@dataclass(frozen=True)
class Nest:
    """A nest of loops.

    Attributes:
        function: a flat `PrimFunc` over pointers, whose body binds its threads.
        arguments: what it touches: places among the parameters and, after them, the scratch.
        written: those that it writes.
        blocks: of threads.
        threads: of a block.
    """

    function: Any
    arguments: tuple[int, ...]
    written: tuple[int, ...]
    blocks: int
    threads: int


class FlatFunction:
    """A function without blocks.

    Attributes:
        nests: in execution order.
        scratch: memory between and beside them.
    """

    def __init__(self, function: Any) -> None:
        """Cut an s_tir `PrimFunc` whose parameters are buffers; blocks may be bound to threads.

        Raises:
            ValueError: its nests cannot do without each other's scalars or shared memory.
        """
        self.nests: list[Nest] = []
        self.scratch: list[Memory] = []
        self._places: dict[Any, int] = {}
        self._parameters = len(function.params)
        flat = _flat(function)
        pointers = {pointer: place for place, pointer in enumerate(flat.params)}
        steps: list[list[Any]] = []
        for statement in _statements(flat.body):
            if isinstance(statement, tirx.DeclBuffer):
                self._places[statement.buffer] = pointers[statement.data]
            elif isinstance(statement, tirx.AllocBuffer):
                self._keep(statement)
            elif isinstance(statement, tirx.Bind):
                raise ValueError(f"several nests may use {statement.var}")
            elif _runs_on_threads(statement) or not steps or _runs_on_threads(steps[-1][-1]):
                steps.append([statement])
            else:
                steps[-1].append(statement)
        for statements in self._with_one_writer(steps):
            if _is_bound(statements[0]):
                self._add(statements[0])
            elif len(statements) == 1 and is_parallel(statements[0]):
                self._add(over_threads(statements[0]))
            else:
                self._add(self._on_one_block(statements))

    def _with_one_writer(self, steps: list[list[Any]]) -> list[list[Any]]:
        """Join the steps that write the same memory: in a program only one call writes a tensor."""
        writers: dict[int, list[int]] = {}
        for number, statements in enumerate(steps):
            for buffer in _touched(statements)[1]:
                if buffer in self._places:
                    writers.setdefault(self._places[buffer], []).append(number)
        joined = steps
        for numbers in writers.values():
            together = joined[numbers[0] : numbers[-1] + 1]
            if len(together) > 1:
                whole = [statement for statements in together for statement in statements]
                if any(_is_bound(statement) for statement in whole):
                    raise ValueError("several kernels would write the same memory")
                joined = [*joined[: numbers[0]], whole, *joined[numbers[-1] + 1 :]]
                return self._with_one_writer(joined)
        return joined

    def _keep(self, allocation: Any) -> Any:
        """Let the program provide what TVM allocates."""
        buffer = allocation.buffer
        dtype, shape = str(buffer.ty.dtype), tuple(int(size) for size in buffer.ty.shape)
        self._places[buffer] = self._parameters + len(self.scratch)
        self.scratch.append((dtype, shape))
        return tirx.Evaluate(0)

    def _on_one_block(self, statements: list[Any]) -> Any:
        """Run statements one after the other, each on as many threads of a block as it can be."""
        kept = [tvm_ffi.structural_map(s, (tirx.AllocBuffer, self._keep)) for s in statements]
        return on_one_block(kept)

    def _add(self, body: Any) -> None:
        if any(buffer.ty.storage_scope == "global" for buffer in allocated(body)):
            raise ValueError("each thread would need global memory of its own")
        body = tvm_ffi.structural_map(body, [(tirx.For, _serial), (tirx.AttrStmt, _unmarked)])
        touched, stored = _touched(body)
        used: dict[int, list[Any]] = {}
        for buffer in touched:
            if buffer in self._places:
                used.setdefault(self._places[buffer], []).append(buffer)
        arguments = sorted(used)
        written = {self._places[buffer] for buffer in stored if buffer in self._places}
        extents = _extents(body)
        self.nests.append(
            Nest(
                function=_over_pointers([used[place] for place in arguments], body),
                arguments=tuple(arguments),
                written=tuple(sorted(written)),
                blocks=extents.get("blockIdx.x", 1),
                threads=extents.get("threadIdx.x", 1),
            )
        )


def _over_pointers(buffers: list[list[Any]], body: Any) -> Any:
    """Wrap a statement as a function of one pointer per list of buffers that are the same."""
    pointers, declarations = [], []
    for same in buffers:
        element = tvm.ir.PrimType(same[0].ty.dtype.dtype)
        pointers.append(tirx.Var(same[0].name, tvm.ir.PointerType(element, "global")))
        declarations += [tirx.DeclBuffer(buffer, data=pointers[-1]) for buffer in same]
    return tirx.PrimFunc(pointers, tirx.SeqStmt([*declarations, body]))


def _flat(function: Any) -> Any:
    """Lower blocks to loops over flat memory behind pointers."""
    target = tvm.target.Target(_TARGET)
    function = without_offsets(function).with_attr("global_symbol", "flat")
    module = tirx.transform.BindTarget(target)(tvm.IRModule({"flat": function}))
    return tvm.ir.transform.Sequential(_passes())(module)["flat"]


def _passes() -> list[Any]:
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.prim_func_pass(_bound_indices, opt_level=0, name="edgepress.bound"),
        tirx.transform.prim_func_pass(_plain, opt_level=0, name="edgepress.plain"),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(_INDEX_BITS),
    ]


def _plain(function: Any, _module: Any, _context: Any) -> Any:
    plain = plain_function("flat", list(function.params), function.body)
    return plain.with_attr("target", function.attrs["target"])


def _bound_indices(function: Any, _module: Any, _context: Any) -> Any:
    """Bound what is loaded to be an index, which lets TVM see that 32 bits are enough.

    It changes nothing, as such indices are within bounds; but to divide 64 bits takes a GPU many
    instructions.
    """

    def load(access: Any) -> Any:
        return tirx.BufferLoad(access.source, _bounded(access.source, access.indices))

    def store(access: Any) -> Any:
        indices = _bounded(access.buffer, access.indices)
        return tirx.BufferStore(access.buffer, access.value, indices)

    changes = [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store)]
    return function.with_body(tvm_ffi.structural_map(function.body, changes))


def _bounded(buffer: Any, indices: Any) -> list[Any]:
    bounded = []
    for index, size in zip(indices, buffer.ty.shape, strict=True):
        loads: list[Any] = []
        tvm_ffi.structural_walk(index, (tvm.ir.TensorLoad, loads.append))
        if any(str(load.ty.dtype) == "int64" for load in loads):
            place = tirx.Max(tirx.Cast("int32", index), tirx.const(0, "int32"))
            last = tirx.const(max(int(size) - 1, 0), "int32")
            index = tirx.Cast("int64", tirx.Min(place, last))
        bounded.append(index)
    return bounded


def _statements(body: Any) -> Iterator[Any]:
    if isinstance(body, tirx.SeqStmt):
        for statement in body.seq:
            yield from _statements(statement)
    elif isinstance(body, tirx.AttrStmt) and body.attr_key != EXTENT:
        yield from _statements(body.body)
    else:
        yield body


def _is_bound(statement: Any) -> bool:
    return isinstance(statement, tirx.AttrStmt) and statement.attr_key == EXTENT


def _runs_on_threads(statement: Any) -> bool:
    return _is_bound(statement) or is_parallel(statement)


def _serial(loop: Any) -> Any:
    """Undo what TVM's hand-written loops say of threads and vectors."""
    if loop.kind == tirx.ForKind.SERIAL:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _unmarked(statement: Any) -> Any:
    return statement if statement.attr_key == EXTENT else statement.body


def _touched(body: Any) -> tuple[list[Any], list[Any]]:
    """Return which buffers occur, and which are stored to."""
    touched: dict[Any, None] = {}
    stored: dict[Any, None] = {}

    def touch(variable: Any) -> None:
        if tirx.is_buffer_var(variable):
            touched[variable] = None

    def store(statement: Any) -> None:
        stored[statement.buffer] = None

    tvm_ffi.structural_walk(body, [(tvm.ir.Var, touch), (tirx.BufferStore, store)])
    return list(touched), list(stored)


def _extents(body: Any) -> dict[str, int]:
    """Return how many threads run along each axis."""
    extents: dict[str, int] = {}

    def note(statement: Any) -> None:
        if statement.attr_key == EXTENT:
            extents[statement.node.thread_tag] = int(statement.value)

    tvm_ffi.structural_walk(body, (tirx.AttrStmt, note))
    return extents
