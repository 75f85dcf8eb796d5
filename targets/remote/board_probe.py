"""What a board is and how it does: a script there tells, and this reads what it says.

A fact that a board does not tell is empty or None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from edgepress.targets.base import DeviceFailed
from edgepress.targets.remote._probe_script import SCRIPT
from edgepress.targets.remote.arm_cores import core_name
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.shell import Shell, run_script

PROBE_S = 60
_BEGIN, _END = "edgepress-probe", "edgepress-end"
_COLDEST, _HOTTEST = -40.0, 150.0  # °C; a sensor that is off says less or more

THROTTLE_BITS = {
    0: "its supply is too weak",
    1: "its frequency is capped",
    2: "it is throttled",
    3: "it is at its soft temperature limit",
    16: "its supply was too weak",
    17: "its frequency was capped",
    18: "it was throttled",
    19: "it was at its soft temperature limit",
}
"""Of a Raspberry Pi's `get_throttled`: what holds now (below 16), and what did since it started."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """A core that is online.

    Attributes:
        number: as the system counts.
        kind: such as `Cortex-A76`, or empty.
        capacity: how fast it is beside the others, as the scheduler believes; None where it does
            not say.
        highest_khz: its highest frequency.
        frequency_khz: its frequency just then.
        governor: what chooses its frequency.
    """

    number: int
    kind: str = ""
    capacity: int | None = None
    highest_khz: int | None = None
    frequency_khz: int | None = None
    governor: str = ""


@dataclass(frozen=True, kw_only=True)
class BoardFacts:
    """What a board told.

    Attributes:
        machine: architecture of the kernel, as `uname -m` has it.
        kernel: its release.
        loaders: what starts programs, by path: `/lib/ld-linux-aarch64.so.1`; with the libc that
            belongs to it, `glibc 2.36` or `musl 1.2.4`, or empty where that is not known.
        board: its model.
        cpu: model of the CPU where it has a name, else of its cores.
        features: names that all cores list in `/proc/cpuinfo`.
        cores: those online.
        memory_total_bytes, memory_available_bytes: of the board.
        temperature_celsius: of its hottest sensor.
        throttled: a Raspberry Pi's flags; see `THROTTLE_BITS`.
        folder: where bundles are installed.
        deployed: names of bundles there, with the link of each.
        disk_free_bytes: there.
        writable: whether this user may write there.
        executable: whether programs may be started there.
        uptime_s: since it started.
        load: of the last minute: how many threads ran or wanted to.
        tools: of those that installing a bundle takes, the ones that are there; and `mv -T`.
        program: whether the program that was asked for is there.
        gpus: device files of NVIDIA's driver, one per GPU.
    """

    machine: str = ""
    kernel: str = ""
    loaders: dict[str, str] = field(default_factory=dict)
    board: str = ""
    cpu: str = ""
    features: frozenset[str] = frozenset()
    cores: tuple[Core, ...] = ()
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    temperature_celsius: float | None = None
    throttled: int | None = None
    folder: str = ""
    deployed: dict[str, str] = field(default_factory=dict)
    disk_free_bytes: int | None = None
    writable: bool = False
    executable: bool = True
    uptime_s: float | None = None
    load: float | None = None
    tools: frozenset[str] = frozenset()
    program: bool = False
    gpus: tuple[str, ...] = ()

    @property
    def core_kinds(self) -> list[list[int]]:
        """Numbers of the cores, the fastest kind first; one list where all are equally fast."""
        speeds: dict[int, list[int]] = {}
        for core in self.cores:
            speeds.setdefault(core.capacity or core.highest_khz or 0, []).append(core.number)
        return [speeds[speed] for speed in sorted(speeds, reverse=True)]

    @property
    def throttle_flags(self) -> list[str]:
        """What a Raspberry Pi says of its supply and its temperature, now and since it started."""
        flags = self.throttled or 0
        return [
            text if bit < 16 else f"{text} since it started"
            for bit, text in THROTTLE_BITS.items()
            if flags >> bit & 1 and not (bit >= 16 and flags >> (bit - 16) & 1)
        ]


def probe(shell: Shell, *, folder: str = "", program: str = "", root: str = "") -> BoardFacts:
    """Ask a board for everything.

    Args:
        shell: of the board.
        folder: where bundles are installed; empty: `~/edgepress`.
        program: to look for.
        root: a folder in whose place `/proc`, `/sys` and `/lib` are read.

    Raises:
        DeviceFailed: the board was not reached, or did not run the script to its end.
    """
    result = run_script(shell, SCRIPT, root, folder, program, TOOLS, timeout_s=PROBE_S)
    try:
        return parse_facts(result.stdout)
    except ValueError:
        said = result.stderr.decode("utf-8", "replace").strip()[:500] or "nothing"
        raise DeviceFailed(
            f"{shell.name}: its shell did not run the probe to the end (exit code "
            f"{result.returncode}), and said: {said}"
        ) from None


def parse_facts(said: bytes) -> BoardFacts:
    """Read what the script wrote; what a start-up file of the shell wrote before it is left out.

    Raises:
        ValueError: it does not end as it should.
    """
    pairs = [_pair(line) for line in said.decode("utf-8", "replace").split("\n")]
    keys = [key for key, _ in pairs]
    if _END not in keys or _BEGIN not in keys:
        raise ValueError("the script did not run to its end")
    told = _Told(pairs[keys.index(_BEGIN) : len(keys) - keys[::-1].index(_END)])
    features = [frozenset(value.split()) for value in told.all("features")]
    cores = _cores(told)
    disk_free_bytes, mount = _disk(told.first("disk"))
    return BoardFacts(
        machine=told.first("machine"),
        kernel=told.first("kernel"),
        loaders=_loaders(told),
        board=told.first("board"),
        cpu=_cpu(told, cores),
        features=frozenset.intersection(*features) if features else frozenset(),
        cores=cores,
        memory_total_bytes=_kib(told.first("memory total")),
        memory_available_bytes=_kib(told.first("memory available") or told.first("memory free")),
        temperature_celsius=_hottest(told.all("temperature")),
        throttled=_throttled(told),
        folder=told.first("folder"),
        deployed=dict(told.followed("deployed", "version")),
        disk_free_bytes=disk_free_bytes,
        writable="yes" in told.all("writable"),
        executable=mount not in (_unescaped(folder) for folder in told.all("noexec")),
        uptime_s=_number(told.first("uptime")),
        load=_number(told.first("load")),
        tools=frozenset(told.all("tool")),
        program=bool(told.first("program")),
        gpus=tuple(told.all("gpu")),
    )


@dataclass(frozen=True)
class _Told:
    """What a script said, in its order."""

    pairs: list[tuple[str, str]]

    def all(self, key: str) -> list[str]:
        """Every value of a key."""
        return [value for name, value in self.pairs if name == key]

    def first(self, key: str) -> str:
        """The first value of a key that is not empty, or an empty text."""
        return next((value for value in self.all(key) if value), "")

    def groups(self, key: str) -> list[tuple[str, _Told]]:
        """Per value of a key: the value, and what was said until the next."""
        starts = [index for index, (name, _) in enumerate(self.pairs) if name == key]
        ends = [*starts[1:], len(self.pairs)]
        return [
            (self.pairs[start][1], _Told(self.pairs[start + 1 : end]))
            for start, end in zip(starts, ends, strict=False)
        ]

    def followed(self, key: str, other: str) -> list[tuple[str, str]]:
        """Per value of a key: the value, and the next of another key; empty where none follows."""
        return [(value, rest.first(other)) for value, rest in self.groups(key)]


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key, value.replace("\0", "").strip()


def _loaders(told: _Told) -> dict[str, str]:
    """Every loader with its libc. Where no file told, the programs of the system do."""
    found = {}
    for path, rest in told.groups("loader"):
        glibc = re.match(r"[0-9]+(\.[0-9]+)+", rest.first("glibc"))
        musl = _musl(rest.first("musl"))
        found[path] = f"glibc {glibc[0]}" if glibc else musl
    unknown = [path for path, libc in found.items() if not libc]
    if len(unknown) == len(found) == 1:
        said = told.first("ldd")
        glibc = re.match(r"glibc ([0-9.]+)$", told.first("getconf")) or re.match(
            r"ldd \(.*?\) ([0-9]+(?:\.[0-9]+)+)", said
        )
        found[unknown[0]] = f"glibc {glibc[1]}" if glibc else _musl(said)
    for path, libc in found.items():
        if not libc and "/ld-musl-" in path:
            found[path] = "musl"
    return found


def _musl(said: str) -> str:
    """Read what musl's loader says of itself; empty where it is none."""
    version = re.search(r"^musl libc .*Version ([0-9.]+)", said)
    return f"musl {version[1]}" if version else ""


def _cores(told: _Told) -> tuple[Core, ...]:
    """Cores that are online: as the system lists them, else as `/proc/cpuinfo` does."""
    kinds: dict[int, str] = {}
    for number, rest in told.groups("processor"):
        if (processor := _integer(number)) is not None:
            kinds[processor] = core_name(rest.first("implementer"), rest.first("part"))
    groups = [(_integer(number), rest) for number, rest in told.groups("core")]
    rows = {number: rest for number, rest in groups if number is not None}
    online = _core_list(told.first("online")) or sorted(kinds) or sorted(rows)
    # cores of one kind may be told once, at the end
    common = core_name(told.first("implementer"), told.first("part"))
    return tuple(
        Core(
            number=number,
            kind=kinds.get(number) or common,
            capacity=_integer(rest.first("capacity")),
            highest_khz=_integer(rest.first("highest")),
            frequency_khz=_integer(rest.first("frequency")),
            governor=rest.first("governor"),
        )
        for number in online
        for rest in [rows.get(number, _Told([]))]
    )


def _core_list(text: str) -> list[int]:
    """Numbers of a list such as `0-3,5`; none where it is no such list."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        if not found:
            return []
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(numbers)


def _cpu(told: _Told, cores: Iterable[Core]) -> str:
    """Kinds of the cores with their numbers, or the name that the CPU gives itself."""
    kinds = Counter(core.kind for core in cores if core.kind)
    named = " + ".join(f"{count} × {kind}" for kind, count in kinds.items())
    return named or next(filter(None, map(told.first, ("model name", "Processor", "Hardware"))), "")


def _hottest(temperatures: Iterable[str]) -> float | None:
    """Highest of some temperatures in thousandths of a degree that a board can have."""
    known = [value / 1000 for text in temperatures if (value := _integer(text)) is not None]
    return max((value for value in known if _COLDEST < value < _HOTTEST), default=None)


def _throttled(told: _Told) -> int | None:
    """Flags of a Raspberry Pi; of one whose flags cannot be read, whether its supply is weak."""
    flags = told.first("throttled")
    if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", flags):
        return int(flags, 16)
    return _integer(told.first("undervoltage"))


def _disk(said: str) -> tuple[int | None, str]:
    """Free bytes, and where the file system is mounted, from a line of `df -P -k`."""
    found = re.search(r"\s[0-9]+\s+[0-9]+\s+(-?[0-9]{1,18})\s+(?:[0-9]+%|-)\s+(/.*)$", said)
    return (max(int(found[1]), 0) * 1024, found[2]) if found else (None, "")


def _unescaped(mount: str) -> str:
    """A folder of `/proc/mounts`, where spaces and the like are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mount)


def _kib(text: str) -> int | None:
    """Bytes of a number of `/proc/meminfo`, `123 kB`."""
    found = re.fullmatch(r"([0-9]{1,15}) kB", text)
    return int(found[1]) * 1024 if found else None


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else None


def _number(text: str) -> float | None:
    """The number that a text begins with."""
    found = re.match(r"[0-9]{1,15}(\.[0-9]{1,9})?(?=\s|$)", text)
    return float(found[0]) if found else None
