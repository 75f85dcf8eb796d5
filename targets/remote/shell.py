"""A POSIX shell where bundles run: this machine's here, a board's in `ssh_shell`.

Scripts are constants of this package. What changes from call to call (names, folders) are
arguments, `$1` and so on: no text of a user's ever becomes part of a script. Scripts keep to what
busybox has.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from edgepress.targets.base import DeviceFailed
from edgepress.targets.children import child

_PIECE_BYTES = 64 * 1024


class Shell(Protocol):
    """Runs scripts on a device."""

    @property
    def name(self) -> str:
        """The device, as the user names it; it begins every message."""
        ...

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        """Return the command for this machine that runs a script on the device."""
        ...

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        """Raise DeviceFailed where the device was not reached, or the link broke."""
        ...


@dataclass(frozen=True)
class LocalShell:
    """The shell of this machine."""

    name: str = "local"

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs a script here."""
        return ["sh", "-c", script, "edgepress", *arguments]

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        """Do nothing: this machine is always reached."""


def run_script(
    shell: Shell,
    script: str,
    *arguments: str,
    timeout_s: float,
    stdin: bytes | BinaryIO | None = b"",
    sent: Callable[[int], None] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a script on a device and return how it ended, whatever its exit code.

    Args:
        shell: of the device.
        script: text of a POSIX shell script.
        arguments: what it finds in `$1`, `$2`, …; any text without NUL.
        timeout_s: seconds after which it is given up.
        stdin: what it reads. With None it reads nothing, and its standard input stays open until it
            ends: a script that sees it end before knows that nobody waits for it any more.
        sent: told how many bytes of a stream were handed over so far.

    Raises:
        DeviceFailed: the device was not reached, the link broke, or time was up.
    """
    command = shell.words(script, arguments)
    output = {"stdout": b"", "stderr": b""}
    try:
        with child(command) as process:
            threads = [
                threading.Thread(target=_drain, args=(process, name, output), daemon=True)
                for name in output
            ]
            if stdin is not None:
                feed = threading.Thread(target=_feed, args=(process, stdin, sent), daemon=True)
                threads.append(feed)
            for thread in threads:
                thread.start()
            try:
                code = process.wait(timeout_s)
                for thread in threads:  # a grandchild may hold the pipes open a little longer
                    thread.join(5)
            finally:
                if process.stdin is not None and stdin is None:
                    process.stdin.close()
    except subprocess.TimeoutExpired:
        raise DeviceFailed(f"{shell.name}: no answer within {timeout_s:g} s.") from None
    except OSError as error:
        raise DeviceFailed(f"{shell.name}: cannot start {command[0]}: {error}.") from None
    result = subprocess.CompletedProcess(command, code, output["stdout"], output["stderr"])
    shell.check(result)
    return result


def _drain(process: subprocess.Popen[bytes], name: str, output: dict[str, bytes]) -> None:
    with getattr(process, name) as stream:
        output[name] = stream.read()


def _feed(
    process: subprocess.Popen[bytes],
    source: bytes | BinaryIO,
    sent: Callable[[int], None] | None,
) -> None:
    """Hand over what a script reads; a script that ends earlier says why on its own."""
    assert process.stdin is not None
    total = 0
    try:
        with process.stdin as stream:
            if isinstance(source, bytes):
                stream.write(source)
                return
            while piece := source.read(_PIECE_BYTES):
                stream.write(piece)
                stream.flush()
                total += len(piece)
                if sent is not None:
                    sent(total)
    except (BrokenPipeError, ValueError, KeyboardInterrupt):  # who waits for it hears of all three
        pass
