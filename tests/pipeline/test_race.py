"""Races: who takes part, in what order, who drops out, and what is said about it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgepress.pipeline import race as race_module
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.peers.base import CannotRun
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.race import Race, bench, disturbed, interleave, show_race
from edgepress.pipeline.run import Request, run
from edgepress.targets.base import DeviceFailed
from tests.graphs import random
from tests.pipeline import fake_peers
from tests.pipeline.conftest import Edgepress, World

QUIET = Progress(shown=False)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(race_module, "VISIT_SECONDS", 0.02)
    monkeypatch.setattr(race_module, "WARM_UP_SECONDS", 0.0)
    log = fake_peers.install(tmp_path, monkeypatch)
    np.save(tmp_path / "weights.npy", random(3 * 8 * 8, 10))
    return log


def test_contenders_take_turns_and_who_fails_is_out() -> None:
    turns: list[str] = []

    def visit(name: str, limit: int = 99) -> Callable[[], list[float]]:
        times = itertools.count(1)

        def one() -> list[float]:
            turns.append(name)
            if next(times) > limit:
                raise CannotRun("enough")
            return [3.0, len(turns), 2.0]

        return one

    visits = {"a": visit("a"), "b": visit("b", 1), "c": visit("c")}
    medians, dropped = interleave(visits, 3, QUIET)
    assert turns == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert dropped == {"b": "enough"}
    assert medians == {"a": [2.0, 3.0, 3.0], "c": [3.0, 3.0, 3.0]}


def test_ratios_are_of_the_same_round() -> None:
    race = Race(threads=1, medians_ms={"edgepress": [1, 2, 4], "b": [2, 2, 2]}, device={})
    assert race.ratios("b") == [0.5, 1.0, 2.0]
    assert race.to_json()["our_time_over_theirs"] == {"b": {"median": 1.0, "min": 0.5, "max": 2.0}}


def test_a_machine_that_is_not_at_rest_is_noted() -> None:
    assert disturbed(1, {"a": 0.99, "b": 0.95}) == []
    assert disturbed(1, {}) == []
    assert disturbed(2, {"a": 0.5}) == []
    (note,) = disturbed(1, {"a": 0.99, "b": 0.25})
    assert "0.25" in note


def test_an_integer_bundle_races_what_a_peer_makes_of_the_model(
    world: World, log: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    found, again = (
        bench(
            world.request.output,
            model=world.model,
            against=("fake",),
            rounds=2,
            calib=world.samples,
            cache=cache,
        )
        for _ in range(2)
    )
    for race in (found, again):
        assert set(race.medians_ms) == {"edgepress", "fake fp32", "fake int8"}
    assert fake_peers.prepared(log) == {"fp32": 1, "int8": 1}
    assert {len(times) for times in found.medians_ms.values()} == {2}
    assert set(found.sqnr_db) == set(found.medians_ms)
    assert found.sqnr_db["edgepress"] > 20  # the peers multiply by something else
    assert found.sqnr_db["fake fp32"] < 10
    assert found.skipped == {"fake int1": "one bit is not enough"}
    assert found.versions["fake"] == "1.2"
    assert not any("random" in note for note in found.notes)
    assert json.loads(json.dumps(found.to_json()))["cores"].keys() == {"fake fp32", "fake int8"}


@pytest.mark.usefixtures("log")
def test_a_float_bundle_races_floats(float_request: Request, world: World) -> None:
    run(float_request, cache=world.cache)
    found = bench(float_request.output, against=("fake",), rounds=1)
    assert set(found.medians_ms) == {"edgepress", "fake fp32"}
    assert found.sqnr_db["edgepress"] > 100
    assert found.skipped == {}
    assert not any("random" in note for note in found.notes)


@pytest.mark.usefixtures("log")
def test_the_float_model_is_needed(world: World) -> None:
    with pytest.raises(UsageError, match="--model"):
        bench(world.request.output, against=("fake",), rounds=1)


@pytest.mark.usefixtures("log")
def test_who_cannot_is_left_out_and_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PRECISIONS", "int4 fp32")
    found = bench(world.request.output, model=world.model, against=("fake",), rounds=1)
    assert set(found.medians_ms) == {"edgepress", "fake fp32"}
    assert found.skipped["fake int4"] == "no four bits today"
    assert "random samples" in found.notes[0]
    screen = Console(file=io.StringIO(), width=120)
    show_race(found, screen)
    assert isinstance(screen.file, io.StringIO)
    said = screen.file.getvalue()
    assert "fake int4 did not run: no four bits today" in said
    assert "SQNR dB" in said
    assert "--calib" in said


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(("variable", "value"), [("FAKE_START", "fails"), ("FAKE_CALL", "dies")])
def test_nobody_left_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DeviceFailed, match="nothing is left to race against") as caught:
        bench(world.request.output, model=world.model, against=("fake",), rounds=1)
    assert "fake fp32" in str(caught.value)


def test_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_module, "VISIT_SECONDS", 0.01)
    found = bench(world.request.output, rounds=2, threads=2)
    assert set(found.medians_ms) == {"edgepress"}
    assert found.threads == 2
    assert found.device["name"] == "local"
    assert found.sqnr_db == {}


def test_a_missing_extra_is_wrong_usage(
    edgepress: Edgepress, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_peers.install(tmp_path, monkeypatch, "openvino")
    monkeypatch.setenv("FAKE_PACKAGES", "no_such_module")
    code, out, err = edgepress("bench", world.request.output, "--against", "openvino", "--json")
    assert code == 2
    assert "pip install 'edgepress[openvino]'" in err
    assert json.loads(out)["error"]["code"] == 2


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--profile", "--against", "ncnn"], "--against is for races"),
        (["--profile", "--calib", "x.npz"], "--calib is for races"),
        (["-d", "qemu"], "-d is for --profile"),
        (["--eval", "x.npz"], "--against"),
    ],
)
def test_options_that_do_not_fit_together(
    edgepress: Edgepress, world: World, options: list[Any], what: str
) -> None:
    code, _, err = edgepress("bench", world.request.output, *options)
    assert code == 2
    assert what in err
