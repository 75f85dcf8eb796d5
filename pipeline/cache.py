"""A cache of finished stages, keyed by content.

An entry is a folder of files, written elsewhere and renamed into place, with the hash of every file
in `entry.json`. An entry that is not whole is deleted and counts as missing, so a cache can never
be the reason of a wrong result or of a failure; a full disk only means that nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

import platformdirs

LIMIT_BYTES = 2 << 30
PARTIAL_SECONDS = 24 * 3600
PACKAGES = ("apache-tvm", "numpy", "onnx", "onnx-ir", "onnxruntime")


def cache_folder() -> Path:
    """Return `$EDGEPRESS_CACHE_DIR`, or the user's cache folder of this platform."""
    named = os.environ.get("EDGEPRESS_CACHE_DIR")
    return Path(named) if named else platformdirs.user_cache_path("edgepress")


class Cache:
    """A folder of entries, bounded in size: the entries not used for longest go first."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def get(self, key: str) -> Path | None:
        """Return the folder of an entry, or None. Its files are then known to be as written."""
        entry = self._entry(key)
        try:
            listed = json.loads((entry / "entry.json").read_text("utf-8"))
            whole = sorted(listed) == _files(entry) and all(
                file_sha256(entry / name) == digest for name, digest in listed.items()
            )
        except (OSError, ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # a cache that is only readable still answers
            os.utime(entry)
        return entry

    def put(self, key: str, fill: Callable[[Path], None]) -> None:
        """Let `fill` write files into a new folder and keep it under this key.

        What `fill` raises is raised, except OSError: an entry that cannot be written is not kept.
        """
        entry = self._entry(key)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        except OSError:
            return
        try:
            fill(temporary)
            listed = {name: file_sha256(temporary / name) for name in _files(temporary)}
            (temporary / "entry.json").write_text(json.dumps(listed), "utf-8")
            temporary.rename(entry)
        except OSError:
            pass
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._shrink(keep=entry)

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _shrink(self, keep: Path) -> None:
        for left in self.folder.glob(".partial-*"):  # of a process that was killed
            with contextlib.suppress(OSError):  # its own process may rename it meanwhile
                if time.time() - left.stat().st_mtime > PARTIAL_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        used = []
        for entry in self.folder.glob("??/*"):
            try:
                size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
                used.append((entry.stat().st_mtime_ns, size, entry))
            except OSError:
                continue
        total = sum(size for _, size, _ in used)
        for _, size, entry in sorted(used):
            if total <= self.limit_bytes:
                break
            if entry != keep:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != "entry.json")


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_key(*parts: object) -> str:
    """Hash parts that JSON can hold into one key.

    >>> content_key("a", 1) == content_key("a", 1) != content_key("a", "1")
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_version(*packages: str) -> str:
    """Hash the source files of our own packages and the versions of those we build on.

    Cached results must not outlive the code that made them. The answer stays the same while the
    process runs, as the code that it has imported does.
    """
    digest = hashlib.sha256()
    for package in packages:
        for name, data in _sources(importlib.resources.files(package)):
            digest.update(f"{package}/{name} {len(data)}\n".encode())
            digest.update(data)
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir() and item.name != "__pycache__":
            yield from _sources(item, f"{prefix}{item.name}/")
        elif item.name.endswith((".py", ".c", ".h", ".cuh", ".toml", ".json")):
            yield prefix + item.name, item.read_bytes()
