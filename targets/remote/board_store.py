"""Bundles on a board: complete versions in a folder, and names that point to one of them each.

    ROOT/NAME                       symbolic link to .edgepress/ID: what programs open
    ROOT/.edgepress/ID/             a version: complete, checked, never changed afterwards
    ROOT/.edgepress/ID/SHA256SUMS   "HEX  path" per file, sorted; ID is how its own SHA-256 begins
    ROOT/.edgepress/incoming/       files under way, named by their SHA-256
    ROOT/.edgepress/NAME.previous   "ID ID-BEFORE", for a rollback
    ROOT/.edgepress/lock/           held by the deployment under way

Whatever ends at whatever moment, a name points to a complete version, and what has arrived is not
sent again. `docs/deploying.md` says what a board needs.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from edgepress.targets.base import DeviceFailed, LinkBroken, OnDevice, Unreachable
from edgepress.targets.remote import board_scripts
from edgepress.targets.remote.board_answers import (
    SUMS,
    BoardContents,
    failure,
    read_contents,
    sums_text,
    version_id,
)
from edgepress.targets.remote.board_lock import BoardLock
from edgepress.targets.remote.board_upload import (
    EXECUTABLE,
    File,
    Piece,
    Upload,
    list_files,
    plan_upload,
)
from edgepress.targets.remote.shell import Shell, run_script

ROOT = "~/edgepress"

_ANSWER_S = 60
_HASH_S = 1800  # for scripts that read or write a whole version
_RESUMES = 3
_ASSEMBLIES = 3
_KEPT_VERSIONS = 2
_SPARE_BYTES = 256 * 1024  # for folders, and for what is left of the last block of each file
_SLOWEST_BYTES_PER_S = 1000

_SEND_AGAIN = {
    board_scripts.MOVED: "is being written to by somebody else",
    board_scripts.CUT: "did not arrive as a whole: the link ended early",
    board_scripts.DAMAGED: "arrived with other bytes than were sent",
}

Advance = Callable[[str, int, int], None]

T = TypeVar("T")


class NotOurs(DeviceFailed):
    """What lies where a bundle should go is not to be replaced."""


class Store:
    """The bundles in one folder of a board.

    Attributes:
        shell: of the board.
        folder: the folder there, as the user wrote it; `~` is the home folder there.
        sent_bytes: bytes of files that were sent since this object was made.
        atomic: False where a name was switched by two steps, for lack of `mv -T` on the board.
    """

    def __init__(
        self,
        shell: Shell,
        folder: str = ROOT,
        *,
        patience_s: int = 20,
        pause_s: float = 1.0,
    ) -> None:
        """Take a folder; nothing is asked of the board yet.

        Args:
            shell: of the board.
            folder: on the board; empty: `~/edgepress`.
            patience_s: how long another deployment there is waited for.
            pause_s: before the first attempt to go on after the link broke; later ones are longer.
        """
        self.shell, self.folder = shell, folder or ROOT
        self.sent_bytes, self.atomic = 0, True
        self._pause_s = pause_s
        self._lock = BoardLock(shell, self.folder, patience_s)

    def look(self, name: str | None = None, version: str = "") -> BoardContents:
        """Return what there is, for one name, with every byte of one version checked.

        Raises:
            NotOurs: a bundle cannot be installed under the name.
            DeviceFailed: the board was not reached, or lacks a command.
        """
        if name is not None:
            _check_name(name)
        result = run_script(
            self.shell, board_scripts.LOOK, self.folder, name or "", version, timeout_s=_HASH_S
        )
        if result.returncode != 0:
            raise failure(self.shell.name, self.folder, "look at what there is", result)
        contents = read_contents(result.stdout)
        if contents.name in ("foreign", "inside"):
            raise self._not_ours(contents, name or "")
        return contents

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other deployments out; what needs that does so itself, for as long as it needs it.

        Raises:
            DeviceFailed: another deployment is under way, or the folder cannot be written to.
        """
        with self._lock.held():
            yield

    def stage(
        self,
        folder: Path,
        *,
        files: Mapping[str, str] | None = None,
        check: Callable[[OnDevice], None] | None = None,
        progress: Advance | None = None,
    ) -> OnDevice:
        """Bring the files of a folder to the board, as a complete version; return where it lies.

        Files that any version there has are not sent, nor what an earlier attempt brought. Where
        the link breaks, it goes on up to three times.

        Args:
            folder: on this machine.
            files: path in the folder → SHA-256 of what is brought; None: all of them but
                `graph.onnx` and `evidence.json`.
            check: called with a folder on the board that has the executable and may have nothing
                else; what it raises ends the staging, and what was brought is removed.
            progress: told what is sent, how many bytes of all were, and how many there are.

        Raises:
            DeviceFailed: the board was not reached, its disk is full or cannot be written to, what
                arrived is damaged, or another deployment is under way there.
        """
        wanted = list_files(folder, files)
        sums = {file.path: file.sha256 for file in wanted}
        version = version_id(sums)
        contents = self._again(lambda: self.look(version=version))
        if not _is_complete(contents, version, sums):
            self._again(lambda: self._bring(wanted, version, check, progress))
            return OnDevice(self._lock.root) / ".edgepress" / version
        return OnDevice(contents.root) / ".edgepress" / version

    def switch(self, name: str, version: OnDevice) -> str | None:
        """Let a name point to a staged version; return the ID of the one before, if any.

        Raises:
            NotOurs: what has that name is to be kept.
            DeviceFailed: the board was not reached, or cannot be written to.
        """
        return self._again(lambda: self._switch(name, version.name))

    def rollback(
        self, name: str, *, check: Callable[[OnDevice], None] | None = None
    ) -> tuple[OnDevice, str | None]:
        """Let a name point to the version before; return that, and the ID of what it left.

        Args:
            name: in the folder.
            check: called with the version before; what it raises leaves the name as it is.

        Raises:
            NotOurs: what has that name is none of ours.
            DeviceFailed: there is no version before, or it is damaged.
        """
        with self.locked():
            contents = self._again(lambda: self.look(name))
            known = contents.before
            before = known.get(contents.current or next(iter(known), ""))
            if before is None or before not in contents.versions:
                raise DeviceFailed(
                    f"{self.shell.name}: {self.folder}/{name} has no version before the one that "
                    "is installed, so there is nothing to go back to."
                )
            contents = self._again(lambda: self.look(version=before))
            sums = contents.versions[before]
            if version_id(sums) != before or contents.damaged:
                damaged = ", ".join(sorted(contents.damaged)) or "SHA256SUMS"
                raise DeviceFailed(
                    f"{self.shell.name}: the version before is damaged ({damaged}), so "
                    f"{self.folder}/{name} stays as it is. Deploy that bundle again."
                )
            there = OnDevice(contents.root) / ".edgepress" / before
            if check is not None:
                check(there)
            return there, self.switch(name, there)

    def size_bytes(self, version: OnDevice) -> int:
        """Bytes of all files of a version, but for its checksums. Raises DeviceFailed."""
        result = run_script(self.shell, board_scripts.SIZE, str(version), SUMS, timeout_s=_ANSWER_S)
        if result.returncode != 0:
            raise self._failure("look at a version", result)
        return int(result.stdout)

    def discard(self, version: OnDevice) -> None:
        """Remove a version, unless a name points to it, and what is under way.

        Raises:
            DeviceFailed: the board was not reached, or cannot be written to.
        """
        with self.locked():
            self._prune(_KEPT_VERSIONS, version.name)

    def _again(self, work: Callable[[], T]) -> T:
        """Do what can be done again after the link broke, so that it goes on by itself."""
        broke = False
        for attempt in range(_RESUMES):
            try:
                return work()
            except LinkBroken:
                broke = True
                self._lock.take_again()
            except Unreachable:
                if not broke:
                    raise
            time.sleep(self._pause_s * 2**attempt)
        return work()

    def _bring(
        self,
        wanted: list[File],
        version: str,
        check: Callable[[OnDevice], None] | None,
        progress: Advance | None,
    ) -> None:
        """Make a version of what is there and what has to be sent."""
        distrusted: set[str] = set()
        with self.locked(), self._nothing_left():
            for _ in range(_ASSEMBLIES):
                upload = self._plan(wanted, version, distrusted)
                if upload is None:
                    return
                self._send_all(upload, version, check, progress)
                check = None
                damaged = self._assemble(version, upload)
                if not damaged:
                    self._prune(_KEPT_VERSIONS)
                    return
                distrusted |= damaged
            raise DeviceFailed(
                f"{self.shell.name}: files on the disk there have other bytes each time they are "
                f"read ({', '.join(sorted(distrusted))}). Check the disk."
            )

    @contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Remove what is under way where something fails that trying again does not mend."""
        try:
            yield
        except (LinkBroken, Unreachable):
            raise
        except Exception:
            with suppress(DeviceFailed):
                self._prune(_KEPT_VERSIONS)
            raise

    def _plan(self, wanted: list[File], version: str, distrusted: set[str]) -> Upload | None:
        """Plan an upload that the disk has room for; None: the version is complete.

        If need be, versions that nobody uses are removed, and then what others left under way.
        """
        sums = {file.path: file.sha256 for file in wanted}
        free = needed = 0
        for kept in (None, 0, _KEPT_VERSIONS):
            if kept is not None:
                self._prune(kept)
            contents = self.look(version=version)
            if _is_complete(contents, version, sums):
                return None
            upload = plan_upload(wanted, contents, version, distrusted)
            needed = upload.needed_bytes + _SPARE_BYTES
            if contents.free_bytes is None or contents.free_bytes >= needed:
                return upload
            free = contents.free_bytes
        raise DeviceFailed(
            f"{self.shell.name}: {self.folder} has {free / 1e6:.1f} MB free, and "
            f"{needed / 1e6:.1f} MB are needed. Free some space there, or give another place: "
            "`folder` in devices.toml, or --to. What was installed before is as it was."
        )

    def _send_all(
        self,
        upload: Upload,
        version: str,
        check: Callable[[OnDevice], None] | None,
        progress: Advance | None,
    ) -> None:
        """Send every piece; once the executable is there, let it be checked."""
        done = 0

        def send(pieces: Sequence[Piece]) -> None:
            nonlocal done
            for piece in pieces:
                self._send(piece, advance)
                done += piece.missing_bytes

        def advance(piece: Piece, sent: int) -> None:
            if progress is not None:
                progress(piece.name, done + sent, upload.missing_bytes)

        ahead = 1 if any(piece.files[0].path == EXECUTABLE for piece in upload.pieces[:1]) else 0
        send(upload.pieces[:ahead])
        if check is not None and upload.executable:
            self._try(version, upload.executable, check)
        send(upload.pieces[ahead:])

    def _send(self, piece: Piece, advance: Callable[[Piece, int], None]) -> None:
        before = self.sent_bytes

        def sent(count: int) -> None:
            self.sent_bytes = before + count
            advance(piece, count)

        with piece.open() as stream:
            stream.seek(piece.have_bytes)
            result = run_script(
                self.shell, board_scripts.RECEIVE, self._lock.root, self._lock.token, piece.sha256,
                str(piece.have_bytes), str(piece.size_bytes),
                timeout_s=_HASH_S + piece.size_bytes / _SLOWEST_BYTES_PER_S,
                stdin=stream, sent=sent,
            )  # fmt: skip
        if result.returncode == board_scripts.DAMAGED:
            for file in piece.files:
                file.check()
        if result.returncode in _SEND_AGAIN:
            raise LinkBroken(
                f"{self.shell.name}: {piece.name} {_SEND_AGAIN[result.returncode]}. Deploy again: "
                "what has arrived is not sent again."
            )
        if result.returncode != 0:
            raise self._failure(f"write {piece.name}", result)

    def _try(self, version: str, executable: str, check: Callable[[OnDevice], None]) -> None:
        """Let the executable be checked."""
        result = self._run(board_scripts.TRY, version, executable)
        if result.returncode != 0:
            raise self._failure("try the executable", result)
        check(OnDevice(self._lock.root) / ".edgepress" / f"{version}.partial")

    def _assemble(self, version: str, upload: Upload) -> set[str]:
        """Make the version of files on the board; return those that turned out to be damaged."""
        result = self._run(board_scripts.ASSEMBLE, version, stdin=upload.recipe.encode())
        if result.returncode == board_scripts.DAMAGED:
            return set(os.fsdecode(result.stdout).split())
        if result.returncode == board_scripts.CUT:
            raise LinkBroken(f"{self.shell.name}: the link ended early. Deploy again.")
        if result.returncode != 0:
            raise self._failure("put the files together", result)
        return set()

    def _prune(self, kept: int, unwanted: str = "") -> None:
        """Remove versions to which nothing points, but for the latest."""
        result = self._run(board_scripts.PRUNE, str(kept), unwanted)
        if result.returncode != 0:
            raise self._failure("remove old versions", result)

    def _switch(self, name: str, version: str) -> str | None:
        with self.locked():
            contents = self.look(name)
            self.require_links()
            older = version_id(contents.older) if contents.name == "folder" else ""
            result = self._run(
                board_scripts.SWITCH, name, version, older,
                stdin=sums_text(contents.older).encode("utf-8", "surrogateescape"),
            )  # fmt: skip
            if result.returncode == board_scripts.FOREIGN:
                raise self._not_ours(contents, name)
            if result.returncode == board_scripts.GONE:
                raise DeviceFailed(
                    f"{self.shell.name}: the version {version} is no longer complete in "
                    f"{self.folder}; deploy again."
                )
            if result.returncode != 0:
                raise self._failure(f"let {name} point to the new version", result)
            said = os.fsdecode(result.stdout).split("\n")
            self.atomic = self.atomic and "not atomic" not in said
            self._prune(_KEPT_VERSIONS)
            before = said[0].removeprefix("before ")
            return contents.before.get(version) if before == version else before or None

    def require_links(self) -> None:
        """Raise DeviceFailed where the disk, seen when it was locked, has no symbolic links."""
        if not self._lock.has_links:
            raise DeviceFailed(
                f"{self.shell.name}: the file system of {self.folder} has no symbolic links, as "
                "FAT has none. Give a place that has them: `folder` in devices.toml, or --to."
            )

    def _run(
        self, script: str, *arguments: str, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a script that needs the lock."""
        return run_script(
            self.shell, script, self._lock.root, self._lock.token, *arguments,
            timeout_s=_HASH_S, stdin=stdin,
        )  # fmt: skip

    def _failure(self, doing: str, result: subprocess.CompletedProcess[bytes]) -> DeviceFailed:
        return failure(self.shell.name, self.folder, doing, result)

    def _not_ours(self, contents: BoardContents, name: str) -> NotOurs:
        where = f"{self.shell.name}: {contents.root}/{name}"
        if contents.name == "inside":
            return NotOurs(f"{where} lies inside a bundle, which holds nothing else.")
        return NotOurs(
            f"{where} is not a bundle that edgepress installed, so it is not replaced; give "
            "another name with --to."
        )


def _is_complete(contents: BoardContents, version: str, sums: Mapping[str, str]) -> bool:
    return contents.versions.get(version) == sums and not contents.damaged


def _check_name(name: str) -> None:
    """Raise NotOurs for what cannot be the name of a bundle in a folder."""
    if name in ("", ".", "..", "~", ".edgepress") or "/" in name or "\0" in name:
        raise NotOurs(f"{name!r} is no name for a bundle; give another one with --to.")
