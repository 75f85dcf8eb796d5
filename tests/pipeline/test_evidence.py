"""Evidence of a device and of a fleet: what is written is read back, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.pipeline.bundle import BundleError, read_bundle, write_evidence
from edgepress.pipeline.evidence import (
    Evidence,
    checked_evidence,
    checked_latency,
    fleet_evidence,
    overall,
)
from edgepress.pipeline.fleet import Outcome
from edgepress.pipeline.gates import judge
from edgepress.targets.base import DeviceFailed
from tests.pipeline import bundles


def latency(**changes: Any) -> dict[str, Any]:
    return {
        "samples_ms": [2.0, 1, 3.0],
        "min_ms": 1,
        "p50_ms": 2.0,
        "p90_ms": 2.8,
        "p99_ms": 2.98,
        "intervals_ms": {"p50": [1.0, 3.0], "p90": [2.0, None], "p99": None},
        "refused": [],
        "windows_ms": [],
        "conditions": {"hottest_celsius": 61.0},
        "sustained": [{"at_s": 5.0, "p50_ms": 2.0, "throttled": False}],
        "mlperf": None,
        "threads": 1,
        "device": {},
        **changes,
    }


def evidence(value: float = 0.0, **changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "device": {"spec": "pi"},
        "verdicts": [judge("golden", value, 0.0, "d")],
        "outputs": {},
        "accuracy": None,
        "latency": latency(),
        "instructions": None,
    }
    return Evidence(**fields | changes)


FAILED = Outcome[Evidence](device="b", error=DeviceFailed("no route to b"))


def outcome(device: str, value: float = 0.0) -> Outcome[Evidence]:
    return Outcome(device=device, value=evidence(value, device={"spec": device}))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    for written in (
        evidence().to_json(),
        evidence(1.0, latency=None).to_json(),
        fleet_evidence([FAILED, outcome("a"), outcome("c", 1.0)]),
    ):
        write_evidence(bundle, written)
        read = read_bundle(tmp_path / "b").evidence
        assert read is not None
        assert {k: read[k] for k in written} == json.loads(json.dumps(written))
        assert set(read) == {*written, "schema", "manifest_sha256"}


def test_a_fleet_is_the_first_that_answered_and_all_of_them() -> None:
    found = fleet_evidence([FAILED, outcome("a"), outcome("c")])
    assert found["device"] == {"spec": "a"}
    assert [entry["device"] for entry in found["fleet"]] == ["b", "a", "c"]
    assert [entry["error"] for entry in found["fleet"]] == ["no route to b", None, None]
    assert found["fleet"][0]["evidence"] is None
    assert found["fleet"][2]["evidence"]["device"] == {"spec": "c"}


def test_a_fleet_passed_where_every_board_did() -> None:
    assert fleet_evidence([outcome("a"), outcome("c")])["passed"] is True
    assert fleet_evidence([outcome("a"), outcome("c", 1.0)])["passed"] is False
    assert fleet_evidence([outcome("a"), FAILED])["passed"] is False


def test_a_fleet_that_did_not_answer_is_no_evidence() -> None:
    found = fleet_evidence([FAILED])
    assert set(found) == {"fleet", "passed"}
    assert found["passed"] is False
    with pytest.raises(ValueError, match="missing"):
        checked_evidence(found)


def test_evidence_of_older_versions_is_filled_in() -> None:
    old = evidence().to_json()
    for key in ("intervals_ms", "refused", "windows_ms", "conditions", "sustained", "mlperf"):
        del old["latency"][key]
    del old["trials"]
    read = checked_evidence(old)
    assert read["trials"] is None
    assert read["latency"]["refused"] == []
    assert read["latency"]["intervals_ms"] == {}
    assert read["latency"]["p50_ms"] == 2.0


def test_the_worst_verdict_counts() -> None:
    gates = [judge("a", 0.0, 1.0, ""), judge("b", None, 1.0, ""), judge("c", 2.0, 1.0, "")]
    verdicts = [{"gate": gate.gate, "verdict": gate.verdict} for gate in gates]
    assert overall(verdicts) == "fail: c"
    assert overall(verdicts[:2]) == "unverified: b"
    assert overall(verdicts[:1]) == "pass"


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return apply


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda d: d.pop("outputs"), "'outputs' is missing"),
    "unknown": (change("more", to=1), "unknown key 'more'"),
    "type": (change("device", to=[]), "'device' in the evidence is of another type"),
    "a number as truth": (change("passed", to=1), "'passed' in the evidence is of another type"),
    "passed": (change("fleet", 1, "evidence", "passed", to=False), "not what 'verdicts' say"),
    "fleet passed": (change("passed", to=True), "not what the boards"),
    "verdict": (change("verdicts", 0, "verdict", to="fine"), "no verdict 'fine'"),
    "malformed verdict": (change("verdicts", 0, to=None), "a verdict is no JSON object"),
    "no gate": (lambda d: d["verdicts"][0].pop("gate"), "'gate' is missing in a verdict"),
    "no list": (change("fleet", to=None), "'fleet' is no list"),
    "no boards": (change("fleet", to=[]), "'fleet' is no list"),
    "board": (change("fleet", 0, to=3), "an entry of 'fleet' is no JSON object"),
    "neither": (change("fleet", 0, "error", to=None), "neither an error nor evidence"),
    "both": (change("fleet", 1, "error", to="x"), "neither an error nor evidence, or both"),
    "inside": (change("fleet", 1, "evidence", "verdicts", to={}), "'verdicts' in the evidence"),
    "a percentile": (change("latency", "p99_ms", to=None), "some percentiles"),
    "samples": (change("latency", "samples_ms", to=[]), "no number"),
    "a sample": (change("latency", "samples_ms", to=["1"]), "no number"),
    "window": (change("latency", "windows_ms", to=[None]), "no number"),
    "interval": (change("latency", "intervals_ms", "p50", to=[1.0]), "'intervals_ms' is malformed"),
    "bound": (change("latency", "intervals_ms", "p50", to=["a", 1.0]), "no number"),
    "reason": (change("latency", "refused", to=[1]), "no sentence"),
    "curve": (change("latency", "sustained", to=[{"at_s": 1.0}]), "'p50_ms' is missing"),
    "point": (change("latency", "sustained", 0, "p50_ms", to=None), "'p50_ms' in an entry"),
    "mlperf": (change("latency", "mlperf", to={}), "'queries' is missing in 'mlperf'"),
    "threads": (change("latency", "threads", to=True), "'threads' in 'latency'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_evidence_is_refused(tmp_path: Path, damage: str) -> None:
    apply, words = DAMAGE[damage]
    data = json.loads(json.dumps(fleet_evidence([FAILED, outcome("a")])))
    checked_evidence(data)
    apply(data)
    with pytest.raises(ValueError, match=words):
        checked_evidence(data)
    write_evidence(bundles.write(tmp_path / "b"), data)
    with pytest.raises(BundleError, match=r"evidence\.json.*remove it and run"):
        read_bundle(tmp_path / "b")


def test_one_board_passed_where_its_verdicts_say_so() -> None:
    for value in (0.0, 1.0):
        data = evidence(value).to_json()
        assert checked_evidence(data)["passed"] is (value == 0.0)
        with pytest.raises(ValueError, match="not what 'verdicts' say"):
            checked_evidence(data | {"passed": value != 0.0})


def test_the_reasons_of_mlperf_are_sentences_too() -> None:
    rule = {"queries": 1, "duration_s": 1.0, "early_stopping_p90_ms": None, "refused": ["a"]}
    assert checked_latency(latency(mlperf=rule)) is not None
    with pytest.raises(ValueError, match="no sentence"):
        checked_latency(latency(mlperf=rule | {"refused": [None]}))
