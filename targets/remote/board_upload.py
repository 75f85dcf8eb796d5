"""What has to be sent to a board for a version, given what is there."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgepress.targets.base import DeviceFailed
from edgepress.targets.remote.board_answers import SUMS, BoardContents

EXECUTABLE = "model"
STAYS_HERE = ("graph.onnx", "evidence.json")

# The board's `model --selftest` takes no other paths from SHA256SUMS.
_PLAIN = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9._-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9._-]+)*")
_LONGEST_PATH = 255

# Smaller files are sent together, so that many golden samples take no connection each.
_SMALL_BYTES = 1 << 20
_PACK_BYTES = 8 << 20
_BLOCK_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a version.

    Attributes:
        path: in the version.
        sha256: of its bytes.
        size_bytes: how many those are.
        executable: whether it is a program.
        source: where it lies on this machine.
    """

    path: str
    sha256: str
    size_bytes: int
    executable: bool
    source: Path

    def read(self) -> bytes:
        """Return all bytes. Raises DeviceFailed where they are not those of the checksum."""
        data = self.source.read_bytes()
        self._require(hashlib.sha256(data).hexdigest())
        return data

    def check(self) -> None:
        """Raise DeviceFailed where the bytes are not those of the checksum any more."""
        self._require(_hash(self.source))

    def _require(self, digest: str) -> None:
        if digest != self.sha256:
            raise DeviceFailed(
                f"{self.source} is not what it was when it was read first; leave the bundle alone "
                "while it is sent, and deploy again."
            )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is sent in one go: a file, or a pack of small ones.

    Attributes:
        name: for people.
        sha256: of its bytes.
        size_bytes: how many those are.
        have_bytes: how many of them are on the board.
        open: returns them as a stream.
        files: those that are in it.
    """

    name: str
    sha256: str
    size_bytes: int
    have_bytes: int
    open: Callable[[], BinaryIO]
    files: tuple[File, ...]

    @property
    def missing_bytes(self) -> int:
        """Bytes that have to be sent."""
        return self.size_bytes - self.have_bytes


@dataclass(frozen=True, kw_only=True)
class Upload:
    """How a version comes about.

    Attributes:
        pieces: what is sent, the executable first.
        recipe: what `ASSEMBLE` reads: where each file lies on the board then.
        executable: where the executable lies then; empty where there is none.
    """

    pieces: tuple[Piece, ...]
    recipe: str
    executable: str

    @property
    def missing_bytes(self) -> int:
        """Bytes that have to be sent."""
        return sum(piece.missing_bytes for piece in self.pieces)

    @property
    def needed_bytes(self) -> int:
        """Room that it takes on the board's disk; packs are unpacked there."""
        unpacked = (p.size_bytes for p in self.pieces if len(p.files) > 1)
        return self.missing_bytes + sum(unpacked)


def list_files(folder: Path, digests: Mapping[str, str] | None) -> list[File]:
    """List the files of a version.

    Args:
        folder: where they lie.
        digests: path → SHA-256; None: every file but those that stay here, as they are now.

    Raises:
        DeviceFailed: a name is not plain, or a file is not there.
    """
    paths = digests if digests is not None else sorted(_walk(folder))
    files = []
    for path in sorted(paths):
        if not _PLAIN.fullmatch(path) or len(path) > _LONGEST_PATH or path == SUMS:
            raise DeviceFailed(
                f"{folder}: {path!r} cannot be brought to a board. Its name has to be letters, "
                "digits, dots, dashes and underscores, without .. and not too long."
            )
        source = folder / path
        try:
            status = source.stat()
            sha256 = digests[path] if digests is not None else _hash(source)
        except OSError as error:
            raise DeviceFailed(f"{source} cannot be read: {error.strerror}.") from error
        executable = path == EXECUTABLE or bool(status.st_mode & 0o100)
        files.append(
            File(
                path=path,
                sha256=sha256,
                size_bytes=status.st_size,
                executable=executable,
                source=source,
            )
        )
    if not files:
        raise DeviceFailed(f"{folder} has no files, so there is nothing to bring to a board.")
    return files


def plan_upload(
    files: list[File], contents: BoardContents, version: str, distrusted: set[str]
) -> Upload:
    """Plan what is sent, and how the version is made of that and of what is there.

    Args:
        files: of the version.
        contents: of the board.
        version: its ID; its own damaged files do not count.
        distrusted: files there, by path in the store, whose bytes turned out to be wrong.

    Raises:
        DeviceFailed: a file was changed since it was listed.
    """
    there = _there(contents, version) - distrusted
    by_digest = {}
    for source in sorted(there):
        by_digest[_digest(contents, source)] = source
    missing = {f.sha256: f for f in files if f.sha256 not in by_digest}
    pieces = []
    large = [f for f in missing.values() if f.path == EXECUTABLE or f.size_bytes >= _SMALL_BYTES]
    for file in sorted(large, key=lambda file: (file.path != EXECUTABLE, file.path)):
        pieces.append(_whole(file, contents))
    small = [file for file in missing.values() if file not in large]
    packs = [_pack(group, contents, distrusted) for group in _groups(small)]
    places = {digest: (source, "-") for digest, source in by_digest.items()}
    for piece in pieces:
        places[piece.sha256] = (f"incoming/{piece.sha256}", "-")
    for pack in packs:
        skip = 0
        for file in pack.files:
            blocks = "-" if len(pack.files) == 1 else str(skip)
            places[file.sha256] = (f"incoming/{pack.sha256}", blocks)
            skip += _blocks(file.size_bytes)
    lines = []
    for file in files:
        place, blocks = places[file.sha256]
        mode = "x" if file.executable else "-"
        lines.append(f"{mode} {file.sha256} {place} {blocks} {file.size_bytes} {file.path}\n")
    executables = [places[file.sha256][0] for file in files if file.path == EXECUTABLE]
    unsent = [pack for pack in packs if pack.missing_bytes or pack.sha256 not in contents.incoming]
    return Upload(
        pieces=(*pieces, *unsent),
        recipe="".join(lines),
        executable=executables[0] if executables else "",
    )


def _digest(contents: BoardContents, source: str) -> str:
    """SHA-256 that a file in the store should have, by its path there."""
    folder, _, path = source.partition("/")
    return path if folder == "incoming" else contents.versions[folder][path]


def _there(contents: BoardContents, version: str) -> set[str]:
    """Paths in the store of all files there that look right."""
    found = {f"incoming/{digest}" for digest in contents.incoming}
    for other, sums in contents.versions.items():
        damaged = contents.damaged if other == version else set()
        found |= {f"{other}/{path}" for path in sums if path not in damaged and _is_plain(path)}
    return found


def _is_plain(path: str) -> bool:
    return _PLAIN.fullmatch(path) is not None


def _whole(file: File, contents: BoardContents) -> Piece:
    have = contents.parts.get(file.sha256, 0)
    return Piece(
        name=file.path,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        have_bytes=have if have <= file.size_bytes else 0,
        open=lambda: file.source.open("rb"),
        files=(file,),
    )


def _groups(files: list[File]) -> Iterator[list[File]]:
    """Split small files into packs of bounded size, the same ones each time."""
    group: list[File] = []
    size = 0
    for file in sorted(files, key=lambda file: file.path):
        if group and size + file.size_bytes > _PACK_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size_bytes
    if group:
        yield group


def _pack(files: list[File], contents: BoardContents, distrusted: set[str]) -> Piece:
    """Put files one after another, each at the begin of a block."""
    if len(files) == 1:
        return _whole(files[0], contents)
    data = bytearray()
    for file in files:
        data += file.read()
        data += bytes(-len(data) % _BLOCK_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    whole = bytes(data)
    have = contents.parts.get(digest, 0)
    if digest in contents.incoming and f"incoming/{digest}" not in distrusted:
        have = len(whole)
    return Piece(
        name=f"{len(files)} small files",
        sha256=digest,
        size_bytes=len(whole),
        have_bytes=have if have <= len(whole) else 0,
        open=lambda: io.BytesIO(whole),
        files=tuple(files),
    )


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES)


def _walk(folder: Path) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if path not in STAYS_HERE]


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
