"""A Ctrl-C that a library swallowed still ends the command."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest

from edgepress.pipeline import interruption
from edgepress.pipeline.progress import Progress


def swallow(number: int) -> None:
    """Receive a signal as a library's callback may."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_signal_is_raised_again(number: int) -> None:
    interruption.check()
    progress = Progress(shown=False)
    with pytest.raises(KeyboardInterrupt), progress.step("compile"):
        swallow(number)
    assert interruption.received()
    with pytest.raises(KeyboardInterrupt):
        progress.update("calibrate", 1, 2)
    with pytest.raises(KeyboardInterrupt), progress.step("the next step"):
        pytest.fail("it began")  # pragma: no cover


@pytest.mark.usefixtures("handlers")
def test_an_error_keeps_its_own_message() -> None:
    with pytest.raises(ValueError, match="mine"), Progress(shown=False).step("work"):
        raise ValueError("mine")


def test_the_command_says_interrupted_whatever_a_library_makes_of_it() -> None:
    code = """
import signal
from edgepress.pipeline import cli

def broken(*args, **kwargs):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("the compiler failed") from None

cli.cli.main = broken
cli.main([])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 130
    assert result.stderr == "edgepress: interrupted; what had not finished is as it was.\n"
