"""`edgepress devices`, with boards whose facts are made up, and with a real sshd."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgepress.pipeline import device_rows
from edgepress.pipeline.device_rows import DeviceRow, examine
from edgepress.pipeline.device_table import devices, show_devices
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.targets.base import DeviceFailed, Unreachable
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.load import target_names
from edgepress.targets.named_devices import InvalidDevices
from edgepress.targets.remote.board_probe import BoardFacts, Core
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.shell import Shell

WIDEST = 100

PI4 = BoardFacts(
    machine="aarch64",
    kernel="6.6.31",
    loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.36"},
    board="Raspberry Pi 4 Model B Rev 1.4",
    cpu="4 × Cortex-A72",
    features=frozenset({"fp", "asimd", "crc32"}),
    cores=tuple(
        Core(number=n, frequency_khz=1800000, highest_khz=1800000, governor="performance")
        for n in range(4)
    ),
    memory_total_bytes=3977584640,
    temperature_celsius=48.6,
    throttled=0,
    folder="/home/pi/edgepress",
    disk_free_bytes=21 * 10**9,
    writable=True,
    load=0.08,
    tools=frozenset({*TOOLS.split(), "mv -T"}),
    program=True,
)
BIG_LITTLE = dataclasses.replace(
    PI4,
    board="Radxa ROCK 5B",
    cpu="4 × Cortex-A55 + 4 × Cortex-A76",
    cores=tuple(
        Core(
            number=n,
            capacity=1024 if n > 3 else 414,
            frequency_khz=408000,
            highest_khz=2256000 if n > 3 else 1800000,
            governor="schedutil",
        )
        for n in range(8)
    ),
    disk_free_bytes=400 * 10**6,
)
ALPINE = dataclasses.replace(PI4, loaders={"/lib/ld-musl-aarch64.so.1": "musl 1.2.4"})

BOARDS = """
[pi4-lab]
connect = "ssh:pi@10.0.0.7"
target = "raspberry-pi-4"

[wrong]
connect = "ssh:wrong"
target = "raspberry-pi-5"

[typo]
connect = "ssh:typo"
target = "raspbery-pi-4"

[rock]
connect = "ssh:rock"

[alpine]
connect = "ssh:alpine"

[dead]
connect = "ssh:dead"
target = "raspberry-pi-4"

[emulated]
connect = "ssh:emulated"
target = "raspberry-pi-5"
run_with = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
"""
TOLD: dict[str, BoardFacts | DeviceFailed] = {
    "pi4-lab": PI4,
    "wrong": PI4,
    "typo": PI4,
    "rock": BIG_LITTLE,
    "alpine": ALPINE,
    "dead": Unreachable("dead: no route to host. Is it switched on?"),
    "emulated": BoardFacts(
        machine="x86_64", folder="/x", writable=True, tools=PI4.tools, program=True
    ),
}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, BoardFacts | DeviceFailed]:
    """What boards tell, instead of a probe; a test may change it."""
    answers = dict(TOLD)

    def probe(shell: Shell, *, folder: str, program: str) -> BoardFacts:
        assert (folder, program) == ("", "qemu-aarch64" if shell.name == "emulated" else "")
        answer = answers.get(shell.name, PI4)
        if isinstance(answer, DeviceFailed):
            raise answer
        return answer

    monkeypatch.setattr(device_rows, "probe", probe)
    monkeypatch.setattr(device_rows, "linked_glibc", lambda _target: (2, 34))
    (tmp_path / "devices.toml").write_text(BOARDS)
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(tmp_path / "devices.toml"))
    return answers


pytestmark = pytest.mark.usefixtures("told")


def rows(*names: str) -> dict[str, DeviceRow]:
    return {row.board.name: row for row in examine(names, progress=FleetProgress(shown=False))}


def findings(row: DeviceRow, kind: str) -> list[str]:
    return [finding.text for finding in row.findings if finding.kind == kind]


def shown(*names: str, width: int = WIDEST) -> str:
    paper = io.StringIO()
    show_devices(rows(*names).values(), Console(file=paper, width=width))
    return paper.getvalue()


def document(capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, dict[str, Any]]:
    devices(names, as_json=True)
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["devices"]}


def test_without_names_everything_is_listed() -> None:
    assert list(rows()) == ["local", "qemu", *TOLD]
    twice = examine(["rock", "ssh:elsewhere", "rock"], progress=FleetProgress(shown=False))
    assert [row.board.name for row in twice] == ["rock", "ssh:elsewhere"]


def test_a_board_that_runs_its_target() -> None:
    row = rows("pi4-lab")["pi4-lab"]
    assert row.works
    assert row.findings == []
    assert row.targets == ["raspberry-pi-4"]
    assert row.refused["raspberry-pi-5"] == (
        "this board lacks asimddp, which raspberry-pi-5 bundles need."
    )
    assert "native is for the machine that builds" in row.refused["native"]
    assert set(row.targets) | set(row.refused) == set(target_names())


def test_a_board_that_does_not_run_its_target() -> None:
    row = rows("wrong")["wrong"]
    assert not row.works
    assert findings(row, "stops") == [
        "this board lacks asimddp, which raspberry-pi-5 bundles need."
    ]
    assert findings(row, "note") == ["bundles of raspberry-pi-4 run there."]


def test_a_target_that_there_is_not() -> None:
    row = rows("typo")["typo"]
    assert not row.works
    (text,) = findings(row, "stops")
    assert text.startswith("no target is called 'raspbery-pi-4'. Did you mean raspberry-pi-4")


def test_a_board_without_a_target_says_what_it_runs() -> None:
    found = rows("rock", "alpine")
    assert found["rock"].works
    assert found["rock"].targets == ["raspberry-pi-4"]
    assert [text[:12] for text in findings(found["rock"], "spoils")] == ["its governor"]
    assert not found["alpine"].works
    (text,) = findings(found["alpine"], "stops")
    assert text.startswith(
        "it runs bundles of no target. What stops raspberry-pi-4: its libc is musl 1.2.4"
    )


def test_a_board_that_is_not_reached_hurts_no_other() -> None:
    found = rows()
    assert found["dead"].error == "dead: no route to host. Is it switched on?"
    assert found["dead"].facts is None
    assert not found["dead"].works
    assert found["pi4-lab"].works


def test_an_emulator_on_a_board_runs_what_is_for_it() -> None:
    row = rows("emulated")["emulated"]
    assert row.works
    assert {"raspberry-pi-4", "raspberry-pi-5"} <= set(row.targets)
    assert row.refused["armv7-neon"] == "qemu-aarch64 does not run armv7-neon bundles."
    assert len(row.findings) == 1
    assert "under qemu-aarch64" in row.findings[0].text


def test_a_glibc_that_is_too_old(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    old = {"/lib/ld-linux-aarch64.so.1": "glibc 2.31"}
    told["pi4-lab"] = dataclasses.replace(PI4, loaders=old)
    (text,) = findings(rows("pi4-lab")["pi4-lab"], "stops")
    assert text.startswith("its glibc 2.31 is too old: bundles that aarch64-linux-gnu-gcc builds")


def test_what_stops_comes_first(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    told["pi4-lab"] = dataclasses.replace(
        PI4, load=5.0, writable=False, tools=PI4.tools - {"mv -T"}
    )
    kinds = [finding.kind for finding in rows("pi4-lab")["pi4-lab"].findings]
    assert kinds == ["stops", "spoils", "note"]


def test_local_and_qemu(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    told["local"] = dataclasses.replace(PI4, machine=host_architecture(), features=frozenset())
    found = rows("local", "qemu")
    other = "raspberry-pi-4" if host_architecture() == "x86_64" else "x86-64-v3"
    assert f"local is {host_architecture()}, but {other} is" in found["local"].refused[other]
    assert found["qemu"].facts is None
    assert found["qemu"].refused["native"].startswith("the target native has no emulator")


def test_a_missing_emulator_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    text = " ".join(shown("qemu").split())
    assert "does not run: qemu-aarch64, which runs" in text
    assert "apt-get install qemu-user" in text
    assert "native" not in text


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ((), 0),
        (("pi4-lab",), 0),
        (("pi4-lab", "rock", "emulated"), 0),
        (("pi4-lab", "dead"), 5),
        (("wrong",), 5),
        (("typo",), 5),
        (("alpine",), 5),
    ],
)
def test_exit_codes(names: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices(names, as_json=False) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    assert devices(names, as_json=True) == code
    assert json.loads(capsys.readouterr().out)["devices"]


def test_unknown_names_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DeviceFailed, match=r"no device is called 'pi4-lap'. Did you mean pi4-lab"):
        devices(["pi4-lab", "pi4-lap"], as_json=False)
    (tmp_path / "devices.toml").write_text("[x]\n")
    with pytest.raises(InvalidDevices, match="missing connect"):
        devices([], as_json=False)


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys)
    pi4 = found["pi4-lab"]
    assert (pi4["connect"], pi4["target"]) == ("ssh:pi@10.0.0.7", "raspberry-pi-4")
    assert (pi4["reachable"], pi4["error"]) == (True, None)
    assert pi4["targets"] == ["raspberry-pi-4"]
    facts = pi4["facts"]
    assert facts["features"] == ["asimd", "crc32", "fp"]
    assert facts["loaders"] == PI4.loaders
    assert facts["cores"][3]["governor"] == "performance"
    assert facts["throttle_flags"] == []
    assert set(dataclasses.asdict(PI4)) <= set(facts)
    assert found["rock"]["facts"]["core_kinds"] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert found["wrong"]["findings"][0]["kind"] == "stops"
    dead = found["dead"]
    assert (dead["reachable"], dead["facts"], dead["targets"]) == (False, None, [])
    assert "no route" in dead["error"]
    assert found["qemu"]["facts"] is None


def test_the_table() -> None:
    text = shown("pi4-lab", "rock", "wrong", "dead")
    for word in (
        "ssh:pi@10.0.0.7", "Raspberry Pi 4", "4 × Cortex-A72", "1800/1800 MHz", "49 °C",
        "4.0 GB", "21.0 GB free", "400 MB free", "glibc 2.36", "big 4-7", "little 0-3",
        "schedutil", "408/2256 MHz", "unreachable", "not", "spoils times: its governor",
        "stops: this board lacks asimddp", "dead: no route to host", "note: bundles of",
    ):  # fmt: skip
        assert word in " ".join(text.split()), word


def test_the_table_fits_its_width(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    long = "a-board-whose-name-is-much-longer-than-any-name-should-be"
    told[f"ssh:{long}"] = dataclasses.replace(
        BIG_LITTLE,
        board="A board of a company that likes long names (rev. 4.2.1)",
        cpu="2 × Cortex-A710 + 4 × Cortex-A510 + 2 × core 0x51/0x804",
        loaders={f"/lib/ld-{n}.so": f"glibc 2.{n}" for n in range(20)},
        temperature_celsius=-3.0,
    )
    for width in (WIDEST, 80):
        text = shown(f"ssh:{long}", *TOLD, "qemu", width=width)
        assert max(map(len, text.splitlines())) <= width
        column = [line.split("│")[1] for line in text.splitlines() if line.startswith("│")]
        assert long in "".join(part.strip() for part in column)


def test_a_board_cannot_draw_on_the_terminal(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    told["pi4-lab"] = dataclasses.replace(
        PI4,
        board="[red]\x1b[31mbad\x07\nboard[/red]",
        cpu="\x9b31m[/]",
        deployed={"\x1b[2Jnet": ".edgepress/0123456789abcdef"},
        folder="/\x1b[1m",
        writable=False,
        loaders={"/lib/ld-linux-aarch64.so.1": "glibc 2.36"},
    )
    told["dead"] = Unreachable("dead: \x1b]0;title\x07 said")
    text = shown("pi4-lab", "dead")
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "[red]" in text
    assert "?[2Jnet (0123456789abcdef)" in text


def test_what_is_installed_is_shown(told: dict[str, BoardFacts | DeviceFailed]) -> None:
    told["pi4-lab"] = dataclasses.replace(
        PI4, deployed={"net": ".edgepress/0123456789abcdef", "mine": "/home/pi/mine"}
    )
    assert "installed: net (0123456789abcdef)" in shown("pi4-lab")
