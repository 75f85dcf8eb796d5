"""The passes from TIR, scheduled or flat, to what LLVM takes: one pipeline for all kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from edgepress.targets.lowering.plain import BOUND, plain_function
from edgepress.targets.schedules.deferred import expand_deferred
from edgepress.targets.schedules.elementary import expand_elementary, expand_erf

_INDEX_BITS = 32
# Give the last, partly filled vector of a loop code of its own.
_PASS_OPTIONS = {"s_tir.LoopPartition": {"partition_const_loop": True}}
_CPU_DEVICE_TYPE = 1


def lower_functions(functions: dict[str, Any], llvm: Any) -> Any:
    """Lower TIR functions to plain C functions over pointers.

    Args:
        functions: name to `PrimFunc`: made by `plain_function`, or s_tir with buffer parameters.
        llvm: a `tvm.target.Target` of kind llvm.

    Returns:
        An `IRModule` for `target.build.llvm`.

    Raises:
        RuntimeError, ValueError, TypeError: TVM refused a function.
    """
    named = {
        name: without_offsets(function).with_attr("global_symbol", name)
        for name, function in sorted(functions.items())
    }
    module = tirx.transform.BindTarget(llvm.with_host(llvm))(tvm.IRModule(named))
    with tvm.ir.transform.PassContext(config=_PASS_OPTIONS):
        return tvm.ir.transform.Sequential(_passes())(module)


def without_offsets(function: Any) -> Any:
    """Let buffers start where their pointers point; some of TVM's operators leave that open."""
    renewed: dict[Any, Any] = {
        parameter: tirx.decl_buffer(parameter.ty.shape, str(parameter.ty.dtype), parameter.name)
        for parameter in function.params
        if tirx.is_buffer_var(parameter) and isinstance(parameter.ty.elem_offset, tvm.ir.Var)
    }
    if not renewed:
        return function
    return tvm_ffi.structural_map(
        function, (tvm.ir.Var, lambda variable: renewed.get(variable, variable))
    )


def _pass(change: Callable[[Any], Any]) -> Any:
    """Make a pass of what changes one function."""

    def run(function: Any, _module: Any, _context: Any) -> Any:
        return change(function)

    return tirx.transform.prim_func_pass(run, opt_level=0, name=f"edgepress.{change.__name__}")


def _plain(function: Any) -> Any:
    """Give a function with buffer parameters the plain C signature."""
    if not all(tirx.is_buffer_var(parameter) for parameter in function.params):
        return function
    name = str(function.attrs["global_symbol"])
    plain = plain_function(name, list(function.params), function.body)
    return plain.with_attr("target", function.attrs["target"])


def _locals_on_stack(function: Any) -> Any:
    """Turn `local` buffers into `global` ones.

    LowerTVMBuiltin leaves small global buffers on the stack, where LLVM makes registers of them,
    and takes local ones from the workspace, however small.
    """
    replaced: dict[Any, Any] = {}

    def replace(variable: Any) -> Any:
        if not tirx.is_buffer_var(variable) or variable.ty.storage_scope != "local":
            return variable
        if variable not in replaced:
            kind = variable.ty
            replaced[variable] = tirx.decl_buffer(kind.shape, str(kind.dtype), variable.name)
        return replaced[variable]

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.Var, replace)))


def _common_subexpressions(function: Any) -> Any:
    """Compute once what occurs twice; the slowest pass by far for a kernel of many statements.

    A generator that has bound all of it itself says so.
    """
    if function.attrs is not None and BOUND in function.attrs:
        return function
    return tirx.transform.CommonSubexprElim()(tvm.IRModule({"kernel": function}))["kernel"]


def _on_cpu(function: Any) -> Any:
    """Say which device's workspace to use; LowerTVMBuiltin wants to know."""
    body = function.body
    for key, value in (("device_type", _CPU_DEVICE_TYPE), ("device_id", 0)):
        body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
    return function.with_body(body)


def _return_zero(function: Any) -> Any:
    """End in `return 0`. Any earlier, LowerTVMBuiltin would free the workspace after it."""
    return function.with_body(tirx.SeqStmt([function.body, tirx.Return(tirx.const(0, "int32"))]))


def _passes() -> list[Any]:
    """The CPU part of TVM's s_tir pipeline, with a plain C signature for its packed one."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        _pass(_locals_on_stack),
        _pass(_plain),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(_INDEX_BITS),
        s_tir.transform.LoopPartition(),
        _pass(expand_erf),  # a loop that calls erf would not be vectorised
        tirx.transform.VectorizeLoop(True),
        _pass(expand_elementary),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        _pass(_common_subexpressions),
        tirx.transform.VerifyMemory(),
        tirx.transform.SplitHostDevice(),
        _pass(_on_cpu),
        tirx.transform.LowerTVMBuiltin(),
        _pass(_return_zero),
        tirx.transform.LowerIntrin(),
        _pass(expand_deferred),
    ]
