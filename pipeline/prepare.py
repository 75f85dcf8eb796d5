"""From a file to a compressed graph: load, make canonical, run the passes of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, LayerTimer
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.cost import cost
from edgepress.pipeline.driver import Driver, StepRecord, canonical_passes
from edgepress.pipeline.feeds import user_samples
from edgepress.pipeline.load import load_model, model_sha256
from edgepress.pipeline.mixed_precision import (
    MixedPrecision,
    Task,
    has_accuracy_gate,
    raise_precision,
)
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import Target
from edgepress.targets.devices.base import open_device

QUANTIZE = "quantize-int8"


class UsageError(Exception):
    """What was asked for does not fit together: what, where, what to do."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model on both sides of its passes.

    Attributes:
        source: file, sha256, opset, parameters, macs, size_bytes of the model.
        original: the model as it was loaded: the reference of every float figure.
        canonical: after the canonical passes.
        compressed: after the passes of the recipe.
        steps: one record per pass.
        lossless: whether every pass that changed something is lossless.
        calibration: the calibration samples, or None.
        training: the training samples, or None.
        evaluation: the evaluation samples, or None.
        precision: how layers were raised to hold the recipe's gates on accuracy, or None where
            nothing had to be.
    """

    source: dict[str, Any]
    original: Snapshot
    canonical: Snapshot
    compressed: Snapshot
    steps: list[StepRecord]
    lossless: bool
    calibration: Samples | None
    evaluation: Samples | None
    training: Samples | None = None
    precision: MixedPrecision | None = None


def prepare(
    path: Path,
    recipe: Recipe,
    *,
    target: Target | None = None,
    device: str | None = None,
    calib: Path | None = None,
    train: Path | None = None,
    evaluation: Path | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Load a model and run the canonical passes and those of the recipe.

    Where the quantized model misses the recipe's gates on accuracy, layers are raised to a higher
    precision and `quantize-int8` and the passes behind it run again.

    Args:
        path: the ONNX file.
        recipe: its passes are run.
        target: decides the vector width, and layers are measured on it; None where the passes
            shall suit any.
        device: where layers are measured; None chooses one that fits the target. It is opened only
            where a pass measures layers.
        calib: calibration samples, or None.
        train: training samples, or None.
        evaluation: evaluation samples, or None.
        input_shapes: shapes to fix, by input name.
        cache: keeps finished steps, or None.
        progress: where to say how far it is.

    Raises:
        UsageError: a pass needs samples or a target that was not given.
        DeviceFailed: layers are to be measured, but the device cannot run the target.
        ModelError, PassError, CalibrationError: the model, a pass or the samples.
        TargetError: measuring layers failed.
    """
    progress = progress or Progress(shown=False)
    with progress.step("load"):
        model = load_model(path)
        source = {"file": path.name, "sha256": model_sha256(path), "opset": model.opset_imports[""]}
        driver = Driver(model, cache=cache, progress=progress)
    # after loading: a file that is no model is the first thing to say
    if calib is None and (needy := [step.name for step in recipe.passes if step.needs_samples]):
        raise UsageError(
            f"recipe {recipe.name}: {needy[0]} needs calibration samples; give some with "
            "--calib DATA.npz, or compile without compression with -r none."
        )
    if train is None and (needy := [step.name for step in recipe.passes if step.needs_training]):
        raise UsageError(
            f"recipe {recipe.name}: {needy[0]} trains the model; give samples with labels with "
            "--train DATA.npz, or leave the pass out."
        )
    timers = _timers(recipe, target, device, cache, progress)
    original = driver.snapshot
    context = Context(input_shapes=dict(input_shapes or {}))
    driver.run(canonical_passes(), context)
    canonical = driver.snapshot
    # counted here, since shapes and constants are known only now
    figures = cost(driver.model)
    source |= {
        "parameters": figures.parameters,
        "macs": figures.macs,
        "size_bytes": path.stat().st_size,
    }
    samples, training, tests = (
        None if path is None else user_samples(driver.model, path, recipe.preprocess)
        for path in (calib, train, evaluation)
    )
    context = dataclasses.replace(context, samples=samples)
    if training is not None:
        context = dataclasses.replace(context, training=training, original=canonical.load())
    if target is not None and recipe.passes:
        context = dataclasses.replace(context, simd_bytes=simd_bytes(target))
    start = _raised_from(recipe)
    driver.run(recipe.passes[:start], context, timers[:start], after=len(recipe.passes) - start)
    base, done = driver.snapshot, len(driver.records)
    driver.run(recipe.passes[start:], context, timers[start:], before=start)
    compressed, steps, precision = driver.snapshot, driver.records, None
    if start < len(recipe.passes):
        task = Task(
            base=base,
            passes=recipe.passes[start:],
            timers=timers[start:],
            context=context,
            budget=recipe.budget,
            original=original,
            evaluation=tests,
            cache=cache,
            progress=progress,
        )
        precision = raise_precision(task, compressed, steps[done:])
    if precision is not None:
        compressed = precision.best.model
        steps = [*steps[:done], *precision.best.records, precision.record()]
    return Prepared(
        source=source,
        original=original,
        canonical=canonical,
        compressed=compressed,
        steps=steps,
        lossless=all(record.lossless or not record.modified for record in steps),
        calibration=samples,
        training=training,
        evaluation=tests,
        precision=precision,
    )


def _raised_from(recipe: Recipe) -> int:
    """Return the first pass to run again where layers are raised; their number for none."""
    if has_accuracy_gate(recipe.budget):
        for index, step in enumerate(recipe.passes):
            if step.name == QUANTIZE:
                return index
    return len(recipe.passes)


def simd_bytes(target: Target) -> int:
    """Return the vector width of a target."""
    from edgepress.targets.isa.base import load_isa  # imports TVM

    return load_isa(target.isa).vector_bytes


def _timers(
    recipe: Recipe,
    target: Target | None,
    device: str | None,
    cache: Cache | None,
    progress: Progress,
) -> list[LayerTimer | None]:
    """Make a timer for every pass that needs one; the device is opened for them alone."""
    timers: list[LayerTimer | None] = [None] * len(recipe.passes)
    needy = [index for index, step in enumerate(recipe.passes) if step.needs_timer]
    if not needy:
        return timers
    if target is None:
        raise UsageError(
            f"recipe {recipe.name}: {recipe.passes[needy[0]].name} measures layers on the target; "
            "name one with -t TARGET, or set an option of the pass that does without."
        )
    from edgepress.pipeline.layer_timer import DeviceTimer  # it imports this module

    opened = open_device(device, target)
    for index in needy:
        quantized = any(step.name == QUANTIZE for step in recipe.passes[index + 1 :])
        timers[index] = DeviceTimer(target, opened, quantized, cache, progress.update)
    return timers
