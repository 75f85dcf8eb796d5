"""One deployment at a time: living locks are kept, dead ones taken over."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgepress.targets.base import DeviceFailed, LinkBroken
from edgepress.targets.remote.board_lock import BoardLock
from edgepress.targets.remote.board_store import Store
from tests.targets.board_shells import (
    BareShell,
    FaultyShell,
    bare_shell,
    new_boot,
    time_passes,
)


@pytest.fixture(params=["dash", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> BareShell:
    return bare_shell(request.param, tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "board"


def lock_of(shell: BareShell | FaultyShell, root: Path, patience_s: int = 0) -> BoardLock:
    return BoardLock(shell, str(root), patience_s)


def leave(root: Path, holder: str) -> None:
    """Leave a lock as one does that ends without letting go of it."""
    lock = root / ".edgepress" / "lock"
    lock.mkdir(parents=True)
    (lock / "holder").write_text(holder)
    uptime = Path("/proc/uptime").read_text().partition(".")[0]
    (lock / "beat").write_text(f"{uptime}\n")


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_nothing_is_left_of_a_lock(shell: BareShell, root: Path) -> None:
    lock = lock_of(shell, root)
    with lock.held():
        assert (root / ".edgepress" / "lock" / "holder").is_file()
        with lock.held():
            pass
        assert (root / ".edgepress" / "lock" / "holder").is_file()
    assert not root.exists()
    root.mkdir()
    with lock.held():
        pass
    assert list(root.iterdir()) == []  # what was there before stays


def test_a_living_holder_is_named(shell: BareShell, root: Path) -> None:
    with lock_of(shell, root).held():
        said = r"is under way there: .+ on .+, process \d+, for \d+ s"
        with pytest.raises(DeviceFailed, match=said), lock_of(shell, root).held():
            pytest.fail("two hold it")
        assert (root / ".edgepress" / "lock" / "holder").is_file()


def test_a_living_holder_is_waited_for(shell: BareShell, root: Path) -> None:
    taken, let_go, got = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        taken.wait(60)
        threading.Timer(0.5, let_go.set).start()
        with lock_of(shell, root, patience_s=100).held():
            got.set()

    thread = threading.Thread(target=second)
    thread.start()
    with lock_of(shell, root).held():
        taken.set()
        assert let_go.wait(60)
        assert not got.is_set()
    thread.join(100)
    assert got.is_set()


@pytest.mark.parametrize("passes", [new_boot, time_passes])
def test_a_dead_holder_is_followed(passes: object, shell: BareShell, root: Path) -> None:
    leave(root, f"other.1\n{boot()}\n5\nsomebody, process 1\n")
    with pytest.raises(DeviceFailed, match="somebody, process 1, for"), lock_of(shell, root).held():
        pytest.fail("it lives")
    assert callable(passes)
    passes(root)
    lock = lock_of(shell, root)
    with lock.held():
        assert (root / ".edgepress/lock/holder").read_text().startswith(lock.token)
    assert list((root).iterdir()) == []


def test_a_lock_that_was_never_finished_is_followed(shell: BareShell, root: Path) -> None:
    (root / ".edgepress" / "lock").mkdir(parents=True)
    with lock_of(shell.having(sleep=":"), root).held():
        pass
    assert list(root.iterdir()) == []


def test_whoever_was_followed_notices(shell: BareShell, root: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model").write_text("x")
    store = Store(shell, str(root), patience_s=0, pause_s=0)
    version = store.stage(tmp_path / "bundle")
    with store.locked():
        new_boot(root)  # for the other one; this holder believes that it lives
        refused = pytest.raises(DeviceFailed, match="another deployment")
        with lock_of(shell, root).held(), refused:
            store.switch("net", version)
        assert not (root / "net").exists()
    assert not (root / ".edgepress" / "lock").exists()


def test_an_answer_that_was_lost_is_asked_for_again(shell: BareShell, root: Path) -> None:
    lock = lock_of(FaultyShell(shell, {1: "after"}), root)
    with pytest.raises(LinkBroken), lock.held():
        pytest.fail("nobody told")
    with lock.held():  # its own one is no reason to wait
        assert (root / ".edgepress/lock/holder").read_text().startswith(lock.token)
    assert list(root.iterdir()) == []


def test_many_at_once_get_it_one_after_another(shell: BareShell, root: Path) -> None:
    leave(root, "dead.1\nanother boot\n5\nsomebody\n")
    inside, most, failed = [0], [0], []

    def work() -> None:
        try:
            with lock_of(shell, root, patience_s=300).held():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1
        except DeviceFailed as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert (most[0], failed) == (1, [])
    assert list(root.iterdir()) == []


PROGRAM = """
import sys
from edgepress.targets.remote.board_lock import BoardLock
from edgepress.targets.remote.shell import LocalShell
lock = BoardLock(LocalShell(), sys.argv[1], 0)
with lock.held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_lets_go(shell: BareShell, root: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        said = f"process {process.pid}, for"
        with pytest.raises(DeviceFailed, match=said), lock_of(shell, root).held():
            pytest.fail("two hold it")
        process.kill()
        process.wait()
        with lock_of(shell, root, patience_s=100).held():
            pass


def test_once_the_link_broke_it_is_not_relied_on(shell: BareShell, root: Path) -> None:
    lock = lock_of(shell, root)
    with lock.held():
        before = lock.token
        lock.take_again()
        with lock.held():
            assert lock.token != before
            assert (root / ".edgepress/lock/holder").read_text().startswith(lock.token)
    assert not root.exists()
