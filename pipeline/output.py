"""Writing results so that a reader sees all of them or nothing.

A folder is built beside its destination under a name that says whose it is, synced, and renamed. A
process that is stopped at any moment leaves the old folder or none; what it left under its own name
is removed by the next one.

Errors::

    OutputError     the destination exists, is not ours to replace, or cannot be written
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = "manifest.json"


class OutputError(Exception):
    """The destination cannot be written: what, where, what to do."""


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a result must not go: it exists, or it is no bundle of ours."""
    if not path.name:
        raise OutputError(f"{path} is not the name of a result; give -o a new name.")
    if all((path.absolute().parent / name).is_file() for name in (MARKER, "weights.epw")):
        raise OutputError(
            f"{path} lies inside a bundle, which holds nothing else; write elsewhere."
        )
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise cannot_write(path, error) from error
    if not exists:
        return
    if not overwrite:
        raise OutputError(f"{path} exists; give another name, or --overwrite to replace it.")
    if path.is_symlink():
        raise OutputError(f"{path} is a symbolic link, which is not replaced; give another name.")


def _refuse_foreign(folder: Path, *, overwrite: bool) -> None:
    refuse_existing(folder, overwrite=overwrite)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file and not a bundle; give another name with -o.")
    if any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputError(
            f"{folder} is not a bundle (it has no {MARKER}), so it is not replaced; "
            "give another name with -o."
        )


@contextmanager
def new_folder(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends without an error.

    Raises OutputError before the block for a destination that must not be replaced or cannot be
    written, and after it where the disk is full.
    """
    _refuse_foreign(destination, overwrite=overwrite)
    parent, name = destination.absolute().parent, destination.name
    partial, old = parent / f".{name}.partial-{os.getpid()}", parent / f".{name}.old-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clean(parent, name)
        partial.mkdir()
    except OSError as error:
        raise cannot_write(destination, error) from error
    try:
        yield partial
        _sync(partial)
        _refuse_foreign(destination, overwrite=overwrite)
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
        _sync_folder(parent)
    except OSError as error:
        if _is_inside(error.filename, partial) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cannot_write(destination, error) from error
        raise
    finally:
        if old.exists() and not destination.exists():
            old.rename(destination)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a file at once. Raises OutputError."""
    refuse_existing(path, overwrite=overwrite)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file with -o.")
    partial = path.absolute().parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Turn an OSError into a paragraph about the destination."""
    todo = "choose a place that you may write to"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        todo = "free some space, or choose another disk"
    return OutputError(f"cannot write {path}: {error.strerror or error}; {todo}.")


def _is_inside(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(name).is_relative_to(folder)


def _clean(parent: Path, name: str) -> None:
    """Undo what processes left that were killed: half a folder, or an old one moved away."""
    pattern = re.compile(re.escape(f".{name}.") + r"(partial|old)-(\d+)")
    for path in parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found is None or _alive(int(found[2])):
            continue
        if found[1] == "old" and not (parent / name).exists():
            path.rename(parent / name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process has nothing under way when it cleans
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
