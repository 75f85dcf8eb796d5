"""The most that a machine can do: operations per second of a kernel that only multiplies and adds.

The kernel is compiled for the bundle's target and run by the bundle's own runtime, on as many
threads. It is compiled once for a target; the measuring, which takes a second, is done anew, since
the same machine does not do the same at any time.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

from edgepress.pipeline.build import ARTIFACT_FILES, toolchain
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.progress import Progress
from edgepress.targets.base import Target
from edgepress.targets.devices.base import Device
from edgepress.targets.program import Array, Call, Program, Tensor

PRECISIONS = {"fp32": "float32", "int8": "int8", "int16": "int16"}  # to the weights' dtype
SECONDS, RUNS, PROCESSES = 0.1, 10, 3
NAME = "peak"


def peak_gops(
    target: Target,
    device: Device,
    *,
    threads: int,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return operations per second in 1e9, two per multiply-accumulate, by precision.

    The best of several processes counts: a peak is what is possible.

    Raises:
        CompileFailed, DeviceFailed: the kernels cannot be compiled or run.
    """
    from edgepress.targets.isa.base import load_isa  # imports TVM
    from edgepress.targets.schedules.peak import peak_macs

    progress = progress or Progress(shown=False)
    isa = load_isa(target.isa)
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        with progress.step("measure the machine's peak"):
            _build(target, folder, cache)
            visits = [
                device.profile(folder, threads=threads, seconds=SECONDS, runs=RUNS)
                for _ in range(PROCESSES)
            ]
    best_ms = np.min(visits, axis=0)
    return {
        name: 2e-6 * peak_macs(isa.for_operands(dtype), dtype != "float32") / float(ms)
        for (name, dtype), ms in zip(PRECISIONS.items(), best_ms[: len(PRECISIONS)], strict=True)
    }


def _build(target: Target, folder: Path, cache: Cache | None) -> None:
    """Write the executable, or take it from the cache."""
    from edgepress.targets.compile import compile_kernels
    from edgepress.targets.export import export

    key = content_key(
        NAME, code_version("edgepress.targets"), dataclasses.asdict(target), toolchain(target)
    )
    entry = cache.get(key) if cache else None
    if entry is None:
        program = peak_program(target)
        code = compile_kernels(program, target)
        tolerances = (0.0,) * len(program.outputs)
        export(program, code, target, folder, name=NAME, tolerances=tolerances)
        if cache:
            cache.put(key, lambda into: _copy(folder, into))
    else:
        _copy(entry, folder)


def _copy(source: Path, into: Path) -> None:
    for file in ARTIFACT_FILES:
        shutil.copy2(source / file, into / file)


def peak_program(target: Target) -> Program:
    """Return a program with one call per precision, in the order of `PRECISIONS`."""
    from edgepress.targets.isa.base import load_isa
    from edgepress.targets.schedules.peak import peak, peak_sizes

    program = Program()
    for name, dtype in PRECISIONS.items():
        isa = load_isa(target.isa).for_operands(dtype)
        quantized = dtype != "float32"
        x, weights, y = peak_sizes(isa, quantized)
        kernel = f"{NAME}_{name}"
        staged = np.dtype(isa.staged if quantized else "float32")
        constants: dict[str, Array] = {
            f"{kernel}_x": np.ones(x, staged),
            f"{kernel}_weights": np.ones(weights, dtype),
        }
        program.constants |= constants
        output = f"{kernel}_y"
        program.tensors[output] = Tensor(output, "int32" if quantized else "float32", (y,))
        program.kernels[kernel] = peak(kernel, isa, dtype)
        program.calls.append(Call(kernel, (*constants, output), (output,), name))
    # a model has an input; nothing reads this one
    program.tensors["x"] = Tensor("x", "float32", (1,))
    program.inputs = ("x",)
    program.outputs = tuple(call.outputs[0] for call in program.calls)
    return program
