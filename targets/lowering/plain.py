"""TIR functions with a plain C signature: one raw pointer per buffer, 0 on success."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, tirx

_C_CALLING_CONVENTION = 1
# Attribute of a function whose generator binds whatever it uses more than once.
BOUND = "edgepress.bound"


def plain_function(name: str, buffers: Sequence[Any], body: Any) -> Any:
    """Wrap a statement as `int32_t name(void *buffer0, void *buffer1, …)`.

    Args:
        name: symbol of the function in the object.
        buffers: `tirx.Buffer`s that `body` loads from and stores to, in the order of the C
            parameters. They are declared here, must not alias, and must have constant shapes.
        body: a `tirx.Stmt` whose only free variables are the buffers. It does not return: the
            compiler adds `return 0` after it has placed what frees the function's workspace.

    Returns:
        A `tirx.PrimFunc` that `edgepress.targets.compile.compile_kernels` accepts.
    """
    pointers = [
        tirx.Var(buffer.name, ir.PointerType(ir.PrimType(buffer.ty.dtype.dtype), "global"))
        for buffer in buffers
    ]
    declarations = [
        tirx.DeclBuffer(buffer, data=pointer)
        for buffer, pointer in zip(buffers, pointers, strict=True)
    ]
    function = tirx.PrimFunc(
        pointers,
        tirx.SeqStmt([*declarations, body]),
        ret_type=ir.PrimType("int32"),
    )
    return function.with_attrs(
        {
            "global_symbol": name,
            "tirx.noalias": True,
            "calling_conv": _C_CALLING_CONVENTION,
        }
    )
