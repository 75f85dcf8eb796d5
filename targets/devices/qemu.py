"""qemu's user mode: runs a bundle of another architecture on this machine.

Answers are those of the board. Times are not: an emulated integer and an emulated float
instruction differ by far more than on any CPU. So `bench` and `profile` count instructions instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import platformdirs

from edgepress.targets.base import DeviceFailed, Measurement, Target
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.named_devices import NamedDevice

# Of the plugin interface: qemu up to 8.2 speaks 1, later ones 2 and more.
_PLUGIN_VERSIONS = (1, 2, 3, 4, 5)
_COMPILE_S = 60
_RUN_S = 1800
_TOTAL = re.compile(rb"edgepress-instructions (\d+)")
_AT_CLOCK = re.compile(rb"edgepress-clock (\d+)")
_PROFILE = ["--profile", "--runs", "2", "--seconds", "0", "--warmup", "0", "--threads", "1"]
_T = TypeVar("_T")


def connect(target: Target, address: str, board: NamedDevice) -> QemuDevice:
    """Run bundles under the target's emulator. Raises DeviceFailed where it is missing."""
    if address:
        raise DeviceFailed(f"qemu takes no address, so `qemu:{address}` is wrong: write `qemu`.")
    if not target.emulator:
        where = "-d ssh:USER@HOST, the machine with the GPU" if target.is_cuda else "-d local"
        raise DeviceFailed(f"the target {target.name} has no emulator. Use {where}.")
    if shutil.which(target.emulator) is None:
        raise DeviceFailed(
            f"{target.emulator}, which runs {target.name} on this machine, is not installed. "
            "On Debian or Ubuntu: apt-get install qemu-user"
        )
    prefix = [target.emulator]
    if target.emulator_cpu:
        prefix += ["-cpu", target.emulator_cpu]
    if target.sysroot:
        prefix += ["-L", target.sysroot]
    return QemuDevice(board.name, (*board.run_with, *prefix))


@dataclass(frozen=True)
class QemuDevice(CommandDevice):
    """A device under qemu: right answers, counted instructions, no times."""

    @property
    def emulated(self) -> bool:
        """Always."""
        return True

    @property
    def machine(self) -> str:
        """Nothing: the same instructions are counted on every machine."""
        return ""

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
        warm_up_seconds: float | None = None,  # noqa: ARG002
        cores: str | None = None,  # noqa: ARG002
        defended: bool = False,  # noqa: ARG002
        sustained_minutes: float | None = None,  # noqa: ARG002
        mlperf: bool = False,  # noqa: ARG002
    ) -> Measurement:
        """Count instructions per inference; the other arguments mean nothing here.

        The count is that of two inferences minus that of one, on one thread whatever `threads`
        says: waiting threads would count what they spin. `instructions` is None where the counting
        plugin cannot be built or loaded; `device["note"]` then says why.
        """
        facts = {"name": self.name, "emulator": " ".join(self.prefix)}
        sample = self._sample(folder)
        self._answer(folder, sample, ())  # what goes wrong without the plugin is no missing count

        def count(plugin: tuple[str, ...]) -> int:
            one, two = (self._answer(folder, sample * n, plugin) for n in (1, 2))
            return _total(two) - _total(one)

        try:
            instructions = self._counted(count)
        except DeviceFailed as error:
            facts["note"] = str(error)
            return Measurement(samples_ms=(), threads=1, device=facts)
        return Measurement(samples_ms=(), threads=1, device=facts, instructions=instructions)

    def profile(
        self,
        folder: Path,
        *,
        threads: int | None,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
        runs: int,  # noqa: ARG002
    ) -> list[float]:
        """Count the instructions of every kernel call, in the order of the calls.

        They are those of the second inference, on one thread as `bench` counts, between two looks
        of `model --profile` at the clock.
        """
        calls = int(self.info(folder)["calls"])

        def count(plugin: tuple[str, ...]) -> list[float]:
            device = CommandDevice(self.name, (*self.prefix, *plugin))
            return _per_call(device.run(folder, _PROFILE, _RUN_S).stderr, calls)

        return self._counted(count)

    def _counted(self, count: Callable[[tuple[str, ...]], _T]) -> _T:
        """Count with the first version of the plugin that qemu loads.

        Args:
            count: gets the options that load the plugin.

        Raises:
            DeviceFailed: no version can be built or loaded, or `count` raised it.
        """
        reasons = []
        for version in _PLUGIN_VERSIONS:
            try:
                return count(("-plugin", str(build_plugin(version))))
            except DeviceFailed as error:
                reasons.append(str(error))
        raise DeviceFailed(f"instructions were not counted: {reasons[0]}")

    def _sample(self, folder: Path) -> bytes:
        """Inputs of one inference: golden ones, or zeros."""
        golden = folder / "golden" / "0.in"
        if golden.is_file():
            return golden.read_bytes()
        return bytes(sum(tensor["bytes"] for tensor in self.info(folder)["inputs"]))

    def _answer(self, folder: Path, samples: bytes, options: tuple[str, ...]) -> bytes:
        """What qemu with more options says on stderr while the model answers samples."""
        with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
            inputs = Path(temporary) / "in"
            inputs.write_bytes(samples)
            arguments = ["--run", str(inputs), str(Path(temporary) / "out"), "--threads", "1"]
            device = CommandDevice(self.name, (*self.prefix, *options))
            return device.run(folder, arguments, _RUN_S).stderr


def _total(said: bytes) -> int:
    """Instructions of a whole run, as the plugin printed them."""
    found = _TOTAL.search(said)
    if found is None:
        raise DeviceFailed(f"the counting plugin said nothing: {said.decode('utf-8', 'replace')}")
    return int(found[1])


def _per_call(said: bytes, calls: int) -> list[float]:
    """Instructions of every call of the second inference of a profile.

    The clock is read 3 times before the inferences and once after them. An inference reads it when
    it begins, then when a call ends and when the next begins.
    """
    at = [int(count) for count in _AT_CLOCK.findall(said)]
    inference = 1 + 2 * calls
    if len(at) != 3 + 2 * inference + 1:
        raise DeviceFailed(
            f"the profile of {calls} calls looked at the clock {len(at)} times instead of "
            f"{3 + 2 * inference + 1}"
        )
    second = at[3 + inference : -1]
    return [float(end - start) for start, end in zip(second[:-1:2], second[1::2], strict=True)]


def build_plugin(version: int) -> Path:
    """Compile `instructions.c` for this machine into the user's cache, once.

    Args:
        version: of qemu's plugin interface.

    Raises:
        DeviceFailed: there is no C compiler, or it failed, or the cache cannot be written.
    """
    source = (resources.files("edgepress.targets.devices") / "instructions.c").read_bytes()
    key = hashlib.sha256(source).hexdigest()[:16]
    plugin = platformdirs.user_cache_path("edgepress") / f"instructions-{version}-{key}.so"
    if plugin.is_file():
        return plugin
    try:
        plugin.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="edgepress-", dir=plugin.parent) as temporary:
            (Path(temporary) / "instructions.c").write_bytes(source)
            result = subprocess.run(
                ["gcc", "-std=c11", "-O2", "-fPIC", "-shared", f"-DPLUGIN_VERSION={version}",
                 "instructions.c", "-o", "instructions.so"],
                cwd=temporary, capture_output=True, timeout=_COMPILE_S, check=False,
            )  # fmt: skip
            if result.returncode != 0:
                raise DeviceFailed(f"gcc failed: {result.stderr.decode('utf-8', 'replace')}")
            os.replace(Path(temporary) / "instructions.so", plugin)  # noqa: PTH105
    except FileNotFoundError:
        raise DeviceFailed("counting needs gcc: apt-get install gcc") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceFailed(f"the counting plugin cannot be built: {error}") from None
    return plugin
