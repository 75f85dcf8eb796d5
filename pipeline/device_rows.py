"""What `edgepress devices` finds out about devices: what each is, what it runs, what to mind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgepress.pipeline.fleet import on_devices
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.progress import Progress
from edgepress.targets.base import DeviceFailed, Target, TargetError, UnknownTarget
from edgepress.targets.devices.base import find_device, open_device, open_shell
from edgepress.targets.glibc_needs import linked_glibc
from edgepress.targets.load import load_target, target_names
from edgepress.targets.named_devices import NamedDevice, named_devices
from edgepress.targets.remote.board_fit import Finding, compare, stopping
from edgepress.targets.remote.board_probe import BoardFacts, probe

_KINDS = ("stops", "spoils", "note")
_HOST_ONLY = "native"  # describes the machine that builds, whatever board runs it


@dataclass(frozen=True, kw_only=True)
class DeviceRow:
    """A device.

    Attributes:
        board: how it is named and reached.
        error: why it was not reached, or empty.
        facts: what it told; None where it was not reached, and of `qemu`.
        targets: those whose bundles it runs.
        refused: why not, by the name of each other target.
        findings: what to mind.
    """

    board: NamedDevice
    error: str = ""
    facts: BoardFacts | None = None
    targets: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether bundles of its target can be installed on it and run."""
        stopped = any(finding.kind == "stops" for finding in self.findings)
        return not self.error and not stopped and bool(self.targets)

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        facts = None
        if self.facts is not None:
            facts = dataclasses.asdict(self.facts) | {
                "features": sorted(self.facts.features),
                "tools": sorted(self.facts.tools),
                "core_kinds": self.facts.core_kinds,
                "throttle_flags": self.facts.throttle_flags,
            }
        return {
            **dataclasses.asdict(self.board),
            "reachable": not self.error,
            "error": self.error or None,
            "targets": self.targets,
            "not": self.refused,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "facts": facts,
        }


def examine(names: Sequence[str], *, progress: FleetProgress) -> list[DeviceRow]:
    """Ask devices what they are, all at once; none named: local, qemu and every named board.

    Raises:
        DeviceFailed: a name is of no device.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    chosen = list(dict.fromkeys(names)) or ["local", "qemu", *named_devices()]
    boards = {name: find_device(name) for name in chosen}

    def ask(name: str, shown: Progress) -> DeviceRow:
        shown.update("probe", 0, 0)
        return device_row(boards[name])

    outcomes = on_devices(chosen, ask, progress=progress, verdict=lambda _row: "")
    rows = []
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        assert outcome.value is not None
        rows.append(outcome.value)
    return rows


def device_row(board: NamedDevice) -> DeviceRow:
    """Ask one device."""
    if board.connect == "qemu":
        return _emulated_here(board)
    emulator = PurePosixPath(board.run_with[0]).name if board.run_with else ""
    try:
        shell = open_shell(board.name)
        program = board.run_with[0] if board.run_with else ""
        facts = probe(shell, folder=board.folder, program=program)
    except DeviceFailed as error:
        return DeviceRow(board=board, error=str(error))
    targets, refused = [], {}
    for name in target_names():
        if why := _refusal(name, board, facts, emulator):
            refused[name] = why
        else:
            targets.append(name)
    # a target that the board does not run is refused already, and its needs matter no more
    target = load_target(board.target) if board.target in targets else None
    findings = _about_target(board, facts, targets, refused)
    findings += compare(facts, target, run_with=board.run_with, glibc=_glibc(target))
    findings.sort(key=lambda finding: _KINDS.index(finding.kind))
    return DeviceRow(board=board, facts=facts, targets=targets, refused=refused, findings=findings)


def _refusal(name: str, board: NamedDevice, facts: BoardFacts, emulator: str) -> str:
    """Say why a board does not run bundles of a target; empty where it does."""
    try:
        target = load_target(name)
        if board.connect == "local":
            open_device("local", target)
    except TargetError as error:
        return str(error)
    if emulator.startswith("qemu-"):
        return "" if target.emulator == emulator else f"{emulator} does not run {name} bundles."
    if name == _HOST_ONLY and board.connect != "local":
        return f"{name} is for the machine that builds."
    return " ".join(stopping(facts, target, _glibc(target)))


def _about_target(
    board: NamedDevice, facts: BoardFacts, targets: Sequence[str], refused: dict[str, str]
) -> list[Finding]:
    """Say where a board's target is none that it runs, and what it runs instead."""
    if not board.target:
        if targets:
            return []
        nearest = _nearest(facts, refused)
        text = f"it runs bundles of no target. What stops {nearest}: {refused[nearest]}"
        return [Finding("stops", text)]
    if board.target in targets:
        return []
    if board.target in refused:
        found = [Finding("stops", refused[board.target])]
    else:
        found = [Finding("stops", str(UnknownTarget(board.target, target_names())))]
    if targets:
        found.append(Finding("note", f"bundles of {', '.join(targets)} run there."))
    return found


def _nearest(facts: BoardFacts, refused: dict[str, str]) -> str:
    """The target whose bundles a board would run with the least changes."""
    targets = [load_target(name) for name in refused if name != _HOST_ONLY]
    same = [target for target in targets if target.architecture == facts.machine]
    return min(same or targets, key=lambda target: len(refused[target.name])).name


def _emulated_here(board: NamedDevice) -> DeviceRow:
    """The targets whose emulator is on this machine."""
    targets, refused = [], {}
    for name in target_names():
        try:
            open_device(board.name, load_target(name))
            targets.append(name)
        except TargetError as error:
            refused[name] = str(error)
    return DeviceRow(board=board, targets=targets, refused=refused)


def _glibc(target: Target | None) -> tuple[int, ...] | None:
    return linked_glibc(target) if target is not None else None
