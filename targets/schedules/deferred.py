"""Calls that TVM's passes leave alone and that become other expressions before code is generated.

For what the passes do not know, such as a choice between two pointers, and for what would keep them
busy: a shuffle of 64 bytes is 64 nodes, which every pass visits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi

from edgepress.targets.schedules.emit import Expr

_PREFIX = "edgepress."
_EXPANSIONS: dict[str, Callable[..., Expr]] = {}


def deferred(expand: Callable[..., Expr], kind: Any, arguments: Sequence[Expr]) -> Expr:
    """Return a call of type `kind` that becomes `expand(kind, *arguments)`."""
    name = f"{_PREFIX}{expand.__module__}.{expand.__name__}"
    _EXPANSIONS[name] = expand
    return tvm.ir.Call("tirx.call_pure_extern", [tvm.ir.StringImm(name), *arguments], ret_ty=kind)


def expand_deferred(function: Any) -> Any:
    """Replace such calls in a TIR function."""

    def replace(call: Any) -> Any:
        if getattr(call.op, "name", "") != "tirx.call_pure_extern":
            return call
        name, *arguments = call.args
        expand = _EXPANSIONS.get(getattr(name, "value", ""))
        return call if expand is None else expand(call.ty, *arguments)

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.Call, replace)))
