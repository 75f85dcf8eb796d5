"""Whatever breaks at whatever moment: names point to complete versions, and the next try works."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgepress.targets.base import DeviceFailed, LinkBroken, OnDevice
from edgepress.targets.remote import board_upload
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.board_store import Store
from tests.targets.board_shells import (
    BareShell,
    FaultyShell,
    MortalShell,
    bare_shell,
    new_boot,
    time_passes,
)

LARGE = bytes(range(256)) * 64
OLD = {"model": b"old", "weights.epw": LARGE, "manifest.json": b"old", "golden/0.in": b"1"}
NEW = OLD | {"model": b"new" * 9, "weights.epw": LARGE[::-1], "manifest.json": b"new", "more": b"2"}

# Scripts of a deployment: look, lock, look, the executable, the check, the weights, the small
# files, assemble, prune, look, switch, prune.
SCRIPTS = 13
COMMANDS = 75

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few kilobytes count as a large file."""
    monkeypatch.setattr(board_upload, "_SMALL_BYTES", 4096)


@pytest.fixture(params=["dash", "busybox"], scope="module")
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BareShell:
    return bare_shell(request.param, tmp_path_factory.mktemp("commands"))


class Scene:
    """A board with an old bundle, installed as `start` says, and a new one to deploy."""

    def __init__(self, folder: Path, start: str, shell: BareShell) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.root, self.old, self.new = folder / "board", folder / "old", folder / "new"
        for place, files in ((self.old, OLD), (self.new, NEW)):
            for path, data in files.items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(data)
        self.start = start
        if start == "version":
            deploy(self.store(shell), self.old)
        elif start == "folder":
            shutil.copytree(self.old, self.root / "net")

    def store(self, shell: BareShell | FaultyShell | MortalShell) -> Store:
        return Store(shell, str(self.root), patience_s=0, pause_s=0)

    def installed(self) -> dict[str, bytes] | None:
        """What a program finds under the name."""
        net = self.root / "net"
        if not os.path.lexists(net):
            return None
        found = {
            path.relative_to(net).as_posix(): path.read_bytes()
            for path in net.rglob("*")
            if path.is_file()
        }
        sums = found.pop("SHA256SUMS", None)
        if net.is_symlink():
            assert sums is not None
            assert net.readlink().parts == (".edgepress", hashlib.sha256(sums).hexdigest()[:16])
        return found

    def check(self) -> None:
        """The name points to one of both bundles, or to nothing where nothing was there before."""
        before = None if self.start == "nothing" else OLD
        assert self.installed() in (before, NEW)

    def arrived_bytes(self) -> int:
        """How many bytes of the large file are on the board."""
        name = hashlib.sha256(NEW["weights.epw"]).hexdigest()
        incoming = self.root / ".edgepress" / "incoming"
        files = [incoming / f"{name}.part", incoming / name]
        return max((file.stat().st_size for file in files if file.is_file()), default=0)

    def check_next(self, shell: BareShell) -> None:
        """The next deployment works, goes on where the last one ended, and leaves nothing over."""
        arrived = self.arrived_bytes()
        store = self.store(shell)
        deploy(store, self.new)
        assert self.installed() == NEW
        rest = sum(len(data) for data in NEW.values()) + 4 * 512
        assert store.sent_bytes <= rest - arrived
        kept = {path.name for path in (self.root / ".edgepress").iterdir()}
        assert all(name == "net.previous" or len(name) == 16 for name in kept), kept
        if self.start != "nothing":
            store.rollback("net")
            assert self.installed() == OLD


def check_executable(there: OnDevice) -> None:
    assert (there / "model").is_file()


def deploy(store: Store, folder: Path) -> None:
    with store.locked():
        version = store.stage(folder, check=check_executable)
        store.switch("net", version)


STARTS = st.sampled_from(["nothing", "version", "folder"])
FAULTS = st.dictionaries(
    st.integers(1, SCRIPTS),
    st.one_of(st.sampled_from(["before", "after", "flip"]), st.integers(0, len(LARGE))),
    min_size=1,
    max_size=7,
)


@settings(max_examples=8, deadline=None, suppress_health_check=CHECKS)
@given(start=STARTS, faults=FAULTS)
@example(start="version", faults={6: 9000, 7: "after", 8: 100, 9: "before"})
def test_links_that_break(
    shell: BareShell, tmp_path_factory: pytest.TempPathFactory, start: str,
    faults: dict[int, str | int],
) -> None:  # fmt: skip
    scene = Scene(tmp_path_factory.getbasetemp() / "links", start, shell)
    with suppress(DeviceFailed):
        deploy(scene.store(FaultyShell(shell, faults)), scene.new)
    scene.check()
    time_passes(scene.root)  # for a lock whose taker never heard that it had it
    scene.check_next(shell)


@settings(max_examples=12, deadline=None, suppress_health_check=CHECKS)
@given(start=st.sampled_from(["nothing", "version"]), commands=st.integers(0, COMMANDS))
def test_power_that_goes(
    shell: BareShell, tmp_path_factory: pytest.TempPathFactory, start: str, commands: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "power"
    scene = Scene(folder, start, shell)
    board = MortalShell(shell, folder)
    board.power_on(commands)
    with suppress(DeviceFailed):
        deploy(scene.store(board), scene.new)
    scene.check()
    new_boot(scene.root)
    scene.check_next(shell)


@settings(max_examples=5, deadline=None, suppress_health_check=CHECKS)
@given(commands=st.integers(0, COMMANDS))
def test_power_that_goes_while_a_folder_of_an_older_edgepress_becomes_a_version(
    shell: BareShell, tmp_path_factory: pytest.TempPathFactory, commands: int
) -> None:
    """Only then, between two renames, is there a moment without the name; nothing is lost."""
    folder = tmp_path_factory.getbasetemp() / "power"
    scene = Scene(folder, "folder", shell)
    board = MortalShell(shell, folder)
    board.power_on(commands)
    with suppress(DeviceFailed):
        deploy(scene.store(board), scene.new)
    new_boot(scene.root)
    if scene.installed() is None:
        scene.store(shell).rollback("net")
        assert scene.installed() == OLD
    scene.check()
    scene.check_next(shell)


def test_a_link_that_breaks_three_times_is_no_failure(shell: BareShell, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    board = FaultyShell(shell, {6: 5000, 10: 5000, 13: 100})
    store = scene.store(board)
    deploy(store, scene.new)
    assert scene.installed() == NEW
    assert board.count > SCRIPTS


def test_a_link_that_breaks_for_good_is_one(shell: BareShell, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    board = FaultyShell(shell, dict.fromkeys(range(4, 100), "before"))
    with pytest.raises(LinkBroken):
        deploy(scene.store(board), scene.new)
    scene.check()
    scene.check_next(shell)


def test_bytes_that_arrive_wrong_each_time_are_no_bundle(shell: BareShell, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    board = FaultyShell(shell, dict.fromkeys(range(4, 100), "flip"))
    with pytest.raises(LinkBroken, match="model arrived with other bytes than were sent"):
        deploy(scene.store(board), scene.new)
    assert scene.installed() == OLD


def test_everything_is_on_the_disk_before_the_switch(shell: BareShell, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    log = tmp_path / "log"
    sync = f'printf "%s\\n" "$@" >>{log}'
    mv = f'case "$*" in *link.new*) echo switch >>{log} ;; esac\ncommand mv "$@"'
    deploy(scene.store(shell.having(sync=sync, mv=mv)), scene.new)
    before, _, after = log.read_text().partition("switch\n")
    for path in (*NEW, "SHA256SUMS"):
        assert f".partial/{path}\n" in before
    assert f"{scene.root / '.edgepress'}\n" in before
    assert after.startswith(f"{scene.root}\n")


def test_a_switch_that_did_not_come_about_leaves_what_was_before(
    shell: BareShell, tmp_path: Path
) -> None:
    """What comes before the old version is known until the name points to the new one."""
    scene = Scene(tmp_path / "scene", "version", shell)
    deploy(scene.store(shell), scene.new)
    (scene.old / "model").write_bytes(b"third")
    ends = 'case "$*" in *link.new*) exit 1 ;; esac\ncommand mv "$@"'
    with pytest.raises(DeviceFailed, match="cannot let net point to the new version"):
        deploy(scene.store(shell.having(mv=ends)), scene.old)
    assert scene.installed() == NEW
    scene.store(shell).rollback("net")
    assert scene.installed() == OLD


def test_a_file_that_somebody_else_writes_to_is_not_appended_to(
    shell: BareShell, tmp_path: Path
) -> None:
    """As a connection does that broke here and not yet there."""
    scene = Scene(tmp_path / "scene", "version", shell)
    part = scene.root / ".edgepress/incoming" / hashlib.sha256(NEW["weights.epw"]).hexdigest()
    part = part.with_suffix(".part")
    part.parent.mkdir()
    part.write_bytes(NEW["weights.epw"][:100])
    writes = f'command mkdir "$@" && printf . >>{part}'
    with pytest.raises(LinkBroken, match=r"weights\.epw is being written to by somebody else"):
        deploy(scene.store(shell.having(mkdir=writes)), scene.new)
    assert part.stat().st_size < 200
    scene.check()


def test_there_is_no_moment_without_the_name(shell: BareShell, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    log = tmp_path / "log"
    look = f'[ -f "{scene.root}/net/model" ] || echo gone >>{log}\n'
    sync = shell.functions["sync"]
    tools = {tool: f'{look}command {tool} "$@"' for tool in TOOLS.split() if tool != "sync"}
    deploy(scene.store(shell.having(**tools, sync=f"{look}{sync}")), scene.new)
    scene.store(shell.having(**tools)).rollback("net")
    assert scene.installed() == OLD
    assert not log.exists()


@pytest.mark.parametrize("arrives_bytes", [0, 1, 100, 200])
def test_half_a_list_of_files_makes_no_version(
    arrives_bytes: int, shell: BareShell, tmp_path: Path
) -> None:
    scene = Scene(tmp_path / "scene", "version", shell)
    board = FaultyShell(shell, dict.fromkeys(range(9, 99), "before") | {8: arrives_bytes})
    with pytest.raises(LinkBroken):
        deploy(scene.store(board), scene.new)
    versions = [path.parent.name for path in scene.root.glob(".edgepress/*/SHA256SUMS")]
    assert [name for name in versions if "." not in name] == [
        str((scene.root / "net").readlink().name)
    ]
    scene.check_next(shell)
