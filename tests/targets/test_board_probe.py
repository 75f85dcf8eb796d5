"""The probe, run by real shells in folders that look like boards."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.base import DeviceFailed
from edgepress.targets.remote.board_probe import BoardFacts, parse_facts, probe
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.shell import LocalShell
from tests.targets import board_trees
from tests.targets.board_trees import SHELLS, Board, frequencies, programs
from tests.targets.tiny import need

Make = Callable[[Board], Board]


@pytest.fixture(params=["dash", "dash with busybox", "busybox"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Board:
    """A board without anything, for every kind of shell and of programs."""
    shell, _, others = request.param.partition(" with ")
    need(shell, {"dash": "dash", "busybox": "busybox-static"}[shell])
    root = tmp_path / "root = 'a'\n$(b) *"
    root.mkdir()
    interpreter = (shutil.which(SHELLS[shell][0]) or "", *SHELLS[shell][1:])
    tools = programs(tmp_path / "bin", busybox="busybox" in (shell, others))
    return Board(root, interpreter=interpreter, tools=tools)


@pytest.fixture
def plain(tmp_path: Path) -> Board:
    """A board without anything, for what does not depend on the shell."""
    root = tmp_path / "root"
    root.mkdir()
    tools = programs(tmp_path / "bin", busybox=False)
    return Board(root, interpreter=(shutil.which("sh") or "",), tools=tools)


def ask(board: Board, folder: str = "", program: str = "") -> BoardFacts:
    return probe(board, folder=folder, program=program, root=str(board.root))


def test_a_raspberry_pi_4(board: Board) -> None:
    facts = ask(board_trees.pi4(board))
    assert (facts.machine, facts.kernel) == ("aarch64", "6.6.31+rpt-rpi-v8")
    assert facts.loaders == {"/lib/ld-linux-aarch64.so.1": "glibc 2.36"}
    assert facts.board == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts.cpu == "4 × Cortex-A72"
    assert facts.features == {"fp", "asimd", "evtstrm", "crc32", "cpuid"}
    assert [core.number for core in facts.cores] == [0, 1, 2, 3]
    assert {core.governor for core in facts.cores} == {"ondemand"}
    assert {core.frequency_khz for core in facts.cores} == {600000}
    assert {core.highest_khz for core in facts.cores} == {1800000}
    assert facts.core_kinds == [[0, 1, 2, 3]]
    assert facts.memory_total_bytes == 3884360 * 1024
    assert facts.memory_available_bytes == 3500000 * 1024
    assert facts.temperature_celsius == 48.686
    assert facts.throttled == 0x50000
    assert facts.throttle_flags == [
        "its supply was too weak since it started",
        "it was throttled since it started",
    ]
    assert (facts.uptime_s, facts.load) == (1234.56, 0.08)
    assert facts.folder == f"{board.root}/home/edgepress".replace("\n", " ")
    assert facts.disk_free_bytes is not None
    assert facts.disk_free_bytes > 0
    assert facts.writable
    assert facts.executable
    assert facts.tools == {*TOOLS.split(), "mv -T"}
    assert facts.deployed == {}
    assert not facts.program


def test_a_raspberry_pi_5(board: Board) -> None:
    facts = ask(board_trees.pi5(board))
    assert facts.cpu == "4 × Cortex-A76"
    assert "asimddp" in facts.features
    assert facts.throttle_flags == ["its supply is too weak"]  # what the voltage sensor tells


def test_flags_of_a_pi_without_vcgencmd(board: Board) -> None:
    board_trees.pi4(board)
    del board.commands["vcgencmd"]
    assert ask(board).throttled == 0xF


def test_32_bit_programs_on_a_64_bit_kernel(board: Board) -> None:
    facts = ask(board_trees.pi_32_bit(board))
    assert facts.machine == "aarch64"
    assert facts.loaders == {"/lib/ld-linux-armhf.so.3": "glibc 2.31"}


def test_a_busybox_board_with_big_and_little_cores(board: Board) -> None:
    facts = ask(board_trees.yocto(board))
    assert facts.loaders == {"/lib/ld-linux-aarch64.so.1": "glibc 2.35"}
    assert facts.board == "Radxa ROCK 5B"
    assert facts.cpu == "4 × Cortex-A55 + 4 × Cortex-A76"
    assert facts.core_kinds == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert facts.memory_available_bytes == 3000000 * 1024
    assert facts.temperature_celsius == 92.5
    assert facts.throttled is None
    assert facts.tools == set(TOOLS.split())
    assert facts.uptime_s is None


def test_an_alpine_board(board: Board) -> None:
    facts = ask(board_trees.alpine(board))
    assert facts.loaders == {"/lib/ld-musl-aarch64.so.1": "musl 1.2.4"}
    assert facts.cpu == "2 × Cortex-A53"
    assert [core.number for core in facts.cores] == [0, 1]


def test_a_loader_of_another_architecture_is_not_run(board: Board, tmp_path: Path) -> None:
    board_trees.alpine(board)
    ran = tmp_path / "ran"
    board.write({"lib/ld-musl-x86_64.so.1": f"#!/bin/sh\ntouch '{ran}'\n"})
    (board.root / "lib/ld-musl-x86_64.so.1").chmod(0o755)
    assert ask(board).loaders["/lib/ld-musl-x86_64.so.1"] == "musl"
    assert not ran.exists()


def test_a_pc(board: Board) -> None:
    facts = ask(board_trees.x86(board))
    assert facts.cpu == "Intel(R) N100 = fine"
    assert facts.board == "Mini PC"
    assert facts.features == {
        *("fpu", "sse2", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
    }
    assert facts.loaders == {"/lib64/ld-linux-x86-64.so.2": "glibc 2.36"}
    assert len(facts.cores) == 2


@pytest.mark.parametrize(
    ("commands", "libc"),
    [
        ({"getconf": "echo glibc 2.28"}, "glibc 2.28"),
        ({"ldd": "echo 'ldd (Ubuntu GLIBC 2.35-0ubuntu3.8) 2.35'; echo More"}, "glibc 2.35"),
        ({"ldd": "printf 'musl libc (aarch64)\\nVersion 1.2.3\\n' >&2"}, "musl 1.2.3"),
        ({"getconf": "echo Invalid; return 1", "ldd": "return 1"}, ""),
    ],
)
def test_the_libc_where_its_file_tells_nothing(
    plain: Board, commands: dict[str, str], libc: str
) -> None:
    board_trees.pi4(plain)
    plain.commands = board_trees.uname("aarch64", "6") | commands
    plain.write({"lib/aarch64-linux-gnu/libc.so.6": "GNU C Library, but no version\n"})
    assert ask(plain).loaders == {"/lib/ld-linux-aarch64.so.1": libc}


def test_a_libc_beside_the_loader_that_a_link_leads_to(board: Board) -> None:
    board_trees.pi4(board)
    board.commands = board_trees.uname("aarch64", "6") | {"getconf": "return 1", "ldd": "return 1"}
    loader = board.root / "lib/ld-linux-aarch64.so.1"
    loader.unlink()
    (board.root / "lib/aarch64-linux-gnu/libc.so.6").unlink()
    board.write({"opt/odd/ld.so": "", "opt/odd/libc.so.6": board_trees.BANNER.format("2.39")})
    loader.symlink_to("../opt/odd/ld.so")
    assert ask(board).loaders == {"/lib/ld-linux-aarch64.so.1": "glibc 2.39"}


def test_values_hold_anything(board: Board) -> None:
    board_trees.pi4(board)
    unreadable = board.root / "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor"
    unreadable.unlink()
    unreadable.mkdir()
    (board.root / "sys/devices/system/cpu/cpu3/cpufreq/cpuinfo_max_freq").unlink()
    (board.root / "sys/devices/system/cpu/cpu1.old").mkdir()
    files: dict[str, str | bytes] = {
        "proc/device-tree/model": b"k=v 'a' \"b\" $(c) \\n \x81\xff\xe2\x80\xa8 *\nmachine=z\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "a=b\tc\r\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unsupported>\n",
        "sys/devices/system/cpu/cpu1/cpu_capacity": "9" * 1000,
        "sys/class/thermal/thermal_zone0/temp": "hot\n",
        "sys/class/thermal/thermal_zone1/temp": "",
        "proc/uptime": "\xb2 now",
        "proc/loadavg": "",
        "proc/meminfo": "MemTotal: many kB",
        "lib/aarch64-linux-gnu/libc.so.6": b"\0\xff" * 100,
    }
    board.write(files)
    board.commands["vcgencmd"] = "echo VCHI initialization failed"
    del board.commands["getconf"], board.commands["ldd"]
    board.write({"sys/devices/platform/soc/soc:firmware/get_throttled": "0xnone"})
    facts = ask(board)
    assert facts.machine == "aarch64"
    assert facts.board == "k=v 'a' \"b\" $(c) \\n \ufffd\ufffd\u2028 *"
    assert [core.governor for core in facts.cores] == ["a=b\tc", "", "", "ondemand"]
    assert facts.cores[0].frequency_khz is None
    assert facts.cores[1].capacity is None
    assert facts.cores[3].highest_khz is None
    assert facts.temperature_celsius is None
    assert facts.uptime_s is None
    assert facts.load is None
    assert facts.memory_total_bytes is None
    assert facts.throttled is None
    assert facts.loaders == {"/lib/ld-linux-aarch64.so.1": ""}


def test_nothing_is_there(board: Board) -> None:
    """Neither /proc nor /sys nor a loader; and no program but the shell, as far as it can be."""
    board.tools = board.root / "no programs"
    board.commands = dict.fromkeys(("uname", "mv", "df", "sed", "tr", "sort"), "return 127")
    facts = ask(board)
    assert (facts.machine, facts.loaders, facts.cores, facts.cpu) == ("", {}, (), "")
    assert facts.disk_free_bytes is None
    assert facts.features == frozenset()


def test_cores_whose_capacities_nobody_tells(plain: Board) -> None:
    plain.write(frequencies([0, 2], 1, 2000000, "powersave"))
    plain.write(frequencies([1], 1, 1000000, "powersave"))
    assert ask(plain).core_kinds == [[0, 2], [1]]


def test_cores_that_are_off_are_not_counted(plain: Board) -> None:
    board_trees.pi4(plain)
    plain.write({"sys/devices/system/cpu/online": "0,2-3\n"})
    assert [core.number for core in ask(plain).cores] == [0, 2, 3]


def test_a_system_that_lists_cores_nowhere_but_in_sys(plain: Board) -> None:
    plain.write({**frequencies([0, 1], 1, 2, "powersave")})
    assert [core.number for core in ask(plain).cores] == [0, 1]


def test_what_is_installed(board: Board) -> None:
    folder = board.root / "bundles here"
    folder.mkdir()
    (folder / "net = 'a' *").symlink_to(".edgepress/0123456789abcdef")
    (folder / "dangling").symlink_to("absent")
    (folder / "a file").touch()
    facts = ask(board, folder=str(folder))
    assert facts.deployed == {
        "net = 'a' *": ".edgepress/0123456789abcdef",
        "dangling": "absent",
    }


def test_a_folder_in_the_home_folder_that_is_not_there_yet(board: Board) -> None:
    facts = ask(board, folder="~/a/b $(c)")
    assert facts.folder == f"{board.root}/home/a/b $(c)".replace("\n", " ")
    assert facts.writable
    assert facts.disk_free_bytes is not None
    assert not (board.root / "home/a").exists()


def test_a_folder_where_nothing_can_be_written(board: Board) -> None:
    assert not ask(board, folder="/dev/null/edgepress").writable
    if os.geteuid() != 0:  # root may write anywhere
        board.root.chmod(0o555)
        assert not ask(board, folder=f"{board.root}/edgepress").writable
        board.root.chmod(0o755)


def test_a_folder_where_nothing_can_be_started(plain: Board) -> None:
    plain.commands["df"] = "echo Filesystem; echo '/dev/sd a 100 40 60 40% /media/my stick'"
    plain.write({"proc/mounts": "/dev/sda /media/my\\040stick vfat rw,noexec,relatime 0 0\n"})
    facts = ask(plain)
    assert not facts.executable
    assert facts.disk_free_bytes == 60 * 1024
    plain.write({"proc/mounts": "/dev/sda /media/my\\040stick vfat rw,nonoexec,noexecs 0 0\n"})
    assert ask(plain).executable


def test_a_program_is_looked_for(board: Board) -> None:
    assert ask(board, program="sha256sum").program
    assert ask(board, program=str(board.tools / "df")).program
    for absent in ("absent", "sha256sum; touch x", "", "-v", "$(echo df)"):
        assert not ask(board, program=absent).program


@pytest.mark.parametrize(
    ("files", "gpus"),
    [
        (("dev/nvidia0", "dev/nvidia1", "dev/nvidiactl"), ("/dev/nvidia0", "/dev/nvidia1")),
        (("dev/nvhost-gpu", "dev/nvmap"), ("/dev/nvhost-gpu",)),
        ((), ()),
    ],
    ids=["server", "Jetson", "none"],
)
def test_gpus(plain: Board, files: tuple[str, ...], gpus: tuple[str, ...]) -> None:
    plain.write(dict.fromkeys(files, ""))
    assert ask(plain).gpus == gpus


def test_programs_that_are_missing(plain: Board, tmp_path: Path) -> None:
    plain.tools = programs(tmp_path / "few", busybox=False, without=["dd", "sync"])
    assert ask(plain).tools == {*TOOLS.split(), "mv -T"} - {"dd", "sync"}


def test_this_machine() -> None:
    facts = probe(LocalShell())
    assert facts.machine
    assert facts.kernel
    assert facts.cores
    assert facts.features
    assert socket.gethostname() not in facts.board  # no name of a person's machine


def test_what_a_start_up_file_prints_is_left_out() -> None:
    said = b"Hello\nmachine=z\nedgepress-probe=1\nmachine=a\0rm\nedgepress-end=1\nboard=y\n"
    facts = parse_facts(said)
    assert (facts.machine, facts.board) == ("arm", "")


@pytest.mark.parametrize("said", [b"", b"edgepress-probe=1\nmachine=a\n", b"edgepress-end=1\n"])
def test_what_ends_early_is_no_answer(said: bytes) -> None:
    with pytest.raises(ValueError, match="did not run to its end"):
        parse_facts(said)


def test_a_shell_that_runs_no_script_is_named(plain: Board) -> None:
    plain.commands["echo"] = "command echo sh: no such thing >&2; exit 3"
    with pytest.raises(DeviceFailed, match=r"fake: its shell .*exit code 3.*no such thing"):
        ask(plain)


KEYS = (
    *("machine", "loader", "glibc", "musl", "getconf", "ldd", "processor", "implementer", "part"),
    *("features", "online", "core", "capacity", "highest", "frequency", "temperature", "uptime"),
    *("throttled", "undervoltage", "load", "folder", "deployed", "version", "disk", "noexec"),
    *("tool", "memory total", "model name", "gpu"),
)
VALUES = st.text(max_size=20) | st.from_regex(r"[0-9,-]{1,8}") | st.just("1 2 3 4% /x")
LINES = st.tuples(st.sampled_from(KEYS), VALUES).map(
    lambda pair: "=".join(pair).encode("utf-8", "surrogatepass")
) | st.binary(max_size=20)


@given(st.lists(LINES, max_size=30))
@settings(deadline=None, max_examples=200)
def test_any_answer_is_read(lines: list[bytes]) -> None:
    facts = parse_facts(b"\n".join([b"edgepress-probe=1", *lines, b"edgepress-end=1"]))
    assert len(facts.cores) == sum(map(len, facts.core_kinds))
