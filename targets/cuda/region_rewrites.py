"""Relax functions, rewritten so that TVM fuses more: a launch costs what a small kernel does."""

from __future__ import annotations

import functools
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.dpl import is_op, rewrite_call, wildcard

_BINARY = {
    "relax.max": relax.op.maximum,
    "relax.min": relax.op.minimum,
    "relax.sum": relax.op.add,
}


def ease_fusion(module: Any) -> Any:
    """Return a module of the same functions, without operators that end a fused function."""
    functions = {
        variable: _rewritten(function) if isinstance(function, relax.Function) else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _rewritten(function: Any) -> Any:
    for name in _BINARY:
        function = _without_stacks(function, name)
    return _without_idle_broadcasts(function)


def _without_stacks(function: Any, name: str) -> Any:
    """Turn a reduction of stacked tensors into operators of two tensors each.

    TVM imports Max, Min and Sum of several tensors so, and fuses nothing with the result.
    """
    tensors = wildcard()
    stack = is_op("relax.stack")(tensors)

    def rewrite(call: Any, found: Any) -> Any:
        axes = [int(axis) for axis in call.attrs.axis or []]
        if axes != [int(found[stack].attrs.axis)] or call.attrs.keepdims:
            return call
        if not isinstance(found[tensors], relax.Tuple):
            return call
        return functools.reduce(_BINARY[name], found[tensors].fields)

    return rewrite_call(is_op(name)(stack), rewrite, function)


def _without_idle_broadcasts(function: Any) -> Any:
    """Drop broadcasts to the shape that a tensor has; TVM makes reshapes of them."""
    tensor = wildcard()

    def rewrite(call: Any, found: Any) -> Any:
        same = tvm_ffi.structural_equal(call.ty.shape, found[tensor].ty.shape)
        return found[tensor] if same else call

    return rewrite_call(is_op("relax.broadcast_to")(tensor, wildcard()), rewrite, function)
