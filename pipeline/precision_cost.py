"""What raising layers costs on the device: every model that was tried is built and timed there.

All of them take turns, so that a disturbance hits them alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.build import build
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.prepare import Prepared
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import Recipe
from edgepress.targets.base import Target, TargetError
from edgepress.targets.devices.base import Device

ROUNDS, SECONDS, RUNS = 3, 0.3, 20


@dataclass(frozen=True, kw_only=True)
class TrialCost:
    """What one of the tried models costs.

    Attributes:
        latency_ms: median over the rounds of each round's median; None where nothing was measured.
        deployed_bytes: executable and coded weights; None where the model was not built.
        detail: one sentence: how it was measured, or why it was not.
    """

    latency_ms: float | None
    deployed_bytes: int | None
    detail: str


def trial_costs(
    prepared: Prepared,
    recipe: Recipe,
    target: Target,
    device: Device,
    chosen: Bundle,
    *,
    threads: int | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> list[TrialCost]:
    """Build and time the models that a search for mixed precision tried, in their order.

    Under an emulator nothing is built, since its times say nothing about the board.

    Args:
        prepared: holds the trials; `prepared.precision` is not None.
        recipe: as the bundle was built.
        target: likewise.
        device: where to measure.
        chosen: the bundle of the trial that was kept.
        threads: to time on; None takes as many as the target has cores.
        cache: keeps what was compiled, or None.
        progress: where to say how far it is.

    Raises:
        DeviceFailed: the device failed.
    """
    progress = progress or Progress(shown=False)
    precision = prepared.precision
    assert precision is not None, "there is nothing to measure otherwise"
    if device.emulated:
        why = f"unverified: {device.name} is an emulator, whose times say nothing about the board"
        return [
            TrialCost(
                latency_ms=None,
                deployed_bytes=chosen.deployed_bytes if number == precision.chosen else None,
                detail=why,
            )
            for number in range(len(precision.trials))
        ]
    built: dict[int, Bundle] = {precision.chosen: chosen}
    failures: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        for number, trial in enumerate(precision.trials):
            if number == precision.chosen:
                continue
            folder = Path(temporary) / str(number)
            folder.mkdir()
            model = dataclasses.replace(
                prepared, compressed=trial.model, steps=list(trial.records), precision=None
            )
            try:
                built[number] = build(
                    model, recipe, target, folder, cache=cache, progress=progress
                ).bundle
            except TargetError as error:
                failures[number] = f"not measured: it cannot be built: {error}"
        with progress.step(f"time {len(built)} models on {device.name}"):
            medians = _measure(built, device, threads, progress)
    costs = []
    for number in range(len(precision.trials)):
        if number in failures:
            costs.append(TrialCost(latency_ms=None, deployed_bytes=None, detail=failures[number]))
            continue
        costs.append(
            TrialCost(
                latency_ms=medians[number],
                deployed_bytes=built[number].deployed_bytes,
                detail=f"median of {ROUNDS} rounds in turn on {device.name}",
            )
        )
    return costs


def _measure(
    built: dict[int, Bundle], device: Device, threads: int | None, progress: Progress
) -> dict[int, float]:
    """Time all bundles in turn; return their medians in ms."""
    medians: dict[int, list[float]] = {number: [] for number in built}
    for done in range(ROUNDS):
        progress.update("time models", done, ROUNDS)
        for number, bundle in built.items():
            measured = device.bench(bundle.folder, threads=threads, seconds=SECONDS, runs=RUNS)
            medians[number].append(statistics.median(measured.samples_ms))
    return {number: statistics.median(each) for number, each in medians.items()}
