"""The whole pipeline as one function: a model becomes a verified bundle, or nothing is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline.build import build
from edgepress.pipeline.bundle import Bundle, read_bundle, write_evidence
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.driver import StepRecord
from edgepress.pipeline.evidence import Evidence
from edgepress.pipeline.expected_answers import ExpectedAnswers
from edgepress.pipeline.latency import Measuring
from edgepress.pipeline.output import new_folder
from edgepress.pipeline.precision_cost import trial_costs
from edgepress.pipeline.prepare import Prepared, prepare
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tuned_tiles import known_tiles, tuned_tiles
from edgepress.pipeline.verify import verify
from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.devices.base import open_device
from edgepress.targets.tile_files import TileSizes

if TYPE_CHECKING:
    from edgepress.pipeline.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `run` is asked for.

    Attributes:
        model: the ONNX file.
        target: the board.
        recipe: the passes and gates.
        output: the bundle's folder.
        calib: calibration samples, or None.
        train: training samples, or None.
        eval: evaluation samples, or None.
        input_shapes: shapes to fix, by input name.
        device: where to measure layers and to verify: `local`, `qemu`, …; None chooses one that
            fits the target.
        overwrite: whether an old bundle may be replaced.
        check: whether to verify at all.
        threads: to measure the latency on; None takes as many as the target has cores.
        tune_minutes: how long to search for better tiles on the device, or None.
    """

    model: Path
    target: Target
    recipe: Recipe
    output: Path
    calib: Path | None = None
    train: Path | None = None
    eval: Path | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    device: str | None = None
    overwrite: bool = False
    check: bool = True
    threads: int | None = None
    tune_minutes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `run` made.

    Attributes:
        bundle: where it lies now.
        steps: one record per pass.
        seconds: of each stage.
        cached: whether the compiled files came from the cache.
        evidence: what was measured; None where nothing was verified.
        unverified: why nothing was verified, or None.
        tuning: what the search for tiles found, or None.
    """

    bundle: Bundle
    steps: list[StepRecord]
    seconds: Mapping[str, float]
    cached: bool
    evidence: Evidence | None
    unverified: DeviceFailed | None = None
    tuning: Tuning | None = None


def run(
    request: Request, *, cache: Cache | None = None, progress: Progress | None = None
) -> Result:
    """Compress, compile, bundle and verify a model.

    The folder appears when everything is done; a bundle whose gates failed is kept, with the
    verdicts in it, and so is one that no device could verify (`Result.unverified`). Whatever is
    raised or interrupts leaves the old bundle or none.

    Raises DeviceFailed before any work where `request.device` cannot run the target, and what
    `prepare` and `build` raise.
    """
    progress = progress or Progress(shown=False)
    if request.device is not None:
        open_device(request.device, request.target)  # a wrong name is better said at once
    with new_folder(request.output, overwrite=request.overwrite) as folder:
        prepared = prepare(
            request.model,
            request.recipe,
            target=request.target,
            device=request.device,
            calib=request.calib,
            train=request.train,
            evaluation=request.eval,
            input_shapes=request.input_shapes,
            cache=cache,
            progress=progress,
        )
        tiles, tuning = _tiles(request, prepared, cache, progress)
        built = build(
            prepared,
            request.recipe,
            request.target,
            folder,
            tiles=tiles,
            cache=cache,
            progress=progress,
        )
        evidence = unverified = None
        if request.check:
            try:
                evidence = _verify(request, prepared, built.bundle, cache, progress)
            except DeviceFailed as error:
                unverified = error
    return Result(
        bundle=read_bundle(request.output),
        steps=prepared.steps,
        seconds=built.seconds,
        cached=built.cached,
        evidence=evidence,
        unverified=unverified,
        tuning=tuning,
    )


def _tiles(
    request: Request, prepared: Prepared, cache: Cache | None, progress: Progress
) -> tuple[Mapping[str, TileSizes], Tuning | None]:
    """Return the tiles found on the device, after a search where one is asked for."""
    if request.tune_minutes is None:
        return known_tiles(request.target, request.device, cache), None
    from edgepress.pipeline.tuning import tune  # imports TVM

    device = open_device(request.device, request.target)
    tuned = tuned_tiles(request.target, device, cache)
    tuning = tune(
        prepared.compressed.load(),
        request.target,
        device,
        tuned,
        minutes=request.tune_minutes,
        progress=progress,
    )
    progress.note(f"tune: {tuning}")
    return tuned.tiles, tuning


def _verify(
    request: Request,
    prepared: Prepared,
    bundle: Bundle,
    cache: Cache | None,
    progress: Progress,
) -> Evidence:
    device = open_device(request.device, request.target)
    evidence = verify(
        ExpectedAnswers(bundle, original=prepared.original, samples=prepared.evaluation),
        device,
        budget=request.recipe.budget,
        measuring=Measuring(threads=request.threads),
        progress=progress,
    )
    if prepared.precision is not None:
        costs = trial_costs(
            prepared,
            request.recipe,
            request.target,
            device,
            bundle,
            threads=request.threads,
            cache=cache,
            progress=progress,
        )
        trials = [dataclasses.asdict(cost) for cost in costs]
        evidence = dataclasses.replace(evidence, trials=trials)
    write_evidence(bundle, evidence.to_json())
    return evidence
