"""One deployment at a time in a folder of a board: a lock that dies with its holder.

The holder is a script on the board that gets a line every few seconds. Each is a beat: it writes
down how long the board is up. Where the lines end it lets go; where they stop coming, because
neither end noticed that the link is gone, or where the board was started again, the next deployment
takes over. All other scripts look first whether the lock is still theirs.
"""

from __future__ import annotations

import getpass
import io
import os
import platform
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from edgepress.targets.base import DeviceFailed
from edgepress.targets.remote import board_scripts
from edgepress.targets.remote.board_answers import failure
from edgepress.targets.remote.shell import Shell, run_script

_BEAT_S = 3.0
_DEAD_S = 60  # without a beat: more than any machine under load takes for one
_FIRST_S = 15  # likewise for the first one: the answer that it was taken may have been lost
_ANSWER_S = 60
_LONGEST_S = 30 * 24 * 3600
_RELEASE_S = 30


class BoardLock:
    """The lock of a folder of a board.

    Attributes:
        shell: of the board.
        folder: as the user wrote it.
        patience_s: how long a living holder is waited for.
        root: absolute path of the folder, once the lock was held.
        has_links: whether the file system there has symbolic links, once the lock was held.
    """

    def __init__(self, shell: Shell, folder: str, patience_s: int) -> None:
        self.shell, self.folder, self.patience_s = shell, folder, patience_s
        self.root, self.has_links = folder, True
        self._same = secrets.token_hex(8) + "."
        self._taken = 0
        self._depth = 0
        self._made = False
        self._keeper: threading.Thread | None = None
        self._beats = _Beats()

    @property
    def token(self) -> str:
        """What the lock says while it is ours."""
        return f"{self._same}{self._taken}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; take it again where a broken link made the board let go of it.

        Raises:
            DeviceFailed: somebody else holds it, or the folder cannot be written to.
        """
        if self._keeper is None or not self._keeper.is_alive():
            self._take()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._release()
                self._made = False

    def take_again(self) -> None:
        """Trust it no more, since the link broke: whoever needs it next takes it first.

        The board may have let go of it before anybody notices here.
        """
        self._release()

    def _take(self) -> None:
        self._taken += 1
        result = run_script(
            self.shell, board_scripts.LOCK, self.folder, self.token, self._same, _who(),
            str(_DEAD_S), str(_FIRST_S), str(self.patience_s),
            timeout_s=_ANSWER_S + 2 * self.patience_s,
        )  # fmt: skip
        said = os.fsdecode(result.stdout)
        if result.returncode == board_scripts.HELD:
            seconds, _, who = said.strip().rpartition("\n")[2].partition(" ")
            raise DeviceFailed(
                f"{self.shell.name}: another deployment to {self.folder} is under way there: "
                f"{who[:200]}, for {seconds} s. Wait until it has ended."
            )
        if result.returncode != 0:
            raise failure(self.shell.name, self.folder, "take the lock", result)
        facts, _, self.root = said.rpartition("root ")
        self._made = self._made or "made" in facts.split()
        self.has_links = "links" in facts.split()
        self._beats = _Beats()
        self._keeper = threading.Thread(target=self._keep, args=(self._beats,), daemon=True)
        self._keeper.start()

    def _keep(self, beats: _Beats) -> None:
        made = "made" if self._made else ""
        # Where the link breaks, the next script hears of it, too.
        with suppress(DeviceFailed, KeyboardInterrupt):
            run_script(
                self.shell, board_scripts.KEEP, self.root, self.token, made,
                timeout_s=_LONGEST_S, stdin=beats,
            )  # fmt: skip

    def _release(self) -> None:
        self._beats.end()
        if self._keeper is not None:
            self._keeper.join(_RELEASE_S)
        self._keeper = None


class _Beats(io.BytesIO):
    """A stream with a line every few seconds, until it is ended."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()

    def read(self, _size: int | None = -1, /) -> bytes:
        return b"" if self._ended.wait(_BEAT_S) else b"\n"

    def end(self) -> None:
        self._ended.set()


def _who() -> str:
    """Who deploys, for whoever finds the lock."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = str(os.getuid())
    text = f"{user} on {platform.node()}, process {os.getpid()}"
    return "".join(character if character.isprintable() else "?" for character in text)[:200]
