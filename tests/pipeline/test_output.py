import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgepress.pipeline.output import OutputError, new_folder, write_file

DEAD_PID = 2**22 + 1  # above the highest that Linux gives


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop(error: type[BaseException]) -> None:
    raise error


def make(path: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / "manifest.json").write_text(text)


def test_a_folder_appears_at_once(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a/b") as folder:
        (folder / "manifest.json").write_text("1")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/manifest.json").read_text() == "1"
    assert names(tmp_path / "a") == ["b"]


def test_an_old_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "b", "1")
    with pytest.raises(OutputError, match="--overwrite"):
        make(tmp_path / "b", "2")
    make(tmp_path / "b", "2", overwrite=True)
    assert (tmp_path / "b/manifest.json").read_text() == "2"
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "b"
    match kind:
        case "folder":
            path.mkdir()
            (path / "thesis.tex").write_text("x")
        case "file":
            path.write_text("x")
        case _:
            make(tmp_path / "other", "1")
            path.symlink_to(tmp_path / "other")
    with pytest.raises(OutputError):
        make(path, "2", overwrite=True)
    assert path.exists()
    assert (tmp_path / "other").exists() == (kind == "link")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_error_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "b", "1")
    with pytest.raises(error), new_folder(tmp_path / "b", overwrite=True):
        stop(error)
    assert (tmp_path / "b/manifest.json").read_text() == "1"
    assert names(tmp_path) == ["b"]


def test_a_full_disk_is_one_paragraph(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free some space"), new_folder(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/else")
    assert names(tmp_path) == []


def test_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"), new_folder(tmp_path / ("x" * 300)):
        pass


def test_nothing_is_written_into_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    write_file(tmp_path / "answers", b"beside somebody else's manifest")
    (tmp_path / "weights.epw").write_bytes(b"")
    with pytest.raises(OutputError, match="inside a bundle"):
        write_file(tmp_path / "model", b"answers", overwrite=True)
    assert not (tmp_path / "model").exists()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "b"):
        (tmp_path / "missing").read_text()


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make(tmp_path / "file/b", "1")
    with pytest.raises(OutputError, match="cannot write"):
        write_file(tmp_path / "file/b", b"1")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    make(tmp_path / "b", "1")
    (tmp_path / f".b.partial-{DEAD_PID}").mkdir()
    (tmp_path / f".b.partial-{os.getppid()}").mkdir()
    (tmp_path / f".bb.partial-{DEAD_PID}").mkdir()
    make(tmp_path / "b", "2", overwrite=True)
    left = {"b", f".b.partial-{os.getppid()}", f".bb.partial-{DEAD_PID}"}
    assert set(names(tmp_path)) == left


def test_an_old_bundle_moved_away_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "b", "1")
    (tmp_path / "b").rename(tmp_path / f".b.old-{DEAD_PID}")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "b/manifest.json").read_text() == "1"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_stopped_half_way(tmp_path: Path, number: signal.Signals) -> None:
    make(tmp_path / "b", "1")
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from edgepress.pipeline.output import new_folder\n"
        "with new_folder(Path(sys.argv[1]), overwrite=True) as folder:\n"
        "    (folder / 'manifest.json').write_text('half')\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "b")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(number)
    child.communicate(timeout=20)
    assert (tmp_path / "b/manifest.json").read_text() == "1"
    make(tmp_path / "b", "2", overwrite=True)
    assert (tmp_path / "b/manifest.json").read_text() == "2"
    assert names(tmp_path) == ["b"]


def test_files_are_written_at_once(tmp_path: Path) -> None:
    write_file(tmp_path / "x.npz", b"1")
    with pytest.raises(OutputError, match="--overwrite"):
        write_file(tmp_path / "x.npz", b"2")
    write_file(tmp_path / "x.npz", b"2", overwrite=True)
    assert (tmp_path / "x.npz").read_bytes() == b"2"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_file(tmp_path / "folder", b"2", overwrite=True)
    assert names(tmp_path) == ["folder", "x.npz"]
