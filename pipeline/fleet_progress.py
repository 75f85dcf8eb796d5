"""Progress of many boards at once, on stderr: on a terminal a line each, else a line per step."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from edgepress.pipeline import interruption
from edgepress.pipeline.printable import one_line
from edgepress.pipeline.progress import Clock, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Lines
    from rich.progress import TaskID


class FleetProgress:
    """Shows what each board is doing. Nothing is ever written to stdout.

    Used as a context manager: the lines are there while its block runs. On a terminal the line of a
    board that has finished moves above those of the others and stays there.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._interrupted = threading.Event()
        self._writing = threading.Lock()
        self._lines: Lines | None = None

    def __enter__(self) -> FleetProgress:
        """Begin to draw where stderr is a terminal."""
        if self._shown and sys.stderr.isatty():
            self._lines = _lines()
            self._lines.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Remove the lines of boards that have not finished."""
        if self._lines is not None:
            self._lines.stop()
            self._lines = None

    @contextmanager
    def board(self, name: str) -> Iterator[BoardProgress]:
        """Show a board until the block ends; `BoardProgress.finish` says how it ended."""
        self.check()
        shown = one_line(name)
        lines, task = self._lines, None
        if lines is not None:
            task = lines.add_task("", total=None, board=shown)
        progress = BoardProgress(name, self, task)
        started = time.perf_counter()
        try:
            yield progress
        finally:
            if lines is not None and task is not None:
                lines.remove_task(task)
            if progress.verdict:
                seconds = time.perf_counter() - started
                self.write(shown, f"{progress.verdict} ({seconds:.1f} s)")

    def interrupt(self) -> None:
        """Make every board stop at its next step."""
        self._interrupted.set()

    def check(self) -> None:
        """Raise KeyboardInterrupt where all boards are to stop."""
        interruption.check()
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    def write(self, name: str, text: str) -> None:
        """Write a line about a board."""
        if not self._shown:
            return
        with self._writing:
            if self._lines is not None:
                from rich.text import Text

                self._lines.console.print(Text.assemble((name, "bold"), f": {text}"))
            else:
                print(f"{name}: {text}", file=sys.stderr, flush=True)

    def step_ended(self, name: str, text: str) -> None:
        """Write how long a step of a board took, where no line shows it."""
        if self._lines is None:
            self.write(name, text)

    def show(self, task: TaskID | None, what: str, done: int, total: int) -> None:
        """Show on a board's line how far it is; a `total` of 0 is unknown."""
        if self._lines is not None and task is not None:
            self._lines.update(task, description=what, completed=done, total=total or None)


class BoardProgress(Progress):
    """The progress of one board of a fleet.

    Attributes:
        verdict: how the board ended, in a few words; empty while it runs.
    """

    def __init__(self, name: str, fleet: FleetProgress, task: TaskID | None) -> None:
        super().__init__(shown=False)
        self.verdict = ""
        self._name, self._fleet, self._task = name, fleet, task

    @contextmanager
    def step(self, name: str) -> Iterator[Clock]:
        """Show a step until the block ends, then its time."""
        self._fleet.check()
        for preposition in ("on", "to", "at"):  # the line begins with the board's name
            name = name.removesuffix(f" {preposition} {self._name}")
        name = one_line(name)
        clock, started = Clock(), time.perf_counter()
        self._fleet.show(self._task, name, 0, 0)
        try:
            yield clock
        finally:
            clock.seconds = time.perf_counter() - started
        self._fleet.check()
        self._fleet.step_ended(one_line(self._name), f"{name}: {clock.seconds:.1f} s")

    def update(self, what: str, done: int, total: int) -> None:
        """Say how far the running step is. Any thread may call it."""
        self._fleet.show(self._task, one_line(what), done, total)

    def note(self, text: str) -> None:
        """Write one line that the user should read."""
        self._fleet.write(one_line(self._name), one_line(text))

    def finish(self, verdict: str) -> None:
        """Say how the board ended."""
        self.verdict = one_line(verdict)


def _lines() -> Lines:
    """Return the lines of a terminal: board, step, share of it, time since it began."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Share(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.percentage:3.0f} %")

    board = TextColumn("{task.fields[board]}", style="bold", markup=False)
    step = TextColumn("{task.description}", markup=False)
    return Progress(
        board,
        step,
        Share(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
