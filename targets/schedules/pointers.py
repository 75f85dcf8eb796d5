"""A pointer that is chosen while a kernel runs, so that rows beyond an image read other memory."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from edgepress.targets.schedules.deferred import deferred
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load


def chosen(
    kernel: Kernel,
    condition: Expr,
    first: tuple[Buffer, Expr],
    second: tuple[Buffer, Expr],
    size: int,
) -> Buffer:
    """Return a buffer of `size` elements that starts at an element of one of two buffers.

    Each buffer comes with the index of its element, which may lie outside where it is not chosen.
    Nothing may be stored to either buffer in the kernel: the compiler takes them for different
    memory than the buffer returned.
    """
    addresses = [tirx.address_of(load(buffer, index)) for buffer, index in (first, second)]
    kind = addresses[0].ty
    pointer = tirx.Var("chosen", kind)
    kernel.emit(tirx.Bind(pointer, deferred(_choice, kind, [condition, *addresses])))
    buffer = tirx.decl_buffer((size,), first[0].ty.dtype.dtype, "chosen")
    kernel.emit(tirx.DeclBuffer(buffer, data=pointer))
    return buffer


def _choice(kind: Any, condition: Expr, first: Expr, second: Expr) -> Expr:
    # tirx.if_then_else takes no pointers, and not all passes do.
    return tvm.ir.Call("prim.if_then_else", [condition, first, second], ret_ty=kind)
