"""Twenty boards at once, on a machine of two cores, some of them broken."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boards.conftest import (
    Bundles,
    Edgepress,
    Processes,
    digests,
    installed,
    lying_emulator,
    wait_for,
)
from tests.loopback import QEMU_AARCH64, Lab, boards

COUNT = 20


@pytest.fixture(scope="module")
def twenty() -> Iterator[Lab]:
    """Twenty boards, which keep what one test deployed for the next one."""
    with boards(COUNT) as made:
        yield made


@pytest.fixture
def lab(twenty: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The twenty boards, and the environment in which edgepress finds them."""
    for name, value in twenty.environment.items():
        monkeypatch.setenv(name, value)
    return twenty


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path) -> Path:
    """A copy that gets the evidence."""
    return shutil.copytree(bundles.first, tmp_path / "bundle")


def test_deploying_to_twenty(bundle: Path, lab: Lab, edgepress: Edgepress) -> None:
    ended = edgepress("deploy", bundle, "--all", "--json")
    assert ended.code == 0, ended.out
    rows = json.loads(ended.out)["boards"]
    assert [row["device"] for row in rows] == [board.name for board in lab.boards]
    assert [row["error"] for row in rows] == [None] * COUNT
    for board in lab.boards:
        assert installed(board.home / "edgepress/first") == digests(bundle)


def test_verifying_twenty(bundle: Path, lab: Lab, edgepress: Edgepress) -> None:
    ended = edgepress("verify", bundle, "--all", "--json")
    assert ended.code == 0, ended.out
    evidence = json.loads((bundle / "evidence.json").read_text())
    assert [entry["device"] for entry in evidence["fleet"]] == [b.name for b in lab.boards]
    assert [entry["error"] for entry in evidence["fleet"]] == [None] * COUNT
    for entry in evidence["fleet"]:
        verdicts = {v["gate"]: v["verdict"] for v in entry["evidence"]["verdicts"]}
        assert verdicts == {"golden": "pass", "outputs": "pass"}


def test_two_broken_boards_hurt_no_other(
    bundle: Path, bundles: Bundles, lab: Lab, edgepress: Edgepress
) -> None:
    impostor, off = lab.boards[3], lab.boards[-1]
    before = [digests(board.home) for board in (impostor, off)]
    lab.change_host_key(impostor)
    lab.link(off).close()
    try:
        deployed = edgepress("deploy", bundles.second, "--all", "--to", "~/edgepress/first")
        verified = edgepress("verify", bundle, "--all", "--json")
    finally:
        lab.know_host_keys({board.name: lab.server.host_key for board in lab.boards})
        lab.configure(off, Port=str(lab.server.port))
    assert deployed.code == 5
    assert verified.code == 5
    assert [digests(board.home) for board in (impostor, off)] == before
    for board in lab.boards:
        if board not in (impostor, off):
            assert installed(board.home / "edgepress/first") == digests(bundles.second)
    evidence = json.loads((bundle / "evidence.json").read_text())
    errors = {entry["device"]: entry["error"] for entry in evidence["fleet"]}
    assert "HAS CHANGED" in errors.pop(impostor.name)
    assert "refuses the connection" in errors.pop(off.name)
    assert set(errors.values()) == {None}


def test_one_whose_answers_are_wrong_fails_its_gate_alone(
    bundle: Path, lab: Lab, edgepress: Edgepress
) -> None:
    good, wrong, other = lab.boards[:3]
    liar = lying_emulator(wrong)
    devices = lab.folder / "devices.toml"
    text = devices.read_text()
    table = text.index(f"[{wrong.name}]")
    lies = text[table:].replace(json.dumps(QEMU_AARCH64[0]), json.dumps(str(liar)), 1)
    try:
        devices.write_text(text[:table] + lies)
        chosen = [word for board in (good, wrong, other) for word in ("-d", board.name)]
        ended = edgepress("verify", bundle, *chosen)
    finally:
        devices.write_text(text)
    assert ended.code == 6, ended.err
    evidence = json.loads((bundle / "evidence.json").read_text())
    golden = [entry["evidence"]["verdicts"][0]["verdict"] for entry in evidence["fleet"]]
    assert golden == ["pass", "fail", "pass"]


def test_ctrl_c_ends_them_all(bundles: Bundles, lab: Lab, processes: Processes) -> None:
    port = str(lab.server.port)
    for board in lab.boards:
        shutil.rmtree(board.home / "edgepress", ignore_errors=True)
    links = [lab.link(board) for board in lab.boards]
    for link in links:
        link.throttle(100_000)
    try:
        running = processes.start("deploy", bundles.first, "--all")
        wait_for(lambda: sum(link.sent_bytes > 50_000 for link in links) > COUNT // 2, "uploads")
        running.process.send_signal(signal.SIGINT)
        ended = running.wait()
    finally:
        for board in lab.boards:
            lab.configure(board, Port=port)
    assert ended.code == 130, ended.err
    places = [board.home / "edgepress/first" for board in lab.boards]
    for board, place in zip(lab.boards, places, strict=True):
        board.wait_until_idle()
        # one that was much faster than most may have finished before
        assert not place.exists() or installed(place) == digests(bundles.first)
    assert sum(place.exists() for place in places) < COUNT // 2
