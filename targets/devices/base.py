"""A device runs a bundle and brings its answers back.

A device kind is one file in this folder, named as users write it (`local`, `qemu`, `ssh`). It
defines `connect(target, address, board) -> Device`, and `shell(address, board) -> Shell` where
bundles run on another machine. `address` is what follows the colon in `kind:address`; `board` has
what else `devices.toml` says, or its defaults.
"""

from __future__ import annotations

import difflib
import importlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgepress.targets.base import DeviceFailed, Measurement, Target
from edgepress.targets.named_devices import NamedDevice, device_names, named_devices
from edgepress.targets.program import Array
from edgepress.targets.remote.shell import LocalShell, Shell

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class Device(Protocol):
    """Runs the `model` executable of a folder that `export` filled.

    A folder lies on this machine, and is brought to the device first where that is another; or it
    is an `OnDevice` path.

    Every method raises DeviceFailed where the device is the wrong one, or the program crashed,
    hung or printed something else than it should.
    """

    @property
    def name(self) -> str:
        """What the user typed to get this device, such as `local`."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether a time on it means nothing; then `bench` and `profile` count instructions."""
        ...

    @property
    def machine(self) -> str:
        """Which machine it is: what is measured on one does not hold on another."""
        ...

    def info(self, folder: Path) -> dict[str, Any]:
        """What `model --info` prints: inputs, outputs, threads, memory, features."""
        ...

    def selftest(self, folder: Path) -> dict[str, Any]:
        """What `model --selftest` prints; `passed` is False where an output is off."""
        ...

    def infer(self, folder: Path, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Answer feeds: per feed and model input one array of the input's dtype and shape."""
        ...

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,
        runs: int,
        cores: str | None = None,
        defended: bool = False,
        sustained_minutes: float | None = None,
        mlperf: bool = False,
    ) -> Measurement:
        """Measure single inferences: at least `runs` of them and at least `seconds`.

        Args:
            folder: of the bundle.
            threads: None takes as many as the target has cores.
            seconds: to measure at least.
            runs: inferences to measure at least.
            cores: one for each thread: "big", "little", or a list such as "0,2-3"; None pins none.
            defended: measure again where the device was disturbed, three times at most; `refused`
                says what still speaks against the figures. False measures once.
            sustained_minutes: afterwards, run so long without a pause, for the curve.
            mlperf: measure as long as the single-stream rule of MLPerf wants.
        """
        ...

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        """Cost of every kernel call of an inference, in order: in ms, or in instructions.

        Looking at the clock before and after a call is in it. A time is typical of at least `runs`
        inferences and at least `seconds`.
        """
        ...


def open_device(spec: str | None, target: Target) -> Device:
    """Find a device for a target. Nothing is asked of it yet.

    Args:
        spec: `local`, `qemu`, `ssh:HOST`, a name in `devices.toml`, or None: local where the
            target's architecture is that of this machine, else qemu.
        target: what the bundle was built for.

    Raises:
        DeviceFailed: no such device, or it cannot run this target.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    if spec is None:
        spec = "local" if host_architecture() == target.architecture else "qemu"
    board = find_device(spec)
    kind, _, address = board.connect.partition(":")
    module = importlib.import_module(f"edgepress.targets.devices.{kind}")
    device: Device = module.connect(target, address, board)
    return device


def open_shell(spec: str) -> Shell:
    """Return the shell of a device, whatever its bundles are for. Raises as `find_device`."""
    board = find_device(spec)
    kind, _, address = board.connect.partition(":")
    module = importlib.import_module(f"edgepress.targets.devices.{kind}")
    shell: Shell = module.shell(address, board) if hasattr(module, "shell") else LocalShell(spec)
    return shell


def find_device(spec: str) -> NamedDevice:
    """Resolve what a user typed, `ssh:pi4` or a name in `devices.toml`.

    Raises:
        DeviceFailed: there is no such kind of device and no such name.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    if spec.partition(":")[0] in device_names():
        return NamedDevice(name=spec, connect=spec)
    named = named_devices()
    if spec not in named:
        known = [*device_names(), *named]
        near = difflib.get_close_matches(spec, known, 2, 0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DeviceFailed(
            f"no device is called {spec!r}.{hint} Known: {', '.join(known)}; "
            f"`edgepress devices --help` says how to name a board."
        )
    return named[spec]


def require_support(device: Device, folder: Path) -> None:
    """Raise DeviceFailed where a device lacks CPU features that an executable needs.

    Args:
        device: where it is to run.
        folder: holds it; nothing else need be there yet.
    """
    features = device.info(folder).get("features", {})
    if missing := [name for name, present in features.items() if not present]:
        raise DeviceFailed(
            f"{device.name}: this board lacks {', '.join(missing)}, which the bundle needs. "
            "Build it for the target that this board is."
        )


def host_architecture() -> str:
    """Architecture of this machine, as in `Target.architecture`."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)
