"""What ssh says when it fails, and what edgepress makes of it."""

import itertools
import re

import pytest

from edgepress.targets.base import DeviceFailed, LinkBroken, Unreachable
from edgepress.targets.remote import ssh_shell
from edgepress.targets.remote.shell import run_script
from edgepress.targets.remote.ssh_failures import failure
from edgepress.targets.remote.ssh_shell import SshShell
from tests.loopback import Lab


def reason(lab: Lab, host: str = "") -> str:
    with pytest.raises(Unreachable) as caught:
        run_script(SshShell("pi", host or lab.boards[0].name), "true", timeout_s=60)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pi: ")
    return str(caught.value)


def test_an_unknown_name(lab: Lab) -> None:
    assert "no-such-host.invalid is neither a machine's name" in reason(lab, "no-such-host.invalid")


def test_a_board_without_a_server(lab: Lab) -> None:
    lab.link(lab.boards[0]).close()
    assert "refuses the connection: the board is up" in reason(lab)


def test_a_board_that_does_not_answer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    link = lab.link(lab.boards[0])
    link.stall()
    soon = ("ConnectTimeout=1", *ssh_shell._OPTIONS)
    monkeypatch.setattr(ssh_shell, "_OPTIONS", soon)
    assert "does not answer. Check that the board is on" in reason(lab)


def test_a_key_that_the_board_does_not_know(lab: Lab) -> None:
    lab.configure(lab.boards[0], User="nobody")
    said = reason(lab, f"somebody@{lab.boards[0].name}")
    assert "denied the login" in said
    assert f"`ssh-copy-id somebody@{lab.boards[0].name}`" in said
    assert "Permission denied (publickey)" in said


def test_an_unknown_host_key(lab: Lab) -> None:
    lab.forget_host_key(lab.boards[0])
    said = reason(lab)
    assert "is unknown. Connect once by hand" in said
    assert "compare the fingerprint" in said


def test_a_changed_host_key(lab: Lab) -> None:
    board = lab.boards[0]
    lab.change_host_key(board)
    said = reason(lab, f"{board.name}:{lab.server.port}")
    assert "HAS CHANGED (SHA256:" in said
    assert "Do not go on unless you know that it was installed anew" in said
    assert "ssh-keygen -" in said
    assert f'-R "{board.name}"`' in said or f"-R '[{board.name}]:" in said
    assert f"`ssh -p {lab.server.port} {board.name}`" in said
    assert list(board.home.iterdir()) == []


def test_a_broken_configuration(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.configure(lab.boards[0], Nonsense="yes")
    assert "Bad configuration option: nonsense" in reason(lab)
    monkeypatch.setenv("EDGEPRESS_SSH_CONFIG", "/nowhere/config")
    assert "Can't open user config file /nowhere/config" in reason(lab)


def test_what_a_jump_host_says(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_shell, "_PAUSES_S", (0.0,))
    lab.configure(lab.boards[0], ProxyJump="somebody@127.0.0.1:1")
    assert "connect to host 127.0.0.1 port 1: Connection refused" in reason(lab)


# What this machine cannot bring about; the texts are OpenSSH's.
@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ssh: connect to host 10.0.0.7 port 22: No route to host", "there is no way to"),
        ("ssh: connect to host 10.0.0.7 port 22: Network is unreachable", "there is no way to"),
        ("ssh: connect to host 10.0.0.7 port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host 10.0.0.7 port 22: Operation timed out", "does not answer"),
        ("Received disconnect from 10.0.0.7 port 22:2: Too many authentication failures", "denied"),
        ("Unable to negotiate with 10.0.0.7 port 22: no matching key exchange", "no common"),
        ("No ED25519 host key is known for 10.0.0.7 and you have requested", "key of .* unknown"),
        ("Bad owner or permissions on /home/a/.ssh/config", "its configuration"),
    ],
)
def test_other_reasons(log: str, message: str) -> None:
    error = failure("pi", "pi@10.0.0.7", "", f"{log}\r\n".encode(), b"")
    assert isinstance(error, Unreachable)
    assert re.search(message, str(error))
    assert log.removeprefix("ssh: ") in str(error)


@pytest.mark.parametrize(
    "log",
    [
        "client_loop: send disconnect: Broken pipe",
        "Connection to 10.0.0.7 closed by remote host.",
        "Connection reset by 10.0.0.7 port 22",
        "kex_exchange_identification: Connection closed by remote host",
        "Timeout, server 10.0.0.7 not responding.",
        "Read from remote host 10.0.0.7: Connection timed out\r\nclient_loop: send disconnect",
        "Read from remote host 10.0.0.7: No route to host",
        "client_loop: send disconnect: Connection timed out",
        "",
    ],
)
def test_links_that_broke(log: str) -> None:
    error = failure("pi", "pi@10.0.0.7", "", log.encode(), b"cat: a: not found")
    assert isinstance(error, LinkBroken)
    assert "Trying again may help." in str(error)


def test_what_the_board_wrote_is_no_reason_of_ssh() -> None:
    lies = b"REMOTE HOST IDENTIFICATION HAS CHANGED\nssh: connect to host a: Connection refused\n"
    for log in (b"", b"client_loop: send disconnect: Broken pipe\r\n"):
        error = failure("pi", "pi", "", log, lies)
        assert isinstance(error, LinkBroken)
        assert "refused" not in str(error)


def test_long_texts_are_cut() -> None:
    log = " ".join(map(str, itertools.islice(itertools.count(), 5000)))
    assert len(str(failure("pi", "pi", "", log.encode(), b""))) < 1000


def test_every_failure_is_one_of_the_device() -> None:
    assert issubclass(Unreachable, DeviceFailed)
    assert issubclass(LinkBroken, DeviceFailed)
