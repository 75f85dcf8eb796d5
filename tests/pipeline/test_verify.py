# ruff: noqa: ARG002 - a device keeps the names of the arguments
"""Verification, with the real bundle and with devices that misbehave."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline import expected_answers
from edgepress.pipeline import verify as verification
from edgepress.pipeline.accuracy import accuracy, classes, stack
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.evidence import overall
from edgepress.pipeline.expected_answers import ExpectedAnswers
from edgepress.pipeline.fleet import raise_bug
from edgepress.pipeline.gates import all_passed, judge, judge_budget
from edgepress.pipeline.golden import make_golden
from edgepress.pipeline.latency import Measuring
from edgepress.pipeline.oracle import Oracle
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.recipe import Budget
from edgepress.pipeline.verify import (
    bundle_target,
    infer_folder,
    verify,
    verify_fleet,
    verify_folder,
)
from edgepress.targets.base import DeviceFailed, Measurement, Target, Unreachable
from edgepress.targets.devices.base import Device, open_device
from tests.graphs import random
from tests.loopback import Lab
from tests.pipeline.conftest import World


@dataclasses.dataclass(frozen=True)
class Misbehaving:
    """A real device whose answers are off by a little, or that is an emulator."""

    device: Device
    offset: float = 0.0
    emulated: bool = False
    passed: bool = True
    refused: tuple[str, ...] = ()
    windows_ms: tuple[float, ...] = ()
    asked: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return "misbehaving"

    @property
    def machine(self) -> str:
        return self.device.machine

    def info(self, folder: Path) -> dict[str, Any]:
        return self.device.info(folder)

    def selftest(self, folder: Path) -> dict[str, Any]:
        return {"passed": self.passed}

    def infer(self, folder: Path, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        answers = self.device.infer(folder, feeds)
        return [{n: a + np.float32(self.offset) for n, a in answer.items()} for answer in answers]

    def bench(
        self,
        folder: Path,
        *,
        threads: int | None,
        seconds: float,
        runs: int,
        cores: str | None = None,
        defended: bool = False,
        sustained_minutes: float | None = None,
        mlperf: bool = False,
    ) -> Measurement:
        how = {"threads": threads, "cores": cores, "defended": defended}
        self.asked.append(how | {"sustained_minutes": sustained_minutes, "mlperf": mlperf})
        return Measurement(
            samples_ms=() if self.emulated else (seconds,) * runs,
            threads=threads or 1,
            instructions=7,
            refused=self.refused,
            windows_ms=self.windows_ms,
        )

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        return self.device.profile(folder, threads=threads, seconds=seconds, runs=runs)


def judged(world: World, budget: Budget | None = None, **how: Any) -> dict[str, str]:
    bundle = read_bundle(world.request.output)
    device = Misbehaving(open_device("local", bundle_target(bundle)), **how)
    evidence = verify(ExpectedAnswers(bundle), device, budget=budget or Budget())
    assert evidence.passed == all(verdict.verdict == "pass" for verdict in evidence.verdicts)
    return {verdict.gate: verdict.verdict for verdict in evidence.verdicts}


def test_a_device_that_answers_right_passes(world: World) -> None:
    assert judged(world) == {"golden": "pass", "outputs": "pass"}


def test_one_wrong_bit_is_a_failure(world: World) -> None:
    assert judged(world, offset=1e-3) == {"golden": "pass", "outputs": "fail"}


def test_a_failed_selftest_is_a_failure(world: World) -> None:
    assert judged(world, passed=False)["golden"] == "fail"


def test_an_emulator_verifies_no_latency(world: World) -> None:
    budget = Budget(latency_ms=1e9)
    assert judged(world, budget)["latency_ms"] == "pass"
    assert judged(world, Budget(latency_ms=0.01))["latency_ms"] == "fail"
    assert judged(world, budget, emulated=True)["latency_ms"] == "unverified"


def test_a_disturbed_latency_is_no_failure(world: World) -> None:
    disturbed: dict[str, Any] = {"refused": ("other load: much",), "windows_ms": (1.0, 3.0)}
    assert judged(world, Budget(latency_ms=3.0), **disturbed)["latency_ms"] == "pass"
    assert judged(world, Budget(latency_ms=2.9), **disturbed)["latency_ms"] == "unverified"


def test_how_to_measure_reaches_the_device(world: World) -> None:
    bundle = read_bundle(world.request.output)
    device = Misbehaving(open_device("local", bundle_target(bundle)), refused=("other load",))
    how = Measuring(threads=2, cores="big", sustained_minutes=3.0, mlperf=True, anyway=True)
    evidence = verify(ExpectedAnswers(bundle), device, budget=Budget(), measuring=how)
    assert device.asked == [
        {
            "threads": 2,
            "cores": "big",
            "defended": False,
            "sustained_minutes": 3.0,
            "mlperf": True,
        }
    ]
    assert evidence.latency is not None
    assert evidence.latency["p50_ms"] is not None
    evidence = verify(ExpectedAnswers(bundle), device, budget=Budget())
    assert device.asked[1]["defended"] is True
    assert evidence.latency is not None
    assert (evidence.latency["p50_ms"], evidence.latency["refused"]) == (None, ["other load"])


@pytest.mark.parametrize("windows", [(float("nan"),), ("1",), ({},)])
def test_figures_that_make_no_sense_are_the_devices_failure(world: World, windows: Any) -> None:
    with pytest.raises(DeviceFailed, match="misbehaving: `model --bench` printed figures"):
        judged(world, windows_ms=windows)


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let names stand for devices that misbehave as told, or for what opening them raises."""
    known: dict[str, Any] = {}

    def opened(name: str, target: Target) -> Device:
        if isinstance(known[name], BaseException):
            raise known[name]
        return Misbehaving(open_device("local", target), **known[name])

    monkeypatch.setattr(verification, "open_device", opened)
    return known


def test_twenty_boards_are_verified_and_each_has_its_own_verdict(
    world: World, boards: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they should answer is worked out once, whichever of them asks first."""
    names = [f"ssh:board-{number}" for number in range(20)]
    boards |= {name: {} for name in names}
    boards[names[3]] = {"offset": 1e-3}
    boards[names[4]] = Unreachable("ssh:board-4: no route to host")
    boards[names[7]] = {"refused": ("throttled",), "windows_ms": (1e6,)}
    boards[names[8]] = {"windows_ms": (float("inf"),)}
    boards[names[11]] = ZeroDivisionError("a bug")
    boards[names[12]] = {"emulated": True}
    computed: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            computed.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(expected_answers, "make_golden", counted("golden", make_golden))
    monkeypatch.setattr(expected_answers, "Oracle", counted("oracle", Oracle))
    outcomes = verify_fleet(
        read_bundle(world.request.output),
        names,
        evaluation=world.samples,
        original=world.model,
        max_latency_ms=1e5,
    )
    assert sorted(computed) == ["golden", "oracle", "oracle"], "the original, the bundle's graph"
    verdicts = [
        type(each.error).__name__
        if each.value is None
        else overall(each.value.to_json()["verdicts"])
        for each in outcomes
    ]
    special = {
        3: "fail: outputs",
        4: "Unreachable",
        7: "unverified: latency_ms",
        8: "DeviceFailed",
        11: "ZeroDivisionError",
        12: "unverified: latency_ms",
    }
    assert verdicts == [special.get(number, "pass") for number in range(20)]
    for each in outcomes:
        if each.value is not None and each.device != names[3]:
            assert each.value.accuracy is not None
            assert each.value.accuracy["top1"] == 100.0
    with pytest.raises(ZeroDivisionError):
        raise_bug(outcomes)


def test_what_is_wrong_with_the_question_is_said_before_any_board_is_asked(
    world: World, boards: dict[str, Any]
) -> None:
    boards["ssh:pi"] = {}
    with pytest.raises(UsageError, match=r"net\.onnx"):
        verify_fleet(
            read_bundle(world.request.output),
            ["ssh:pi"],
            original=world.request.output / "graph.onnx",
        )


def test_accuracy_without_samples_is_unverified(world: World) -> None:
    assert judged(world, Budget(accuracy_drop=100))["accuracy_drop"] == "unverified"


def test_older_evidence_knows_the_original(world: World) -> None:
    bundle = read_bundle(world.request.output)
    evidence = verify_folder(bundle, None, evaluation=world.samples)
    assert evidence.accuracy is not None
    assert evidence.accuracy["reference_top1"] == 100.0
    verdicts = {verdict.gate: verdict.verdict for verdict in evidence.verdicts}
    assert verdicts["accuracy_drop"] == "pass"
    assert verdicts["sqnr_db"] == "unverified", "the original is needed for it"
    evidence = verify_folder(bundle, None, evaluation=world.samples, original=world.model)
    assert evidence.passed
    assert evidence.accuracy is not None
    assert evidence.accuracy["sqnr_db"] > 20


def test_older_evidence_on_other_samples_knows_nothing(world: World, tmp_path: Path) -> None:
    with np.load(world.samples) as kept:
        np.savez(tmp_path / "fewer.npz", x=kept["x"][:5], labels=kept["labels"][:5])
    bundle = read_bundle(world.request.output)
    evidence = verify_folder(bundle, None, evaluation=tmp_path / "fewer.npz")
    assert evidence.accuracy is not None
    assert (evidence.accuracy["top1"], evidence.accuracy["reference_top1"]) == (100.0, None)


def test_another_model_is_not_the_original(world: World) -> None:
    bundle = read_bundle(world.request.output)
    with pytest.raises(UsageError, match=r"net\.onnx"):
        verify_folder(bundle, None, original=world.request.output / "graph.onnx")


def test_a_latency_gate_on_the_command_line(world: World) -> None:
    evidence = verify_folder(read_bundle(world.request.output), None, max_latency_ms=1e-6)
    verdict = next(v for v in evidence.verdicts if v.gate == "latency_ms")
    assert verdict.limit == 1e-6
    assert verdict.verdict in ("fail", "unverified"), "the latter where this machine is busy"
    assert not evidence.passed


def test_infer_asks_the_bundle_itself(world: World) -> None:
    answers = stack(infer_folder(read_bundle(world.request.output), None, world.samples))
    assert answers["y"].shape == (8, 10)
    golden = (world.request.output / "golden/2.out").read_bytes()
    assert answers["y"][2].tobytes() == golden


def test_a_board_behind_ssh_answers_and_measures_as_this_machine(world: World, lab: Lab) -> None:
    bundle = read_bundle(world.request.output)
    board = lab.boards[0].spec
    far, here = (stack(infer_folder(bundle, where, world.samples)) for where in (board, "local"))
    assert far["y"].tobytes() == here["y"].tobytes()
    (outcome,) = verify_fleet(bundle, [board], max_latency_ms=1e6)
    assert outcome.value is not None, outcome.error
    verdicts = {verdict.gate: verdict.verdict for verdict in outcome.value.verdicts}
    assert {verdicts[gate] for gate in ("golden", "outputs", "latency_ms")} == {"pass"}
    assert outcome.value.latency is not None
    assert len(outcome.value.latency["samples_ms"]) >= 100
    assert outcome.value.device["peak_memory_bytes"] > 0


def test_gates() -> None:
    assert judge("g", 1.0, 1.0, "").verdict == "pass"
    assert judge("g", 1.1, 1.0, "").verdict == "fail"
    assert judge("g", 1.1, 1.0, "", at_least=True).verdict == "pass"
    assert judge("g", None, 1.0, "").verdict == "unverified"
    assert not all_passed([judge("g", None, 1.0, "")])
    assert (
        judge_budget(
            Budget(), size_bytes=1, accuracy_drop=(0, ""), sqnr_db=(0, ""), latency_ms=(0, "")
        )
        == []
    )


def outputs(*scores: list[float]) -> list[dict[str, Array]]:
    return [{"y": np.array([row], np.float32)} for row in scores]


def test_accuracy_with_labels_is_a_drop_of_top1() -> None:
    samples = Samples({"x": random(4, 2)}, labels=np.array([0, 1, 0, 1]))
    original = outputs([1, 0], [0, 1], [1, 0], [1, 0])
    got = outputs([1, 0], [0, 1], [0, 1], [1, 0])
    found = accuracy(samples, got, original)
    assert (found["reference_top1"], found["top1"], found["drop"]) == (75.0, 50.0, 25.0)
    assert found["agreement"] == 75.0
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(4 / 2), abs=0.01)
    assert accuracy(samples, got, None, 75.0)["drop"] == 25.0
    assert accuracy(samples, got, None)["drop"] is None


def test_accuracy_without_labels_is_agreement() -> None:
    found = accuracy(Samples({"x": random(2, 2)}), outputs([1, 0], [1, 0]), outputs([1, 0], [0, 1]))
    assert (found["top1"], found["agreement"], found["drop"]) == (None, 50.0, 50.0)


def test_an_output_that_is_no_vector_of_scores_has_no_classes() -> None:
    assert classes([{"y": random(1, 3, 4)}]) is None
    assert classes([{"y": random(1)}]) is None
