"""Closes the gates of a bundle by running it on a device: outputs, accuracy, size, latency."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline import snapshot
from edgepress.pipeline.accuracy import accuracy
from edgepress.pipeline.bundle import Bundle, BundleError
from edgepress.pipeline.feeds import SEED, input_shapes, random_samples, user_samples
from edgepress.pipeline.gates import Verdict, all_passed, judge, judge_budget
from edgepress.pipeline.golden import make_golden, raw
from edgepress.pipeline.load import load_model, model_sha256
from edgepress.pipeline.oracle import Oracle, Outputs, relative_error
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Budget, parse_recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import Measurement, Target
from edgepress.targets.devices.base import Device, open_device

OUTPUT_SAMPLES = 4
BENCH_SECONDS, BENCH_RUNS = 1.0, 100


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was measured, and what follows from it.

    Attributes:
        device: facts about the device.
        verdicts: one per gate.
        outputs: how the device's answers compare to the reference.
        accuracy: top-1, agreement, SQNR against the original model, or None without samples.
        latency: all raw samples and their percentiles, or None where it was not measured.
        instructions: per inference, under an emulator, else None.
        trials: what each of the models costs that a search for mixed precision tried, or None where
            there was none.
    """

    device: dict[str, Any]
    verdicts: list[Verdict]
    outputs: dict[str, Any]
    accuracy: dict[str, Any] | None
    latency: dict[str, Any] | None
    instructions: int | None
    trials: list[dict[str, Any]] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all_passed(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `evidence.json` and `--json`."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify_folder(
    bundle: Bundle,
    device: str | None,
    *,
    evaluation: Path | None = None,
    original: Path | None = None,
    max_latency_ms: float | None = None,
    threads: int | None = None,
    cores: str | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Verify a bundle with what its own manifest and the user's files say.

    Args:
        bundle: what to verify; its recipe's budget applies.
        device: where, such as `local` or `qemu`; None chooses by the target.
        evaluation: evaluation samples.
        original: the model that the bundle was built from.
        max_latency_ms: replaces the budget's.
        threads: to measure the latency on; None takes as many as the target has cores.
        cores: to pin them to: `big`, `little`, or a list such as `0,2-3`; None pins none.
        progress: where to say how far it is.

    Raises:
        DeviceFailed, CalibrationError, ModelError; UsageError where `original` is another model.
    """
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
        samples = user_samples(_graph(bundle).load(), evaluation, recipe.preprocess)
    return verify(
        bundle,
        open_device(device, bundle_target(bundle)),
        original=source,
        samples=samples,
        budget=budget,
        threads=threads,
        cores=cores,
        progress=progress,
    )


def infer_folder(
    bundle: Bundle, device: str | None, data: Path, progress: Progress | None = None
) -> list[dict[str, Array]]:
    """Return the compiled model's own answers to every sample of a file."""
    progress = progress or Progress(shown=False)
    model = _graph(bundle).load()
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


def _graph(bundle: Bundle) -> Snapshot:
    return Snapshot((bundle.folder / "graph.onnx").read_bytes())


def verify(
    bundle: Bundle,
    device: Device,
    *,
    original: Snapshot | None,
    samples: Samples | None,
    budget: Budget,
    threads: int | None = None,
    cores: str | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Run a bundle on a device and judge every gate.

    Args:
        bundle: what to verify.
        device: where to run it; it must be able to.
        original: the model before its passes, for float outputs and accuracy; None where it is
            not here: then float outputs are held to the bundle's own graph, and the loss of
            accuracy is known only as far as older evidence tells.
        samples: evaluation samples, or None.
        budget: the gates beside that of the outputs.
        threads: to measure the latency on; None takes as many as the target has cores.
        cores: to pin them to: `big`, `little`, or a list such as `0,2-3`; None pins none.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device failed; a wrong answer is a verdict instead.
    """
    progress = progress or Progress(shown=False)
    graph = _graph(bundle)
    model = graph.load()
    asked = samples or random_samples(model, OUTPUT_SAMPLES, SEED + 1)
    feeds = list(asked.feeds(input_shapes(model) or {}))
    with progress.step(f"selftest on {device.name}"):
        selftest = device.selftest(bundle.folder)
    with progress.step(f"infer {len(feeds)} samples on {device.name}"):
        got = device.infer(bundle.folder, feeds)
    with progress.step("compare"):
        feeds = feeds[:OUTPUT_SAMPLES]
        outputs = _compare(bundle, graph, original, feeds, got[: len(feeds)])
        found = None
        if samples is not None:
            found = accuracy(samples, got, *_baseline(bundle, original, samples, graph))
    with progress.step(f"bench on {device.name}"):
        measured = device.bench(
            bundle.folder,
            threads=threads,
            cores=cores,
            seconds=BENCH_SECONDS,
            runs=BENCH_RUNS,
        )
    latency = latency_figures(measured)
    verdicts = [_judge_golden(bundle, selftest), _judge_outputs(bundle, outputs)]
    verdicts += judge_budget(
        budget,
        size_bytes=bundle.deployed_bytes,
        accuracy_drop=_figure(found, "drop"),
        sqnr_db=_figure(found, "sqnr_db"),
        latency_ms=_latency(device, latency),
    )
    return Evidence(
        device={"spec": device.name, **measured.device},
        verdicts=verdicts,
        outputs=outputs,
        accuracy=found,
        latency=latency,
        instructions=measured.instructions,
    )


def _compare(
    bundle: Bundle,
    graph: Snapshot,
    original: Snapshot | None,
    feeds: Sequence[Mapping[str, Array]],
    got: Outputs,
) -> dict[str, Any]:
    """Hold answers to the reference of the bundle's arithmetic."""
    lossless = all(step["lossless"] or not step["modified"] for step in bundle.manifest.steps)
    golden = make_golden(graph, original if lossless else None, feeds)
    result: dict[str, Any] = {
        "samples": len(feeds),
        "reference": golden.reference,
        "max_error": relative_error(golden.answers, got),
        "limit": golden.limit,
        "bit_equal": all(
            raw(want) == raw(have) for want, have in zip(golden.answers, got, strict=True)
        ),
        "onnxruntime_steps": None,
    }
    if golden.arithmetic != "float":
        oracle = Oracle(graph.model)
        answers = [oracle.run(feed) for feed in feeds]
        result["onnxruntime_steps"] = _steps(bundle, answers, got)
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


def _baseline(
    bundle: Bundle, original: Snapshot | None, samples: Samples, graph: Snapshot
) -> tuple[Outputs | None, float | None]:
    """Return the original model's answers, or what older evidence knows of its top-1."""
    if original is not None:
        oracle = Oracle(original.model)
        shapes = input_shapes(graph.load()) or {}
        return [oracle.run(feed) for feed in samples.feeds(shapes)], None
    older = (bundle.evidence or {}).get("accuracy") or {}
    if older.get("samples_sha256") == samples.sha256():
        return None, older.get("reference_top1")
    return None, None


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


def _latency(device: Device, latency: Mapping[str, Any] | None) -> tuple[float | None, str]:
    if latency is None:
        return None, f"{device.name} is an emulator, whose times say nothing about the board"
    return latency["p50_ms"], f"median of {len(latency['samples_ms'])} runs on {device.name}"


def latency_figures(measured: Measurement) -> dict[str, Any] | None:
    """Summarise a measurement; None where it holds no times, as under an emulator."""
    times = sorted(measured.samples_ms)
    if not times:
        return None
    cuts = {name: _percentile(times, share) for name, share in (("p90_ms", 0.9), ("p99_ms", 0.99))}
    return {
        "samples_ms": [round(sample, 6) for sample in measured.samples_ms],
        "min_ms": times[0],
        "p50_ms": statistics.median(times),
        **cuts,
        "threads": measured.threads,
        "device": measured.device,
    }


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
