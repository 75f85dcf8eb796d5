"""A CUDA driver for machines without a GPU: `stub/driver.h` says what it does and can be told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Program
from tests.cuda.emulation import compile_emulated

STUB = Path(__file__).parent / "stub"
_FLAGS = ("-std=c11", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
_DRIVER_PARTS = ("driver", "memory", "modules", "streams")
NVML_ANSWERS: Mapping[str, object] = {
    "clock_mhz": 1500,
    "memory_clock_mhz": 2600,
    "most_clock_mhz": 1980,
    "most_memory_clock_mhz": 2619,
    "temperature_celsius": 40,
    "power_milliwatts": 70000,
    "power_limit_milliwatts": 700000,
    "performance_state": 0,
    "reasons": 0,
    "driver": "580.65.06",
}


def stub_driver(
    folder: Path,
    kernels: Program | Sequence[CudaKernel],
    *,
    without: Sequence[str] = (),
    nvml: bool = True,
) -> dict[str, str]:
    """Build a fake `libcuda.so.1` and `libnvidia-ml.so.1` that run kernels in the emulator.

    Args:
        folder: where to build; what NVML answers is in its file `nvml`, see `write_nvml`.
        kernels: all that will be launched.
        without: functions that the driver is not to have, as if it were older.
        nvml: whether there is a `libnvidia-ml.so.1`.

    Returns:
        What to add to the environment of the process that uses them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(kernels, Program):
        kernels = tuple(kernels.kernels.values())
    library = compile_emulated(kernels, folder / "kernels")
    versions = folder / "versions"
    hidden = "".join(f"{name}; " for name in without)
    versions.write_text(f"{{ global: cu*; local: {hidden}stub_*; }};\n", encoding="utf-8")
    sources = [str(STUB / f"{name}.c") for name in _DRIVER_PARTS]
    script = f"-Wl,--version-script={versions}"
    _build(folder / "libcuda.so.1", *sources, script, "-ldl", "-pthread")
    environment = {"CUDA_STUB_KERNELS": str(library), "LD_LIBRARY_PATH": _path(folder)}
    if nvml:
        _build(folder / "libnvidia-ml.so.1", str(STUB / "nvml.c"))
        environment["NVML_STUB"] = str(folder / "nvml")
        write_nvml(folder)
    return environment


def write_nvml(folder: Path, **answers: object) -> None:
    """Say what NVML is to answer from now on; None takes an answer away."""
    merged = {**NVML_ANSWERS, **answers}
    lines = [f"{name} {value}\n" for name, value in merged.items() if value is not None]
    fresh = folder / "nvml.new"
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.replace(folder / "nvml")


def _build(library: Path, *arguments: str) -> None:
    command = ("gcc", *_FLAGS, "-shared", f"-Wl,-soname,{library.name}", "-o", str(library))
    result = subprocess.run((*command, *arguments), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)


def _path(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
