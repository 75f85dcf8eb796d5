"""`edgepress devices` asks a real board behind a real sshd."""

from __future__ import annotations

import os
from pathlib import Path

from edgepress.pipeline.device_rows import DeviceRow, examine
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.remote.board_scripts import TOOLS
from tests.loopback import QEMU_AARCH64, Lab


def row(name: str) -> DeviceRow:
    (only,) = examine([name], progress=FleetProgress(shown=False))
    return only


def test_a_board_behind_ssh(lab: Lab) -> None:
    board = lab.boards[0]
    installed = board.home / "edgepress"
    installed.mkdir()
    os.chown(installed, board.home.stat().st_uid, board.home.stat().st_gid)
    (installed / "net").symlink_to(".edgepress/0123456789abcdef")
    found = row(board.name)
    assert found.error == ""
    assert found.facts is not None
    assert found.facts.machine == host_architecture()
    assert found.facts.folder == str(installed)
    assert found.facts.deployed == {"net": ".edgepress/0123456789abcdef"}
    assert found.facts.tools == {*TOOLS.split(), "mv -T"}
    assert found.facts.program == Path(QEMU_AARCH64[0]).exists()
    assert found.facts.writable
    assert found.facts.disk_free_bytes
    assert found.facts.cores
    assert "raspberry-pi-4" in found.targets
    assert found.works
    installed.chmod(0o555)
    os.chown(installed, os.getuid(), os.getgid())
    closed = row(board.name)
    assert not closed.works
    assert f"this user may not write to {installed}." in {f.text for f in closed.findings}


def test_a_board_that_another_pretends_to_be(lab: Lab) -> None:
    lab.change_host_key(lab.boards[0])
    found = row(lab.boards[0].spec)
    assert not found.works
    assert found.facts is None
    assert "host key" in found.error


def test_this_machine() -> None:
    found = row("local")
    assert "native" in found.targets
    assert found.facts is not None
    assert found.facts.machine
    assert found.document()["reachable"] is True
