"""Boards on this machine: a real sshd on 127.0.0.1, whose users are boards.

Behind it is what a small board has: busybox as login shell, busybox's applets in PATH, and nothing
else; an empty home folder each. Bundles for Arm run there under qemu.

    with boards(2) as lab:
        lab.boards[0].home        # its files
        lab.environment           # EDGEPRESS_SSH_CONFIG and EDGEPRESS_DEVICES for edgepress

The fixture `lab` (tests/conftest.py) is a lab of one board, with that environment set.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.loopback_link import Link

QEMU_AARCH64 = ("/usr/bin/qemu-aarch64", "-cpu", "cortex-a72", "-L", "/usr/aarch64-linux-gnu")
_SSHD = "/usr/sbin/sshd"
_BUSYBOX = "/usr/bin/busybox"
_WRAPPER = "libnss_wrapper.so"
_MOST_BOARDS = 100
_PATIENCE_S = 60
# sshd runs under it where the tests run as root; nothing else on the machine does.
_UID = 61234


def need_sshd() -> None:
    """Skip where the server or its boards cannot run; fail where EDGEPRESS_REQUIRE_SSHD is set."""
    missing = [
        package
        for package, there in (
            ("openssh-server", Path(_SSHD).exists()),
            ("openssh-client", shutil.which("ssh") and shutil.which("ssh-keygen")),
            ("busybox-static", Path(_BUSYBOX).exists()),
            ("libnss-wrapper", _wrapper_is_there()),
            ("util-linux", shutil.which("setpriv")),
        )
        if not there
    ]
    if missing:
        hint = f"boards on loopback need more: apt-get install {' '.join(missing)}"
        if os.environ.get("EDGEPRESS_REQUIRE_SSHD"):
            pytest.fail(hint)
        pytest.skip(hint)


@functools.cache
def _wrapper_is_there() -> bool:
    """Whether the loader finds nss_wrapper; it only warns where it does not."""
    tried = subprocess.run(
        ["/bin/true"], env={"LD_PRELOAD": _WRAPPER}, capture_output=True, check=False
    )
    return tried.returncode == 0 and not tried.stderr


@dataclass
class Board:
    """A user of the server.

    Attributes:
        name: of the user, in ssh's configuration and in devices.toml.
        home: its home folder.
        options: of its Host block in ssh's configuration.
    """

    name: str
    home: Path
    options: dict[str, str]

    @property
    def spec(self) -> str:
        """How edgepress reaches it without devices.toml."""
        return f"ssh:{self.name}"

    def processes(self) -> list[int]:
        """Return what runs on it."""
        marker = f"EDGEPRESS_BOARD={self.home}".encode()
        return [pid for pid in _pids() if marker in _environment(pid)]

    def wait_until_idle(self) -> None:
        """Wait until nothing runs on it any more."""
        deadline = time.monotonic() + _PATIENCE_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"still running on {self.name}: {left}"
            time.sleep(0.02)


@dataclass
class Lab:
    """Boards, and the client's configuration for them.

    Attributes:
        boards: in order.
        folder: the client's files: `config`, `known_hosts`, `devices.toml`.
        server: of all boards.
        links: those that are open.
    """

    boards: list[Board]
    folder: Path
    server: Server
    links: list[Link] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What edgepress reads."""
        return {
            "EDGEPRESS_SSH_CONFIG": str(self.folder / "config"),
            "EDGEPRESS_DEVICES": str(self.folder / "devices.toml"),
        }

    def configure(self, board: Board, **options: str) -> None:
        """Change options of a board's Host block; one that is empty is left out."""
        board.options.update(options)
        blocks = []
        for each in self.boards:
            lines = [f"    {key} {value}\n" for key, value in each.options.items() if value]
            blocks.append(f"Host {each.name}\n{''.join(lines)}")
        (self.folder / "config").write_text("".join(blocks))

    def link(self, board: Board) -> Link:
        """Put a link that can be slowed or cut between the client and a board."""
        link = Link(self.server.port)
        self.links.append(link)
        self.configure(board, Port=str(link.port))
        return link

    def know_host_keys(self, keys: dict[str, str]) -> None:
        """Make these the only host keys that the client knows, by board."""
        lines = [f"{name} {key}\n" for name, key in keys.items()]
        (self.folder / "known_hosts").write_text("".join(lines))

    def change_host_key(self, board: Board) -> None:
        """Let the client find another key at a board than the one it knows."""
        keys = {each.name: self.server.host_key for each in self.boards}
        keys[board.name] = _new_key(self.folder / f"old_key_of_{board.name}")
        self.know_host_keys(keys)

    def forget_host_key(self, board: Board) -> None:
        """Let the client not know a board's key."""
        others = [each for each in self.boards if each is not board]
        self.know_host_keys({each.name: self.server.host_key for each in others})

    def write_devices(self, *, target: str, run_with: Sequence[str]) -> None:
        """Write a devices.toml that names every board."""
        (self.folder / "devices.toml").write_text(
            "".join(
                f"[{board.name}]\nconnect = {json.dumps(board.spec)}\ntarget = "
                f"{json.dumps(target)}\nrun_with = {json.dumps(list(run_with))}\n\n"
                for board in self.boards
            )
        )


@contextlib.contextmanager
def boards(
    count: int,
    *,
    target: str = "raspberry-pi-4",
    run_with: Sequence[str] = QEMU_AARCH64,
    **sshd_options: str,
) -> Iterator[Lab]:
    """Make a lab of boards with empty home folders, which are gone afterwards.

    Args:
        count: of boards, up to 100.
        target: of all of them in devices.toml.
        run_with: the same.
        **sshd_options: of the server; each other set of them starts another one.
    """
    need_sshd()
    server = running_server(**sshd_options)
    made = [server.new_board() for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="edgepress-lab-") as folder:
        lab = Lab(made, Path(folder), server)
        try:
            lab.know_host_keys({board.name: server.host_key for board in made})
            lab.write_devices(target=target, run_with=run_with)
            for board in made:
                lab.configure(
                    board,
                    HostName="127.0.0.1",
                    Port=str(server.port),
                    User=board.name,
                    HostKeyAlias=board.name,
                    IdentityFile=str(server.user_key),
                    IdentitiesOnly="yes",
                    UserKnownHostsFile=f"{folder}/known_hosts",
                    GlobalKnownHostsFile="/dev/null",
                )
            yield lab
        finally:
            for link in lab.links:
                link.close()
            for board in made:
                server.remove_board(board)


@functools.cache
def running_server(**options: str) -> Server:
    """Start the server, once for all tests of this process and these options."""
    return Server(options)


class Server:
    """An sshd that is not root.

    Attributes:
        port: where it listens.
        host_key: type and key, as in known_hosts.
        user_key: file of the private key that every board accepts.
    """

    def __init__(self, options: dict[str, str]) -> None:
        self._client = Path(tempfile.mkdtemp(prefix="edgepress-keys-"))
        self._root = Path(tempfile.mkdtemp(prefix="edgepress-sshd-"))
        self._root.chmod(0o755)
        self._uid = _UID if os.getuid() == 0 else os.getuid()
        self._gid = _UID if os.getuid() == 0 else os.getgid()
        self._free = [f"board{index:02}" for index in reversed(range(_MOST_BOARDS))]
        self.user_key = self._client / "user_key"
        accepted = _new_key(self.user_key)
        self.host_key = _new_key(self._root / "host_key")
        os.chown(self._root / "host_key", self._uid, self._gid)
        (self._root / "home").mkdir()
        (self._root / "accepted_keys").write_text(f"{accepted}\n")
        applets = self._root / "applets"
        applets.mkdir()
        listed = subprocess.run([_BUSYBOX, "--list"], capture_output=True, text=True, check=True)
        for applet in listed.stdout.split():
            (applets / applet).symlink_to(_BUSYBOX)
        users = [
            f"{name}:x:{self._uid}:{self._gid}::{self._home(name)}:{applets}/sh\n"
            for name in self._free
        ]
        (self._root / "passwd").write_text("".join(users))
        (self._root / "group").write_text(f"boards:x:{self._gid}:\n")
        self._process, self.port = self._start(options)
        atexit.register(self._stop)

    def new_board(self) -> Board:
        """Make a board whose home folder is empty."""
        name = self._free.pop()
        home = self._home(name)
        home.mkdir()
        os.chown(home, self._uid, self._gid)
        return Board(name, home, {})

    def remove_board(self, board: Board) -> None:
        """End what runs on a board, and remove its files."""
        for pid in board.processes():
            _kill(pid)
        # what was just being written may reappear until its process has ended
        board.wait_until_idle()
        shutil.rmtree(board.home)
        self._free.append(board.name)

    def _home(self, name: str) -> Path:
        return self._root / "home" / name

    def _start(self, options: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
        """Start sshd at a free port; another program may take that port first, so try again."""
        log = self._root / "log"
        for _ in range(10):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            (self._root / "sshd_config").write_text(self._configuration(port, options))
            identity = [f"--reuid={self._uid}", f"--regid={self._gid}", "--clear-groups"]
            command = [
                "setpriv", *(identity if os.getuid() == 0 else []), "--pdeathsig=KILL",
                _SSHD, "-D", "-e", "-f", str(self._root / "sshd_config"),
            ]  # fmt: skip
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    env={
                        "LD_PRELOAD": _WRAPPER,
                        "NSS_WRAPPER_PASSWD": str(self._root / "passwd"),
                        "NSS_WRAPPER_GROUP": str(self._root / "group"),
                    },
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            deadline = time.monotonic() + _PATIENCE_S
            while process.poll() is None and time.monotonic() < deadline:
                if b"Server listening" in log.read_bytes():
                    return process, port
                time.sleep(0.01)
            process.kill()
            process.wait()
        raise RuntimeError(f"sshd does not start: {log.read_text()}")

    def _configuration(self, port: int, options: dict[str, str]) -> str:
        applets = self._root / "applets"
        settings = {
            "ListenAddress": "127.0.0.1",
            "Port": str(port),
            "HostKey": f"{self._root}/host_key",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "AuthorizedKeysFile": f"{self._root}/accepted_keys",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PrintMotd": "no",
            "MaxStartups": "500",
            "MaxSessions": "100",
            "LoginGraceTime": "600",
            **options,
        }
        matches = [
            f"Match User {name}\n    SetEnv PATH={applets} EDGEPRESS_BOARD={self._home(name)}\n"
            for name in self._free
        ]
        return "".join([*(f"{key} {value}\n" for key, value in settings.items()), *matches])

    def _stop(self) -> None:
        """End the server, its connections, and what they run."""
        running = _descendants(self._process.pid)
        self._process.kill()
        self._process.wait()
        for pid in running:
            _kill(pid)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.rmtree(self._client, ignore_errors=True)


def _new_key(path: Path) -> str:
    """Write a private key, and return the public one as known_hosts and authorized_keys have it."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True
    )
    return path.with_name(f"{path.name}.pub").read_text().strip()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _descendants(ancestor: int) -> list[int]:
    parents = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {ancestor})


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
