"""Targets, and a tiny program whose kernels are written in C, for the tests of the device half."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.base import Artifact, Target
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.export import export
from edgepress.targets.program import Array, Call, Program, Tensor

HOST = Target(
    name="host",
    description="",
    triple=f"{host_architecture()}-linux-gnu",
    cpu="generic",
    isa="avx2",
    cores=2,
    compiler="gcc",
    compiler_package="gcc",
    cpu_flags=("sse2",) if host_architecture() == "x86_64" else ("asimd",),
)
PI4 = Target(
    name="pi4",
    description="",
    triple="aarch64-linux-gnu",
    cpu="cortex-a72",
    isa="neon",
    cores=4,
    compiler="aarch64-linux-gnu-gcc",
    compiler_flags=("-mtune=cortex-a72",),
    compiler_package="gcc-aarch64-linux-gnu",
    emulator="qemu-aarch64",
    emulator_cpu="cortex-a72",
    sysroot="/usr/aarch64-linux-gnu",
    cpu_flags=("asimd",),
)
ARMV7 = Target(
    name="armv7",
    description="",
    triple="armv7l-linux-gnueabihf",
    cpu="cortex-a7",
    isa="neon_armv7",
    float_abi="hard",
    compiler="arm-linux-gnueabihf-gcc",
    compiler_package="gcc-arm-linux-gnueabihf",
    emulator="qemu-arm",
    emulator_cpu="cortex-a7",
    sysroot="/usr/arm-linux-gnueabihf",
    cpu_flags=("neon", "vfpv4"),
)

KERNELS = r"""
#include <stdint.h>
#include <stddef.h>
extern void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);
int32_t add_one(const float *x, float *y)
{
    for (int i = 0; i < 6; i++) y[i] = x[i] + 1;
    return 0;
}
int32_t scale(const float *x, const float *factor, float *y)
{
    for (int i = 0; i < 6; i++) y[i] = x[i] * factor[i];
    return 0;
}
int32_t sum(const float *x, const int8_t *offset, int32_t *total)
{
    float all = 0;
    for (int i = 0; i < 6; i++) all += x[i];
    if (all > 1e6f) {
        const char *parts[] = {"too ", "large"};
        TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
        return -7;
    }
    *total = (int32_t)all + offset[0];
    return 0;
}
"""


def tiny_program() -> Program:
    """Compute `scaled = (x + 1) · w`, `total = int(sum(scaled)) + offset`; `scaled` is read too."""
    tensors = [
        Tensor("x", "float32", (2, 3)),
        Tensor("offset", "int8", (1,)),
        Tensor("moved", "float32", (2, 3)),
        Tensor("scaled", "float32", (2, 3)),
        Tensor("total", "int32", ()),
    ]
    return Program(
        inputs=("x", "offset"),
        outputs=("scaled", "total"),
        tensors={tensor.name: tensor for tensor in tensors},
        constants={
            "w": np.arange(6, dtype=np.float32),
            "same": np.arange(6, dtype=np.float32),
            "unused": np.zeros(1000, np.int8),
        },
        calls=[
            Call("add_one", ("x", "moved"), ("moved",), 'first */ "node"'),
            Call("scale", ("moved", "w", "scaled"), ("scaled",), "zweitér"),
            Call("sum", ("scaled", "offset", "total"), ("total",), "third"),
        ],
        kernels={"add_one": None, "scale": None, "sum": None},
    )


def tiny_feed(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    x = random.integers(-9, 9, (2, 3)).astype(np.float32)
    return {"x": x, "offset": random.integers(-9, 9, 1, np.int8)}


def tiny_answer(feed: dict[str, Array]) -> dict[str, Array]:
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    scaled = (feed["x"] + np.float32(1)) * w
    total = np.int32(scaled.sum()) + feed["offset"][0].astype(np.int32)
    return {"scaled": scaled, "total": np.array(total, np.int32)}


def compile_c(target: Target, source: str, *flags: str) -> bytes:
    """Object code of C, as a cross compiler makes it."""
    need(target.compiler, target.compiler_package)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.c").write_text(source)
        run([target.compiler, "-O2", "-fPIC", *flags, "-c", "kernels.c"], folder)
        return (Path(folder) / "kernels.o").read_bytes()


def export_tiny(target: Target, folder: Path, tolerances: Sequence[float] = (0, 0)) -> Artifact:
    """Export the tiny program, with two golden samples beside it."""
    artifact = export(
        tiny_program(),
        compile_c(target, KERNELS),
        target,
        folder,
        name="tiny",
        tolerances=tolerances,
    )
    (folder / "golden").mkdir()
    for seed in range(2):
        feed = tiny_feed(seed)
        answer = tiny_answer(feed)
        (folder / f"golden/{seed}.in").write_bytes(b"".join(a.tobytes() for a in feed.values()))
        (folder / f"golden/{seed}.out").write_bytes(b"".join(a.tobytes() for a in answer.values()))
    return artifact


def need(tool: str, package: str) -> None:
    """Skip where a tool is missing; fail where EDGEPRESS_REQUIRE_CROSS says that it must not be."""
    if shutil.which(tool) is None:
        hint = f"{tool} is missing: apt-get install {package}"
        if os.environ.get("EDGEPRESS_REQUIRE_CROSS"):
            pytest.fail(hint)
        pytest.skip(hint)


def run(command: Sequence[str], folder: str | Path = ".") -> str:
    """Run a command that must succeed and say nothing on stderr; return its stdout."""
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout
