"""Kernels of a program → one ELF object: of plain C functions, or of machine code for a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from edgepress.targets.base import CompileFailed, Target
from edgepress.targets.load import tvm_target
from edgepress.targets.lowering.tir import lower_functions
from edgepress.targets.program import Program

_WORKSPACE_ALIGNMENT_BYTES = 64
_ALLOCATE_WORKSPACE = "tirx.TVMBackendAllocWorkspace"


def compile_kernels(program: Program, target: Target) -> bytes:
    """Compile every kernel of a program for a target.

    A kernel is either a flat function made by `plain_function` or a scheduled s_tir function whose
    parameters are buffers; both go through the same passes. The bytes depend on nothing but the
    program and the target.

    Sets `program.workspace_bytes`.

    Returns:
        An ELF relocatable object. Each kernel is `int32_t NAME(void *, …)`. It refers to the
        pointer variables `__TVMBackendAllocWorkspace`, `__TVMBackendFreeWorkspace` and
        `__TVMBackendParallelLaunch` where kernels need them, and to libc and libm. For a GPU it is
        what `edgepress.targets.cuda.compile.compile_cuda` returns.

    Raises:
        CompileFailed: TVM, LLVM or a CUDA compiler refused; carries their message.
    """
    if target.is_cuda:
        from edgepress.targets.cuda.compile import compile_cuda

        return compile_cuda(program, target)
    return _object(_build(program, target))


def compile_with_assembly(program: Program, target: Target) -> tuple[bytes, str]:
    """Compile as `compile_kernels` does; return the object, and its code as assembly text.

    Raises:
        CompileFailed: TVM or LLVM refused; carries their message. Or the target has a GPU, whose
            machine code has no text here.
    """
    module = _build(program, target)
    return _object(module), str(module.inspect_source("asm"))


def kernel_assembly(program: Program, target: Target) -> str:
    """Assembly text of every kernel, as LLVM writes it.

    Raises:
        CompileFailed: as `compile_with_assembly`.
    """
    return str(_build(program, target).inspect_source("asm"))


def _build(program: Program, target: Target) -> Any:
    if target.is_cuda:
        raise CompileFailed(
            f"the kernels of {target.name} run on a GPU, whose instructions edgepress cannot read. "
            "Ask for a target whose CPU runs them."
        )
    llvm = tvm_target(target)
    try:
        module = lower_functions(program.kernels, llvm)
        program.workspace_bytes = max(map(_workspace_bytes, module.functions.values()), default=0)
        return tvm.get_global_func("target.build.llvm")(module, llvm)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileFailed(
            f"TVM could not compile the kernels for {target.name}.", str(error)
        ) from error


def _object(module: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


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
