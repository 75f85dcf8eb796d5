"""Closes the gates of a bundle by running it on devices: outputs, accuracy, size, latency."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.calibration.base import Array
from edgepress.pipeline import snapshot
from edgepress.pipeline.accuracy import accuracy
from edgepress.pipeline.bundle import Bundle, BundleError
from edgepress.pipeline.evidence import Evidence, checked_latency, overall
from edgepress.pipeline.expected_answers import ExpectedAnswers, bundle_graph
from edgepress.pipeline.feeds import input_shapes, user_samples
from edgepress.pipeline.fleet import Outcome, on_devices
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.gates import Verdict, judge, judge_budget
from edgepress.pipeline.golden import raw
from edgepress.pipeline.latency import Measuring, gated_latency, latency_figures
from edgepress.pipeline.load import load_model, model_sha256
from edgepress.pipeline.oracle import Outputs, relative_error
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Budget, parse_recipe
from edgepress.targets.base import DeviceFailed, Measurement, Target
from edgepress.targets.devices.base import Device, open_device

BENCH_SECONDS, BENCH_RUNS = 1.0, 100
PLAIN = Measuring()


def verify_folder(
    bundle: Bundle,
    device: str | None,
    *,
    evaluation: Path | None = None,
    original: Path | None = None,
    max_latency_ms: float | None = None,
    measuring: Measuring = PLAIN,
    progress: Progress | None = None,
) -> Evidence:
    """Verify a bundle with what its own manifest and the user's files say.

    Args:
        bundle: what to verify; its recipe's budget applies.
        device: where, such as `local` or `qemu`; None chooses by the target.
        evaluation: evaluation samples.
        original: the model that the bundle was built from.
        max_latency_ms: replaces the budget's.
        measuring: how to measure the latency.
        progress: where to say how far it is.

    Raises:
        DeviceFailed, CalibrationError, ModelError; UsageError where `original` is another model.
    """
    expected, budget = _expected(bundle, evaluation, original, max_latency_ms)
    opened = open_device(device, bundle_target(bundle))
    return verify(expected, opened, budget=budget, measuring=measuring, progress=progress)


def verify_fleet(
    bundle: Bundle,
    devices: Sequence[str],
    *,
    evaluation: Path | None = None,
    original: Path | None = None,
    max_latency_ms: float | None = None,
    measuring: Measuring = PLAIN,
    progress: FleetProgress | None = None,
) -> list[Outcome[Evidence]]:
    """Verify a bundle on many devices at once; arguments and errors as those of `verify_folder`.

    What a device raises is its outcome.
    """
    expected, budget = _expected(bundle, evaluation, original, max_latency_ms)
    target = bundle_target(bundle)

    def work(device: str, progress: Progress) -> Evidence:
        opened = open_device(device, target)
        return verify(expected, opened, budget=budget, measuring=measuring, progress=progress)

    return on_devices(
        devices,
        work,
        progress=progress or FleetProgress(shown=False),
        verdict=lambda evidence: overall(evidence.to_json()["verdicts"]),
    )


def _expected(
    bundle: Bundle, evaluation: Path | None, original: Path | None, max_latency_ms: float | None
) -> tuple[ExpectedAnswers, Budget]:
    """Read what the answers are held against, and the limits."""
    manifest = bundle.manifest
    recipe = parse_recipe(manifest.recipe["text"], manifest.recipe["name"], "the bundle's recipe")
    budget = recipe.budget
    if max_latency_ms is not None:
        budget = dataclasses.replace(budget, latency_ms=max_latency_ms)
    source = None
    if original is not None:
        source = snapshot.take(load_model(original))
        if model_sha256(original) != manifest.source["sha256"]:
            raise UsageError(
                f"{original} is not the model that {bundle.folder} was built from "
                f"({manifest.source['file']}); give that one."
            )
    samples = None
    if evaluation is not None:
        samples = user_samples(bundle_graph(bundle).load(), evaluation, recipe.preprocess)
    return ExpectedAnswers(bundle, original=source, samples=samples), budget


def infer_folder(
    bundle: Bundle, device: str | None, data: Path, progress: Progress | None = None
) -> list[dict[str, Array]]:
    """Return the compiled model's own answers to every sample of a file."""
    progress = progress or Progress(shown=False)
    model = bundle_graph(bundle).load()
    samples = user_samples(model, data)
    opened = open_device(device, bundle_target(bundle))
    with progress.step(f"infer {len(samples)} samples on {opened.name}"):
        return opened.infer(bundle.folder, list(samples.feeds(input_shapes(model) or {})))


def bundle_target(bundle: Bundle) -> Target:
    """Return the target that a bundle was built for, as it was then. Raises BundleError."""
    stored = bundle.manifest.target.items()
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored}
    try:
        return Target(**fields)
    except TypeError as error:
        raise BundleError(f"{bundle.folder}: its target is malformed: {error}.") from error


def verify(
    expected: ExpectedAnswers,
    device: Device,
    *,
    budget: Budget,
    measuring: Measuring = PLAIN,
    progress: Progress | None = None,
) -> Evidence:
    """Run a bundle on a device and judge every gate.

    Args:
        expected: the bundle, and what its answers are held against.
        device: where to run it; it must be able to.
        budget: the gates beside that of the outputs.
        measuring: how to measure the latency.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device failed; a wrong answer is a verdict instead.
    """
    progress = progress or Progress(shown=False)
    bundle, feeds = expected.bundle, expected.feeds
    with progress.step(f"selftest on {device.name}"):
        selftest = device.selftest(bundle.folder)
    with progress.step(f"infer {len(feeds)} samples on {device.name}"):
        got = device.infer(bundle.folder, feeds)
    with progress.step("compare"):
        outputs = _compare(expected, got)
        found = None
        if expected.samples is not None:
            found = accuracy(expected.samples, got, *expected.of_original())
    with progress.step(f"bench on {device.name}"):
        measured = device.bench(
            bundle.folder,
            threads=measuring.threads,
            cores=measuring.cores,
            seconds=BENCH_SECONDS,
            runs=BENCH_RUNS,
            defended=not measuring.anyway,
            sustained_minutes=measuring.sustained_minutes,
            mlperf=measuring.mlperf,
        )
    latency = _latency(device, measured, measuring)
    verdicts = [_judge_golden(bundle, selftest), _judge_outputs(bundle, outputs)]
    verdicts += judge_budget(
        budget,
        size_bytes=bundle.deployed_bytes,
        accuracy_drop=_figure(found, "drop"),
        sqnr_db=_figure(found, "sqnr_db"),
        latency_ms=gated_latency(latency, budget.latency_ms, device.name),
    )
    return Evidence(
        device={"spec": device.name, **measured.device},
        verdicts=verdicts,
        outputs=outputs,
        accuracy=found,
        latency=latency,
        instructions=measured.instructions,
    )


def _latency(device: Device, measured: Measurement, measuring: Measuring) -> dict[str, Any] | None:
    """Summarise what a device measured, which is not to be trusted to make sense."""
    try:
        latency = checked_latency(latency_figures(measured, anyway=measuring.anyway))
        json.dumps([latency, measured.device], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DeviceFailed(
            f"{device.name}: `model --bench` printed figures that make no sense there: {error}."
        ) from None
    return latency


def _compare(expected: ExpectedAnswers, answers: Outputs) -> dict[str, Any]:
    """Hold answers to the reference of the bundle's arithmetic."""
    golden = expected.golden()
    got = answers[: len(expected.compared)]
    result: dict[str, Any] = {
        "samples": len(got),
        "reference": golden.reference,
        "max_error": relative_error(golden.answers, got),
        "limit": golden.limit,
        "bit_equal": all(
            raw(want) == raw(have) for want, have in zip(golden.answers, got, strict=True)
        ),
        "onnxruntime_steps": None,
    }
    if golden.arithmetic != "float":
        result["onnxruntime_steps"] = _steps(expected.bundle, expected.of_onnxruntime(), got)
    return result


def _steps(bundle: Bundle, expected: Outputs, got: Outputs) -> int | None:
    """Return the largest difference in quantization steps; None where an output has no scale."""
    worst = 0
    for index, output in enumerate(bundle.manifest.outputs):
        if not output["scale"]:
            return None
        for want, have in zip(expected, got, strict=True):
            error = list(want.values())[index].astype(np.float64) - list(have.values())[index]
            worst = max(worst, int(np.rint(np.abs(error).max() / output["scale"])))
    return worst


def _judge_golden(bundle: Bundle, selftest: Mapping[str, Any]) -> Verdict:
    wrong = 0.0 if selftest["passed"] is True else 1.0
    count = bundle.manifest.golden["samples"]
    return judge("golden", wrong, 0.0, f"{count} golden samples, checked by the executable itself")


def _judge_outputs(bundle: Bundle, outputs: Mapping[str, Any]) -> Verdict:
    detail = f"{outputs['samples']} samples against {outputs['reference']}"
    if bundle.manifest.arithmetic == "integer":
        differing = 0.0 if outputs["bit_equal"] else 1.0
        return judge("outputs", differing, 0.0, f"bit-equal wanted: {detail}")
    detail = f"largest error as a share of the output range: {detail}"
    return judge("outputs", outputs["max_error"], outputs["limit"], detail)


def _figure(found: Mapping[str, Any] | None, name: str) -> tuple[float | None, str]:
    if found is None:
        return None, "not measured: give samples with --eval"
    if found[name] is None:
        return None, "not measured: the original model is not here; give it with --model"
    return found[name], f"against the original model, {found['samples']} samples"
