"""Kernels of a program → one ELF object of plain C functions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from edgepress.targets.base import CompileFailed, Target
from edgepress.targets.load import tvm_target
from edgepress.targets.lowering.plain import plain_function
from edgepress.targets.program import Program

_WORKSPACE_ALIGNMENT_BYTES = 64
_ALLOCATE_WORKSPACE = "tirx.TVMBackendAllocWorkspace"
_INDEX_BITS = 32
# Give the last, partly filled vector of a loop code of its own.
_PASS_OPTIONS = {"s_tir.LoopPartition": {"partition_const_loop": True}}
_CPU_DEVICE_TYPE = 1


def compile_kernels(program: Program, target: Target) -> bytes:
    """Compile every kernel of a program for a target.

    A kernel is either a flat function made by `plain_function` or a scheduled s_tir function whose
    parameters are buffers; both go through the same passes. The bytes depend on nothing but the
    program and the target.

    Sets `program.workspace_bytes`.

    Returns:
        An ELF relocatable object. Each kernel is `int32_t NAME(void *, …)`. It refers to the
        pointer variables `__TVMBackendAllocWorkspace`, `__TVMBackendFreeWorkspace` and
        `__TVMBackendParallelLaunch` where kernels need them, and to libc and libm.

    Raises:
        CompileFailed: TVM or LLVM refused; carries their message.
    """
    module = _build(program, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def kernel_assembly(program: Program, target: Target) -> str:
    """Assembly text of every kernel, as LLVM writes it.

    Raises:
        CompileFailed: TVM or LLVM refused; carries their message.
    """
    return str(_build(program, target).inspect_source("asm"))


def _build(program: Program, target: Target) -> Any:
    llvm = tvm_target(target)
    functions = {
        name: function.with_attr("global_symbol", name)
        for name, function in sorted(program.kernels.items())
    }
    try:
        module = tirx.transform.BindTarget(llvm.with_host(llvm))(tvm.IRModule(functions))
        with tvm.ir.transform.PassContext(config=_PASS_OPTIONS):
            module = tvm.ir.transform.Sequential(_lowering_passes())(module)
        program.workspace_bytes = max(map(_workspace_bytes, module.functions.values()), default=0)
        return tvm.get_global_func("target.build.llvm")(module, llvm)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileFailed(
            f"TVM could not compile the kernels for {target.name}.", str(error)
        ) from error


@tvm.ir.transform.module_pass(opt_level=0, name="edgepress.PlainFunctions")
def _plain_functions(module: Any, _context: Any) -> Any:
    """Give functions with buffer parameters the plain C signature."""
    functions = {}
    for variable, function in module.functions.items():
        if all(tirx.is_buffer_var(parameter) for parameter in function.params):
            plain = plain_function(variable.name_hint, list(function.params), function.body)
            function = plain.with_attr("target", function.attrs["target"])
        functions[variable] = function
    return tvm.IRModule(functions)


@tirx.transform.prim_func_pass(opt_level=0, name="edgepress.LocalsOnStack")
def _locals_on_stack(function: Any, _module: Any, _context: Any) -> Any:
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


@tirx.transform.prim_func_pass(opt_level=0, name="edgepress.OnCpu")
def _on_cpu(function: Any, _module: Any, _context: Any) -> Any:
    """Say which device's workspace to use; LowerTVMBuiltin wants to know."""
    body = function.body
    for key, value in (("device_type", _CPU_DEVICE_TYPE), ("device_id", 0)):
        body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
    return function.with_body(body)


@tirx.transform.prim_func_pass(opt_level=0, name="edgepress.ReturnZero")
def _return_zero(function: Any, _module: Any, _context: Any) -> Any:
    """End in `return 0`. Any earlier, LowerTVMBuiltin would free the workspace after it."""
    return function.with_body(tirx.SeqStmt([function.body, tirx.Return(tirx.const(0, "int32"))]))


def _lowering_passes() -> list[Any]:
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
        _locals_on_stack,
        _plain_functions,
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(_INDEX_BITS),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.SplitHostDevice(),
        _on_cpu,
        tirx.transform.LowerTVMBuiltin(),
        _return_zero,
        tirx.transform.LowerIntrin(),
    ]


def _workspace_bytes(function: Any) -> int:
    """Bytes that one run of a lowered function asks the workspace for, were all alive at once."""
    total = 0

    def add(call: Any) -> None:
        nonlocal total
        if getattr(call.op, "name", "") == _ALLOCATE_WORKSPACE:
            size = int(call.args[2])
            total += -(-size // _WORKSPACE_ALIGNMENT_BYTES) * _WORKSPACE_ALIGNMENT_BYTES

    tvm_ffi.structural_walk(function.body, (tvm.ir.Call, add))
    return total
