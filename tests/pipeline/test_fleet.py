"""The same work on many boards: what happens on one does not touch the others."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepress.pipeline import fleet
from edgepress.pipeline.fleet import (
    MOST_AT_ONCE,
    Outcome,
    chosen_devices,
    failed,
    on_devices,
    raise_bug,
)
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.targets import children
from edgepress.targets.base import DeviceFailed, LinkBroken
from edgepress.targets.named_devices import InvalidDevices
from edgepress.targets.remote.shell import LocalShell, run_script

BOARDS = [f"ssh:board-{number}" for number in range(20)]


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write `devices.toml`."""

    def write(text: str) -> None:
        (tmp_path / "devices.toml").write_text(text, encoding="utf-8")
        monkeypatch.setenv("EDGEPRESS_DEVICES", str(tmp_path / "devices.toml"))

    return write


def quiet(devices: list[str], work: Callable[[str, Progress], str]) -> list[Outcome[str]]:
    return on_devices(devices, work, progress=FleetProgress(shown=False), verdict=str)


def behave(device: str, progress: Progress) -> str:
    """Of twenty boards some fail, some hang until their time is up, and one meets a bug."""
    number = int(device.rpartition("-")[2])
    with progress.step("work"):
        if number % 5 == 1:
            raise DeviceFailed(f"{device}: refused")
        if number % 5 == 2:
            run_script(LocalShell(device), "exec sleep 1000", timeout_s=0.1)
        if number == 13:
            raise IndexError("a bug")
        if number == 18:
            raise OutputError("cannot write there")
    return f"done {number}"


def test_twenty_boards_each_end_in_their_own_way() -> None:
    outcomes = quiet(BOARDS, behave)
    assert [outcome.device for outcome in outcomes] == BOARDS
    for number, outcome in enumerate(outcomes):
        if number in (13, 18) or number % 5 in (1, 2):
            assert outcome.value is None
        else:
            assert outcome == Outcome(device=BOARDS[number], value=f"done {number}")
    assert str(outcomes[6].error) == "ssh:board-6: refused"
    assert "no answer within 0.1 s" in str(outcomes[7].error)
    assert failed(outcomes)
    assert not failed(outcomes[3:6])
    assert [outcome.device for outcome in outcomes if outcome.is_bug] == ["ssh:board-13"]


def test_an_error_names_its_board_once(capsys: pytest.CaptureFixture[str]) -> None:
    on_devices(BOARDS[1:2], behave, progress=FleetProgress(), verdict=str)
    assert re.fullmatch(r"ssh:board-1: error: refused \(.* s\)\n", capsys.readouterr().err)


def test_a_bug_is_raised_in_the_end() -> None:
    with pytest.raises(IndexError) as caught:
        raise_bug(quiet(BOARDS, behave))
    assert caught.value.__notes__ == ["It happened with the board ssh:board-13."]
    raise_bug(quiet(BOARDS[:10], behave))  # those are failures of boards


def test_a_verdict_that_cannot_be_written_is_a_bug() -> None:
    def broken(_value: str) -> str:
        raise KeyError("no verdict")

    outcomes = on_devices(
        BOARDS[:2], lambda _d, _p: "", progress=FleetProgress(shown=False), verdict=broken
    )
    assert [outcome.is_bug for outcome in outcomes] == [True, True]


def test_boards_work_at_the_same_time() -> None:
    """All twenty wait for each other, which ends only where all run at once."""
    together = threading.Barrier(len(BOARDS))

    def work(_device: str, _progress: Progress) -> str:
        together.wait(60)
        return "met"

    assert [outcome.value for outcome in quiet(BOARDS, work)] == ["met"] * len(BOARDS)


def test_no_more_boards_than_allowed_work_at_once() -> None:
    begun: list[str] = []
    full, go_on = threading.Event(), threading.Event()
    at_once: list[int] = []

    def work(device: str, _progress: Progress) -> str:
        begun.append(device)
        if len(begun) >= MOST_AT_ONCE:
            full.set()
        go_on.wait(60)
        return device

    def look() -> None:
        full.wait(60)
        time.sleep(0.2)  # for others to begin, which they must not
        at_once.append(len(begun))
        go_on.set()

    looking = threading.Thread(target=look)
    looking.start()
    many = [f"ssh:board-{number}" for number in range(3 * MOST_AT_ONCE)]
    assert [outcome.value for outcome in quiet(many, work)] == many
    looking.join(60)
    assert at_once == [MOST_AT_ONCE]


def test_boards_of_one_address_take_turns(named: Callable[[str], None]) -> None:
    named('[a]\nconnect = "ssh:pi"\n[b]\nconnect = "ssh:pi"\n[c]\nconnect = "ssh:other"\n')
    running: set[str] = set()
    met = threading.Barrier(2)
    lock = threading.Lock()

    def work(device: str, _progress: Progress) -> str:
        with lock:
            assert not ({"a", "b"} - {device} <= running) or device == "c"
            running.add(device)
        if device in "ac":
            met.wait(60)
        with lock:
            running.discard(device)
        return device

    assert [outcome.value for outcome in quiet(["b", "a", "c"], work)] == ["b", "a", "c"]
    everything = ["local", "qemu", "ssh:pi", "a", "nobody"]
    assert fleet._turns(everything) == [[0, 1], [2, 3], [4]]


def test_an_unknown_board_is_only_its_own_failure() -> None:
    from edgepress.targets.devices.base import find_device

    outcomes = quiet(["ssh:pi", "piX"], lambda device, _progress: find_device(device).connect)
    assert outcomes[0].value == "ssh:pi"
    assert "no device is called 'piX'" in str(outcomes[1].error)


def test_a_broken_devices_file_is_said_at_once(named: Callable[[str], None]) -> None:
    named("[a]\nconnekt = 1\n")
    with pytest.raises(InvalidDevices):
        quiet(["a", "b"], behave)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_boards_and_what_runs_for_them(number: int) -> None:
    pids: list[int] = []
    later: list[str] = []
    all_run = threading.Barrier(len(BOARDS))

    def work(device: str, progress: Progress) -> str:
        with progress.step("wait"), children.child(["sleep", "1000"]) as process:
            pids.append(process.pid)
            if all_run.wait(60) == 0:
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, number)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        later.append(device)
        return "done"

    with pytest.raises(KeyboardInterrupt):
        quiet(BOARDS, work)
    assert len(pids) == len(BOARDS)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert later == [], "no board went on to its next step"


@pytest.mark.usefixtures("handlers")
def test_boards_that_wait_for_their_turn_never_begin_after_ctrl_c(
    capsys: pytest.CaptureFixture[str], named: Callable[[str], None]
) -> None:
    named('[a]\nconnect = "ssh:pi"\n[b]\nconnect = "ssh:pi"\n')
    begun: list[str] = []

    def work(device: str, progress: Progress) -> str:
        with progress.step("begin"):
            begun.append(device)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        run_script(LocalShell(device), "exec sleep 1000", timeout_s=60)
        raise LinkBroken("cut")

    with pytest.raises(KeyboardInterrupt):
        on_devices(["a", "b"], work, progress=FleetProgress(), verdict=str)
    assert begun == ["a"]
    assert "error" not in capsys.readouterr().err, "a board that was ended did not fail"


def test_a_library_that_raises_keyboard_interrupt_ends_all() -> None:
    stopped = threading.Event()
    busy = threading.Barrier(2)

    def work(device: str, progress: Progress) -> str:
        if device == BOARDS[3]:
            busy.wait(60)
            raise KeyboardInterrupt
        if device == BOARDS[4]:
            try:
                busy.wait(60)
                while True:
                    with progress.step("again and again"):
                        time.sleep(0.01)
            finally:
                stopped.set()
        children.run(["sleep", "1000"], b"", 60)
        return "done"

    with pytest.raises(KeyboardInterrupt):
        quiet(BOARDS, work)
    assert stopped.is_set()


def test_a_retry_after_ctrl_c_starts_nothing() -> None:
    """A link that was cut by us is not mended."""
    started: list[str] = []

    def work(device: str, _progress: Progress) -> str:
        for _ in range(3):
            try:
                started.append(device)
                if device == BOARDS[1]:
                    raise KeyboardInterrupt
                if children.run(["sleep", "1000"], b"", 60).returncode < 0:
                    raise LinkBroken("cut")
            except LinkBroken:
                continue
        return "done"

    with pytest.raises(KeyboardInterrupt):
        quiet(BOARDS[:2], work)
    assert started.count(BOARDS[0]) <= 2


def test_the_devices_of_a_command(named: Callable[[str], None], tmp_path: Path) -> None:
    named('[b]\nconnect = "ssh:b"\n[a]\nconnect = "local"\n')
    assert chosen_devices([], everything=False) == []
    assert chosen_devices(["qemu", "a"], everything=False) == ["qemu", "a"]
    assert chosen_devices([], everything=True) == ["b", "a"]
    with pytest.raises(UsageError, match="a is given twice"):
        chosen_devices(["a", "b", "a"], everything=False)
    with pytest.raises(UsageError, match="--all is for every board"):
        chosen_devices(["a"], everything=True)
    named("")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}/devices.toml names no board")):
        chosen_devices([], everything=True)
