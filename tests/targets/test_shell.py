"""Scripts on this machine's shell: what they read, and how they end."""

import io

import pytest

from edgepress.targets.base import DeviceFailed
from edgepress.targets.remote.shell import LocalShell, run_script

SHELL = LocalShell("here")


def test_what_a_script_reads_and_says() -> None:
    done = run_script(SHELL, 'cat; echo "$1" "$2" >&2; exit 3', "a b", "$(c)\n", timeout_s=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"a b $(c)\n\n")
    assert run_script(SHELL, "cat", timeout_s=60, stdin=b"x" * 10**6).stdout == b"x" * 10**6


def test_a_stream_is_handed_over_in_pieces() -> None:
    sent: list[int] = []
    data = bytes(200_000)
    done = run_script(SHELL, "cat", timeout_s=60, stdin=io.BytesIO(data), sent=sent.append)
    assert done.stdout == data
    assert sent == sorted(sent)
    assert len(sent) > 1
    assert sent[-1] == len(data)


def test_a_script_that_stops_reading_is_no_error() -> None:
    assert run_script(SHELL, "exit 5", timeout_s=60, stdin=b"x" * 10**6).returncode == 5


def test_input_stays_open_until_the_end_where_there_is_none() -> None:
    with pytest.raises(DeviceFailed, match=r"here: no answer within 0\.2 s"):
        run_script(SHELL, "exec cat", timeout_s=0.2, stdin=None)


def test_ctrl_c_in_the_thread_that_hands_over_is_the_main_threads() -> None:
    """Progress raises it wherever it is called; that thread has nobody to tell."""

    def interrupted(_sent: int) -> None:
        raise KeyboardInterrupt

    done = run_script(SHELL, "wc -c", timeout_s=60, stdin=io.BytesIO(bytes(9)), sent=interrupted)
    assert done.stdout.strip() == b"9"


def test_a_shell_that_is_not_there() -> None:
    class Nowhere(LocalShell):
        def words(self, script: str, arguments: object) -> list[str]:  # noqa: ARG002
            return ["/there/is/none"]

    with pytest.raises(DeviceFailed, match="local: cannot start /there/is/none"):
        run_script(Nowhere(), "true", timeout_s=60)
