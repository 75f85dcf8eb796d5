"""Programs that are waited for end with the wait, and all of them on an interruption."""

import os
import subprocess
import threading
from contextlib import suppress

import pytest

from edgepress.targets import children

FOREVER = ["sleep", "1000"]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_what_a_program_reads_and_writes() -> None:
    done = children.run(["sh", "-c", "cat; echo said >&2; exit 3"], b"read", 60)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"read", b"said\n")


def test_a_program_that_does_not_read_is_no_error() -> None:
    assert children.run(["true"], b"x" * 10**6, 60).returncode == 0


def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        children.run(FOREVER, b"", 0.05)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        children.run(["/there/is/none"], b"", 60)


def test_it_has_ended_when_the_block_has() -> None:
    with pytest.raises(ValueError, match="mine"), children.child(FOREVER) as process:
        raise ValueError("mine")
    assert process.poll() is not None
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def test_all_end_and_none_starts() -> None:
    """Even one that ignores to be asked."""
    stubborn = ["sh", "-c", "trap '' TERM; echo; exec sleep 1000"]
    pids: list[int] = []
    refused: list[str] = []
    running = threading.Barrier(4)

    def wait(command: list[str]) -> None:
        with children.child(command) as process:
            if command is stubborn:
                assert process.stdout is not None
                process.stdout.read(1)
            pids.append(process.pid)
            running.wait(60)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        try:
            children.run(["true"], b"", 60)
        except KeyboardInterrupt:
            refused.append(command[0])

    commands = (FOREVER, FOREVER, stubborn)
    threads = [threading.Thread(target=wait, args=(command,)) for command in commands]
    for thread in threads:
        thread.start()
    running.wait(60)
    with children.ended():
        for thread in threads:
            thread.join(60)
    assert len(pids) == 3
    assert all(map(is_gone, pids))
    assert sorted(refused) == ["sh", "sleep", "sleep"]
    assert children.run(["true"], b"", 60).returncode == 0, "afterwards they start again"


def test_they_are_asked_before_they_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_GRACE_S", 60.0)
    polite = ["sh", "-c", "trap 'kill $!; exit 7' TERM; sleep 1000 & echo; wait"]
    with children.child(polite) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        with children.ended():
            assert process.wait(60) == 7
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_a_block_that_fails_lets_programs_start_again() -> None:
    with suppress(ValueError), children.ended():
        raise ValueError
    assert children.run(["true"], b"", 60).returncode == 0
