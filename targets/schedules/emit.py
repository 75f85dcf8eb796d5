"""Writes kernels as TIR nodes: loops, vector loads and stores, values in registers.

A generator opens a `Kernel`, names its pointer arguments, and emits statements; `with
kernel.loop(...)` nests. Vectors are explicit (`load(buffer, index, lanes)`), registers are local
buffers with constant indices that LLVM keeps in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from edgepress.targets.lowering.plain import plain_function

Expr = Any
Buffer = Any


class Kernel:
    """One kernel under construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._arguments: list[Buffer] = []
        self._blocks: list[list[Any]] = [[]]

    def argument(self, name: str, dtype: str, size: int) -> Buffer:
        """Declare the next pointer argument: `size` elements of `dtype`."""
        buffer = tirx.decl_buffer((max(size, 1),), dtype, name)
        self._arguments.append(buffer)
        return buffer

    def registers(self, name: str, dtype: str, size: int) -> Buffer:
        """Allocate `size` elements of this block that stay in registers if indices are constant.

        One vector each: TVM moves what is larger than 1 KB to the heap.
        """
        buffer = tirx.decl_buffer((size,), dtype, name)
        self.emit(tirx.AllocBuffer(buffer))
        return buffer

    def workspace(self, name: str, dtype: str, size: int) -> Buffer:
        """Allocate `size` elements for the rest of this block, from the workspace of the thread."""
        return self.registers(name, dtype, size)

    def emit(self, statement: Any) -> None:
        """Append a statement to the current block."""
        self._blocks[-1].append(statement)

    def store(self, buffer: Buffer, index: Expr, value: Expr, lanes: int = 1) -> None:
        """Store `lanes` neighbouring elements."""
        self.emit(tirx.BufferStore(buffer, value, [_ramp(index, lanes)]))

    def prefetch(self, buffer: Buffer, index: Expr) -> None:
        """Ask for the cache line of an element that is read soon; it may lie behind the buffer."""
        arguments = (tirx.const(value, "int32") for value in (0, 3, 1))  # to read, often, data
        address = tirx.address_of(load(buffer, index))
        self.emit(
            tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *arguments))
        )

    def let(self, name: str, value: Expr) -> Expr:
        """Bind a value for the rest of the block."""
        if isinstance(value, int):
            return value
        var = tirx.Var(name, value.ty)
        self.emit(tirx.Bind(var, value))
        return var

    @contextmanager
    def loop(self, name: str, extent: int, parallel: bool = False) -> Iterator[Expr]:
        """Loop over `0 <= var < extent`; a single iteration makes no loop."""
        if extent == 1:
            yield 0
            return
        var = tirx.Var(name, "int32")
        self._blocks.append([])
        yield var
        body = sequence(self._blocks.pop())
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        self.emit(tirx.For(var, 0, extent, kind, body))

    @contextmanager
    def block(self, condition: Expr) -> Iterator[None]:
        """Emit the statements inside only where the condition holds."""
        self._blocks.append([])
        yield
        self.emit(tirx.IfThenElse(condition, sequence(self._blocks.pop()), None))

    def finish(self) -> Any:
        """Return the TIR function."""
        return plain_function(self.name, self._arguments, sequence(self._blocks[0]))


def sequence(statements: Sequence[Any]) -> Any:
    """Join statements."""
    if not statements:
        return tirx.Evaluate(0)
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def load(buffer: Buffer, index: Expr, lanes: int = 1) -> Expr:
    """Load `lanes` neighbouring elements."""
    return tirx.BufferLoad(buffer, [_ramp(index, lanes)])


def _ramp(index: Expr, lanes: int) -> Expr:
    index = tirx.const(index, "int32") if isinstance(index, int) else index
    return index if lanes == 1 else tirx.Ramp(index, 1, lanes)


def vector(dtype: str, lanes: int) -> str:
    """Name a vector type.

    >>> vector("int8", 16), vector("int8", 1)
    ('int8x16', 'int8')
    """
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: float, dtype: str, lanes: int) -> Expr:
    """Repeat a constant."""
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def repeat(value: Expr, lanes: int) -> Expr:
    """Repeat a scalar expression."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Convert every lane."""
    return tirx.Cast(vector(dtype, lanes), value)


def lanes_of(value: Expr, first: int, count: int, lanes: int) -> Expr:
    """Take `count` of `lanes` lanes."""
    if (first, count) == (0, lanes):
        return value
    return tirx.Shuffle([value], [tirx.const(first + i, "int32") for i in range(count)])


def folded(kernel: Kernel, value: Expr, lanes: int, choose: Callable[[Expr, Expr], Expr]) -> Expr:
    """Reduce the lanes of a vector to one value."""
    while lanes > 1:
        value, lanes = kernel.let("whole", value), lanes // 2
        value = choose(
            lanes_of(value, 0, lanes, 2 * lanes), lanes_of(value, lanes, lanes, 2 * lanes)
        )
    return kernel.let("folded", value)


def chunks(size: int, widest: int) -> list[tuple[int, int, int]]:
    """Split `size` elements into `(first, lanes, count)` with lanes falling in powers of two.

    >>> chunks(39, 16)
    [(0, 16, 2), (32, 4, 1), (36, 2, 1), (38, 1, 1)]
    """
    parts, first, lanes = [], 0, widest
    while first < size:
        if count := (size - first) // lanes:
            parts.append((first, lanes, count))
            first += count * lanes
        lanes //= 2
    return parts
