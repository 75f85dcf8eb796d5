"""What many boards show while they work: lines on stderr, or one line each on a terminal."""

from __future__ import annotations

import io
import re
import signal
import sys
import threading
import time

import pytest

from edgepress.pipeline import interruption
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.printable import one_line

DEADLINE_S = 60


class Terminal(io.StringIO):
    """A terminal that remembers everything that was written to it."""

    def isatty(self) -> bool:
        return True

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while text not in self.getvalue():
            assert time.monotonic() < end, self.getvalue()
            time.sleep(0.01)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal; no fixture, since pytest replaces stderr after those."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_elsewhere_every_step_is_a_line_with_the_board(capsys: pytest.CaptureFixture[str]) -> None:
    with FleetProgress() as fleet, fleet.board("pi4-lab") as board:
        with board.step("selftest on pi4-lab") as clock:
            board.update("half of it", 1, 2)
        with board.step("send to pi4-lab"):
            pass
        board.note("its clock\nis wrong")
        board.finish("pass")
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = re.sub(r"\d+\.\d s", "0.0 s", printed.err).splitlines()
    assert lines == [
        "pi4-lab: selftest: 0.0 s",
        "pi4-lab: send: 0.0 s",
        "pi4-lab: its clock is wrong",
        "pi4-lab: pass (0.0 s)",
    ]
    assert clock.seconds > 0


def test_nothing_is_shown_where_nothing_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal(monkeypatch)
    with FleetProgress(shown=False) as fleet, fleet.board("pi") as board:
        with board.step("work"):
            board.note("a note")
        board.finish("pass")
    assert screen.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_a_step_that_fails_is_not_said_to_have_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with FleetProgress() as fleet, fleet.board("pi") as board:  # noqa: SIM117
        with pytest.raises(ValueError, match="mine"), board.step("work"):
            raise ValueError("mine")
    assert capsys.readouterr().err == ""


class Slow(io.StringIO):
    """A stream that lets other threads write between any two writes."""

    def write(self, text: str) -> int:
        time.sleep(1e-4)
        return super().write(text)


def test_lines_of_many_boards_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Slow()
    monkeypatch.setattr(sys, "stderr", stderr)
    names = [f"board-{number}" for number in range(20)]
    with FleetProgress() as fleet:

        def work(name: str) -> None:
            with fleet.board(name) as board:
                for step in range(10):
                    with board.step(f"step {step}"):
                        board.update("…", step, 10)
                board.finish("pass")

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 20 * 11
    assert all(re.fullmatch(r"board-\d+: (step \d: \d+\.\d s|pass \(.*\))", line) for line in lines)
    for name in names:
        own = [line.split(": ")[1] for line in lines if line.startswith(f"{name}: ")]
        assert own[:-1] == [f"step {step}" for step in range(10)]


def test_on_a_terminal_each_board_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with FleetProgress() as fleet:
        with fleet.board("pi4-lab") as one, fleet.board("jetson-3") as other:
            with one.step("send on pi4-lab"), other.step("bench [not markup]"):
                one.update("send model", 37, 100)
                screen.wait_for(" 37 %")
                screen.wait_for("bench [not markup]")
            drawn = screen.getvalue()
            one.note("a note")
            other.finish("fail: latency_ms")
        screen.wait_for("jetson-3\x1b[0m: fail: latency_ms (")
    assert "send model" in drawn
    assert "send on" not in drawn
    assert re.search(r"0:00:0\d", drawn)
    assert "pi4-lab\x1b[0m: a note" in screen.getvalue()
    assert not re.search(r"(send|bench).*: \d+\.\d s", screen.getvalue()), "lines show the steps"
    assert "\x1b[?25h" in screen.getvalue(), "the cursor is there again"


def test_the_line_of_a_board_goes_when_it_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with FleetProgress() as fleet, fleet.board("jetson-3") as other:
        with fleet.board("ssh:[red]") as board, board.step("work"):
            screen.wait_for("ssh:[red]")
        screen.truncate(0)
        screen.seek(0)
        with other.step("something new"):
            screen.wait_for("something new")
        assert "ssh:[red]" not in screen.getvalue()


def test_an_update_from_another_thread_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with FleetProgress() as fleet, fleet.board("pi") as board:
        fleet.interrupt()
        board.update("send", 1, 2)
        with pytest.raises(KeyboardInterrupt), board.step("next"):
            pytest.fail("it began")
        screen.wait_for("send")
    with pytest.raises(KeyboardInterrupt), fleet.board("another"):
        pytest.fail("it began")


def test_an_interruption_is_raised_when_the_step_ends() -> None:
    with FleetProgress(shown=False) as fleet, fleet.board("pi") as board:  # noqa: SIM117
        with pytest.raises(KeyboardInterrupt), board.step("work"):
            fleet.interrupt()


def test_a_signal_that_was_swallowed_ends_a_board_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interruption, "_signals", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), FleetProgress(shown=False).board("pi"):
        pytest.fail("it began")


def test_what_a_board_says_cannot_move_the_cursor() -> None:
    assert one_line("a\x1b[2J\r\n b\x00\x9bc\u202e") == "a?[2J b??c?"
    assert one_line("plain, with ° and –") == "plain, with ° and –"
