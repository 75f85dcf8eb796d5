"""Peers in processes of their own: found, converting, answering, stopped, dying, hanging."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgepress.pipeline import peer_process
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.oracle import MAX_SQNR_DB
from edgepress.pipeline.peer_process import Installed, Racer, convert, find_peer
from edgepress.pipeline.peers.base import CannotRun
from edgepress.pipeline.prepare import UsageError
from tests.pipeline import fake_peers


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_peers.install(tmp_path, monkeypatch)


def converted(peer: Installed, precision: str, tmp_path: Path, cache: Cache | None = None) -> Path:
    folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    task = fake_peers.task(folder / "job", fake_peers.samples())
    convert(peer, precision, task, folder, cache)
    return folder


def racer(tmp_path: Path, precision: str = "fp32") -> Racer:
    peer = find_peer("fake")
    folder = converted(peer, precision, tmp_path)
    return Racer(peer, fake_peers.task(tmp_path / f"job-{precision}"), folder, 1)


@pytest.mark.usefixtures("log")
def test_a_peer_is_asked_about_itself() -> None:
    found = find_peer("fake")
    assert found.python == sys.executable
    assert found.precisions == ["fp32", "int8"]
    assert found.unable == {"int1": "one bit is not enough"}
    assert found.versions["fake"] == "1.2"


@pytest.mark.usefixtures("log")
def test_a_python_without_edgepress_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the standard library and NumPy, and none of our dependencies."""
    site, numpy = tmp_path / "site", Path(np.__file__).parent
    site.mkdir()
    for part in (numpy, numpy.with_name("numpy.libs")):
        if part.exists():
            (site / part.name).symlink_to(part)
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nPYTHONPATH={site} FAKE_PACKAGES= exec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("FAKE_PACKAGES", "no_such_module")
    peer = find_peer("fake", str(other))
    assert peer.python == str(other)
    assert peer.versions["sees"] == "edgepress.pipeline.peers.base"
    one = Racer(peer, fake_peers.task(tmp_path / "job"), converted(peer, "fp32", tmp_path), 1)
    try:
        assert one.answers()["y"].shape == (5, 1, 3)
    finally:
        one.close()


@pytest.mark.usefixtures("log")
def test_what_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOOLS", "nosuchtool")
    with pytest.raises(UsageError, match="needs the program nosuchtool: get it somewhere"):
        find_peer("fake")
    monkeypatch.setenv("FAKE_PACKAGES", "numpy no_such_module")
    with pytest.raises(UsageError, match="pip-no_such_module") as caught:
        find_peer("fake", sys.executable)
    assert "pip-numpy" not in str(caught.value)
    assert "edgepress[fake]" in str(caught.value)


def test_the_other_interpreter_is_taken_where_this_one_lacks_a_peer(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nFAKE_PACKAGES= exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    assert find_peer("fake", str(other)).python == sys.executable
    monkeypatch.setenv("FAKE_PACKAGES", "no_such_module")
    assert find_peer("fake", str(other)).python == str(other)
    assert not log.exists()


def test_conversions_are_kept(log: Path, tmp_path: Path) -> None:
    cache, peer = Cache(tmp_path / "cache"), find_peer("fake")
    for _ in range(2):
        folder = converted(peer, "int8", tmp_path, cache)
        assert (folder / "precision").read_text() == "int8"
        assert (folder / "samples").read_text() == "7"
    assert fake_peers.prepared(log) == {"int8": 1}
    converted(peer, "fp32", tmp_path, cache)
    converted(peer, "int8", tmp_path)
    assert fake_peers.prepared(log) == {"int8": 2, "fp32": 1}


def test_a_conversion_is_anew_with_other_samples_code_or_version(log: Path, tmp_path: Path) -> None:
    cache, peer = Cache(tmp_path / "cache"), find_peer("fake")
    newer = Installed(
        name="fake", python=peer.python, versions={"fake": "2"}, precisions=["fp32"], unable={}
    )
    for index, (who, seed) in enumerate([(peer, 1), (peer, 1), (peer, 2), (newer, 2)]):
        folder = tmp_path / f"made{index}"
        task = fake_peers.task(folder / "job", fake_peers.samples(seed))
        convert(who, "int8", task, folder, cache)
    assert fake_peers.prepared(log) == {"int8": 3}
    code = peer_process.WORKER.with_name("fake.py")
    code.write_text(code.read_text() + "\n")
    folder = tmp_path / "changed"
    convert(newer, "int8", fake_peers.task(folder / "job", fake_peers.samples(2)), folder, cache)
    assert fake_peers.prepared(log) == {"int8": 4}


def test_refusals_are_kept_and_said(log: Path, tmp_path: Path) -> None:
    cache, peer = Cache(tmp_path / "cache"), find_peer("fake")
    for _ in range(2):
        with pytest.raises(CannotRun, match=r"^no four bits today$"):
            converted(peer, "int4", tmp_path, cache)
    assert fake_peers.prepared(log) == {"int4": 1}
    with pytest.raises(CannotRun, match=r"^RuntimeError: two lines$"):
        converted(peer, "int2", tmp_path)
    with pytest.raises(CannotRun, match="the program faketool is missing"):
        converted(peer, "tool", tmp_path)


@pytest.mark.usefixtures("log")
def test_answers_and_times(tmp_path: Path) -> None:
    exact, rounded = racer(tmp_path), racer(tmp_path, "int8")
    task = fake_peers.task(tmp_path / "same")
    try:
        answers = exact.answers()
        assert answers["y"].shape == (5, 1, 3)
        wanted = np.stack([feed["x"] @ fake_peers.WEIGHTS for feed in task.feeds])
        np.testing.assert_allclose(answers["y"], wanted, rtol=1e-6)
        assert task.sqnr_db(answers) > 100
        assert 20 < task.sqnr_db(rounded.answers()) < 60
        assert task.sqnr_db({"y": np.stack([w["y"] for w in task.wanted])}) == MAX_SQNR_DB
        times = exact.visit(0.0, 12)
        assert len(times) == 12
        assert all(time > 0 for time in times)
        assert 0 < exact.cores < 2
        assert len(exact.visit(0.05, 1)) > 12
    finally:
        exact.close()
        rounded.close()


@pytest.mark.usefixtures("log")
def test_it_does_nothing_while_it_is_not_its_turn(tmp_path: Path) -> None:
    one = racer(tmp_path)
    try:
        for _ in range(2):
            one.visit(0.01, 1)
            state = Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T"
    finally:
        one.close()
    assert not Path(f"/proc/{one.pid}").exists()


@pytest.mark.usefixtures("log")
def test_who_dies_has_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CALL", "dies")
    one = racer(tmp_path)
    with pytest.raises(CannotRun, match="it ended with 7: these are my last words"):
        one.visit(0.01, 1)
    with pytest.raises(CannotRun, match="it ended with 7"):
        one.visit(0.01, 1)
    one.close()


@pytest.mark.usefixtures("log")
def test_who_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CALL", "hangs")
    peer = find_peer("fake")
    folder = converted(peer, "fp32", tmp_path)
    monkeypatch.setattr(peer_process, "START_S", 1.5)
    with pytest.raises(CannotRun, match=r"no answer in 1\.5 s"):
        Racer(peer, fake_peers.task(tmp_path / "job"), folder, 1)


@pytest.mark.usefixtures("log")
def test_who_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START", "fails")
    with pytest.raises(CannotRun, match=r"^it does not load$"):
        racer(tmp_path)
