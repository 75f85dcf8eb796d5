"""From a program and its kernels to an executable, a library, a header and a weights file.

What is linked: the kernels' object, the generated driver and the C in `runtime/`, that for a CPU or
that for a GPU. Nothing else than libc and libm is needed where it runs; the driver of a GPU is
found when the model is opened.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from edgepress.targets import memory
from edgepress.targets.base import Artifact, CompileFailed, Target
from edgepress.targets.c_compiler import run_c_compiler
from edgepress.targets.cuda.driver_source import ALIGNMENT_BYTES, cuda_driver_source
from edgepress.targets.driver_source import Driver, driver_source, header_source
from edgepress.targets.memory import plan
from edgepress.targets.program import Array, Program
from edgepress.targets.weights import header_checksum, write_weights

COMPILE_FLAGS = (
    "-std=c11",
    "-O2",
    "-fPIC",
    "-pthread",
    "-ffunction-sections",
    "-fdata-sections",
)
LINK_FLAGS = (
    "-pthread",
    "-s",
    "-Wl,--gc-sections",
    "-Wl,--build-id=none",
    "-Wl,--as-needed",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
)
_LIBRARY_SOURCES = (
    "beside.c",
    "cores.c",
    "cpu.c",
    "crc32.c",
    "decode.c",
    "driver.c",
    "error.c",
    "model.c",
    "weights.c",
    "weights_cache.c",
)
_EXECUTABLE_SOURCES = (
    "bench.c",
    "board_state.c",
    "checksums.c",
    "conditions.c",
    "facts.c",
    "info.c",
    "json.c",
    "judgement.c",
    "load.c",
    "main.c",
    "mlperf.c",
    "profile.c",
    "run.c",
    "sample.c",
    "selftest.c",
    "sha256.c",
    "statistics.c",
    "sustained.c",
    "sysfs.c",
    "tasks.c",
    "timing.c",
)
_CPU_LIBRARY_SOURCES = ("executor_cpu.c", "threads.c", "workspace.c")
_CPU_EXECUTABLE_SOURCES = ("machine_cpu.c",)
_CUDA_LIBRARY_SOURCES = (
    "cuda_api.c",
    "cuda_kernels.c",
    "cuda_memory.c",
    "executor_cuda.c",
    "gpu.c",
    "threads_one.c",
)
_CUDA_EXECUTABLE_SOURCES = ("gpu_watch.c", "machine_cuda.c")
_EXPORTS = "{ global: model_*; local: *; };\n"
_CPU_OPTIONS = ("-march=", "-mcpu=", "-mfpu=")


def export(
    program: Program,
    object_code: bytes,
    target: Target,
    folder: Path,
    *,
    name: str,
    tolerances: Sequence[float],
    coded: bool = False,
) -> Artifact:
    """Write `model`, `libmodel.so`, `model.h` and `weights.epw` into a folder.

    The same arguments and the same C compiler give the same bytes.

    Args:
        program: what to call; it is validated first. `workspace_bytes` counts every block that a
            kernel holds at once, each rounded up to 64 bytes.
        object_code: ELF object with a C function for every kernel; for a GPU, with what
            `runtime/launches.h` declares of its kernels.
        target: names the C compiler, and whether a GPU runs the kernels. Options that choose
            instructions are not used for the runtime, which must be able to say that the CPU is the
            wrong one.
        folder: made where it does not exist; files of these names in it are replaced.
        name: the model's name, for messages and `--info`.
        tolerances: per output, what `--selftest` allows: 0 = bit-equal, else the largest absolute
            error.
        coded: whether the weights are encoded, each constant as is smallest.

    Raises:
        ValueError: the program is not valid, or there is not one tolerance >= 0 per output.
        CompileFailed: the C compiler is missing or failed, or the target needs a CPU feature for
            which the runtime has no check.
        OSError: a file cannot be written.
    """
    program.validate()
    if len(tolerances) != len(program.outputs) or not all(
        math.isfinite(tolerance) and tolerance >= 0 for tolerance in tolerances
    ):
        raise ValueError(f"{list(tolerances)} is not one tolerance >= 0 for each of "
                         f"{len(program.outputs)} outputs")  # fmt: skip
    _check_features(target)
    folder.mkdir(parents=True, exist_ok=True)
    arena = plan(program, ALIGNMENT_BYTES if target.is_cuda else memory.ALIGNMENT_BYTES)
    weights_path = folder / "weights.epw"
    weights = write_weights(weights_path, _read_constants(program), coded=coded)
    payload_bytes = {entry["offset"]: entry["raw_bytes"] for entry in weights if entry["raw_bytes"]}
    driver = Driver(
        name=name,
        tolerances=tolerances,
        weights=weights,
        weights_checksum=header_checksum(weights_path),
        weight_bytes=sum(payload_bytes.values()),
    )
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        build = Path(temporary)
        copy_runtime(build)
        api = (build / "api.h").read_text(encoding="utf-8")
        (build / "model.h").write_text(header_source(program, name, api), encoding="utf-8")
        source = cuda_driver_source if target.is_cuda else driver_source
        (build / "driver.c").write_text(source(program, arena, target, driver), encoding="utf-8")
        (build / "kernels.o").write_bytes(object_code)
        _build(build, target)
        for file in ("model", "libmodel.so", "model.h"):
            shutil.copyfile(build / file, folder / file)
        (folder / "model").chmod(0o755)
    return Artifact(
        folder=folder,
        arena_bytes=arena.arena_bytes,
        workspace_bytes=program.workspace_bytes,
        weight_bytes=driver.weight_bytes,
        weights=weights,
    )


def copy_runtime(folder: Path) -> None:
    """Copy the C sources and headers of `runtime/` into a folder."""
    for source in resources.files("edgepress.targets.runtime").iterdir():
        if source.name.endswith((".c", ".h")):
            (folder / source.name).write_bytes(source.read_bytes())


def known_features(architecture: str) -> set[str]:
    """CPU features that `runtime/cpu.c` can check on `x86_64`, `aarch64` or `armv7l`."""
    text = (resources.files("edgepress.targets.runtime") / "cpu.c").read_text(encoding="utf-8")
    x86, _, arm = text.partition("#elif defined(__aarch64__)")
    aarch64, _, armv7 = arm.partition("#else")
    armv7 = armv7.partition("#endif")[0]
    part = {"x86_64": x86, "aarch64": aarch64}.get(architecture, armv7)
    return set(re.findall(r'^    \{"(\w+)", ', part, re.MULTILINE))


def _check_features(target: Target) -> None:
    known = known_features(target.architecture)
    if unknown := [flag for flag in target.cpu_flags if flag not in known]:
        raise CompileFailed(
            f"the target {target.name} needs the CPU features {', '.join(unknown)}, which "
            f"targets/runtime/cpu.c cannot check. It knows {', '.join(sorted(known))}."
        )


def _read_constants(program: Program) -> dict[str, Array]:
    """Constants that a call reads; the others need not be on the board."""
    read = {name for call in program.calls for name in call.arguments}
    return {name: array for name, array in program.constants.items() if name in read}


def _sources(target: Target) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the C files of the library, and those that the executable has beside them."""
    if target.is_cuda:
        return (
            _LIBRARY_SOURCES + _CUDA_LIBRARY_SOURCES,
            _EXECUTABLE_SOURCES + _CUDA_EXECUTABLE_SOURCES,
        )
    return _LIBRARY_SOURCES + _CPU_LIBRARY_SOURCES, _EXECUTABLE_SOURCES + _CPU_EXECUTABLE_SOURCES


def _build(folder: Path, target: Target) -> None:
    """Compile all sources of a folder, and link `model` and `libmodel.so`."""
    flags = [flag for flag in target.compiler_flags if not flag.startswith(_CPU_OPTIONS)]
    library_sources, executable_sources = _sources(target)
    library = [*(source.replace(".c", ".o") for source in library_sources), "kernels.o"]
    executable = [*library, *(source.replace(".c", ".o") for source in executable_sources)]
    libraries = ["-lm", "-ldl"] if target.is_cuda else ["-lm"]
    (folder / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    sources = (*library_sources, *executable_sources)
    run_c_compiler(folder, target, [*flags, *COMPILE_FLAGS, "-c", *sources])
    linked = [*executable, *libraries]
    run_c_compiler(folder, target, [*flags, *LINK_FLAGS, "-pie", *linked, "-o", "model"])
    script = "-Wl,--version-script=exports.map"
    soname = "-Wl,-soname,libmodel.so"
    run_c_compiler(
        folder,
        target,
        [*flags, *LINK_FLAGS, "-shared", script, soname, *library, *libraries, "-o", "libmodel.so"],
    )
