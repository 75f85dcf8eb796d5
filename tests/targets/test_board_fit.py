"""What is said of a board beside a target: what stops a bundle, what spoils a measurement."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from edgepress.targets.base import Target
from edgepress.targets.load import load_target, target_names
from edgepress.targets.remote.board_fit import compare, stopping
from edgepress.targets.remote.board_probe import BoardFacts, Core
from edgepress.targets.remote.board_scripts import TOOLS

FINE = BoardFacts(
    machine="aarch64",
    loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.36"},
    features=frozenset({"fp", "asimd", "crc32"}),
    cores=tuple(Core(number=n, governor="performance") for n in range(4)),
    temperature_celsius=45.0,
    throttled=0,
    folder="/home/pi/edgepress",
    disk_free_bytes=10**10,
    writable=True,
    load=0.1,
    tools=frozenset({*TOOLS.split(), "mv -T"}),
)
PI4, PI5 = load_target("raspberry-pi-4"), load_target("raspberry-pi-5")
ARMV7, SOFT = load_target("armv7-neon"), load_target("armv7-soft-float")
ORIN = load_target("jetson-orin-nano")
GLIBC = (2, 34)


def board(**changes: Any) -> BoardFacts:
    return dataclasses.replace(FINE, **changes)


def texts(kind: str, facts: BoardFacts, target: Target | None = PI4, **more: Any) -> str:
    found = compare(facts, target, glibc=GLIBC, **more)
    return " ".join(finding.text for finding in found if finding.kind == kind)


def test_a_board_that_fits_has_no_findings() -> None:
    assert compare(FINE, PI4, glibc=GLIBC) == []
    assert compare(FINE, None) == []
    assert compare(board(gpus=("/dev/nvhost-gpu",)), ORIN, glibc=GLIBC) == []


@pytest.mark.parametrize(
    ("facts", "target", "message"),
    [
        (FINE, PI5, "this board lacks asimddp, which raspberry-pi-5 bundles need."),
        (FINE, load_target("armv8-i8mm"), "this board lacks asimddp, i8mm, which armv8-i8mm"),
        (FINE, ORIN, "jetson-orin-nano bundles run on an NVIDIA GPU, and there is none whose"),
        (board(machine="x86_64"), PI4, "its system is x86_64, but raspberry-pi-4 bundles are aarc"),
        (board(machine="armv7l"), PI4, "its system is armv7l"),
        (board(machine="armv6l"), ARMV7, "its system is armv6l"),
        (board(machine="riscv64"), ARMV7, "its system is riscv64"),
        (
            board(loaders={"/lib/ld-linux-armhf.so.3": "glibc 2.31"}),
            PI4,
            "its kernel is 64-bit, but its programs are 32-bit: /lib/ld-linux-aarch64.so.1, which "
            "starts raspberry-pi-4 bundles, is not there; of its kind there is "
            "/lib/ld-linux-armhf.so.3.",
        ),
        (FINE, ARMV7, "/lib/ld-linux-armhf.so.3, which starts armv7-neon bundles, is not there"),
        (board(loaders={}), PI4, "/lib/ld-linux-aarch64.so.1, which starts"),
        (
            board(machine="armv7l", loaders={"/lib/ld-linux-armhf.so.3": "glibc 2.36"}),
            SOFT,
            "/lib/ld-linux.so.3, which starts armv7-soft-float bundles, is not there",
        ),
        (
            board(loaders={"/lib/ld-musl-aarch64.so.1": "musl 1.2.4"}),
            PI4,
            "its libc is musl 1.2.4, but bundles are built for glibc.",
        ),
        (  # Alpine's gcompat has a loader of this name
            board(loaders={"/lib/ld-linux-aarch64.so.1": "", "/lib/ld-musl-aarch64.so.1": "musl"}),
            PI4,
            "its libc is musl, but bundles are built for glibc.",
        ),
        (
            board(loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.31"}),
            PI4,
            "its glibc 2.31 is too old: bundles that aarch64-linux-gnu-gcc builds here need 2.34.",
        ),
        (board(writable=False), PI4, "this user may not write to /home/pi/edgepress."),
        (board(executable=False), PI4, "/home/pi/edgepress is mounted noexec"),
        (board(disk_free_bytes=2**20 - 1), PI4, "there is no space left for /home/pi/edgepress."),
        (board(tools=FINE.tools - {"dd", "sha256sum"}), PI4, "it lacks dd, sha256sum, which inst"),
    ],
)
def test_what_stops_a_bundle(facts: BoardFacts, target: Target, message: str) -> None:
    found = texts("stops", facts, target)
    assert found.startswith(message)
    assert texts("spoils", facts, target) == ""


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            board(cores=(Core(number=0, governor="ondemand"), *FINE.cores[1:])),
            "its governor is ondemand, not performance",
        ),
        (board(throttled=0x5), "its supply is too weak, it is throttled. Mind its power"),
        (board(throttled=0x50001), "its supply is too weak, it was throttled since it started."),
        (board(throttled=0x80008), "it is at its soft temperature limit. Mind"),
        (board(temperature_celsius=70.0), "its hottest sensor shows 70 °C"),
        (board(load=0.51), "its load is 0.51: other programs want its cores"),
        (board(cores=FINE.cores[:2]), "it has 2 cores, but raspberry-pi-4 bundles run on 4."),
    ],
)
def test_what_spoils_a_measurement(facts: BoardFacts, message: str) -> None:
    assert texts("spoils", facts).startswith(message)
    assert texts("stops", facts) == ""


@pytest.mark.parametrize(
    "facts",
    [
        board(temperature_celsius=69.9, load=0.5, throttled=1 << 20),
        board(temperature_celsius=None, load=None, throttled=None, disk_free_bytes=None),
        board(cores=tuple(Core(number=n) for n in range(4))),
        board(cores=()),
        board(loaders={"/lib/ld-linux-aarch64.so.1": ""}),
        board(loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.34"}),
        board(loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.100"}),
        board(features=frozenset()),
        board(disk_free_bytes=64 * 2**20),
    ],
)
def test_what_is_fine_or_not_known_is_no_finding(facts: BoardFacts) -> None:
    assert compare(facts, PI4, glibc=GLIBC) == []


def test_notes() -> None:
    assert texts("note", board(disk_free_bytes=2**25)) == (
        "only 34 MB are free for /home/pi/edgepress."
    )
    assert "its mv has no -T" in texts("note", board(tools=FINE.tools - {"mv -T"}))


def test_32_bit_bundles_on_a_64_bit_kernel_need_what_every_such_cpu_has() -> None:
    facts = board(loaders={"/lib/ld-linux-armhf.so.3": "glibc 2.36"})
    assert stopping(facts, ARMV7, GLIBC) == []
    assert (
        "lacks neon, vfpv4"
        in stopping(dataclasses.replace(facts, features=frozenset({"fp"})), ARMV7, GLIBC)[0]
    )


def test_every_reason_is_given() -> None:
    facts = board(loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.31"})
    assert len(stopping(facts, PI5, GLIBC)) == 2


def test_an_unknown_need_of_glibc_is_no_finding() -> None:
    old = board(loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.17"})
    assert compare(old, PI4, glibc=None) == []


@pytest.mark.parametrize("emulator", ["qemu-aarch64", "/opt/qemu-aarch64"])
def test_an_emulator_on_the_board_runs_any_architecture(emulator: str) -> None:
    facts = board(machine="x86_64", loaders={}, features=frozenset({"sse2"}), program=True)
    found = compare(facts, PI5, run_with=(emulator, "-L", "/usr"), glibc=GLIBC)
    assert [finding.kind for finding in found] == ["note"]
    assert "under qemu-aarch64" in found[0].text
    absent = compare(dataclasses.replace(facts, program=False), PI5, run_with=(emulator,))
    assert absent[0].text == f"run_with names {emulator}, which is not there."
    assert absent[0].kind == "stops"


def test_a_program_before_the_executable_is_no_emulator() -> None:
    facts = board(program=True)
    assert "lacks asimddp" in texts("stops", facts, PI5, run_with=("chrt", "-f", "50"))
    missing = texts("stops", FINE, PI4, run_with=("chrt", "-f", "50"))
    assert missing == "run_with names chrt, which is not there."


@pytest.mark.parametrize("name", [name for name in target_names() if name != "native"])
def test_every_target_has_a_loader(name: str) -> None:
    target = load_target(name)
    nothing = BoardFacts(machine=target.architecture)
    assert "is not there; of its kind there is none" in stopping(nothing, target)[0]


def test_the_page_on_devices_has_what_is_said() -> None:
    root = Path(__file__).parent.parent.parent
    page = (root / "docs/devices.md").read_text(encoding="utf-8")
    _, _, tables = page.partition("**stops**")
    phrases = [
        phrase
        for line in tables.splitlines()
        if line.startswith("| `")
        for phrase in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    assert len(phrases) > 20
    names = ("targets/remote/board_fit.py", "targets/remote/board_probe.py", "targets/base.py")
    sources = [root / name for name in (*names, "pipeline/device_rows.py")]
    text = re.sub(r'"\n\s+f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    assert [phrase for phrase in phrases if phrase not in text] == []
