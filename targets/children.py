"""Programs that this process runs and waits for, so that an interruption ends all of them.

Ctrl-C interrupts the main thread only: what another thread waits for, an `ssh` say, would run on.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_GRACE_S = 1.0

_lock = threading.Lock()
_running: set[subprocess.Popen[bytes]] = set()
_blocks_ending = 0


@contextmanager
def child(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program with three pipes; it has ended when the block has.

    Raises:
        OSError: it cannot be started.
        KeyboardInterrupt: everything is being ended.
    """
    pipe = subprocess.PIPE
    with _lock:
        if _blocks_ending:
            raise KeyboardInterrupt
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        _running.add(process)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        with _lock:
            _running.discard(process)


def run(
    command: Sequence[str], stdin: bytes, timeout_s: float
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, however that is, and return all it wrote.

    Raises:
        OSError, KeyboardInterrupt: as `child`.
        subprocess.TimeoutExpired: it did not end in time, and was ended.
    """
    with child(command) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout_s)
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def ended() -> Iterator[None]:
    """End every child of every thread; while the block runs, no new one starts."""
    global _blocks_ending
    with _lock:
        _blocks_ending += 1
        children = list(_running)
    try:
        for process in children:
            process.terminate()
        deadline = time.monotonic() + _GRACE_S
        while any(process.poll() is None for process in children) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in children:
            process.kill()
        yield
    finally:
        with _lock:
            _blocks_ending -= 1
