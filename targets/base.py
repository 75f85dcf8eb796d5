"""Targets, artefacts and measurements, and what can go wrong with them.

Errors::

    TargetError              never raised itself
     ├─ UnknownTarget        no such board file; carries the near names
     ├─ UnsupportedModel     the target cannot run these nodes; lists them all (exit code 3)
     ├─ CompileFailed        TVM, LLVM or the C compiler failed; carries the log (exit code 4)
     └─ DeviceFailed         unreachable, wrong, or the program failed there (exit code 5)
         ├─ Unreachable      no connection came about: address, key, host key
         └─ LinkBroken       the connection ended before the answer; trying again may help
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any


class TargetError(Exception):
    """What went wrong with a target."""


class UnknownTarget(TargetError):
    """No board file has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.near = difflib.get_close_matches(name, list(known), 3, 0.4)
        hint = f" Did you mean {' or '.join(self.near)}?" if self.near else ""
        super().__init__(f"no target is called {name!r}.{hint} `edgepress targets` lists them all.")


class UnsupportedModel(TargetError):
    """The target cannot run some nodes.

    Attributes:
        reasons: `(node, why)` for every such node, not only the first.
    """

    def __init__(self, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = list(reasons)
        lines = "; ".join(f"{node}: {why}" for node, why in self.reasons)
        super().__init__(f"{len(self.reasons)} nodes cannot be compiled: {lines}")


class CompileFailed(TargetError):
    """TVM, LLVM or the C compiler failed."""

    def __init__(self, what: str, log: str = "") -> None:
        self.log = log
        super().__init__(f"{what}\n{log}".rstrip())


class DeviceFailed(TargetError):
    """The device is unreachable, is the wrong one, or the program failed there."""


class Unreachable(DeviceFailed):
    """No connection to the device came about."""


class LinkBroken(DeviceFailed):
    """The connection to the device ended before the answer was there."""


class OnDevice(PosixPath):
    """A path on a device, not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A board, or a family of CPUs, as its TOML file describes it.

    Attributes:
        name: the file's stem.
        description: one line for `edgepress targets`.
        triple: LLVM triple, such as `aarch64-linux-gnu`.
        cpu: LLVM cpu name.
        features: LLVM features beyond those of the cpu, such as `("+dotprod",)`.
        isa: the file in `targets/isa/` that the kernel generators use.
        cores: how many cores run a model at once.
        memory_bytes: memory of the board, 0 where unknown.
        float_abi: `hard` or `soft` on 32-bit Arm, else empty.
        compiler: the C compiler, as Debian names it, such as `aarch64-linux-gnu-gcc`.
        compiler_flags: flags for that compiler, such as `("-mcpu=cortex-a72",)`.
        compiler_package: the Debian package that brings it.
        emulator: the qemu user-mode program, empty on the host's own architecture.
        emulator_cpu: qemu's `-cpu`, a model that has exactly the needed features where it can.
        sysroot: where the cross libraries lie, for qemu's `-L`.
        cpu_flags: names in `/proc/cpuinfo` (or HWCAP) without which the bundle refuses to start.
        gpu_arch: the GPU that runs the kernels, as CUDA names its architecture, such as `sm_87`;
            empty where the CPU runs them. Everything above is then about the GPU's host.
        gpu_multiprocessors: how many that GPU has, 0 where there is none; kernels are laid out for
            it, and run on GPUs that have more or fewer.
    """

    name: str
    description: str
    triple: str
    cpu: str
    features: tuple[str, ...] = ()
    isa: str
    cores: int = 1
    memory_bytes: int = 0
    float_abi: str = ""
    compiler: str
    compiler_flags: tuple[str, ...] = ()
    compiler_package: str = ""
    emulator: str = ""
    emulator_cpu: str = ""
    sysroot: str = ""
    cpu_flags: tuple[str, ...] = ()
    gpu_arch: str = ""
    gpu_multiprocessors: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether kernels run on an NVIDIA GPU."""
        return bool(self.gpu_arch)

    @property
    def architecture(self) -> str:
        """First part of the triple: `x86_64`, `aarch64`, `armv7l`."""
        return self.triple.partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What the exporter made, in one folder.

    Attributes:
        folder: holds `model`, `libmodel.so`, `model.h`, `weights.epw`.
        arena_bytes: planned activation memory.
        workspace_bytes: scratch that kernels ask for while they run.
        weight_bytes: raw bytes of all constants.
        weights: per constant: name, dtype, shape, codec, raw_bytes, encoded_bytes, sha256.
    """

    folder: Path
    arena_bytes: int
    workspace_bytes: int
    weight_bytes: int
    weights: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latency on a device. All raw samples are kept.

    Attributes:
        samples_ms: one entry per inference, in order; where an inference takes less than 10 µs,
            one per `device["runs_per_sample"]` of them, their mean.
        threads: threads that ran it.
        device: facts about the device: kernel, cpu, governor, frequencies, temperature.
        instructions: instructions per inference, only under an emulator.
        refused: why the figures cannot be defended, a sentence each; empty where they can.
        intervals_ms: 95 % confidence intervals of `p50`, `p90` and `p99`, `(low, high)`: None where
            there are too few runs, `(low, None)` where nothing bounds the quantile from above.
        windows_ms: medians of ten consecutive tenths of the samples; empty below ten samples.
        conditions: what else happened on the device while it measured; docs/measuring.md.
        sustained: where a sustained measurement was asked for, an entry per window of seconds.
        mlperf: what the single-stream rule of MLPerf says, where it was asked for.
    """

    samples_ms: tuple[float, ...]
    threads: int
    device: dict[str, Any] = field(default_factory=dict)
    instructions: int | None = None
    refused: tuple[str, ...] = ()
    intervals_ms: dict[str, tuple[float, float | None] | None] = field(default_factory=dict)
    windows_ms: tuple[float, ...] = ()
    conditions: dict[str, Any] = field(default_factory=dict)
    sustained: list[dict[str, Any]] = field(default_factory=list)
    mlperf: dict[str, Any] | None = None
