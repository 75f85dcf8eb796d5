"""Runs passes and holds every one of them to its promise.

Per pass: clone → requires → call → refresh shapes → ensures → onnx checker → run the model before
and after on the same samples. A lossless pass whose outputs differ is refused; a lossy pass gets
its SQNR recorded. Where only the model's metadata changed, there is nothing to run. A finished step
is cached under the content it worked on, so it is not run again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes.base import (
    Context,
    LayerTimer,
    NotEquivalent,
    Pass,
    PassError,
    PassRefused,
    pass_class,
    refresh_shapes,
)
from edgepress.pipeline import snapshot
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.cost import cost
from edgepress.pipeline.feeds import input_shapes, random_samples
from edgepress.pipeline.oracle import Oracle, Outputs, relative_error, sqnr_db
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.snapshot import Snapshot, same_graph, values

CANONICAL = (
    "fix-shapes",
    "raise-opset",
    "lift-constants",
    "fold-constants",
    "fold-batch-norm",
    "fold-pad",
    "drop-no-ops",
)
SAMPLES = 4
LOSSLESS_LIMIT = 1e-4  # of the output range


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """How the outputs after a pass compare to those before it.

    Attributes:
        metric: `max_error` (share of the output range) or `sqnr_db`.
        value: the measured figure.
        limit: what it may be at most; None where the metric is only recorded.
    """

    metric: str
    value: float
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one pass did, for the table and the manifest.

    Attributes:
        pass_name: the pass, as in recipes.
        options: its fields.
        modified: whether it changed anything.
        lossless: whether the pass promises equal outputs.
        stats: its figures.
        skipped: `(what, why)` for everything it left alone.
        notes: sentences that the user should read.
        parameters: after the pass.
        macs: after the pass, per inference.
        size_bytes: of all constants, after the pass.
        equivalence: None where nothing changed or the model before it could not run.
        trials: what a step tried that chooses among models, one entry per model.
        seconds: wall time of this pass and its checks, 0 where it came from the cache.
        cached: whether it came from the cache.
    """

    pass_name: str
    options: dict[str, Any]
    modified: bool
    lossless: bool = True
    stats: dict[str, int | float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0
    size_bytes: int = 0
    equivalence: Equivalence | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cached: bool = False

    def facts(self) -> dict[str, Any]:
        """Return what depends on the inputs alone: everything but seconds and cached."""
        record = dataclasses.asdict(self)
        del record["seconds"], record["cached"]
        return record


def canonical_passes() -> list[Pass]:
    """Return the passes that every model goes through before those of a recipe."""
    return [pass_class(name)() for name in CANONICAL]


class Driver:
    """A model on its way through passes.

    Attributes:
        snapshot: the model after the last pass, as bytes.
        records: one per pass that ran, in order.
    """

    def __init__(
        self, model: ir.Model, *, cache: Cache | None = None, progress: Progress | None = None
    ) -> None:
        self.snapshot = snapshot.take(model)
        self.records: list[StepRecord] = []
        self._model: ir.Model | None = model
        self._cache, self._progress = cache, progress or Progress(shown=False)
        self._version = code_version("edgepress.passes", "edgepress.calibration")
        self._answers: tuple[str, str, Outputs] | None = None

    @property
    def model(self) -> ir.Model:
        """The model after the last pass."""
        if self._model is None:
            self._model = self.snapshot.load()
        return self._model

    def run(
        self,
        passes: Sequence[Pass],
        context: Context,
        timers: Sequence[LayerTimer | None] | None = None,
        *,
        before: int = 0,
        after: int = 0,
    ) -> None:
        """Run passes in order.

        Args:
            passes: what to run.
            context: what they may use; they report progress to that of the driver.
            timers: one per pass, in place of the context's.
            before: how many passes of the same recipe came before these, for the progress.
            after: how many will come after them.

        Raises:
            PassRefused, NotEquivalent or another PassError; TargetError from measuring layers.
        """
        context = dataclasses.replace(context, progress=self._progress.update)
        timers = [context.timer] * len(passes) if timers is None else timers
        samples_sha256 = context.samples.sha256() if context.samples else ""
        total = before + len(passes) + after
        for index, (step, timer) in enumerate(zip(passes, timers, strict=True), before + 1):
            context = dataclasses.replace(context, timer=timer)
            with self._progress.step(f"[{index}/{total}] {step.name}"):
                key = self._key(step, context, samples_sha256)
                record = self._recall(key) or self._apply(step, context, key, samples_sha256)
            self.records.append(record)

    def _key(self, step: Pass, context: Context, samples_sha256: str) -> str:
        return content_key(
            "step",
            self._version,
            self.snapshot.digest,
            step.name,
            json.dumps(dataclasses.asdict(step), sort_keys=True, default=str),
            samples_sha256,  # of every pass: it is judged on them, and may do better with them
            {name: list(shape) for name, shape in context.input_shapes.items()},
            context.simd_bytes,
            context.timer.key if context.timer else "",
            *self._training_key(step, context),
        )

    def _training_key(self, step: Pass, context: Context) -> list[str]:
        """Return what the result of a pass that trains depends on beside its model."""
        if not step.needs_training or context.training is None:
            return []
        original = "" if context.original is None else snapshot.take(context.original).digest
        return [context.training.sha256(), original]

    def _recall(self, key: str) -> StepRecord | None:
        """Take a finished step from the cache."""
        entry = self._cache.get(key) if self._cache else None
        if entry is None:
            return None
        facts = json.loads((entry / "step.json").read_text("utf-8"))
        facts["skipped"] = [(what, why) for what, why in facts["skipped"]]
        if facts["equivalence"] is not None:
            facts["equivalence"] = Equivalence(**facts["equivalence"])
        if (entry / "model.onnx").exists():
            self.snapshot, self._model = snapshot.read(entry), None
        return StepRecord(**facts, cached=True)

    def _apply(self, step: Pass, context: Context, key: str, samples_sha256: str) -> StepRecord:
        """Run one pass on a clone, check the result, and keep it."""
        started = time.perf_counter()
        before = self.snapshot
        if step.needs_samples and context.samples is None:
            why = "needs calibration samples; give some with --calib"
            raise PassRefused(step.name, "samples", why)
        if step.needs_training and context.training is None:
            raise PassRefused(
                step.name, "samples", "needs training samples; give some with --train"
            )
        model = self.model.clone()
        step.requires(model, context)
        old_ranges = {id(value.meta["range"]) for value in values(model) if "range" in value.meta}
        old_marks = dict(model.metadata_props)
        outcome = step.call(model, context)
        model, notes = outcome.model, list(outcome.notes)
        marked = model.metadata_props != old_marks and same_graph(before, snapshot.take(model))
        equivalence = None
        if outcome.modified and not marked:
            refresh_shapes(model, step.name)
            for value in values(model):
                # a range describes the tensor that was observed, which may now be another one
                if id(value.meta.get("range")) in old_ranges:
                    del value.meta["range"]
        step.ensures(model)
        after = snapshot.take(model)
        if after.model != before.model and not marked:
            _check(step, after)
            equivalence = self._compare(step, before, after, model, context, samples_sha256)
        figures = cost(model)
        record = StepRecord(
            pass_name=step.name,
            options=dataclasses.asdict(step),
            modified=outcome.modified,
            lossless=step.lossless,
            stats=dict(outcome.stats),
            skipped=list(outcome.skipped),
            notes=notes,
            parameters=figures.parameters,
            macs=figures.macs,
            size_bytes=figures.size_bytes,
            equivalence=equivalence,
            seconds=time.perf_counter() - started,
        )
        self.snapshot, self._model = after, model
        if self._cache:
            self._cache.put(key, lambda folder: _write(folder, record, before, after))
        return record

    def _compare(
        self,
        step: Pass,
        before: Snapshot,
        after: Snapshot,
        model: ir.Model,
        context: Context,
        samples_sha256: str,
    ) -> Equivalence | None:
        """Run the model before and after; None where the one before does not run by itself."""
        shapes = input_shapes(model)
        if shapes is None:
            return None
        samples = context.samples or random_samples(model, SAMPLES)
        feeds = list(itertools.islice(samples.feeds(shapes), SAMPLES))
        if self._answers is not None and self._answers[:2] == (before.digest, samples_sha256):
            expected = self._answers[2]
        else:
            try:
                expected = _answers(before, feeds)
            except Exception:  # onnxruntime's own exceptions have no base of their own
                return None
        try:
            got = _answers(after, feeds)
        except Exception as error:
            raise PassError(
                f"{step.name}: onnxruntime runs the model before this pass but not after it: "
                f"{error}. This is a bug of the pass; leave it out of the recipe and report it."
            ) from error
        self._answers = (after.digest, samples_sha256, got)
        if not step.lossless:
            return Equivalence(metric="sqnr_db", value=round(sqnr_db(expected, got), 2))
        error_share = relative_error(expected, got)
        if not error_share <= LOSSLESS_LIMIT:
            metric = "largest error, as a share of the output range,"
            raise NotEquivalent(step.name, metric, error_share, LOSSLESS_LIMIT)
        value = float(f"{error_share:.2g}")
        return Equivalence(metric="max_error", value=value, limit=LOSSLESS_LIMIT)


def _answers(model: Snapshot, feeds: Sequence[Mapping[str, Array]]) -> Outputs:
    oracle = Oracle(model.model)
    return [oracle.run(feed) for feed in feeds]


def _check(step: Pass, after: Snapshot) -> None:
    try:
        onnx.checker.check_model(after.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PassError(
            f"{step.name}: the model after this pass is not valid ONNX: {error}. Check the model "
            "with onnx.checker; if it is valid, leave the pass out and report a bug."
        ) from error


def _write(folder: Path, record: StepRecord, before: Snapshot, after: Snapshot) -> None:
    facts = json.dumps(record.facts(), default=str)
    (folder / "step.json").write_text(facts, "utf-8")
    if after != before:
        after.write(folder)
