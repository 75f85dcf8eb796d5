import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepress.targets.base import DeviceFailed, LinkBroken
from edgepress.targets.devices.base import open_shell
from edgepress.targets.remote import ssh_shell
from edgepress.targets.remote.shell import LocalShell, Shell, run_script
from edgepress.targets.remote.ssh_shell import SshAddress, SshShell
from tests.loopback import Lab, boards

# Reads nothing, and ends when whoever waits for it is gone.
WATCH = "echo ready >&2; read -r _; exit 7"
QUICK_S = 60


@pytest.fixture
def shell(lab: Lab) -> SshShell:
    return SshShell("pi", lab.boards[0].name)


def test_a_script_runs_on_the_board(lab: Lab) -> None:
    shell = open_shell(lab.boards[0].name)
    assert shell.name == lab.boards[0].name
    script = 'echo "$HOME" "$1" >&2; cat; exit 3'
    ended = run_script(shell, script, "a b", timeout_s=QUICK_S, stdin=b"x\0y")
    assert ended.stderr.decode() == f"{lab.boards[0].home} a b\n"
    assert ended.stdout == b"x\0y"
    assert ended.returncode == 3


def test_a_shell_is_shared_while_it_is_in_use(lab: Lab) -> None:
    first = open_shell(lab.boards[0].spec)
    assert open_shell(lab.boards[0].spec) is first
    assert open_shell(lab.boards[0].name) is not first, "messages name what the user typed"


def test_no_exit_code_of_a_script_is_taken_for_a_lost_link(shell: SshShell) -> None:
    codes = {code: 254 if code == 255 else code for code in (0, 1, 126, 127, 254, 255)}
    codes_of_scripts = {
        code: run_script(shell, 'exit "$1"', str(code), timeout_s=QUICK_S).returncode
        for code in codes
    }
    assert codes_of_scripts == codes
    assert run_script(shell, "sh -c 'kill -11 $$'", timeout_s=QUICK_S).returncode == 139


def test_files_are_streamed(shell: SshShell) -> None:
    data = os.urandom(500_000)
    sent: list[int] = []
    ended = run_script(shell, "cat", timeout_s=QUICK_S, stdin=io.BytesIO(data), sent=sent.append)
    assert ended.stdout == data
    assert sent[-1] == len(data)


def test_a_banner_is_not_what_a_script_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    with boards(1, Banner="/etc/passwd") as lab:
        monkeypatch.setenv("EDGEPRESS_SSH_CONFIG", lab.environment["EDGEPRESS_SSH_CONFIG"])
        shell = SshShell("pi", lab.boards[0].name)
        assert run_script(shell, "echo out >&2", timeout_s=QUICK_S).stderr == b"out\n"
        with pytest.raises(LinkBroken, match="broke") as caught:
            run_script(shell, "echo Permission denied >&2; kill -9 $PPID", timeout_s=QUICK_S)
        assert "denied" not in str(caught.value)


NASTY = (" ", "'", '"', "\\", "\n", "$(reboot)", "`reboot`", ";reboot", "&", "|", ">x", "*", "~",
         "-rf", "--", "$1", "${IFS}", "!", "#", "%h", "=", "é", "文", "\U0001f600", "\t", "\r",
         "\x01", "\x7f", "{a,b}", "[x]", "\\n", "%s", "\udcff")  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ARGUMENTS = st.lists(TEXT | st.lists(st.sampled_from(NASTY), max_size=6).map("".join), max_size=8)
SAY = r"""for argument; do printf '%s\0' "$argument"; done"""


def arrived(shell: Shell, arguments: list[str]) -> list[bytes]:
    ended = run_script(shell, SAY, *arguments, timeout_s=QUICK_S)
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout.split(b"\0")[:-1]


@settings(deadline=None, max_examples=60)
@given(ARGUMENTS)
def test_arguments_arrive_here(arguments: list[str]) -> None:
    assert arrived(LocalShell(), arguments) == [os.fsencode(text) for text in arguments]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arguments=ARGUMENTS)
def test_arguments_arrive_on_the_board(shell: SshShell, arguments: list[str]) -> None:
    assert arrived(shell, arguments) == [os.fsencode(text) for text in arguments]


def test_every_nasty_argument_arrives_on_the_board(shell: SshShell) -> None:
    assert arrived(shell, list(NASTY)) == [os.fsencode(text) for text in NASTY]


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("pi4", "pi4", ""),
        ("pi@10.0.0.7", "pi@10.0.0.7", ""),
        ("pi@10.0.0.7:2222", "pi@10.0.0.7", "2222"),
        ("fe80::1%eth0", "fe80::1%eth0", ""),
        ("[fe80::1%eth0]", "fe80::1%eth0", ""),
        ("pi@[fe80::1]:22", "pi@fe80::1", "22"),
        ("a.b-c_d+e", "a.b-c_d+e", ""),
    ],
)
def test_addresses(address: str, host: str, port: str) -> None:
    assert SshAddress.parse(address, "pi") == SshAddress(host, port)


REFUSED = ("", "-oProxyCommand=reboot", "pi@-l", "@pi", "pi@", "a b", "a;b", "a$(b)", "a`b`",
           "a\nb", "a\n", "a'b", 'a"b', "a/b", "é", "a\\b", "a&b", "a|b", "a=b", "*", "pi:22:",
           "a:b")  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_no_host_never_reaches_ssh(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(DeviceFailed, match=r"is no host|a host is missing"):
        open_shell(f"ssh:{address}")


@given(st.text())
def test_a_host_is_plain_or_refused(address: str) -> None:
    try:
        parsed = SshAddress.parse(address, "pi")
    except DeviceFailed:
        return
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._@:%[]+-")
    assert set(parsed.host + parsed.port) <= allowed
    assert not parsed.host.startswith("-")


def test_a_missing_ssh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceFailed, match="apt-get install openssh-client"):
        SshShell("pi", "pi4")


def test_a_missing_sh_is_named() -> None:
    said = b"-ash: exec: sh: not found\n"
    with pytest.raises(DeviceFailed, match="the board has no `sh`"):
        SshShell("pi", "pi4").check(subprocess.CompletedProcess(["ssh"], 127, b"", said))
    of_a_script = subprocess.CompletedProcess(["ssh"], 127, b"", b"sh: run.sh: not found\n")
    SshShell("pi", "pi4").check(of_a_script)


def test_no_weaker_check_of_host_keys_and_no_password(shell: SshShell) -> None:
    words = shell.words("true", ())
    assert "BatchMode=yes" in words
    assert not [word for word in words if "HostKey" in word or "KnownHosts" in word]
    assert words[-2:-1] == [shell.address.host]
    assert words[-3] == "--"


def test_the_port_of_an_address_is_used(lab: Lab) -> None:
    lab.configure(lab.boards[0], Port="1")
    shell = SshShell("pi", f"{lab.boards[0].name}:{lab.server.port}")
    assert run_script(shell, "echo hi", timeout_s=QUICK_S).stdout == b"hi\n"


def test_one_connection_serves_all_commands_and_ends_with_the_shell(lab: Lab) -> None:
    link = lab.link(lab.boards[0])
    shell = SshShell("pi", lab.boards[0].name)
    threads = [
        threading.Thread(target=run_script, args=(shell, "true"), kwargs={"timeout_s": QUICK_S})
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run_script(shell, "true", timeout_s=QUICK_S)
    assert link.connections == 1
    folder = shell._folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["s"], "no log is left"
    del shell
    gc.collect()
    link.wait_until_closed()
    assert not folder.exists()


def test_commands_connect_on_their_own_where_the_board_shares_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with boards(1, MaxSessions="1") as lab:
        monkeypatch.setenv("EDGEPRESS_SSH_CONFIG", lab.environment["EDGEPRESS_SSH_CONFIG"])
        link = lab.link(lab.boards[0])
        shell = SshShell("pi", lab.boards[0].name)
        held = subprocess.Popen(
            shell.words(WATCH, ()), stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert held.stdin is not None
        assert held.stderr is not None
        assert held.stderr.readline() == b"ready\n"
        ended = run_script(shell, "echo hi; echo oh >&2", timeout_s=QUICK_S)
        assert (ended.stdout, ended.stderr) == (b"hi\n", b"oh\n")
        assert link.connections == 2
        held.communicate()
        assert held.returncode == 7


def test_a_killed_connection_is_made_anew(lab: Lab) -> None:
    link = lab.link(lab.boards[0])
    shell = SshShell("pi", lab.boards[0].name)
    run_script(shell, "true", timeout_s=QUICK_S)
    os.kill(master_of(shell), signal.SIGKILL)
    link.wait_until_closed()
    assert run_script(shell, "echo hi", timeout_s=QUICK_S).stdout == b"hi\n"
    assert link.connections == 2
    run_script(shell, "true", timeout_s=QUICK_S)
    run_script(shell, "true", timeout_s=QUICK_S)
    assert link.connections == 3, "one alone, one that is shared again"


def master_of(shell: SshShell) -> int:
    said = subprocess.run(
        shell._ssh("-O", "check"), capture_output=True, text=True, check=True
    ).stderr
    return int(said.partition("pid=")[2].partition(")")[0])


def in_thread(shell: SshShell, script: str) -> tuple[threading.Thread, list[object]]:
    """Run a script in a thread; the list gets what it raised or returned."""
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(run_script(shell, script, timeout_s=QUICK_S, stdin=None))
        except DeviceFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, outcome


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + QUICK_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def test_a_cut_link_is_reported_and_ends_the_script(lab: Lab) -> None:
    board = lab.boards[0]
    link = lab.link(board)
    shell = SshShell("pi", board.name)
    thread, outcome = in_thread(shell, "touch started; read -r _; exit 7")
    wait_for(board.home / "started")
    link.cut()
    thread.join()
    assert isinstance(outcome[0], LinkBroken)
    assert str(outcome[0]).startswith(f"pi: the connection to {board.name} broke.")
    board.wait_until_idle()
    assert run_script(shell, "echo hi", timeout_s=QUICK_S).stdout == b"hi\n"


def test_a_cut_while_data_flows_is_reported(lab: Lab) -> None:
    board = lab.boards[0]
    link = lab.link(board)
    shell = SshShell("pi", board.name)
    run_script(shell, "true", timeout_s=QUICK_S)
    link.cut_after(100_000)
    with pytest.raises(LinkBroken, match="broke"):
        run_script(shell, "cat >file", timeout_s=QUICK_S, stdin=bytes(2_000_000))
    board.wait_until_idle()
    assert 0 < (board.home / "file").stat().st_size <= 100_000
    assert link.cuts == 1


def test_a_link_that_falls_silent_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = ("ServerAliveInterval=1", "ServerAliveCountMax=1", *ssh_shell._OPTIONS)
    monkeypatch.setattr(ssh_shell, "_OPTIONS", impatient)
    board = lab.boards[0]
    link = lab.link(board)
    thread, outcome = in_thread(SshShell("pi", board.name), "touch started; read -r _; exit 7")
    wait_for(board.home / "started")
    link.stall()
    thread.join()
    assert isinstance(outcome[0], LinkBroken)
    assert board.processes(), "nothing told the board yet"
    link.cut()
    board.wait_until_idle()


def test_a_login_that_is_dropped_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_shell, "_PAUSES_S", (0.0, 0.0))
    link = lab.link(lab.boards[0])
    link.cut_after(50, times=2)
    shell = SshShell("pi", lab.boards[0].name)
    assert run_script(shell, "echo hi", timeout_s=QUICK_S).stdout == b"hi\n"
    assert (link.connections, link.cuts) == (3, 2)
    link.cut_after(50, times=9)
    with pytest.raises(LinkBroken, match=r"broke\. .* \(ssh: .*Connection .*\)"):
        run_script(SshShell("pi", lab.boards[0].name), "echo hi", timeout_s=QUICK_S)


def test_an_answer_that_takes_too_long_ends_the_script(lab: Lab, shell: SshShell) -> None:
    run_script(shell, "true", timeout_s=QUICK_S)
    with pytest.raises(DeviceFailed, match=r"pi: no answer within 0\.2 s"):
        run_script(shell, WATCH, timeout_s=0.2, stdin=None)
    lab.boards[0].wait_until_idle()


PROGRAM = """
import sys
from edgepress.targets.remote.shell import run_script
from edgepress.targets.remote.ssh_shell import SshShell
shell = SshShell("pi", sys.argv[1])
run_script(shell, "true", timeout_s=60)
run_script(shell, "touch started; read -r _; exit 7", timeout_s=60, stdin=None)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_the_program_is_ended(lab: Lab, number: signal.Signals) -> None:
    board = lab.boards[0]
    link = lab.link(board)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, board.name], stderr=subprocess.PIPE, text=True
    )
    wait_for(board.home / "started")
    program.send_signal(number)
    _, said = program.communicate(timeout=QUICK_S)
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    board.wait_until_idle()
    if number == signal.SIGINT:  # else the shared connection ends when it has been idle
        link.wait_until_closed()


def test_a_normal_end_closes_the_connection(lab: Lab) -> None:
    link = lab.link(lab.boards[0])
    short = PROGRAM.rpartition("run_script")[0]
    subprocess.run([sys.executable, "-c", short, lab.boards[0].name], check=True)
    link.wait_until_closed()
    assert link.connections == 1
