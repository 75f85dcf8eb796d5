"""Versions on a board: what is sent, what it becomes, what names point to."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edgepress.targets.base import DeviceFailed, OnDevice
from edgepress.targets.remote import board_upload
from edgepress.targets.remote.board_answers import version_id
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.board_store import NotOurs, Store
from tests.targets.board_shells import BareShell, bare_shell

FILES = {
    "model": b"an executable" * 100,
    "weights.epw": bytes(range(256)) * 40,
    "manifest.json": b"{}",
    "golden/0.in": b"",
    "golden/0.out": b"\0\n\\ '$(x)" * 99,
    "golden/10.in": b"x" * 512,
    "evidence.json": b"stays here",
    "graph.onnx": b"stays here",
}
STRANGE = (
    *("a b", "it's", 'say "x"', "a;touch x", "$(touch x)", "`touch x`", "two\nlines", "line\n"),
    *("-rf", "--", "*", "!", "ä", "a\\nb", ".hidden", "x=1", "~x", "lock", "0123456789abcdef"),
)
PATHS = ("a b", "two\nlines", "$(x)", "..x/../y", "x/..", "SHA256SUMS", "-;")


@pytest.fixture(params=["dash", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> BareShell:
    return bare_shell(request.param, tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "board"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few kilobytes count as a large file."""
    monkeypatch.setattr(board_upload, "_SMALL_BYTES", 4096)
    monkeypatch.setattr(board_upload, "_PACK_BYTES", 2048)


def write(folder: Path, **changes: bytes) -> Path:
    for path, data in {**FILES, **{k.replace("__", "/"): v for k, v in changes.items()}}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sent(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in read(folder).items() if k not in ("evidence.json", "graph.onnx")}


def versions(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".edgepress").iterdir() if path.is_dir())


def store(shell: BareShell, root: Path | str) -> Store:
    return Store(shell, str(root), patience_s=0, pause_s=0)


def test_a_version_is_what_was_in_the_folder(shell: BareShell, root: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    board = store(shell, root)
    there = board.stage(folder)
    assert isinstance(there, OnDevice)
    assert there.parent == root / ".edgepress"
    found = read(Path(there))
    sums = found.pop("SHA256SUMS")
    assert found == sent(folder)
    assert there.name == hashlib.sha256(sums).hexdigest()[:16]
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=there, check=True,
                          capture_output=True).stdout.count(b": OK\n") == len(found)  # fmt: skip
    paths = [line.partition("  ")[2] for line in sums.decode().splitlines()]
    assert paths == sorted(paths)
    modes = {path: os.access(there / path, os.X_OK) for path in found}
    assert modes == {path: path == "model" for path in found}
    assert not any((there / path).stat().st_mode & 0o222 for path in found)
    assert versions(root) == [there.name]  # nothing else: no lock, nothing under way


def test_what_is_there_takes_one_script(shell: BareShell, root: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    there = store(shell, root).stage(folder)
    again = store(shell, root)
    assert again.stage(folder, check=lambda _: pytest.fail("it was checked before")) == there
    assert again.sent_bytes == 0


def test_only_files_that_no_version_has_are_sent(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    store(shell, root).stage(write(tmp_path / "one"))
    board = store(shell, root)
    other = write(tmp_path / "two", manifest_json=b"", golden__1_in=FILES["weights.epw"])
    (other / "manifest.json").write_bytes(b"{2}")
    (other / "manifest_json").unlink()
    there = board.stage(other)
    assert board.sent_bytes == len(b"{2}")
    assert {k: v for k, v in read(Path(there)).items() if k != "SHA256SUMS"} == sent(other)


def test_progress_ends_with_all_bytes(shell: BareShell, root: Path, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    board = store(shell, root)
    board.stage(write(tmp_path / "bundle"), progress=lambda *a: said.append(a))
    assert said[0][0] == "model"
    assert said[-1][1] == said[-1][2] == board.sent_bytes
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)


def test_the_executable_is_checked_before_the_rest_is_sent(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell, root)

    def refuse(there: OnDevice) -> None:
        assert read(Path(there)) == {"model": FILES["model"]}
        assert os.access(there / "model", os.X_OK)
        raise DeviceFailed("this board lacks asimddp")

    with pytest.raises(DeviceFailed, match="lacks asimddp"):
        board.stage(write(tmp_path / "bundle"), check=refuse)
    assert board.sent_bytes == len(FILES["model"])
    assert not root.exists()


def test_names_switch_and_go_back(shell: BareShell, root: Path, tmp_path: Path) -> None:
    board = store(shell, root)
    one = board.stage(write(tmp_path / "one"))
    assert board.switch("net", one) is None
    two = board.stage(write(tmp_path / "two", model=b"2"))
    assert board.switch("net", two) == one.name
    assert board.switch("net", two) == one.name  # as after a lost answer
    assert str((root / "net").readlink()) == f".edgepress/{two.name}"
    assert board.rollback("net") == (one, two.name)
    assert (root / "net" / "model").read_bytes() == FILES["model"]
    assert board.rollback("net") == (two, one.name)
    assert board.atomic


def test_a_rollback_that_is_refused_changes_nothing(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell, root)
    one = board.stage(write(tmp_path / "one"))
    board.switch("net", one)
    with pytest.raises(DeviceFailed, match="no version before"):
        board.rollback("net")
    two = board.stage(write(tmp_path / "two", model=b"2"))
    board.switch("net", two)

    def fails(there: OnDevice) -> None:
        assert there == one
        raise DeviceFailed("its selftest fails")

    with pytest.raises(DeviceFailed, match="selftest"):
        board.rollback("net", check=fails)
    (one / "weights.epw").chmod(0o644)
    (one / "weights.epw").write_bytes(b"damaged")
    with pytest.raises(DeviceFailed, match=r"damaged \(weights.epw\)"):
        board.rollback("net")
    assert str((root / "net").readlink()) == f".edgepress/{two.name}"


def test_versions_that_nothing_points_to_go_but_for_the_latest(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell, root)
    made = []
    for number in range(6):
        made.append(board.stage(write(tmp_path / "bundle", model=b"%d" % number)))
        os.utime(made[-1], (number, number))  # younger than any time here is what comes next
        if number in (0, 1):
            board.switch("net", made[-1])
    assert versions(root) == sorted(v.name for v in (made[0], made[1], made[4], made[5]))
    (root / "net").unlink()
    (root / ".edgepress" / "net.previous").unlink()
    board.discard(made[5])
    assert made[5].name not in versions(root)


def test_strange_names_are_names_like_others(shell: BareShell, tmp_path: Path) -> None:
    root = tmp_path / "board" / "$(touch x)'\n\"; ä"
    board = store(shell, root)
    with board.locked():
        one = board.stage(write(tmp_path / "one"))
        two = board.stage(write(tmp_path / "two", model=b"2"))
        for name in STRANGE:
            board.switch(name, one)
            assert board.switch(name, two) == one.name
            assert board.rollback(name)[0] == one
    assert {path.name for path in root.iterdir()} == {".edgepress", *STRANGE}
    for name in STRANGE:
        assert (root / name / "model").read_bytes() == FILES["model"]
    assert [path.name for path in (tmp_path / "board").iterdir()] == [root.name]


@pytest.mark.parametrize("name", ["", ".", "..", "~", ".edgepress", "a/b", "/a", "a\0"])
def test_what_is_no_name_is_refused(name: str, tmp_path: Path) -> None:
    board = store(bare_shell("dash", tmp_path), tmp_path / "board")
    with pytest.raises(NotOurs, match="no name"):
        board.look(name)
    with pytest.raises(NotOurs, match="no name"):
        board.rollback(name)
    with pytest.raises(NotOurs, match="no name"):
        board.switch(name, OnDevice("/x/.edgepress/0123456789abcdef"))
    assert not (tmp_path / "board").exists()


@pytest.mark.parametrize("path", PATHS)
def test_strange_paths_never_leave_this_machine(path: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    with pytest.raises(DeviceFailed, match="cannot be brought"):
        store(bare_shell("dash", tmp_path), tmp_path / "board").stage(
            folder, files={path: "0" * 64}
        )
    assert not (tmp_path / "board").exists()


def test_the_home_folder_is_that_of_the_board(shell: BareShell, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    home = tmp_path / "home of ~"
    with pytest.raises(DeviceFailed, match="HOME is not set there"):
        store(shell, "~/edgepress").stage(folder)
    there = store(replace(shell, home=home), "").stage(folder)
    assert there.parent.parent == home / "edgepress"
    assert store(replace(shell, home=home), "~").stage(folder).parent.parent == home


def test_a_relative_folder_is_below_the_one_that_the_shell_starts_in(
    shell: BareShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    assert store(shell, "-x/y").stage(folder).parent == tmp_path / "-x/y/.edgepress"
    assert store(shell, ".").stage(folder).parent == tmp_path / ".edgepress"


def test_a_folder_of_an_older_edgepress_becomes_a_version(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    old = write(root / "net", model=b"old")
    (old / "graph.onnx").unlink()
    (old / "evidence.json").unlink()
    before = read(old)
    board = store(shell, root)
    new = board.stage(write(tmp_path / "bundle"))
    older = board.switch("net", new)
    assert (root / "net" / "model").read_bytes() == FILES["model"]
    assert older == version_id({k: hashlib.sha256(v).hexdigest() for k, v in before.items()})
    assert board.rollback("net")[0].name == older
    assert {k: v for k, v in read(root / "net").items() if k != "SHA256SUMS"} == before


def test_a_folder_of_an_older_edgepress_with_the_same_files(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    write(root / "net")
    for path in ("graph.onnx", "evidence.json"):
        (root / "net" / path).unlink()
    board = store(shell, root)
    same = board.stage(write(tmp_path / "bundle"))
    assert board.switch("net", same) is None
    assert str((root / "net").readlink()) == f".edgepress/{same.name}"
    assert versions(root) == [same.name]


def test_an_empty_folder_is_taken(shell: BareShell, root: Path, tmp_path: Path) -> None:
    (root / "net").mkdir(parents=True)
    board = store(shell, root)
    board.switch("net", board.stage(write(tmp_path / "bundle")))
    assert (root / "net").is_symlink()


def test_what_is_not_ours_stays(shell: BareShell, root: Path, tmp_path: Path) -> None:
    board = store(shell, root)
    one = board.stage(write(tmp_path / "bundle"))
    (root / "file").write_text("mine")
    (root / "folder").mkdir()
    (root / "folder" / ".mine").write_text("mine")
    (root / "link").symlink_to("folder")
    (root / "dangling").symlink_to("../.edgepress/0123456789abcdef")
    for name in ("file", "folder", "link", "dangling"):
        with pytest.raises(NotOurs, match="not a bundle"):
            board.switch(name, one)
    assert (root / "file").read_text() == (root / "folder" / ".mine").read_text() == "mine"
    assert str((root / "link").readlink()) == "folder"
    with pytest.raises(NotOurs, match="inside a bundle"):
        store(shell, one).look("x")


def test_a_damaged_version_is_repaired_where_it_is(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "bundle")
    board = store(shell, root)
    there = board.stage(folder)
    board.switch("net", there)
    with (there / "weights.epw").open("rb") as opened:
        (there / "weights.epw").chmod(0o644)
        (there / "weights.epw").write_bytes(b"damaged")
        (there / "golden" / "0.out").unlink()
        again = store(shell, root)
        assert again.stage(folder) == there
        assert opened.read() == b"damaged"  # a program that runs keeps the file that it opened
    assert again.sent_bytes <= len(FILES["weights.epw"]) + len(FILES["golden/0.out"])
    assert {k: v for k, v in read(Path(there)).items() if k != "SHA256SUMS"} == sent(folder)


def test_a_damaged_file_of_another_version_is_sent_and_not_linked(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    one = store(shell, root).stage(write(tmp_path / "one"))
    (one / "weights.epw").chmod(0o644)
    (one / "weights.epw").write_bytes(b"damaged")
    folder = write(tmp_path / "two", model=b"2")
    board = store(shell, root)
    two = board.stage(folder)
    assert {k: v for k, v in read(Path(two)).items() if k != "SHA256SUMS"} == sent(folder)
    assert board.sent_bytes == len(b"2") + len(FILES["weights.epw"])


def test_a_file_that_changes_meanwhile_is_named(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "bundle")
    files = {path: hashlib.sha256(data).hexdigest() for path, data in sent(folder).items()}
    for path in ("weights.epw", "golden/0.out"):
        kept = (folder / path).read_bytes()
        (folder / path).write_bytes(kept[:-1] + b"?")
        with pytest.raises(DeviceFailed, match=f"{path} is not what it was"):
            store(shell, root).stage(folder, files=files)
        (folder / path).write_bytes(kept)
    assert store(shell, root).stage(folder, files=files)


def test_a_board_that_lacks_commands_is_told_which(root: Path, tmp_path: Path) -> None:
    tools = " ".join(tool for tool in TOOLS.split() if tool not in ("sha256sum", "df"))
    shell = bare_shell("dash", tmp_path, tools)
    with pytest.raises(DeviceFailed, match="the board has no df, sha256sum, which deploying needs"):
        store(shell, root).stage(write(tmp_path / "bundle"))


def test_without_mv_t_it_says_so(shell: BareShell, root: Path, tmp_path: Path) -> None:
    refuse = 'for word; do [ "$word" != -T ] || { echo "mv: bad option" >&2; return 1; }; done'
    board = store(shell.having(mv=f'{refuse}\ncommand mv "$@"'), root)
    one = board.stage(write(tmp_path / "one"))
    board.switch("net", one)
    two = board.stage(write(tmp_path / "two", model=b"2"))
    board.switch("net", two)
    assert not board.atomic
    assert str((root / "net").readlink()) == f".edgepress/{two.name}"
    assert versions(root) == sorted([one.name, two.name])
    assert set(read(Path(one))) == set(read(Path(two)))


def test_without_hard_links_files_are_copied(shell: BareShell, root: Path, tmp_path: Path) -> None:
    shell = shell.having(ln='[ "$1" = -s ] || return 1\ncommand ln "$@"')
    store(shell, root).stage(write(tmp_path / "one"))
    board = store(shell, root)
    two = board.stage(write(tmp_path / "two", model=b"2"))
    assert board.sent_bytes == 1
    assert (two / "weights.epw").read_bytes() == FILES["weights.epw"]
    assert (two / "weights.epw").stat().st_nlink == 1


def test_without_symbolic_links_nothing_is_installed(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell.having(ln='[ "$1" != -s ] || return 1\ncommand ln "$@"'), root)
    there = board.stage(write(tmp_path / "bundle"))  # which is enough for `verify`
    with pytest.raises(DeviceFailed, match="no symbolic links, as FAT has none"):
        board.switch("net", there)


def test_a_full_disk_is_noticed_before_anything_is_sent(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell, root)
    old = board.stage(write(tmp_path / "one"))
    board.switch("net", old)
    unused = board.stage(write(tmp_path / "two", model=b"2"))
    say = "echo Filesystem 1024-blocks Used Available Capacity Mounted; echo /dev/x 1 1 17 99% /"
    board = store(shell.having(df=say), root)
    with pytest.raises(DeviceFailed, match=r"has 0\.0 MB free, and 0\.3 MB are needed"):
        board.stage(write(tmp_path / "three", model=b"3"))
    assert board.sent_bytes == 0
    assert unused.name not in versions(root)  # that room was tried first
    assert read(root / "net")["model"] == FILES["model"]


def test_a_disk_that_fills_up_leaves_what_was_there(
    shell: BareShell, root: Path, tmp_path: Path
) -> None:
    board = store(shell, root)
    old = board.stage(write(tmp_path / "one"))
    board.switch("net", old)
    new = write(tmp_path / "two", weights_epw=b"")
    (new / "weights_epw").unlink()
    (new / "weights.epw").write_bytes(os.urandom(9000))
    digest = hashlib.sha256((new / "weights.epw").read_bytes()).hexdigest()
    incoming = root / ".edgepress" / "incoming"
    incoming.mkdir()
    (incoming / f"{digest}.part").symlink_to("/dev/full")
    with pytest.raises(DeviceFailed, match=r"(?s)No space left on device.*free some space"):
        store(shell, root).stage(new)
    assert read(root / "net")["weights.epw"] == FILES["weights.epw"]
    assert versions(root) == [old.name]  # nor is the disk left full
    assert store(shell, root).stage(new).name != old.name


def test_room_is_made_of_what_nobody_uses(shell: BareShell, root: Path, tmp_path: Path) -> None:
    unused = store(shell, root).stage(write(tmp_path / "one"))
    incoming = root / ".edgepress" / "incoming"
    incoming.mkdir()
    (incoming / ("0" * 64 + ".part")).write_bytes(b"left by another deployment")
    for left in (unused, incoming):  # only once that is gone there is room
        full = f'k=999; [ ! -e "{left}" ] || k=17; echo "x 1 1 $k 99% /"'
        board = store(shell.having(df=full), root)
        there = board.stage(write(tmp_path / left.name, model=left.name.encode()))
        assert not left.exists()
        assert (there / "weights.epw").read_bytes() == FILES["weights.epw"]


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Read-only file system", "make it writable"),
        ("Permission denied", "may not write"),
        ("Disk quota exceeded", "free some space"),
    ],
)
def test_why_nothing_can_be_written_is_passed_on(
    said: str, advice: str, root: Path, tmp_path: Path
) -> None:
    shell = bare_shell("dash", tmp_path)
    shell = shell.having(mkdir=f"echo 'mkdir: cannot create x: {said}' >&2; return 1")
    with pytest.raises(DeviceFailed, match=f"{said}.*{advice}.*--to"):
        store(shell, root).stage(write(tmp_path / "bundle"))


def test_where_a_folder_would_be_is_a_file(shell: BareShell, root: Path, tmp_path: Path) -> None:
    root.write_text("mine")
    with pytest.raises(DeviceFailed, match="cannot take the lock"):
        store(shell, root / "below").stage(write(tmp_path / "bundle"))
    assert root.read_text() == "mine"
