"""Kernels become an object of plain C functions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from edgepress.targets.base import CompileFailed
from edgepress.targets.compile import compile_kernels, kernel_assembly
from edgepress.targets.load import load_target
from edgepress.targets.lowering.plain import plain_function
from edgepress.targets.program import Call, Program, Tensor
from tests.targets.interpret import run_program
from tests.targets.te_programs import answer, program_of, random_feeds

X86 = load_target("x86-64-v3")


def vector(buffer: Any, lanes: int = 8) -> Any:
    return tirx.BufferLoad(buffer, [tirx.Ramp(0, 1, lanes)])


def flat(name: str, body_of: Any, inputs: int = 3) -> Program:
    """A program of one flat function over vectors of 8 float32; `body_of` gives what to store."""
    buffers = [tirx.decl_buffer((8,), "float32", f"b{i}") for i in range(inputs + 1)]
    store = tirx.BufferStore(buffers[-1], body_of(*buffers[:-1]), [tirx.Ramp(0, 1, 8)])
    return program_of_plain(plain_function(name, buffers, store), name, inputs)


def program_of_plain(function: Any, name: str, inputs: int) -> Program:
    names = tuple(f"b{i}" for i in range(inputs + 1))
    return Program(
        inputs=names[:-1],
        outputs=names[-1:],
        tensors={n: Tensor(n, "float32", (8,)) for n in names},
        calls=[Call(name, names, names[-1:])],
        kernels={name: function},
    )


def two_stages(rows: int) -> Program:
    """A scheduled-form function with a temporary of `rows` * 7 floats."""
    x = te.placeholder((rows, 7), name="x")
    doubled = te.compute((rows, 7), lambda i, j: x[i, j] * 2.0, "doubled")
    k = te.reduce_axis((0, 7), "k")
    total = te.compute((rows,), lambda i: te.sum(doubled[i, k], axis=k), "total")
    return program_of(te.create_prim_func([x, total]))


def test_a_flat_function_runs() -> None:
    program = flat("fused", lambda a, b, c: vector(a) * vector(b) + vector(c))
    feeds = random_feeds(program)
    wanted = feeds["b0"] * feeds["b1"] + feeds["b2"]
    np.testing.assert_allclose(answer(program, X86, feeds), wanted, rtol=1e-6, atol=1e-6)


def test_flat_and_scheduled_functions_share_one_object() -> None:
    program, other = two_stages(5), flat("other", lambda a, b, c: vector(a) + vector(b) * vector(c))
    program.kernels.update(other.kernels)
    feeds = random_feeds(program)
    np.testing.assert_allclose(answer(program, X86, feeds), 2 * feeds["x"].sum(1), rtol=1e-5)
    assert re.findall(r"^([a-z]\w+):$", kernel_assembly(program, X86), re.M) == ["kernel", "other"]


@pytest.mark.parametrize(("rows", "workspace_bytes"), [(5, 0), (100, 2816)])
def test_temporaries_live_on_the_stack_or_in_the_workspace(rows: int, workspace_bytes: int) -> None:
    program = two_stages(rows)
    feeds = random_feeds(program)
    answer(program, X86, feeds)  # checks that what was taken was given back, and no more
    assert program.workspace_bytes == workspace_bytes


def test_local_buffers_stay_out_of_the_workspace() -> None:
    def body(source: Any) -> Any:
        return vector(source)

    buffers = [tirx.decl_buffer((8,), "float32", f"b{i}") for i in range(2)]
    register = tirx.decl_buffer((8,), "float32", "register", scope="local")
    ramp = [tirx.Ramp(0, 1, 8)]
    statement = tirx.SeqStmt(
        [
            tirx.AllocBuffer(register),
            tirx.BufferStore(register, body(buffers[0]), ramp),
            tirx.BufferStore(buffers[1], body(register), ramp),
        ]
    )
    program = program_of_plain(plain_function("through", buffers, statement), "through", 1)
    assert "Workspace" not in kernel_assembly(program, X86)
    feeds = random_feeds(program)
    np.testing.assert_array_equal(answer(program, X86, feeds), feeds["b0"])


def test_the_same_program_gives_the_same_bytes() -> None:
    assert compile_kernels(two_stages(9), X86) == compile_kernels(two_stages(9), X86)


@pytest.mark.parametrize("name", ["raspberry-pi-4", "armv7-neon", "x86-64-v4"])
def test_it_compiles_for_other_boards(name: str) -> None:
    assert compile_kernels(two_stages(100), load_target(name))[:4] == b"\x7fELF"


def test_a_program_without_kernels_is_an_empty_object() -> None:
    assert compile_kernels(Program(), X86)[:4] == b"\x7fELF"


def test_what_llvm_lacks_is_a_compile_failure() -> None:
    program = flat("k", lambda a: tirx.cosh(vector(a)), inputs=1)
    with pytest.raises(CompileFailed, match="cosh"):
        compile_kernels(program, X86)


@pytest.mark.parametrize(("name", "fused"), [("x86-64-v3", "vfmadd"), ("raspberry-pi-4", "fmla")])
def test_a_fence_keeps_a_product_and_a_sum_apart(name: str, fused: str) -> None:
    def fence(x: Any) -> Any:
        return tirx.call_llvm_pure_intrin("float32x8", "llvm.arithmetic.fence.v8f32", x)

    together = flat("k", lambda a, b, c: vector(a) * vector(b) + vector(c))
    apart = flat("k", lambda a, b, c: fence(vector(a) * vector(b)) + vector(c))
    target = load_target(name)
    assert fused in kernel_assembly(together, target)
    assert fused not in kernel_assembly(apart, target)


def test_the_interpreter_catches_a_kernel_that_writes_too_far() -> None:
    buffers = [tirx.decl_buffer((8,), "float32", f"b{i}") for i in range(2)]
    store = tirx.BufferStore(buffers[1], tirx.const(1.0, "float32"), [tirx.const(9, "int32")])
    program = program_of_plain(plain_function("wild", buffers, store), "wild", 1)
    with pytest.raises(AssertionError, match="wrote outside b1"):
        run_program(program, X86, random_feeds(program))
