"""Folders that look like /proc, /sys and /lib of boards, and shells that run the probe there."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgepress.targets.remote.board_scripts import TOOLS

PROGRAMS = {*TOOLS.split(), "sed", "sort", "tr"}
SHELLS = {"dash": ("dash",), "busybox": ("busybox", "sh")}
BANNER = (
    "\x7fELF\0strings\nbefore\0GNU C Library (Debian GLIBC {0}-1) stable release version {0}.\n"
)


@dataclass
class Board:
    """A fake board.

    Attributes:
        root: stands for its /.
        commands: what programs print there, a line of a POSIX shell each.
        interpreter: the shell that runs scripts.
        tools: folder with the programs that it has.
        files: what lies where.
    """

    root: Path
    commands: dict[str, str] = field(default_factory=dict)
    interpreter: tuple[str, ...] = ("sh",)
    tools: Path = Path("/usr/bin")
    name: str = "fake"

    def write(self, files: Mapping[str, str | bytes]) -> None:
        for path, text in files.items():
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        functions = [f"{name}() {{ {line}\n}}" for name, line in self.commands.items()]
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        before = [
            f"HOME={shlex.quote(str(home))}",
            f"PATH={shlex.quote(str(self.tools))}",
            *functions,
        ]
        return [*self.interpreter, "-c", "\n".join([*before, script]), "edgepress", *arguments]

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        """Nothing is between this machine and the board."""


def programs(folder: Path, *, busybox: bool, without: Sequence[str] = ()) -> Path:
    """Fill a folder with the few programs that a board has."""
    folder.mkdir()
    for tool in PROGRAMS - set(without):
        found = shutil.which("busybox" if busybox else tool)
        if found is None:
            pytest.skip(f"{tool} is missing")
        (folder / tool).symlink_to(found)
    return folder


def uname(machine: str, kernel: str) -> dict[str, str]:
    return {"uname": f"case $1 in -m) echo {machine} ;; -r) echo {kernel} ;; esac"}


def cpuinfo(cores: Sequence[tuple[str, str]], features: str) -> str:
    blocks = [
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
        f"CPU implementer\t: {implementer}\nCPU architecture: 8\nCPU part\t: {part}\n"
        for number, (implementer, part) in enumerate(cores)
    ]
    return "\n".join(blocks) + "\nRevision\t: d03114\nModel\t\t: Raspberry Pi\n"


def memory(total_kib: int, available_kib: int) -> str:
    return (
        f"MemTotal:       {total_kib} kB\nMemFree:        1000 kB\n"
        f"MemAvailable:   {available_kib} kB\nBuffers:          123 kB\n"
    )


def frequencies(cores: Sequence[int], khz: int, highest: int, governor: str) -> dict[str, str]:
    files = {}
    for core in cores:
        folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        files[f"{folder}/scaling_cur_freq"] = f"{khz}\n"
        files[f"{folder}/cpuinfo_max_freq"] = f"{highest}\n"
        files[f"{folder}/scaling_governor"] = f"{governor}\n"
    return files


def pi4(board: Board) -> Board:
    """A Raspberry Pi 4 with the 64-bit Raspberry Pi OS 12, that got too little power once."""
    board.commands = uname("aarch64", "6.6.31+rpt-rpi-v8") | {
        "getconf": "echo glibc 2.36",
        "ldd": "echo 'ldd (Debian GLIBC 2.36-9+rpt2+deb12u7) 2.36'; echo Copyright",
        "vcgencmd": "echo throttled=0x50000",
    }
    board.write(
        {
            "lib/ld-linux-aarch64.so.1": "",
            "lib/aarch64-linux-gnu/libc.so.6": BANNER.format("2.36"),
            "proc/device-tree/model": b"Raspberry Pi 4 Model B Rev 1.4\0",
            "proc/cpuinfo": cpuinfo([("0x41", "0xd08")] * 4, "fp asimd evtstrm crc32 cpuid"),
            "proc/meminfo": memory(3884360, 3500000),
            "proc/uptime": "1234.56 4321.00\n",
            "proc/loadavg": "0.08 0.03 0.00 1/150 1234\n",
            "sys/devices/system/cpu/online": "0-3\n",
            "sys/class/thermal/thermal_zone0/temp": "48686\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "f\n",  # vcgencmd is newer
            **frequencies(range(4), 600000, 1800000, "ondemand"),
        }
    )
    return board


def pi5(board: Board) -> Board:
    """A Raspberry Pi 5, whose flags only vcgencmd would tell, and hwmon a part of them."""
    board.commands = uname("aarch64", "6.6.51+rpt-rpi-2712")
    board.write(
        {
            "lib/ld-linux-aarch64.so.1": "",
            "lib/aarch64-linux-gnu/libc.so.6": BANNER.format("2.36"),
            "proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/cpuinfo": cpuinfo(
                [("0x41", "0xd0b")] * 4,
                "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
                "lrcpc dcpop asimddp",
            ),
            "proc/meminfo": memory(8257536, 7500000),
            "proc/uptime": "99.10 300.00\n",
            "proc/loadavg": "0.00 0.00 0.00 1/150 1234\n",
            "sys/devices/system/cpu/online": "0-3\n",
            "sys/class/thermal/thermal_zone0/temp": "51000\n",
            "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
            "sys/class/hwmon/hwmon0/in0_lcrit_alarm": "0\n",
            "sys/class/hwmon/hwmon2/name": "rpi_volt\n",
            "sys/class/hwmon/hwmon2/in0_lcrit_alarm": "1\n",
            **frequencies(range(4), 2400000, 2400000, "performance"),
        }
    )
    return board


def pi_32_bit(board: Board) -> Board:
    """A Raspberry Pi 4 with the 32-bit Raspberry Pi OS 11, whose kernel is 64-bit all the same."""
    pi4(board)
    board.commands = uname("aarch64", "6.1.21-v8+") | {"getconf": "echo glibc 2.31"}
    (board.root / "lib/ld-linux-aarch64.so.1").unlink()
    (board.root / "lib/aarch64-linux-gnu/libc.so.6").unlink()
    board.write({"lib/arm-linux-gnueabihf/ld-2.31.so": ""})
    board.write({"lib/arm-linux-gnueabihf/libc.so.6": BANNER.format("2.31")})
    (board.root / "lib/ld-linux-armhf.so.3").symlink_to("arm-linux-gnueabihf/ld-2.31.so")
    return board


def yocto(board: Board) -> Board:
    """An 8-core big.LITTLE board, built with Yocto: busybox, and neither ldd nor getconf."""
    board.commands = uname("aarch64", "5.10.72") | {"mv": "echo \"mv: invalid option -- 'T'\" >&2"}
    cores = [("0x41", "0xd05")] * 4 + [("0x41", "0xd0b")] * 4
    files = frequencies(range(4), 408000, 2256000, "schedutil")
    files |= frequencies(range(4, 8), 408000, 2256000, "schedutil")
    for core in range(8):
        files[f"sys/devices/system/cpu/cpu{core}/cpu_capacity"] = "1024" if core > 3 else "414\n"
    board.write(
        {
            "lib/ld-linux-aarch64.so.1": "",
            "lib/libc.so.6": BANNER.format("2.35"),
            "sys/firmware/devicetree/base/model": b"Radxa ROCK 5B\0",
            "proc/cpuinfo": cpuinfo(cores, "fp asimd crc32 asimddp"),
            "proc/meminfo": "MemTotal: 4000000 kB\nMemFree: 3000000 kB\n",
            "proc/loadavg": "7.50 3.00 1.00 9/150 1234\n",
            "sys/devices/system/cpu/online": "0-7\n",
            "sys/class/thermal/thermal_zone0/temp": "83000\n",
            "sys/class/thermal/thermal_zone1/temp": "-274000\n",
            "sys/class/thermal/thermal_zone2/temp": "255000\n",
            "sys/class/thermal/thermal_zone12/temp": "92500\n",
            **files,
        }
    )
    return board


def alpine(board: Board) -> Board:
    """A board with Alpine Linux, whose libc is musl: its loader says so, which is a script here."""
    board.commands = uname("aarch64", "6.6.0-0-lts")
    board.write(
        {
            "lib/ld-musl-aarch64.so.1": "#!/bin/sh\nexec >&2\n"
            "echo 'musl libc (aarch64)'\necho Version 1.2.4\necho 'Dynamic Loader'\nexit 1\n",
            "proc/cpuinfo": cpuinfo([("0x41", "0xd03")] * 2, "fp asimd"),
        }
    )
    (board.root / "lib/ld-musl-aarch64.so.1").chmod(0o755)
    return board


def x86(board: Board) -> Board:
    """A PC."""
    board.commands = uname("x86_64", "6.1.0-18-amd64")
    block = (
        "processor\t: {0}\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) N100 = fine\n"
        "flags\t\t: fpu sse2 avx2 fma f16c bmi1 bmi2 movbe abm{1}\n\n"
    )
    board.write(
        {
            "lib64/ld-linux-x86-64.so.2": "",
            "lib/x86_64-linux-gnu/libc.so.6": BANNER.format("2.36"),
            "sys/class/dmi/id/product_name": "Mini PC\n",
            "proc/cpuinfo": block.format(0, " only_on_one") + block.format(1, ""),
            "proc/meminfo": memory(16000000, 8000000),
        }
    )
    return board
