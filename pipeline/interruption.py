"""Ctrl-C that gets through: a library may swallow KeyboardInterrupt in one of its callbacks.

The handler notes that a signal came before it raises. `check` raises again, wherever Python code
of edgepress runs next: between and inside the steps that `Progress` shows.
"""

from __future__ import annotations

import signal
from types import FrameType

_signals: list[int] = []


def install() -> None:
    """Handle SIGINT and SIGTERM alike, so that partial results are removed."""
    _signals.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def received() -> bool:
    """Tell whether a signal came since `install`."""
    return bool(_signals)


def check() -> None:
    """Raise KeyboardInterrupt where a signal came that nobody has acted on."""
    if _signals:
        raise KeyboardInterrupt


def _handle(number: int, _frame: FrameType | None) -> None:
    _signals.append(number)
    raise KeyboardInterrupt
