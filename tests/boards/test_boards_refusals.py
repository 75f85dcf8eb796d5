"""Boards and bundles that do not fit, keys that are wrong, and disks that are full."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.boards.conftest import (
    SSH_OVERHEAD_BYTES,
    Bundles,
    Edgepress,
    arrived_bytes,
    digests,
    in_background,
    installed,
    lying_emulator,
    remains,
    sent_size,
    wait_for,
)
from tests.loopback import QEMU_AARCH64, Board, Lab, boards

ROOM = 9_000_000


@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_a_cpu_that_lacks_a_feature_gets_the_executable_only(
    command: str, bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    link = lab.link(board)
    ended = edgepress(command, bundles.dotprod, "-d", board.name)
    assert ended.code == 5
    assert "this board lacks asimddp, which the bundle needs" in ended.err
    executable = (bundles.dotprod / "model").stat().st_size
    assert link.sent_bytes < executable + SSH_OVERHEAD_BYTES
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    assert sorted(os.listdir(board.home / "edgepress")) == [".edgepress", "first"]  # noqa: PTH208
    assert remains(board.home / "edgepress/.edgepress") == []


@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_a_bundle_for_another_architecture(
    command: str, bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    ended = edgepress(command, bundles.armv7, "-d", board.name)
    assert ended.code == 5
    assert "Invalid ELF image" in ended.err
    assert sorted(os.listdir(board.home / "edgepress")) == [".edgepress", "first"]  # noqa: PTH208
    assert installed(board.home / "edgepress/first") == digests(bundles.first)


def test_a_bundle_for_another_architecture_without_an_emulator(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    lab.write_devices(target="raspberry-pi-4", run_with=())
    link = lab.link(board)
    for command in ("deploy", "verify"):
        ended = edgepress(command, bundles.second, "-d", board.name)
        assert ended.code == 5
        assert f"its system is {os.uname().machine}" in ended.err
        assert "Traceback" not in ended.err
    assert link.sent_bytes < sent_size(bundles.second) / 2
    assert sorted(os.listdir(board.home / "edgepress")) == [".edgepress", "first"]  # noqa: PTH208


@pytest.mark.parametrize("command", ["deploy", "verify"])
@pytest.mark.parametrize("known", ["changed", "unknown"])
def test_a_host_key_that_is_not_the_known_one(
    known: str, command: str, bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    link = lab.link(board)
    if known == "changed":
        lab.change_host_key(board)
    else:
        lab.forget_host_key(board)
    ended = edgepress(command, bundles.first, "-d", board.name)
    assert ended.code == 5
    assert ("HAS CHANGED" if known == "changed" else "is unknown") in ended.err
    assert link.sent_bytes < SSH_OVERHEAD_BYTES
    assert list(board.home.iterdir()) == []


def test_a_user_key_that_the_board_does_not_know(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    lab.configure(board, IdentityFile=str(key))
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 5
    assert "denied the login" in ended.err
    assert list(board.home.iterdir()) == []


def test_a_board_where_no_server_listens(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    lab.link(board).close()
    for command in (("deploy",), ("verify",), ("infer", "--data", bundles.samples, "-o", "no.npz")):
        ended = edgepress(command[0], bundles.first, "-d", board.name, *command[1:])
        assert ended.code == 5
        assert "refuses the connection" in ended.err


def test_a_required_signature(
    bundles: Bundles,
    copy: Callable[[Path], Path],
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
    tmp_path: Path,
) -> None:
    for name in ("ours", "theirs"):
        edgepress("keygen", tmp_path / f"{name}.pem")
    wanted = ("-d", board.name, "--require-signature", tmp_path / "ours.pem.pub")
    link = lab.link(board)
    unsigned = edgepress("deploy", bundles.first, *wanted)
    bundle = copy(bundles.first)
    edgepress("sign", bundle, "--key", tmp_path / "theirs.pem")
    theirs = edgepress("deploy", bundle, *wanted)
    assert (unsigned.code, theirs.code) == (6, 6)
    assert "sign" in unsigned.err
    assert "sign" in theirs.err
    assert link.sent_bytes == 0
    assert list(board.home.iterdir()) == []

    edgepress("sign", bundle, "--key", tmp_path / "ours.pem")
    assert edgepress("deploy", bundle, *wanted).code == 0
    assert installed(board.home / "edgepress/first")["manifest.sig"]


def test_a_byte_that_changed_on_the_board(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    edgepress("deploy", bundles.first, *to)
    damage(place / "weights.epw")

    command = [*QEMU_AARCH64, str(place / "model"), "--selftest"]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert ran.returncode == 2
    assert b"weights.epw" in ran.stderr

    edgepress("deploy", bundles.second, *to)
    ended = edgepress("deploy", bundles.second, *to, "--rollback")
    assert ended.code == 5
    assert "weights.epw" in ended.err
    assert installed(place) == digests(bundles.second)

    link = lab.link(board)  # and deploying it again mends it
    ended = edgepress("deploy", bundles.first, *to, "--json")
    assert ended.document["sent_bytes"] == (bundles.first / "weights.epw").stat().st_size
    assert link.sent_bytes < sent_size(bundles.first)
    assert installed(place) == digests(bundles.first)


def test_a_byte_that_changed_here(
    bundles: Bundles, copy: Callable[[Path], Path], board: Board, edgepress: Edgepress
) -> None:
    bundle = copy(bundles.first)
    damage(bundle / "weights.epw")
    ended = edgepress("deploy", bundle, "-d", board.name)
    assert ended.code == 2
    assert "weights.epw" in ended.err
    assert list(board.home.iterdir()) == []


def test_answers_that_are_wrong_there(
    bundles: Bundles, copy: Callable[[Path], Path], lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    edgepress("deploy", bundles.first, *to)
    lab.write_devices(target="raspberry-pi-4", run_with=(str(lying_emulator(board)),))
    ended = edgepress("deploy", bundles.second, *to)
    assert ended.code == 5
    assert "selftest" in ended.err
    assert installed(place) == digests(bundles.first)
    assert remains(place.parent / ".edgepress") == []

    bundle = copy(bundles.second)
    assert edgepress("verify", bundle, "-d", board.name).code == 6
    assert json.loads((bundle / "evidence.json").read_text())["passed"] is False


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def small_disk(board: Board) -> Iterator[Path]:
    """The home folder is the disk of the board, of 9 MB."""
    options = f"size={ROOM},uid={board.home.stat().st_uid},mode=755"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(board.home)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"a small disk takes a user who may mount one: {tried.stderr}")
    yield board.home
    for pid in board.processes():
        os.kill(pid, 9)
    board.wait_until_idle()
    subprocess.run(["umount", str(board.home)], check=True)


def test_a_disk_without_room(
    bundles: Bundles, lab: Lab, board: Board, small_disk: Path, edgepress: Edgepress
) -> None:
    place = small_disk / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    assert edgepress("deploy", bundles.first, *to).code == 0
    link = lab.link(board)
    for command in (("deploy", bundles.second, *to), ("verify", bundles.second, "-d", board.name)):
        ended = edgepress(*command)
        assert ended.code == 5
        assert "MB free" in ended.err
        assert "are needed" in ended.err
        assert installed(place) == digests(bundles.first)
    assert link.sent_bytes < 2 * SSH_OVERHEAD_BYTES

    subprocess.run(["mount", "-o", f"remount,size={2 * ROOM}", str(small_disk)], check=True)
    assert edgepress("deploy", bundles.second, *to).code == 0
    assert installed(place) == digests(bundles.second)


def test_a_disk_that_fills_while_a_bundle_is_sent(
    bundles: Bundles, lab: Lab, board: Board, small_disk: Path, edgepress: Edgepress
) -> None:
    place = small_disk / "edgepress/first"
    others = small_disk / "others"
    link = lab.link(board)
    link.throttle(2_000_000)

    def fill() -> None:
        wait_for(lambda: arrived_bytes(board) > 500_000, "weights")
        with others.open("wb") as stream:
            while True:
                try:
                    stream.write(bytes(64 * 1024))
                    stream.flush()
                except OSError:
                    return

    fills = in_background(fill)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    fills.join()
    assert ended.code == 5
    assert "No space left" in ended.err
    assert not place.exists()

    assert arrived_bytes(board) == 0  # it takes no more of that disk than before

    others.unlink()
    link.throttle(None)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 0, ended.err
    assert installed(place) == digests(bundles.first)
    assert remains(small_disk / "edgepress/.edgepress") == []


def test_a_folder_that_must_not_be_written_to(
    bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    for folder in ("/proc/edgepress", "/dev/null/edgepress"):
        ended = edgepress("deploy", bundles.first, "-d", board.name, "--to", f"{folder}/net")
        assert ended.code == 5
        assert "cannot" in ended.err
    assert list(board.home.iterdir()) == []


def test_a_board_without_what_run_with_names(
    bundles: Bundles, edgepress: Edgepress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with boards(1, run_with=("qemu-of-nobody",)) as lab:
        for name, value in lab.environment.items():
            monkeypatch.setenv(name, value)
        ended = edgepress("deploy", bundles.first, "-d", lab.boards[0].name)
    assert ended.code == 5
    assert "run_with names qemu-of-nobody, which is not there" in ended.err


def test_errors_have_a_document_too(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    lab.change_host_key(board)
    ended = edgepress("deploy", bundles.first, "-d", board.name, "--json")
    assert ended.code == 5
    assert "HAS CHANGED" in json.dumps(ended.document)
