"""Ctrl-C, killed processes on either side, and two deployments at once."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.boards.conftest import (
    SSH_OVERHEAD_BYTES,
    Bundles,
    Edgepress,
    Ended,
    Processes,
    Running,
    arrived_bytes,
    change_store,
    digests,
    gate,
    in_background,
    installed,
    remains,
    sent_size,
    wait_for,
)
from tests.graphs import random
from tests.loopback import Board, Lab

SLOW_BYTES_PER_S = 1_500_000


def interrupt(running: Running, who: str) -> Ended:
    """Send SIGINT to the process alone, or as a terminal does to its children, too."""
    if who == "terminal":
        os.killpg(running.process.pid, signal.SIGINT)
    else:
        running.process.send_signal(signal.SIGINT)
    return running.wait()


@pytest.mark.parametrize("who", ["terminal", "process"])
def test_ctrl_c_during_an_upload(
    who: str,
    bundles: Bundles,
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
    processes: Processes,
) -> None:
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    edgepress("deploy", bundles.first, *to)
    link = lab.link(board)
    link.throttle(SLOW_BYTES_PER_S)
    running = processes.start("deploy", bundles.second, *to)
    wait_for(lambda: arrived_bytes(board) > 300_000, "weights")
    ended = interrupt(running, who)
    assert ended.code == 130, ended.err
    assert "interrupted" in ended.err
    assert "Traceback" not in ended.err
    board.wait_until_idle()
    assert installed(place) == digests(bundles.first)
    assert "lock" not in remains(board.home / "edgepress/.edgepress")

    link.throttle(None)
    arrived = arrived_bytes(board)
    before = link.sent_bytes
    assert edgepress("deploy", bundles.second, *to).code == 0
    assert link.sent_bytes - before < sent_size(bundles.second) - arrived + SSH_OVERHEAD_BYTES
    assert installed(place) == digests(bundles.second)
    assert remains(board.home / "edgepress/.edgepress") == []


@pytest.mark.parametrize("who", ["terminal", "process"])
@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_ctrl_c_while_the_bundle_runs(
    command: str, who: str, bundles: Bundles, lab: Lab, board: Board, processes: Processes
) -> None:
    with gate(board, lab, "--selftest") as held:
        running = processes.start(command, bundles.first, "-d", board.name)
        wait_for(held.exists, "the selftest")
        ended = interrupt(running, who)
        assert ended.code == 130, ended.err
        board.wait_until_idle()
    assert not (board.home / "edgepress/first").exists()
    assert not (bundles.first / "evidence.json").exists()


def test_a_command_that_is_killed_leaves_nothing_running_there(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress, processes: Processes
) -> None:
    with gate(board, lab, "--selftest") as held:
        running = processes.start("deploy", bundles.first, "-d", board.name)
        wait_for(held.exists, "the selftest")
        running.process.kill()
        running.wait()
        board.wait_until_idle()
    assert edgepress("deploy", bundles.first, "-d", board.name).code == 0
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    assert remains(board.home / "edgepress/.edgepress") == []


def test_a_model_that_is_killed_while_it_runs(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress, tmp_path: Path
) -> None:
    many = tmp_path / "many.npz"
    np.savez(many, x=random(20_000, 64))
    with gate(board, lab, "--run") as held:

        def kill() -> None:
            wait_for(held.exists, "the model")
            model = int(held.read_text())
            held.unlink()
            comm = Path(f"/proc/{model}/comm")
            wait_for(lambda: comm.read_text().startswith("qemu-aarch64"), "the emulator")
            os.kill(model, signal.SIGKILL)

        kills = in_background(kill)
        ended = edgepress(
            "infer", bundles.first, "-d", board.name, "--data", many, "-o", tmp_path / "out.npz"
        )
        kills.join()
    assert ended.code == 5
    assert "SIGKILL" in ended.err
    assert not (tmp_path / "out.npz").exists()
    board.wait_until_idle()


@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_a_model_that_is_killed_in_its_selftest(
    command: str, bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place = board.home / "edgepress/net"
    to = ("--to", place) if command == "deploy" else ()
    edgepress("deploy", bundles.first, "-d", board.name, "--to", place)
    with gate(board, lab, "--selftest") as held:

        def kill() -> None:
            wait_for(held.exists, "the selftest")
            os.kill(int(held.read_text()), signal.SIGKILL)

        kills = in_background(kill)
        ended = edgepress(command, bundles.second, "-d", board.name, *to)
        kills.join()
    assert ended.code == 5
    assert "SIGKILL" in ended.err
    assert installed(place) == digests(bundles.first)
    assert not (bundles.second / "evidence.json").exists()


def test_a_deployment_waits_for_no_other_one(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress, processes: Processes
) -> None:
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    with gate(board, lab, "--selftest") as held:
        running = processes.start("deploy", bundles.first, *to)
        wait_for(held.exists, "the selftest")
        with pytest.MonkeyPatch.context() as patch:
            change_store(patch, patience_s=1)  # and not 10
            refused = edgepress("deploy", bundles.second, "-d", board.spec, "--to", place)
        held.unlink()
        ended = running.wait()
    assert refused.code == 5
    assert "another deployment" in refused.err
    assert f"process {running.process.pid}" in refused.err
    assert ended.code == 0, ended.err
    assert installed(place) == digests(bundles.first)


@pytest.mark.parametrize("same", [True, False])
def test_two_deployments_at_once(
    same: bool, bundles: Bundles, board: Board, processes: Processes
) -> None:
    place = board.home / "edgepress/net"
    both = (bundles.first, bundles.first if same else bundles.second)
    running = [processes.start("deploy", b, "-d", board.name, "--to", place) for b in both]
    ended = [each.wait() for each in running]
    codes = [each.code for each in ended]
    assert 0 in codes
    for each in ended:
        assert each.code == 0 or (each.code == 5 and "another deployment" in each.err), each.err
    assert installed(place) in [digests(b) for b, code in zip(both, codes, strict=True) if not code]
    assert remains(board.home / "edgepress/.edgepress") == []


def test_a_version_that_runs_outlives_a_deployment(
    bundles: Bundles,
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
    processes: Processes,
    tmp_path: Path,
) -> None:
    place = board.home / "edgepress/net"
    with gate(board, lab, "--run") as held:
        running = processes.start(
            "infer", bundles.first, "-d", board.name,
            "--data", bundles.samples, "-o", tmp_path / "answers.npz",
        )  # fmt: skip
        wait_for(held.exists, "the model")
        ended = edgepress("deploy", bundles.second, "-d", board.name, "--to", place)
        assert ended.code == 0, ended.err
        held.unlink()
        assert running.wait().code == 0
    assert installed(place) == digests(bundles.second)
