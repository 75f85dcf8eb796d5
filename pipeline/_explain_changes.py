"""Changes of a bundle's recipe, each made and measured: what it does to the error and to the cost.

Accuracy: the float model is quantized anew with the change, and its outputs are compared to those
in float, on the samples. Cost: the result is compiled for the target and raced against the bundle
on the device, interleaved, so that a machine that slows down slows both. Under an emulator
instructions are counted instead.

The error of every change is measured, the cost only of those that are shown and of those that can
only save time.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepress.calibration.base import CalibrationError
from edgepress.passes.base import Pass, PassError, pass_class, pass_names
from edgepress.pipeline._explain_layers import Layer
from edgepress.pipeline._explain_measure import Errors
from edgepress.pipeline._explain_workbench import Workbench
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import load_recipe
from edgepress.pipeline.snapshot import Snapshot
from edgepress.targets.base import CompileFailed, Target, UnsupportedModel
from edgepress.targets.devices.base import Device

SHOWN = 3
WORST_LAYERS = 3  # that are tried at a higher precision
LEAST_SHARE = 0.02  # of the error, to be tried
LEAST_GAIN_DB, LEAST_SAVING = 0.1, 0.03
FLOAT_HANDICAP_DB = 1.0  # with a layer in float, answers are no longer the same bits everywhere
#: Per pass: what helps, in words; the option and its value; whether it is about weights, which the
#: original ones are needed for.
OPTIONS: dict[str, list[tuple[str, str, Any, bool]]] = {
    "quantize-int8": [
        ("one weight scale per channel", "per_channel", True, True),
        ("adaptive rounding of weights", "rounding", "adaptive", True),
        ("bias correction", "bias_correction", True, True),
        ("affine activations", "symmetric", False, False),
        ("the best choice per tensor", "method", "best", True),
    ],
    "quantize-fixed-point": [
        ("16 bits", "bits", 16, False),
        ("one weight scale per channel", "per_channel", True, True),
        ("bias correction", "bias_correction", True, True),
    ],
    "quantize-dynamic": [("one weight scale per channel", "per_channel", True, True)],
}
CALIBRATIONS = ("mse", "percentile", "entropy", "min_max")
ROUNDS, SECONDS, RUNS = 5, 0.2, 10
MOST_WEIGHT_BYTES = 512 << 20  # of a bundle that is built again to be raced


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the recipe and its measured effect.

    Attributes:
        name: what is changed, in words.
        why: the finding that led to it.
        recipe: the tables to write instead of those of the same names, as TOML.
        sqnr_before_db: of the outputs before the change, against those in float.
        sqnr_after_db: after it.
        sqnr_gain_db: the difference; None where the bundle is float.
        cost_before: of one inference, in the unit of the explanation; None where not measured.
        cost_after: likewise.
        cost_ratio: after over before, the median over rounds.
        cost_ratio_range: least and largest over rounds; None under an emulator, which counts.
    """

    name: str
    why: str
    recipe: str
    sqnr_before_db: float | None
    sqnr_after_db: float
    sqnr_gain_db: float | None
    cost_before: float | None = None
    cost_after: float | None = None
    cost_ratio: float | None = None
    cost_ratio_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change before it is measured.

    Attributes:
        name: as in Change.
        why: as in Change.
        passes: all passes that quantize, with the change.
        changed: those of them that differ, for the recipe.
        group: of candidates in one group only the best is shown.
        saves_time: whether that is what it is for.
        handicap_db: what it must gain more than another of its group to be shown.
    """

    name: str
    why: str
    passes: tuple[Pass, ...]
    changed: tuple[Pass, ...]
    group: str
    saves_time: bool = False
    handicap_db: float = 0.0


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    model: Snapshot
    change: Change


def measure_changes(
    work: Workbench,
    layers: Sequence[Layer],
    errors: Errors | None,
    device: Device | None,
    bundle_folder: Path,
    weight_bytes: int,
    target: Target,
    progress: Progress,
) -> tuple[list[Change], int]:
    """Try changes and return the three that help most, and how many were tried.

    Changes that could not be made are in `work.notes`.
    """
    found = candidates(work, layers, errors)
    before = work.bundle_db
    if before is not None and found:
        before = _baseline(work, progress)
    tried: list[_Tried] = []
    what = f"try {len(found)} changes"
    with progress.step(what):
        for done, candidate in enumerate(found):
            progress.update(f"{what}: {candidate.name}", done, len(found))
            try:
                model = work.quantized(candidate.passes)
            except (PassError, CalibrationError) as error:
                work.notes.append(f"{candidate.name}: not possible here: {error}")
                continue
            after = work.sqnr_db(model)
            change = Change(
                name=candidate.name,
                why=candidate.why,
                recipe=recipe_lines(candidate.changed),
                sqnr_before_db=before,
                sqnr_after_db=after,
                sqnr_gain_db=None if before is None else after - before,
            )
            tried.append(_Tried(candidate, model, change))
    race = _Race(work, device, bundle_folder, weight_bytes, target, progress)
    savers = [race.run(one) for one in tried if one.candidate.saves_time]
    savers = [
        one
        for one in savers
        if one.change.cost_ratio is not None and one.change.cost_ratio <= 1 - LEAST_SAVING
    ]
    savers.sort(key=lambda one: one.change.cost_ratio or 1.0)
    helpers = _best_of_groups([one for one in tried if not one.candidate.saves_time])
    chosen = [*savers[: SHOWN if not helpers else 1], *helpers]
    shown = [one if one.change.cost_ratio is not None else race.run(one) for one in chosen[:SHOWN]]
    return [one.change for one in shown], len(tried)


def candidates(work: Workbench, layers: Sequence[Layer], errors: Errors | None) -> list[Candidate]:
    """Return what the findings suggest."""
    index = next((i for i, p in enumerate(work.passes) if p.name in OPTIONS), None)
    if not work.passes and work.bundle_db is None:
        passes = load_recipe("default").passes
        return [
            Candidate(
                name="quantize to int8",
                why="everything runs in float",
                passes=passes,
                changed=passes,
                group="quantize",
                saves_time=True,
            )
        ]
    if index is None:
        work.notes.append("no change was tried: none is known for how this bundle was quantized")
        return []
    return [
        *_raised_layers(work, index, errors),
        *_options(work, index),
        *_calibrations(work),
        *_passes_before(work),
        *_unskipped(work, index, layers),
    ]


def _raised_layers(work: Workbench, index: int, errors: Errors | None) -> list[Candidate]:
    """Raise each of the layers that add most error, to 16-bit activations and to float."""
    if errors is None:
        return []
    shares = errors.shares()
    nodes = {layer.name: layer.nodes for layer in errors.layers}
    worst = sorted((name for name in shares if nodes[name]), key=lambda name: -shares[name])
    found = []
    for name in [n for n in worst if shares[n] >= LEAST_SHARE][:WORST_LAYERS]:
        why = f"{name} adds {shares[name]:.0%} of the error"
        pattern = re.escape(name)
        for option, words in (("int16", "int16 activations"), ("skip", "float")):
            given = getattr(work.passes[index], option, None)
            if given is None or pattern in given:
                continue
            patterns: tuple[str, ...] = (pattern,)
            if option == "skip":  # what is fused with it must not be quantized alone
                patterns = tuple(map(re.escape, nodes[name]))
            change = _with(
                work, index, f"{name} in {words}", why, {option: (*given, *patterns)}, name
            )
            handicap_db = FLOAT_HANDICAP_DB if option == "skip" else 0.0
            found.append(dataclasses.replace(change, handicap_db=handicap_db))
    return found


def _options(work: Workbench, index: int) -> list[Candidate]:
    """Options of the pass that quantizes which the bundle was made without."""
    quantize = work.passes[index]
    return [
        _with(work, index, words, f"{option} is {_toml(given)}", {option: value}, option)
        for words, option, value, about_weights in OPTIONS[quantize.name]
        if (given := getattr(quantize, option, None)) is not None
        and given != value
        and (work.from_original or not about_weights)
    ]


def _calibrations(work: Workbench) -> list[Candidate]:
    """Other ways to choose the ranges of activations."""
    at = next((i for i, p in enumerate(work.passes) if p.name == "calibrate"), None)
    if at is None:
        return []
    given = getattr(work.passes[at], "method", None)
    return [
        _with(
            work,
            at,
            f"calibrate by {method}",
            f"ranges are by {given}",
            {"method": method},
            "range",
        )
        for method in CALIBRATIONS
        if method != given
    ]


def _passes_before(work: Workbench) -> list[Candidate]:
    """Passes that make a model easier to quantize, which change weights."""
    found = []
    for name in ("equalize-layers", "smooth-activations"):
        if work.from_original and name in pass_names() and all(p.name != name for p in work.passes):
            new = pass_class(name)()
            found.append(
                Candidate(
                    name=name,
                    why=f"the recipe has no {name}",
                    passes=(new, *work.passes),
                    changed=(new,),
                    group=name,
                )
            )
    return found


def _unskipped(work: Workbench, index: int, layers: Sequence[Layer]) -> list[Candidate]:
    """Quantize what a pattern of `skip` left in float, where that takes time."""
    given: tuple[str, ...] = getattr(work.passes[index], "skip", ())
    found = []
    for pattern in given:
        floats = [
            layer.name
            for layer in layers
            if layer.float_island and any(re.fullmatch(pattern, name) for name in layer.nodes)
        ]
        if floats:
            fewer = tuple(other for other in given if other != pattern)
            why = f"{', '.join(floats[:3])} in float"
            change = _with(work, index, f"no skip of {pattern!r}", why, {"skip": fewer}, pattern)
            found.append(dataclasses.replace(change, saves_time=True))
    return found


def _with(
    work: Workbench, index: int, name: str, why: str, options: dict[str, Any], group: str
) -> Candidate:
    """Change options of one pass."""
    changed = dataclasses.replace(work.passes[index], **options)
    passes = (*work.passes[:index], changed, *work.passes[index + 1 :])
    return Candidate(name=name, why=why, passes=passes, changed=(changed,), group=group)


def _best_of_groups(tried: Sequence[_Tried]) -> list[_Tried]:
    """Return the best of every group that gains something, by falling gain."""
    best: dict[str, _Tried] = {}

    def gain(one: _Tried) -> float:
        return one.change.sqnr_gain_db or 0.0

    for one in sorted(tried, key=lambda one: one.candidate.handicap_db - gain(one)):
        if gain(one) >= LEAST_GAIN_DB:
            best.setdefault(one.candidate.group, one)
    return sorted(best.values(), key=lambda one: -gain(one))


def _baseline(work: Workbench, progress: Progress) -> float | None:
    """Quantize without a change: what changes are compared to. It should be the bundle's graph."""
    with progress.step("quantize again"):
        again = work.sqnr_db(work.quantized(work.passes))
    if work.bundle_db is not None and abs(again - work.bundle_db) > LEAST_GAIN_DB:
        work.notes.append(
            f"quantizing again gives {again:.1f} dB where the bundle has {work.bundle_db:.1f} dB: "
            "changes are compared to the former"
        )
    return again


class _Race:
    """Builds changed models and times them against the bundle."""

    def __init__(
        self,
        work: Workbench,
        device: Device | None,
        bundle_folder: Path,
        weight_bytes: int,
        target: Target,
        progress: Progress,
    ) -> None:
        self._work, self._device, self._bundle = work, device, bundle_folder
        self._target, self._progress = target, progress
        self._too_large = weight_bytes > MOST_WEIGHT_BYTES

    def run(self, tried: _Tried) -> _Tried:
        """Add what a change costs; leave it out where that cannot be measured, with a note."""
        name = tried.change.name
        if self._device is None:
            return tried
        if self._too_large:
            self._work.notes.append(f"{name}: the bundle is too large to be built again and raced")
            return tried
        with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
            folder = Path(temporary) / "changed"
            try:
                with self._progress.step(f"build: {name}"):
                    self._build(tried.model, folder)
            except (UnsupportedModel, CompileFailed) as error:
                self._work.notes.append(f"{name}: it cannot be compiled: {error}")
                return tried
            costs = self._measure(folder, name)
        if costs is None:
            return tried
        before, after = costs
        ratios = sorted(b / a for a, b in zip(before, after, strict=True) if a)
        change = dataclasses.replace(
            tried.change,
            cost_before=statistics.median(before),
            cost_after=statistics.median(after),
            cost_ratio=statistics.median(ratios) if ratios else None,
            cost_ratio_range=(ratios[0], ratios[-1]) if len(ratios) > 1 else None,
        )
        return dataclasses.replace(tried, change=change)

    def _build(self, model: Snapshot, folder: Path) -> None:
        from edgepress.targets.compile import compile_kernels  # imports TVM
        from edgepress.targets.export import export
        from edgepress.targets.lowering.build import lower

        program = lower(model.load(), self._target)
        code = compile_kernels(program, self._target)
        tolerances = [0.0] * len(program.outputs)
        export(program, code, self._target, folder, name="changed", tolerances=tolerances)

    def _measure(self, folder: Path, name: str) -> tuple[list[float], list[float]] | None:
        """Time both in turns; None where an emulator cannot count."""
        device = self._device
        assert device is not None
        rounds = 1 if device.emulated else ROUNDS
        costs: tuple[list[float], list[float]] = ([], [])
        with self._progress.step(f"race: {name}"):
            for done in range(rounds):
                self._progress.update(f"race: {name}", done, rounds)
                for path, times in zip((self._bundle, folder), costs, strict=True):
                    measured = device.bench(path, threads=None, seconds=SECONDS, runs=RUNS)
                    if not device.emulated:
                        times.append(statistics.median(measured.samples_ms))
                    elif measured.instructions is not None:
                        times.append(float(measured.instructions))
        return costs if all(costs) else None


def recipe_lines(passes: Sequence[Pass]) -> str:
    """Write passes as a recipe does, without the options that have their defaults.

    >>> from edgepress.passes.calibrate import Calibrate
    >>> print(recipe_lines([Calibrate(method="mse")]))
    [[pass]]
    name = "calibrate"
    method = "mse"
    """
    tables = []
    for step in passes:
        lines = ["[[pass]]", f'name = "{step.name}"']
        for option in dataclasses.fields(step):
            value = getattr(step, option.name)
            if value != option.default:
                lines.append(f"{option.name} = {_toml(value)}")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _toml(value: Any) -> str:
    """Write a value; patterns as literal strings, since they hold backslashes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'" if "\\" in value and "'" not in value else _quoted(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
