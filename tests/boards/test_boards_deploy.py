"""Bundles come to boards, run there, are replaced, and come back."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.boards.conftest import (
    SSH_OVERHEAD_BYTES,
    STAYS_HERE,
    Bundles,
    Edgepress,
    digests,
    installed,
    remains,
    sent_size,
)
from tests.loopback import QEMU_AARCH64, Board, Lab


def test_what_is_installed_is_the_bundle_and_runs(
    bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    ended = edgepress("deploy", bundles.first, "-d", board.name, "--json")
    assert ended.code == 0
    place = board.home / "edgepress/first"
    assert ended.document["folder"] == str(place)
    assert ended.document["sent_bytes"] >= sent_size(bundles.first)
    assert installed(place) == digests(bundles.first)
    ran = subprocess.run(
        [*QEMU_AARCH64, place / "model", "--selftest"], capture_output=True, check=True
    )
    assert json.loads(ran.stdout)["passed"] is True
    assert remains(place.parent / ".edgepress") == []


def test_deploying_again_sends_nothing(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    link = lab.link(board)
    ended = edgepress("deploy", bundles.first, "-d", board.name, "--json")
    assert ended.code == 0
    assert ended.document["sent_bytes"] == 0
    assert link.sent_bytes < SSH_OVERHEAD_BYTES


def test_a_second_version_sends_what_changed_and_goes_back(
    bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    first = edgepress("deploy", bundles.first, *to, "--json").document
    second = edgepress("deploy", bundles.second, *to, "--json").document
    assert second["previous"] == first["version"]
    assert installed(place) == digests(bundles.second)

    third = edgepress("deploy", bundles.first, *to, "--json").document
    assert third["sent_bytes"] == 0
    assert installed(place) == digests(bundles.first)

    back = edgepress("deploy", bundles.first, *to, "--rollback", "--json")
    assert back.code == 0
    assert back.document["version"] == second["version"]
    assert installed(place) == digests(bundles.second)


def test_only_files_that_no_version_has_are_sent(
    bundles: Bundles,
    copy: Callable[[Path], Path],
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
    tmp_path: Path,
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    signed = copy(bundles.first)
    edgepress("keygen", tmp_path / "key.pem")
    assert edgepress("sign", signed, "--key", tmp_path / "key.pem").code == 0
    link = lab.link(board)
    ended = edgepress("deploy", signed, "-d", board.name, "--json")
    assert ended.document["sent_bytes"] == 64
    assert link.sent_bytes < SSH_OVERHEAD_BYTES
    assert installed(board.home / "edgepress/first") == digests(signed)


def test_nothing_to_go_back_to(bundles: Bundles, board: Board, edgepress: Edgepress) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    ended = edgepress("deploy", bundles.first, "-d", board.name, "--rollback")
    assert ended.code == 5
    assert "no version before" in ended.err
    assert installed(board.home / "edgepress/first") == digests(bundles.first)


def test_verify_closes_the_gates_on_the_board_and_keeps_the_evidence(
    bundles: Bundles, copy: Callable[[Path], Path], board: Board, edgepress: Edgepress
) -> None:
    bundle = copy(bundles.first)
    ended = edgepress(
        "verify", bundle, "-d", board.name, "--eval", bundles.samples,
        "--model", bundles.model(bundles.first), "--json",
    )  # fmt: skip
    assert ended.code == 0
    evidence = json.loads((bundle / "evidence.json").read_text())
    assert evidence["device"]["spec"] == board.name
    assert {v["gate"]: v["verdict"] for v in evidence["verdicts"]} == {
        "golden": "pass",
        "outputs": "pass",
    }
    assert evidence["accuracy"]["samples"] == 8
    assert evidence["accuracy"]["sqnr_db"] > 60
    assert evidence["latency"] is None  # the board emulates
    assert remains(board.home / "edgepress/.edgepress") == []


def test_verify_of_what_is_installed_sends_nothing(
    bundles: Bundles, copy: Callable[[Path], Path], lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    link = lab.link(board)
    assert edgepress("verify", copy(bundles.first), "-d", board.name).code == 0
    assert link.sent_bytes < SSH_OVERHEAD_BYTES


def test_the_boards_answers_are_those_of_the_emulator_here(
    bundles: Bundles, board: Board, edgepress: Edgepress, tmp_path: Path
) -> None:
    for device in (board.name, "qemu"):
        answers = tmp_path / f"{device}.npz"
        data = ("--data", bundles.samples)
        assert edgepress("infer", bundles.first, "-d", device, *data, "-o", answers).code == 0
    there, here = (np.load(tmp_path / f"{device}.npz")["y"] for device in (board.name, "qemu"))
    assert there.shape == (8, 10)
    assert there.tobytes() == here.tobytes()


def test_devices_shows_the_board(board: Board, edgepress: Edgepress) -> None:
    ended = edgepress("devices", board.name, "--json")
    assert ended.code == 0
    assert board.name in ended.out


def test_what_stays_here_is_not_on_the_board(
    bundles: Bundles, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    names = {path.name for path in (board.home / "edgepress").rglob("*")}
    assert names.isdisjoint(STAYS_HERE)
