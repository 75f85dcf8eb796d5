"""From a file to a compressed graph: load, make canonical, run the passes of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.cost import cost
from edgepress.pipeline.driver import Driver, StepRecord, canonical_passes
from edgepress.pipeline.feeds import user_samples
from edgepress.pipeline.load import load_model, model_sha256
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.snapshot import Snapshot


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
        evaluation: the evaluation samples, or None.
    """

    source: dict[str, Any]
    original: Snapshot
    canonical: Snapshot
    compressed: Snapshot
    steps: list[StepRecord]
    lossless: bool
    calibration: Samples | None
    evaluation: Samples | None


def prepare(
    path: Path,
    recipe: Recipe,
    *,
    calib: Path | None = None,
    evaluation: Path | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    simd_bytes: int = 16,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Load a model and run the canonical passes and those of the recipe.

    Raises UsageError, ModelError, PassError, CalibrationError.
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
    original = driver.snapshot
    context = Context(input_shapes=dict(input_shapes or {}), simd_bytes=simd_bytes)
    driver.run(canonical_passes(), context)
    canonical = driver.snapshot
    # counted here, since shapes and constants are known only now
    figures = cost(driver.model)
    source |= {
        "parameters": figures.parameters,
        "macs": figures.macs,
        "size_bytes": path.stat().st_size,
    }
    samples, tests = (
        None if path is None else user_samples(driver.model, path, recipe.preprocess)
        for path in (calib, evaluation)
    )
    context = Context(samples=samples, input_shapes=context.input_shapes, simd_bytes=simd_bytes)
    driver.run(recipe.passes, context)
    return Prepared(
        source=source,
        original=original,
        canonical=canonical,
        compressed=driver.snapshot,
        steps=driver.records,
        lossless=all(record.lossless or not record.modified for record in driver.records),
        calibration=samples,
        evaluation=tests,
    )
