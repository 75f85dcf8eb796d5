"""The shell of a board that ssh reaches.

It is the system's OpenSSH client with the user's own configuration, keys and known hosts;
EDGEPRESS_SSH_CONFIG names another configuration file. No password is ever asked for, and the check
of the board's host key is what the user's configuration says. One connection is kept per board and
shared by all commands (`ControlMaster`); where that fails, each command makes its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepress.targets import children
from edgepress.targets.base import DeviceFailed, LinkBroken, Unreachable
from edgepress.targets.remote.ssh_failures import SSH_FAILED, failure

_CONNECT_S = 20
_LOGIN_S = 120  # a key on a token waits for a finger
# Servers drop some logins where many come at once, through one jump host say.
_PAUSES_S = (1.0, 3.0)
_ALIVE_EVERY_S = 15
_ALIVE_TRIES = 3
_IDLE_S = 60  # after which a connection ends whose process was killed
_CLOSE_S = 5

# ssh replaces %h in a ProxyCommand by the host, and a shell reads the result.
_HOST = re.compile(r"(?!-)[A-Za-z0-9._@:%\[\]+-]+")
_WITH_PORT = re.compile(r"(?P<host>[^:\[\]]+|(?:[^:\[\]]+@)?\[[^\[\]]+\]):(?P<port>[0-9]{1,5})")
_IPV6 = re.compile(r"(?=.*:.*:)[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_BRACKETS = re.compile(r"((?:[^@\[\]]+@)?)\[([^\[\]]+)\]")

# A path with none of the characters that ssh expands, and short enough for a socket's address: 104
# bytes on some systems, of which ssh wants 17 more while it makes the socket.
_PLAIN_FOLDER = re.compile(r"[A-Za-z0-9/._+-]{1,70}")

_NO_SHELL = re.compile(rb"(?m)(^|: )sh: (command )?not found")

_OPTIONS = (
    "BatchMode=yes",
    f"ConnectTimeout={_CONNECT_S}",
    f"ServerAliveInterval={_ALIVE_EVERY_S}",
    f"ServerAliveCountMax={_ALIVE_TRIES}",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "LogLevel=INFO",
)

# ssh itself exits with 255 where it failed, so a script must not.
_WRAPPED = """LC_ALL=C; export LC_ALL
(
%s
)
code=$?
[ "$code" -eq 255 ] && code=254
exit "$code"
"""


@dataclass(frozen=True)
class SshAddress:
    """What follows `ssh:`.

    Attributes:
        host: name of a `Host` block or of a machine, or its address, with `USER@` before it or not.
        port: where the address names one, else empty: ssh's configuration says.
    """

    host: str
    port: str = ""

    @staticmethod
    def parse(address: str, device: str) -> SshAddress:
        """Take `HOST`, `USER@HOST` or `USER@HOST:PORT` apart.

        Args:
            address: what the user wrote.
            device: name of the device, for the message.

        Raises:
            DeviceFailed: ssh must not see it.
        """
        if not address:
            raise DeviceFailed(f"{device}: a host is missing: write ssh:HOST or ssh:USER@HOST.")
        split = _WITH_PORT.fullmatch(address)
        host, port = (split["host"], split["port"]) if split else (address, "")
        if bracketed := _BRACKETS.fullmatch(host):
            host = bracketed[1] + bracketed[2]
        user, at, name = host.rpartition("@")
        plain = _HOST.fullmatch(host) and _HOST.fullmatch(name) and bool(at) == bool(user)
        if not plain or (":" in host and not _IPV6.fullmatch(name)):
            raise DeviceFailed(
                f"{device}: {address!r} is no host. A host is letters, digits and .-_@:%[]+, and "
                "begins with no dash; what else a board needs belongs into ssh's configuration."
            )
        return SshAddress(host, port)


class SshShell:
    """The shell of a board that ssh reaches.

    Its login shell must understand a command line with POSIX quotes. A script that exits with 255
    is seen to exit with 254.

    Attributes:
        name: the device, as the user names it.
        address: the host and the port.
    """

    def __init__(self, name: str, address: str) -> None:
        """Look at the address; nothing is asked of the board yet.

        Raises:
            DeviceFailed: the address is none, or ssh is not installed here.
        """
        self.name = name
        self.address = SshAddress.parse(address, name)
        if shutil.which("ssh") is None:
            raise DeviceFailed(
                f"{name}: ssh is not installed on this machine. "
                "On Debian or Ubuntu: apt-get install openssh-client"
            )
        self._folder = _private_folder()
        self._socket = self._folder / "s"
        self._logs = itertools.count()
        self._connecting = threading.Lock()
        weakref.finalize(self, _close, self._folder, self._ssh("-O", "exit"))

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs a script on the board, to which it connects first.

        Raises:
            Unreachable: no connection comes about.
        """
        self._connect()
        wrapped = _WRAPPED % script
        remote = shlex.join(["exec", "sh", "-c", wrapped, "edgepress", *arguments])
        return [*self._ssh("-o", "ControlMaster=no", "-E", self._new_log()), remote]

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        """Raise Unreachable or LinkBroken where ssh failed, and not what it ran."""
        said = _take_log(result.args)
        if b"Control socket connect" in said:  # whoever made it was killed
            self._socket.unlink(missing_ok=True)
        if result.returncode == SSH_FAILED:
            raise self._failure(said, result.stderr)
        if result.returncode == 127 and _NO_SHELL.search(result.stderr):
            raise DeviceFailed(f"{self.name}: the board has no `sh`, which edgepress needs there.")

    def _connect(self) -> None:
        """Make the connection that commands share, unless it is there.

        Where it breaks at once, commands are left to try on their own.
        """
        with self._connecting:
            for pause_s in (0.0, *_PAUSES_S):
                if self._socket.exists():
                    return
                time.sleep(pause_s)
                with contextlib.suppress(LinkBroken):
                    self._make_connection()
                    return

    def _make_connection(self) -> None:
        master = ["ControlMaster=yes", f"ControlPersist={_IDLE_S}"]
        command = self._ssh("-f", "-N", "-o", master[0], "-o", master[1], "-E", self._new_log())
        try:
            ended = children.run(command, b"", _LOGIN_S)
        except subprocess.TimeoutExpired:
            raise Unreachable(
                f"{self.name}: {self.address.host} let nobody in within {_LOGIN_S} s."
            ) from None
        except OSError as error:
            raise DeviceFailed(f"{self.name}: cannot start ssh: {error}.") from None
        said = _take_log(command)
        if ended.returncode == SSH_FAILED:
            raise self._failure(said, ended.stderr)

    def _failure(self, log: bytes, stderr: bytes) -> DeviceFailed:
        return failure(self.name, self.address.host, self.address.port, log, stderr)

    def _new_log(self) -> str:
        return str(self._folder / f"log-{next(self._logs)}")

    def _ssh(self, *more: str) -> list[str]:
        """The client with its options and the host."""
        config = os.environ.get("EDGEPRESS_SSH_CONFIG")
        return [
            "ssh",
            *(["-F", config] if config else []),
            *(["-p", self.address.port] if self.address.port else []),
            *["-T", "-a", "-x", "-S", str(self._socket)],
            *itertools.chain.from_iterable(("-o", option) for option in _OPTIONS),
            *more,
            "--",
            self.address.host,
        ]


def _private_folder() -> Path:
    """Make a folder that only this user can enter, for the socket and the logs."""
    plain = _PLAIN_FOLDER.fullmatch(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="edgepress-", dir=None if plain else "/tmp"))


def _take_log(command: Sequence[str]) -> bytes:
    """Read and remove the file that ssh wrote its own messages to, apart from all others."""
    if "-E" not in command:
        return b""
    log = Path(command[command.index("-E") + 1])
    try:
        return log.read_bytes()
    except FileNotFoundError:
        return b""
    finally:
        log.unlink(missing_ok=True)


def _close(folder: Path, end: list[str]) -> None:
    """End the shared connection and remove what belongs to it."""
    if (folder / "s").exists():
        nothing = subprocess.DEVNULL
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                end, stdin=nothing, stdout=nothing, stderr=nothing, timeout=_CLOSE_S, check=False
            )
    shutil.rmtree(folder, ignore_errors=True)
