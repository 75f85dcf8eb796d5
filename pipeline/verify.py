"""Closes the gates of a bundle by running it on a device: outputs, accuracy, size, latency."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgepress.calibration.base import Array, Samples
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.feeds import SEED, input_shapes, random_samples
from edgepress.pipeline.gates import Verdict, all_passed, judge, judge_budget
from edgepress.pipeline.golden import FLOAT_LIMIT, MIXED_LIMIT, make_golden
from edgepress.pipeline.oracle import Oracle, Outputs, relative_error, sqnr_db
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Budget
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import Measurement

OUTPUT_SAMPLES = 8


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
    """

    device: dict[str, Any]
    verdicts: list[Verdict]
    outputs: dict[str, Any]
    accuracy: dict[str, Any] | None
    latency: dict[str, Any] | None
    instructions: int | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all_passed(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `evidence.json` and `--json`."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify(
    bundle: Bundle,
    device: Device,
    *,
    original: Snapshot | None,
    samples: Samples | None,
    budget: Budget,
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
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device failed; a wrong answer is a verdict instead.
    """
    progress = progress or Progress(shown=False)
    graph = Snapshot((bundle.folder / "graph.onnx").read_bytes())
    model = graph.load()
    asked = samples or random_samples(model, OUTPUT_SAMPLES, SEED + 1)
    with progress.step(f"selftest on {device.name}"):
        selftest = device.selftest(bundle.folder)
    with progress.step(f"infer on {device.name}"):
        got = device.infer(bundle.folder, asked, progress.update)
    with progress.step("compare"):
        feeds = list(itertools.islice(asked.feeds(input_shapes(model) or {}), OUTPUT_SAMPLES))
        outputs = _compare(bundle, graph, original, feeds, got[: len(feeds)])
        found = None
        if samples is not None:
            found = accuracy(samples, got, *_baseline(bundle, original, samples, graph))
    with progress.step(f"bench on {device.name}"):
        measured = device.bench(bundle.folder)
    latency = latency_figures(measured)
    verdicts = [_judge_selftest(bundle, selftest), _judge_outputs(bundle, outputs)]
    verdicts += judge_budget(
        budget,
        size_bytes=bundle.deployed_bytes,
        accuracy_drop=_figure(found, "drop"),
        sqnr_db=_figure(found, "sqnr_db"),
        latency_ms=(latency and latency["p50_ms"], _latency_detail(device, latency)),
    )
    return Evidence(
        device=device.info(),
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
    lossless = all(
        step["equivalence"] is None or step["equivalence"]["metric"] != "sqnr_db"
        for step in bundle.manifest.steps
    )
    golden = make_golden(graph, original if lossless else None, feeds)
    result: dict[str, Any] = {
        "samples": len(feeds),
        "reference": golden.reference,
        "max_error": relative_error(golden.answers, got),
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


def _judge_outputs(bundle: Bundle, outputs: Mapping[str, Any]) -> Verdict:
    detail = f"{outputs['samples']} samples against {outputs['reference']}"
    if bundle.manifest.arithmetic == "integer":
        differing = 0.0 if outputs["bit_equal"] else 1.0
        return judge("outputs", differing, 0.0, f"bit-equal wanted: {detail}")
    limit = FLOAT_LIMIT if bundle.manifest.arithmetic == "float" else MIXED_LIMIT
    detail = f"largest error as a share of the output range: {detail}"
    return judge("outputs", outputs["max_error"], limit, detail)


def latency_figures(measured: Measurement) -> dict[str, Any] | None:
    """Summarise a measurement; None where it holds no times, as under an emulator."""
    times = sorted(measured.samples_ms)
    if not times:
        return None
    cuts = {name: _percentile(times, share) for name, share in (("p90_ms", 0.9), ("p99_ms", 0.99))}
    return {
        "samples_ms": list(measured.samples_ms),
        "min_ms": times[0],
        "p50_ms": statistics.median(times),
        **cuts,
        "threads": measured.threads,
        "device": measured.device,
    }


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
