"""The same work on many boards at once; what happens on one does not touch the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.targets import children
from edgepress.targets.base import DeviceFailed, TargetError
from edgepress.targets.devices.base import find_device
from edgepress.targets.named_devices import devices_file, named_devices

MOST_AT_ONCE = 32
_LEAVE_S = 10.0  # for boards to stop in after Ctrl-C; then they are left behind

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[T]):
    """What came of the work on one board.

    Attributes:
        device: the board, as the user named it.
        value: what the work returned, or None.
        error: what it raised, or None.
    """

    device: str
    value: T | None = None
    error: Exception | None = None

    @property
    def is_bug(self) -> bool:
        """Whether the error is none of the board's: a bug, or a full disk of this machine."""
        return self.error is not None and not isinstance(self.error, (TargetError, OutputError))


def chosen_devices(given: Sequence[str], *, everything: bool) -> list[str]:
    """Return the devices that a command is for, none where the target is to choose.

    Args:
        given: what the user named.
        everything: whether all of `devices.toml` are meant instead.

    Raises:
        UsageError: a device is named twice, both were asked for, or `devices.toml` has none.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    if everything and given:
        raise UsageError("--all is for every board of devices.toml; leave it out, or leave -d out.")
    if everything:
        names = list(named_devices())
        if not names:
            raise UsageError(
                f"{devices_file()} names no board, so --all means none; "
                "`edgepress devices --help` says how to name one."
            )
        return names
    for index, name in enumerate(given):
        if name in given[:index]:
            raise UsageError(f"{name} is given twice; name each device once.")
    return list(given)


def on_devices(
    devices: Sequence[str],
    work: Callable[[str, Progress], T],
    *,
    progress: FleetProgress,
    verdict: Callable[[T], str],
) -> list[Outcome[T]]:
    """Do the same on every board, on as many at once as there are, 32 at most.

    Boards of the same address take turns, since they would disturb each other's measurements.

    Args:
        devices: their names.
        work: gets a name, and where to say how far it is. What it raises is the board's outcome.
        progress: of all boards.
        verdict: what to show of a result, in a few words.

    Returns:
        An outcome per board, in the order given.

    Raises:
        KeyboardInterrupt: every program that a board's work waited for was ended.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    waiting: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for turn in _turns(devices):
        waiting.put(turn)
    ended: queue.SimpleQueue[tuple[int, Outcome[T] | None]] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            try:
                turn = waiting.get_nowait()
            except queue.Empty:
                return
            for index in turn:
                outcome = None
                try:
                    outcome = _attempt(devices[index], work, progress, verdict)
                finally:  # whatever happens, or the main thread would wait forever
                    ended.put((index, outcome))

    most = min(MOST_AT_ONCE, waiting.qsize())
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(most)]
    outcomes: dict[int, Outcome[T]] = {}
    with progress:
        try:
            for thread in threads:
                thread.start()
            while len(outcomes) < len(devices):
                index, outcome = ended.get()
                if outcome is None:
                    raise KeyboardInterrupt
                outcomes[index] = outcome
        except BaseException:
            progress.interrupt()
            with children.ended():
                deadline = time.monotonic() + _LEAVE_S
                for thread in threads:
                    if thread.is_alive():
                        thread.join(max(0.0, deadline - time.monotonic()))
            raise
    return [outcomes[index] for index in range(len(devices))]


def failed(outcomes: Sequence[Outcome[T]]) -> bool:
    """Whether a board has an error instead of a result."""
    return any(outcome.error is not None for outcome in outcomes)


def raise_bug(outcomes: Sequence[Outcome[T]]) -> None:
    """Raise the first error that is none of a board's; its notes name the board.

    For the end of a command, so that what other boards said is shown and kept first.
    """
    for outcome in outcomes:
        if outcome.error is not None and outcome.is_bug:
            outcome.error.add_note(f"It happened with the board {outcome.device}.")
            raise outcome.error


def _attempt(
    device: str,
    work: Callable[[str, Progress], T],
    progress: FleetProgress,
    verdict: Callable[[T], str],
) -> Outcome[T] | None:
    """Do the work on one board; None where it was interrupted."""
    try:
        with progress.board(device) as board:
            try:
                value = work(device, board)
                board.finish(verdict(value))
                return Outcome(device=device, value=value)
            except Exception as error:
                progress.check()  # what was ended by an interruption did not fail
                board.finish(f"error: {str(error).removeprefix(f'{device}: ')}")
                return Outcome(device=device, error=error)
    except KeyboardInterrupt:
        return None


def _turns(devices: Sequence[str]) -> list[list[int]]:
    """Group boards by the machine that runs their bundles; each group takes turns."""
    groups: dict[str, list[int]] = {}
    for index, device in enumerate(devices):
        try:
            connect = find_device(device).connect
        except DeviceFailed:  # its outcome says so
            connect = f"unknown {device}"
        machine = "this machine" if connect in ("local", "qemu") else connect
        groups.setdefault(machine, []).append(index)
    return list(groups.values())
