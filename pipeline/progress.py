"""Progress on stderr: on a terminal a bar for work over 2 seconds, else a line per step."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgepress.pipeline import interruption

QUIET_SECONDS = 2.0


@dataclass
class Clock:
    """How long a step took, once it has ended."""

    seconds: float = 0.0


class Progress:
    """Shows which step runs. Nothing is ever written to stdout.

    Without `shown`, nothing is written at all. A Ctrl-C that was swallowed somewhere is raised
    again before, in and after every step.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown, self._what, self._done, self._total = shown, "", 0, 0
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str) -> Iterator[Clock]:
        """Show a step until the block ends, then its time."""
        interruption.check()
        clock, started = Clock(), time.perf_counter()
        with self._lock:
            self._what, self._done, self._total = name, 0, 0
        stop = threading.Event()
        thread = None
        if self._shown and sys.stderr.isatty():
            thread = threading.Thread(target=self._draw, args=(stop,), daemon=True)
            thread.start()
        try:
            yield clock
        finally:
            clock.seconds = time.perf_counter() - started
            stop.set()
            if thread is not None:
                thread.join()
        interruption.check()
        if self._shown and thread is None:
            print(f"{name}: {clock.seconds:.1f} s", file=sys.stderr, flush=True)

    def update(self, what: str, done: int, total: int) -> None:
        """Say how far the running step is; passes call it through their context."""
        interruption.check()
        with self._lock:
            self._what, self._done, self._total = what, done, total

    def note(self, text: str) -> None:
        """Write one line that the user should read."""
        if self._shown:
            print(text, file=sys.stderr, flush=True)

    def _draw(self, stop: threading.Event) -> None:
        if stop.wait(QUIET_SECONDS):
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(self._what, total=None)
            while not stop.wait(0.1):
                with self._lock:
                    total = self._total or None
                    bar.update(task, description=self._what, total=total, completed=self._done)
