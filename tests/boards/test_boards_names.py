"""Names, folders and hosts that a shell would execute: none ever does."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.boards.conftest import Bundles, Edgepress, digests, installed, remains
from tests.loopback import Board, Lab

CANARY = "canary"
COMMANDS = [
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"a; touch {CANARY} #",
    f"a' ; touch {CANARY} ; '",
    f'a" ; touch {CANARY} ; "',
    f"line\ntouch {CANARY}\nline",
    f"& touch {CANARY} &",
    f"> {CANARY}",
]
NAMES = [
    " ".join(COMMANDS),
    f"'\"$(touch {CANARY}) \\$(touch {CANARY})\\",
    "-rf",
    "* [a-z]? two  words ${HOME} $1 %s%n \t ✓",
    "trailing\n",
]


@pytest.fixture(autouse=True)
def no_canary(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever runs what it should not leaves a file behind, there or here."""
    monkeypatch.chdir(tmp_path)
    yield
    for folder in (lab.boards[0].home, tmp_path):
        assert [path for path in folder.rglob(CANARY) if path.is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_on_the_board(
    name: str, bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    place = board.home / name / "models" / name
    to = ("-d", board.name, "--to", place)
    ended = edgepress("deploy", bundles.first, *to, "--json")
    assert ended.code == 0, ended.err
    assert ended.document["folder"] == str(place)
    assert installed(place) == digests(bundles.first)
    assert edgepress("deploy", bundles.first, *to, "--rollback").code == 5  # to nothing
    assert remains(place.parent / ".edgepress") == []
    assert os.listdir(board.home) == [name]  # noqa: PTH208
    assert sorted(os.listdir(place.parent)) == sorted([".edgepress", name])  # noqa: PTH208


def renamed(bundle: Path, folder: Path, name: str) -> Path:
    """Copy a bundle and give it another name."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_bundle(
    name: str, bundles: Bundles, board: Board, edgepress: Edgepress, tmp_path: Path
) -> None:
    bundle = renamed(bundles.first, tmp_path / "bundle", name)
    ended = edgepress("deploy", bundle, "-d", board.name)
    assert ended.code == 0, ended.err
    assert installed(board.home / "edgepress" / name) == digests(bundle)
    assert edgepress("deploy", bundle, "-d", board.name).code == 0


def test_a_name_that_is_none(
    bundles: Bundles, board: Board, edgepress: Edgepress, tmp_path: Path
) -> None:
    names = ("", ".", "..", ".edgepress", "a/b", "/etc/passwd", "../up", "nul\0byte")
    for index, name in enumerate(names):
        bundle = renamed(bundles.first, tmp_path / str(index), name)
        ended = edgepress("deploy", bundle, "-d", board.name)
        assert ended.code == 2, name
        assert "name" in ended.err
    assert list(board.home.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_devices_toml(
    name: str,
    bundles: Bundles,
    copy: Callable[[Path], Path],
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
) -> None:
    devices = lab.folder / "devices.toml"
    devices.write_text(devices.read_text() + f"folder = {json.dumps('~/' + name)}\n")
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 0, ended.err
    assert installed(board.home / name / "first") == digests(bundles.first)
    assert edgepress("verify", copy(bundles.first), "-d", board.name).code == 0
    assert edgepress("devices", board.name).code == 0
    assert os.listdir(board.home) == [name]  # noqa: PTH208


@pytest.mark.parametrize("word", NAMES[:2])
def test_a_word_of_run_with(
    word: str, bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    lab.write_devices(target="raspberry-pi-4", run_with=("qemu-of-nobody", word))
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 5
    assert "qemu-of-nobody" in ended.err
    assert edgepress("devices", board.name).code in (0, 5)


@pytest.mark.parametrize("command", ["deploy", "verify", "devices"])
def test_a_host(command: str, bundles: Bundles, board: Board, edgepress: Edgepress) -> None:
    for host in (*COMMANDS, *NAMES, f"-oProxyCommand=touch {CANARY}", "", "a b@c"):
        if command == "devices":
            ended = edgepress("devices", f"ssh:{host}")
        else:
            ended = edgepress(command, bundles.first, "-d", f"ssh:{host}")
        assert ended.code == 5, host
        assert "host" in ended.err + ended.out
    assert list(board.home.iterdir()) == []
