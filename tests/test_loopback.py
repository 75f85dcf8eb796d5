"""The boards on this machine are what tests of boards take them for."""

import subprocess
import time

import pytest

from tests import loopback
from tests.loopback import Lab, boards, need_sshd


def on(lab: Lab, script: str, index: int = 0) -> subprocess.CompletedProcess[bytes]:
    config = lab.environment["EDGEPRESS_SSH_CONFIG"]
    command = ["ssh", "-F", config, "-o", "BatchMode=yes", lab.boards[index].name, script]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def test_a_board_has_an_empty_home_and_busybox_only(lab: Lab) -> None:
    said = on(lab, "id -u; ls -A; pwd; for c in python3 bash ssh perl; do command -v $c; done")
    user, home = said.stdout.decode().split()
    assert user != "0"
    assert home == str(lab.boards[0].home)
    assert said.stderr == b""
    assert b"BusyBox" in on(lab, "ls --help 2>&1").stdout


def test_boards_do_not_see_each_other() -> None:
    with boards(2) as lab:
        on(lab, "touch here", 0)
        assert on(lab, "ls", 0).stdout == b"here\n"
        assert on(lab, "ls", 1).stdout == b""
        name = lab.boards[1].name
    with boards(2) as lab:
        assert name in [board.name for board in lab.boards]
        assert on(lab, "ls", 0).stdout == b""


def test_what_runs_on_a_board_ends_with_the_lab() -> None:
    with boards(2) as lab:
        on(lab, "sleep 1000 </dev/null >/dev/null 2>&1 & exit")
        assert len(lab.boards[0].processes()) == 1
        assert lab.boards[1].processes() == []
        left = lab.boards[0]
    assert left.processes() == []
    assert not left.home.exists()


def test_a_slow_link_is_slow(lab: Lab) -> None:
    link = lab.link(lab.boards[0])
    link.throttle(20_000)
    begin = time.monotonic()
    assert on(lab, "true").returncode == 0
    link.wait_until_closed()
    assert time.monotonic() - begin >= link.sent_bytes / 20_000
    assert link.sent_bytes > 1000


def test_missing_programs_skip_a_test_or_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "_SSHD", "/nowhere/sshd")
    monkeypatch.delenv("EDGEPRESS_REQUIRE_SSHD", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install openssh-server"):
        need_sshd()
    monkeypatch.setenv("EDGEPRESS_REQUIRE_SSHD", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install openssh-server"):
        need_sshd()
