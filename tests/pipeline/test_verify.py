# ruff: noqa: ARG002 - a device keeps the names of the arguments
"""Verification, with the real bundle and with devices that misbehave."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline.accuracy import accuracy, classes, stack
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.gates import all_passed, judge, judge_budget
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.recipe import Budget
from edgepress.pipeline.verify import (
    bundle_target,
    infer_folder,
    latency_figures,
    verify,
    verify_folder,
)
from edgepress.targets.base import Measurement
from edgepress.targets.devices.base import Device, open_device
from tests.graphs import random
from tests.pipeline.conftest import World


@dataclasses.dataclass(frozen=True)
class Misbehaving:
    """A real device whose answers are off by a little, or that is an emulator."""

    device: Device
    offset: float = 0.0
    emulated: bool = False
    passed: bool = True

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
    ) -> Measurement:
        times = () if self.emulated else (seconds,) * runs
        return Measurement(samples_ms=times, threads=threads or 1, instructions=7)

    def profile(
        self, folder: Path, *, threads: int | None, seconds: float, runs: int
    ) -> list[float]:
        return self.device.profile(folder, threads=threads, seconds=seconds, runs=runs)


def judged(world: World, budget: Budget | None = None, **how: Any) -> dict[str, str]:
    bundle = read_bundle(world.request.output)
    device = Misbehaving(open_device("local", bundle_target(bundle)), **how)
    evidence = verify(bundle, device, original=None, samples=None, budget=budget or Budget())
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


def test_another_model_is_not_the_original(world: World) -> None:
    bundle = read_bundle(world.request.output)
    with pytest.raises(UsageError, match=r"net\.onnx"):
        verify_folder(bundle, None, original=world.request.output / "graph.onnx")


def test_a_latency_gate_on_the_command_line(world: World) -> None:
    evidence = verify_folder(read_bundle(world.request.output), None, max_latency_ms=1e-6)
    verdict = next(v for v in evidence.verdicts if v.gate == "latency_ms")
    assert verdict.verdict == "fail"
    assert not evidence.passed


def test_infer_asks_the_bundle_itself(world: World) -> None:
    answers = stack(infer_folder(read_bundle(world.request.output), None, world.samples))
    assert answers["y"].shape == (8, 10)
    golden = (world.request.output / "golden/2.out").read_bytes()
    assert answers["y"][2].tobytes() == golden


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


def test_percentiles_are_those_of_all_samples() -> None:
    times = tuple(float(i) for i in range(100, 0, -1))
    figures = latency_figures(Measurement(samples_ms=times, threads=1))
    assert figures is not None
    assert figures["samples_ms"] == list(times)
    assert [figures[k] for k in ("min_ms", "p50_ms", "p90_ms", "p99_ms")] == [1, 50.5, 91, 100]
