"""A board that ssh reaches, as a device: bundles are brought there first, then run there."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from edgepress.targets.base import DeviceFailed, Measurement, OnDevice, Target
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import require_support
from edgepress.targets.glibc_needs import Version, linked_glibc, needed_glibc
from edgepress.targets.remote.board_fit import compare, wrong_architecture
from edgepress.targets.remote.board_probe import probe
from edgepress.targets.remote.board_store import Store
from edgepress.targets.remote.shell import Shell, run_script

_ASK_S = 60
_KILL_AFTER_S = 5
_GONE = 125
_SIGNALS = range(1, 65)

# Runs $3… in folder $1. It reads nothing, so the end of standard input means that whoever waits for
# the answer is gone: then it is ended too, by force where it still runs $2 seconds later.
_WATCHED = """
cd "$1" || exit 125
patience=$2
shift 2
exec 3<&0
"$@" </dev/null 3<&- &
model=$!
{
    read -r _ <&3
    kill "$model"
    while [ "$patience" -gt 0 ] && sleep 1 && kill -0 "$model"; do
        patience=$((patience - 1))
    done
    kill -9 "$model"
} >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait "$model"
code=$?
kill "$watcher" 2>/dev/null
exit "$code"
"""

# Runs $2… in folder $1 with what comes on standard input. Where that ends too early, a model says
# so and ends.
_FED = """
cd "$1" || exit 125
shift
exec "$@"
"""


@dataclass(frozen=True)
class SshDevice(CommandDevice):
    """A board that ssh reaches.

    Attributes:
        name: name of the device.
        prefix: words before the executable on the board.
        shell: of the board.
        target: what bundles are built for.
        store: where bundles lie there.
    """

    shell: Shell = field(kw_only=True)
    target: Target = field(kw_only=True)
    store: Store = field(kw_only=True)
    _staged: dict[object, OnDevice] = field(default_factory=dict, init=False, compare=False)

    @property
    def emulated(self) -> bool:
        """Whether the board runs bundles under an emulator."""
        return bool(self.prefix) and PurePosixPath(self.prefix[0]).name.startswith("qemu-")

    @property
    def machine(self) -> str:
        """The board's host name, model, CPU and cores."""
        return self._machine

    @cached_property
    def _machine(self) -> str:
        named = run_script(self.shell, "uname -n", timeout_s=_ASK_S)
        facts = probe(self.shell)
        host = named.stdout.decode("utf-8", "replace").strip()
        parts = [host, facts.board, facts.cpu, f"{len(facts.cores)} cores"]
        return ", ".join(part for part in parts if part)

    @cached_property
    def _wrong_architecture(self) -> str:
        """Why the board's kernel runs no such bundles, asked before one is tried.

        A shell takes an executable of another architecture for a script, and runs its bytes.
        """
        machine = run_script(self.shell, "uname -m", timeout_s=_ASK_S).stdout
        return wrong_architecture(machine.decode("utf-8", "replace").strip(), self.target)

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,
        runs: int,
        **more: Any,
    ) -> Measurement:
        """Measure on the board; under an emulator there, measure nothing and say so."""
        if not self.emulated:
            return super().bench(folder, threads=threads, seconds=seconds, runs=runs, **more)
        facts = {
            "name": self.name,
            "emulator": " ".join(self.prefix),
            "note": "nothing was measured: the board runs bundles under an emulator",
        }
        return Measurement(samples_ms=(), threads=1, device=facts)

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        """Profile on the board. Raises DeviceFailed under an emulator there, too."""
        if self.emulated:
            raise DeviceFailed(
                f"{self.name} runs bundles under {self.prefix[0]}, whose times mean nothing. "
                "Use the device qemu, which counts instructions."
            )
        return super().profile(folder, threads=threads, seconds=seconds, runs=runs)

    def start(
        self, folder: Path, arguments: Sequence[str], timeout_s: float, stdin: bytes
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the folder's executable on the board, where it is brought first unless it is there.

        Without data to read it ends on the board as soon as this process, or the link to it, does.

        Raises:
            DeviceFailed: as `CommandDevice.start`, and where the board cannot run such bundles.
        """
        if not self.emulated and self._wrong_architecture:
            raise DeviceFailed(f"{self.name}: {self._wrong_architecture}")
        there = folder if isinstance(folder, OnDevice) else self.staged(folder)
        words = [*self.prefix, f"{there}/model", *arguments]
        if stdin:
            script, words = _FED, [str(there), *words]
        else:
            script, words = _WATCHED, [str(there), str(_KILL_AFTER_S), *words]
        result = run_script(self.shell, script, *words, timeout_s=timeout_s, stdin=stdin or None)
        if result.returncode == _GONE:
            self._staged.clear()
            raise DeviceFailed(
                f"{self.name}: {there} is not there, or not any more: bundles that no name points "
                "to are removed when others are deployed. Try again."
            )
        if result.returncode - 128 in _SIGNALS:
            result.returncode = 128 - result.returncode
        if _is_unexplained(result):
            self._explain(folder, result.stderr.decode("utf-8", "replace").strip())
        return result

    def staged(self, folder: Path) -> OnDevice:
        """Bring a folder to the board, unless this object has, and return where it lies there.

        Raises:
            DeviceFailed: the board has no room for it, or cannot run it.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        facts = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        key = (folder, *facts)
        if key not in self._staged:
            self._staged[key] = self.store.stage(
                folder, check=lambda there: require_support(self, there)
            )
        return self._staged[key]

    def _explain(self, folder: Path, said: str) -> None:
        """Raise DeviceFailed where the board is the reason why a bundle did not run."""
        program = self.prefix[0] if self.prefix else ""
        try:
            facts = probe(self.shell, folder=self.store.folder, program=program)
        except DeviceFailed:
            return  # that it did not run is known, why is not
        needed = self._glibc(folder)
        findings = compare(facts, self.target, run_with=self.prefix, glibc=needed)
        if reasons := [finding.text for finding in findings if finding.kind == "stops"]:
            raise DeviceFailed(f"{self.name}: {' '.join(reasons)} ({said[:500]})")

    def _glibc(self, folder: Path) -> Version | None:
        """The oldest glibc that a bundle runs with, as far as is known."""
        if isinstance(folder, OnDevice):
            return linked_glibc(self.target)
        try:
            return needed_glibc(folder / "model")
        except (OSError, ValueError):
            return None


def _is_unexplained(result: subprocess.CompletedProcess[bytes]) -> bool:
    """Whether a model did not start: it says itself what else goes wrong.

    A shell takes an executable of another architecture for a script, and finds errors in it.
    """
    if re.search(rb"(?m)^model: ", result.stderr):
        return False
    return result.returncode in (2, 126, 127, -signal.SIGILL) or b"GLIBC_" in result.stderr
