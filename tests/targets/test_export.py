import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from edgepress.targets.base import Artifact, CompileFailed
from edgepress.targets.compile import compile_kernels
from edgepress.targets.driver_source import c_string
from edgepress.targets.export import export, known_features
from edgepress.targets.load import load_target, target_names
from edgepress.targets.lowering.plain import plain_function
from edgepress.targets.program import Call, Program, Tensor
from edgepress.targets.weights import read_weights
from tests.targets.tiny import (
    HOST,
    KERNELS,
    compile_c,
    export_tiny,
    need,
    run,
    tiny_program,
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_tiny(HOST, tmp_path_factory.mktemp("host") / "bundle")


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    document = json.loads(run([str(folder / "model"), *arguments]))
    assert isinstance(document, dict)
    return document


def test_the_artifact(artifact: Artifact) -> None:
    made = {path.name for path in artifact.folder.iterdir()} - {"golden"}
    assert made == {"model", "libmodel.so", "model.h", "weights.epw"}
    assert artifact.arena_bytes == 64
    assert artifact.workspace_bytes == 0
    assert artifact.weight_bytes == 24
    assert [row["name"] for row in artifact.weights] == ["w"]  # the others are never read
    assert list(read_weights(artifact.folder / "weights.epw")) == ["w"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/weights.epw").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        export_tiny(HOST, tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        export_tiny(HOST, tmp_path / "file")


def test_the_cpu_features_that_this_machine_names_are_there(artifact: Artifact) -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    lines = (line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    flags = {flag for line in lines for flag in line.split()}
    known = known_features(HOST.architecture)
    assert {"avx2", "avx512_vnni", "abm"} <= known_features("x86_64")
    assert {"neon", "vfpv4"} <= known_features("armv7l")
    assert {"asimd", "asimddp"} <= known_features("aarch64")
    sources = artifact.folder.parent / "features"
    sources.mkdir()
    target = dataclasses.replace(HOST, cpu_flags=tuple(sorted(known)))
    folder = export_tiny(target, sources / "bundle").folder
    features = ask(folder, "--info")["features"]
    assert {name for name, present in features.items() if present} == known & flags


@pytest.mark.parametrize("name", target_names())
def test_every_board_needs_features_that_can_be_checked(name: str) -> None:
    target = load_target(name)
    assert set(target.cpu_flags) <= known_features(target.architecture)


def test_two_exports_are_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    again = export_tiny(HOST, tmp_path / "another place").folder
    for path in artifact.folder.iterdir():
        if path.is_file():
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
            assert str(tmp_path).encode() not in path.read_bytes()


def test_nothing_but_libc_is_needed_and_nothing_but_the_api_is_exported(artifact: Artifact) -> None:
    for file in ("model", "libmodel.so"):
        dynamic = run(["readelf", "-d", str(artifact.folder / file)])
        needed = {line.split("[")[1][:-1] for line in dynamic.splitlines() if "(NEEDED)" in line}
        assert {n for n in needed if not n.startswith("ld-linux")} <= {"libc.so.6", "libm.so.6"}
    symbols = run(["nm", "-D", "--defined-only", str(artifact.folder / "libmodel.so")])
    assert {line.split()[-1] for line in symbols.splitlines()} == {
        "model_close",
        "model_last_error",
        "model_open",
        "model_run",
        "model_set_cache",
        "model_set_cores",
        "model_set_threads",
    }
    assert (artifact.folder / "model").stat().st_size < 100_000


USER = r"""
#include <stdio.h>
#include "model.h"

int main(int count, char **arguments)
{
    _Alignas(MODEL_ALIGNMENT) float x[7] = {1, 2, 3, 4, 5, 6};
    _Alignas(MODEL_ALIGNMENT) signed char offset[MODEL_INPUT_1_BYTES] = {-2};
    _Alignas(MODEL_ALIGNMENT) float scaled[MODEL_OUTPUT_0_BYTES / sizeof(float)];
    _Alignas(MODEL_ALIGNMENT) int total;
    const void *inputs[MODEL_INPUT_COUNT] = {x, offset};
    void *outputs[MODEL_OUTPUT_COUNT] = {scaled, &total};
    int code = model_run(inputs, outputs);
    printf("%d %s\n", code, model_last_error());
    for (int i = 0; i < 2 && model_open(count > 1 ? arguments[1] : NULL) == MODEL_OK; i++) {
        printf("%d %d\n", model_run(inputs, outputs), model_set_threads(3));
        printf("%g %d %s %s\n", scaled[5], total, model_outputs[1].name, model_outputs[1].dtype);
        inputs[0] = x + 1;
        code = model_run(inputs, outputs);
        printf("%d %s\n", code, model_last_error());
        inputs[0] = x;
        model_close();
    }
    printf("%d %s\n", model_open("/absent"), model_last_error());
    return model_set_threads(0) == MODEL_UNUSABLE ? 0 : 1;
}
"""


def test_a_c_program_uses_the_library(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "user.c").write_text(USER)
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{artifact.folder}", f"-L{artifact.folder}"]
    origin = f"-Wl,-rpath,{artifact.folder}"
    run(["gcc", "-std=c11", *flags, "user.c", "-lmodel", origin, "-o", "user"], tmp_path)
    once = [
        "0 0",
        "35 83 total int32",
        "2 the memory of input x must be aligned to 64 bytes",
    ]
    lines = run([str(tmp_path / "user"), str(artifact.folder / "weights.epw")]).splitlines()
    assert lines == [
        "2 the model is not open: call model_open first",
        *once,
        *once,
        "2 /absent: No such file or directory",
    ]
    shutil.copy(artifact.folder / "weights.epw", tmp_path)  # NULL finds it beside the executable
    assert run([str(tmp_path / "user")]).splitlines() == lines


def test_inputs_that_are_outputs_and_outputs_named_twice(tmp_path: Path) -> None:
    tensors = {n: Tensor(n, "float32", (6,)) for n in ("a", "b", "unread")}
    program = Program(
        inputs=("a", "unread"),
        outputs=("b", "unread", "b", "a"),
        tensors=tensors,
        calls=[Call("add_one", ("a", "b"), ("b",))],
        kernels={"add_one": None},
    )
    made = export(
        program, compile_c(HOST, KERNELS), HOST, tmp_path, name="ä\n\\", tolerances=[0] * 4
    )
    assert (made.weight_bytes, made.arena_bytes, made.weights) == (0, 0, [])
    assert ask(tmp_path, "--info")["name"] == "ä\n\\"
    a, unread = np.arange(6, dtype=np.float32), np.ones(6, np.float32)
    result = subprocess.run(
        [tmp_path / "model", "--run", "-", "-"],
        input=a.tobytes() + unread.tobytes(),
        capture_output=True,
        check=True,
    )
    assert result.stdout == b"".join(x.tobytes() for x in (a + 1, unread, a + 1, a))


def parallel_program() -> Program:
    """`y = reversed(x · w)` in 64 parallel parts, each with 4 kB of scratch: compiled by TVM."""
    x, y, w, scratch = (tirx.decl_buffer((1024,), "float32", name) for name in ("x", "y", "w", "s"))
    part, i, j = (tirx.Var(name, "int32") for name in ("part", "i", "j"))
    at = part * number(16) + j
    product = tirx.BufferLoad(x, [i]) * tirx.BufferLoad(w, [i])
    reverse = tirx.BufferLoad(scratch, [number(1023) - at])
    body = tirx.SeqStmt(
        [
            tirx.AllocBuffer(scratch),
            loop(i, 1024, tirx.BufferStore(scratch, product, [i])),
            loop(j, 16, tirx.BufferStore(y, reverse, [at])),
        ]
    )
    parts = loop(part, 64, body, tirx.ForKind.PARALLEL)
    return Program(
        inputs=("x",),
        outputs=("y",),
        tensors={n: Tensor(n, "float32", (1024,)) for n in "xy"},
        constants={"w": np.arange(1024, dtype=np.float32)},
        calls=[Call("multiply", ("x", "w", "y"), ("y",), "multiply")],
        kernels={"multiply": plain_function("multiply", [x, w, y], parts)},
    )


def number(value: int) -> Any:
    return tirx.const(value, "int32")


def loop(variable: Any, count: int, body: Any, kind: Any = tirx.ForKind.SERIAL) -> Any:
    return tirx.For(variable, number(0), number(count), kind, body)


@pytest.mark.parametrize("name", ["native", "raspberry-pi-4"])
def test_kernels_that_tvm_compiled(tmp_path: Path, name: str) -> None:
    target = load_target(name)
    need(target.compiler, target.compiler_package)
    program = parallel_program()
    code = compile_kernels(program, target)
    assert b"__TVMBackendParallelLaunch" in code
    assert b"__TVMBackendAllocWorkspace" in code
    assert program.workspace_bytes == 4096
    export(program, code, target, tmp_path, name="parallel", tolerances=[0])
    emulator: list[str] = []
    if target.emulator:
        need(target.emulator, "qemu-user")
        emulator = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot]
    x = np.random.default_rng(0).normal(size=(3, 1024)).astype(np.float32)
    wanted = (x * program.constants["w"])[:, ::-1]
    for threads in ("1", "2", "7"):
        result = subprocess.run(
            [*emulator, str(tmp_path / "model"), "--run", "-", "-", "--threads", threads],
            input=x.tobytes(),
            capture_output=True,
            check=True,
        )
        assert result.stdout == wanted.tobytes()


def test_what_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    program = tiny_program()
    for tolerances in ([0], [0, -1], [0, math.nan]):
        with pytest.raises(ValueError, match="tolerance"):
            export(program, b"", HOST, tmp_path, name="t", tolerances=tolerances)
    odd = dataclasses.replace(HOST, cpu_flags=("avx9",))
    with pytest.raises(CompileFailed, match="avx9"):
        export(program, b"", odd, tmp_path, name="t", tolerances=(0, 0))
    absent = dataclasses.replace(HOST, compiler="absent-gcc", compiler_package="gcc-absent")
    with pytest.raises(CompileFailed, match="apt-get install gcc-absent"):
        export(program, b"", absent, tmp_path, name="t", tolerances=(0, 0))
    program.calls[0] = dataclasses.replace(program.calls[0], arguments=("nothing", "moved"))
    with pytest.raises(ValueError, match="nothing"):
        export(program, b"", HOST, tmp_path, name="t", tolerances=(0, 0))
    program = tiny_program()
    program.kernels["add-one"] = None
    program.calls[0] = dataclasses.replace(program.calls[0], kernel="add-one")
    with pytest.raises(ValueError, match="not a C identifier"):
        export(program, b"", HOST, tmp_path, name="t", tolerances=(0, 0))


def test_the_linkers_log_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CompileFailed, match="gcc failed for the target host") as failed:
        export(
            tiny_program(),
            compile_c(HOST, "int nothing;"),
            HOST,
            tmp_path,
            name="t",
            tolerances=(0, 0),
        )
    assert "add_one" in failed.value.log


def test_c_strings() -> None:
    assert c_string('a"\\\n??/é') == r'"a\042\134\012\077\077/\303\251"'
