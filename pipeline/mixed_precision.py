"""Mixed precision: raise the layers that cost most accuracy until the recipe's gate holds.

A model that `quantize-int8` made and that misses `accuracy_drop` or `sqnr_db` is quantized again
with some layers at a higher precision. What each layer alone adds to the error is measured with the
switches of `passes.analysis`, on calibration samples. Errors of layers add up well, so the moves
(`precision_moves`) are put in order by what each takes away of what those before it left.

As long as 16 bits alone should do, nothing is raised to float: a model of integers gives the same
bits on every board.

How many moves are needed is found in two stages (`precision_search`). The switches can run any
prefix of that order without quantizing anything, which tells the shortest that should hold. That
one is quantized for real and judged, and corrects the next guess. So a handful of models are made,
whatever the number of layers.

The figures are those of onnxruntime on the quantized graph. The bundle's own are measured when it
is verified, and they are what counts. They differ in the last bits, so that the search aims a
little higher than the budget.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgepress.calibration.base import Array, Samples
from edgepress.passes.analysis import QuantizationSwitches, node_macs, quantization_switches
from edgepress.passes.base import Context, LayerTimer, Pass, PassRefused
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline.accuracy import accuracy
from edgepress.pipeline.cache import Cache, code_version, content_key
from edgepress.pipeline.driver import Driver, Equivalence, StepRecord
from edgepress.pipeline.feeds import input_shapes, spread
from edgepress.pipeline.oracle import MAX_SQNR_DB, Oracle, Outputs
from edgepress.pipeline.precision_moves import LayerError, Layers, Move, layer_errors
from edgepress.pipeline.precision_search import Figures, PrefixSearch
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import FLOAT, INT16, Budget
from edgepress.pipeline.snapshot import Snapshot

NAME = "mixed-precision"
#: How many samples rank the layers: as many as this many multiply-accumulates are, within limits.
RANKED_MACS, RANKED_SAMPLES = 2_000_000_000, (4, 32)
#: How many samples at most the prefixes are tried on.
TRIED_SAMPLES = 256
#: How much more SQNR than the budget's is aimed at.
MARGIN_DB = 0.25


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model that was quantized for real.

    Attributes:
        int16: names of the layers that read and write 16 bits.
        floats: names of the layers that stay float.
        figures: what `accuracy` says of it.
        holds: whether the gates on accuracy hold.
        size_bytes: of all constants.
        model: after the last pass.
        records: one per pass from `quantize-int8` on.
    """

    int16: tuple[str, ...]
    floats: tuple[str, ...]
    figures: Mapping[str, Any]
    holds: bool
    size_bytes: int
    model: Snapshot = field(repr=False)
    records: Sequence[StepRecord] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Return what depends on the inputs alone, as plain data."""
        keys = ("sqnr_db", "drop", "agreement", "top1")
        return {
            "int16": list(self.int16),
            "float": list(self.floats),
            **{key: self.figures[key] for key in keys},
            "holds": self.holds,
            "size_bytes": self.size_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What was tried, and what came of it.

    Attributes:
        trials: in the order in which they were made; the first has nothing raised.
        chosen: number of the one that is kept: the one that holds with the least raised, or the
            best where none holds.
        notes: sentences that the user should read.
        seconds: wall time.
    """

    trials: list[Trial]
    chosen: int
    notes: list[str]
    seconds: float = 0.0

    @property
    def best(self) -> Trial:
        """The trial that is kept."""
        return self.trials[self.chosen]

    def record(self) -> StepRecord:
        """Describe the search as a step, which comes after those of the trial that is kept."""
        best, last = self.best, self.best.records[-1]
        return StepRecord(
            pass_name=NAME,
            options={},
            modified=self.chosen != 0,
            lossless=False,
            stats={
                "models_tried": len(self.trials),
                "layers_int16": len(best.int16),
                "layers_float": len(best.floats),
            },
            notes=self.notes,
            parameters=last.parameters,
            macs=last.macs,
            size_bytes=last.size_bytes,
            equivalence=Equivalence(metric="sqnr_db", value=best.figures["sqnr_db"]),
            trials=[
                {**trial.facts(), "chosen": number == self.chosen}
                for number, trial in enumerate(self.trials)
            ],
            seconds=self.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a search works with.

    Attributes:
        base: the model right before `quantize-int8`.
        passes: `quantize-int8` and the passes behind it.
        timers: one per pass.
        context: for the passes; its samples rank the layers.
        budget: the gates, and what layers may be raised to.
        original: the model that accuracy is held against.
        evaluation: the samples that decide; None where those of the context have to.
        cache: keeps finished steps and the errors of layers, or None.
        progress: where to say how far it is.
    """

    base: Snapshot
    passes: Sequence[Pass]
    timers: Sequence[LayerTimer | None]
    context: Context
    budget: Budget
    original: Snapshot
    evaluation: Samples | None
    cache: Cache | None
    progress: Progress


def has_accuracy_gate(budget: Budget) -> bool:
    """Whether raising layers can help to hold a budget, and may be tried."""
    return bool(budget.raise_to) and (budget.accuracy_drop, budget.sqnr_db) != (None, None)


def shortfall(budget: Budget, figures: Mapping[str, Any]) -> tuple[int, float]:
    """Return how many gates on accuracy are missed, and by how many dB and points together.

    A figure that could not be measured misses its gate, infinitely.
    """
    missed = []
    for limit, value, sign in (
        (budget.sqnr_db, figures["sqnr_db"], 1),
        (budget.accuracy_drop, figures["drop"], -1),
    ):
        if limit is not None:
            short = float("inf") if value is None else sign * (limit - value)
            missed += [short] if short > 0 else []
    return len(missed), sum(missed)


def raise_precision(
    task: Task, model: Snapshot, records: Sequence[StepRecord]
) -> MixedPrecision | None:
    """Raise layers of a quantized model until it holds the gates on accuracy.

    Args:
        task: what to work with.
        model: what `task.passes` made with nothing raised.
        records: of these passes.

    Returns:
        None where nothing has to be raised.

    Raises:
        PassError, CalibrationError, TargetError: as the passes do.
    """
    started = time.perf_counter()
    search = _Search(task)
    with task.progress.step("judge the quantized model"):
        search.judge(model, records, ())
    first = search.trials[0]
    if search.reaches(first):
        return None
    if task.evaluation is None:
        search.notes.append(
            "judged on the calibration samples, which flatter; give others with --eval"
        )
    if not records[0].modified:
        search.notes.append("nothing is raised: quantize-int8 did not quantize this model")
    elif task.budget.accuracy_drop is not None and first.figures["drop"] is None:
        search.notes.append(
            "nothing is raised: accuracy_drop needs an output that is a vector of scores; "
            "set sqnr_db instead"
        )
    else:
        search.run(model)
    return search.result(time.perf_counter() - started)


class _Search:
    """Trials, and what they are held against."""

    def __init__(self, task: Task) -> None:
        samples = task.evaluation or task.context.samples
        assert samples is not None, "quantize-int8 does not run without samples"
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self._task = task
        self._aim = task.budget
        if task.budget.sqnr_db is not None:
            higher = min(task.budget.sqnr_db + MARGIN_DB, MAX_SQNR_DB)
            self._aim = dataclasses.replace(task.budget, sqnr_db=higher)
        self._float = task.base.load()
        self._shapes = input_shapes(self._float) or {}
        self._all = _Held(task.original, samples, self._shapes)
        few = spread(samples, TRIED_SAMPLES)
        self._few = self._all if few is samples else _Held(task.original, few, self._shapes)

    def run(self, model: Snapshot) -> None:
        """Raise layers to int16 where that should do, or else to int16 and float."""
        kinds = self._task.budget.raise_to
        switches = quantization_switches(model.load(), self._float)
        names = {node.name for node in self._float.graph}
        self._nodes = {
            layer.name: tuple(name for name in layer.nodes if name in names)
            for layer in switches.layers
        }
        layers = Layers(switches.layers, [name for name, nodes in self._nodes.items() if nodes])
        with self._task.progress.step(f"rank {len(layers.movable)} layers"):
            errors = self._errors(model, switches)
        try:
            # integers alone give the same bits everywhere, so float has to be needed
            if len(kinds) == 1 or not self._climb(layers, errors, (INT16,), switches):
                self._climb(layers, errors, kinds, switches)
        except PassRefused as error:
            if error.where != INT16 or FLOAT not in kinds:
                raise
            self.notes.append(f"nothing is raised to int16: {error.why}")
            del self.trials[1:]
            self._climb(layers, errors, (FLOAT,), switches)

    def reaches(self, trial: Trial) -> bool:
        """Whether a trial is as good as is aimed at."""
        return shortfall(self._aim, trial.figures)[0] == 0

    def _errors(self, model: Snapshot, switches: QuantizationSwitches) -> dict[str, LayerError]:
        """Measure what every layer alone adds, or take it from the cache."""
        task = self._task
        assert task.context.samples is not None, "as above"
        fewest, most = RANKED_SAMPLES
        affordable = RANKED_MACS // max(sum(map(node_macs, self._float.graph)), 1)
        samples = spread(task.context.samples, min(max(affordable, fewest), most))
        key = content_key(
            "layer-errors",
            code_version("edgepress.passes", "edgepress.pipeline"),
            task.base.digest,
            model.digest,
            samples.sha256(),
        )
        entry = task.cache.get(key) if task.cache else None
        if entry is not None:
            stored = json.loads((entry / "errors.json").read_text("utf-8"))
            return {name: LayerError(*pair) for name, pair in stored.items()}
        errors = layer_errors(switches, list(samples.feeds(self._shapes)), task.progress)

        def fill(folder: Path) -> None:
            pairs = {name: dataclasses.astuple(error) for name, error in errors.items()}
            (folder / "errors.json").write_text(json.dumps(pairs), "utf-8")

        if task.cache:
            task.cache.put(key, fill)
        return errors

    def _climb(
        self,
        layers: Layers,
        errors: Mapping[str, LayerError],
        kinds: Sequence[str],
        switches: QuantizationSwitches,
    ) -> bool:
        """Try prefixes of the moves to these precisions; return whether one is good enough."""
        moves = layers.order(errors, kinds)

        def predict(length: int) -> Figures:
            activations, constants = layers.quantized(moves[:length])
            return self._few.figures(
                lambda feed: switches.run(feed, activations, constants=constants)
            )

        choose = self._task.progress.step
        with choose("choose layers to raise"):
            search = PrefixSearch(
                len(moves),
                self.trials[0].figures,
                predict,
                lambda figures: shortfall(self._aim, figures)[0] == 0,
            )
            if kinds != self._task.budget.raise_to and search.hopeless():
                return False
            length = search.next()
        while length is not None:
            search.tell(length, self._make(moves[:length]).figures)
            with choose("choose layers to raise"):
                length = search.next()
        return search.found

    def _make(self, moves: Sequence[Move]) -> Trial:
        """Quantize for real, with these moves."""
        task = self._task
        quantize = task.passes[0]
        assert isinstance(quantize, QuantizeInt8), "that is what `task.passes` begins with"
        raised = dataclasses.replace(
            quantize,
            int16=(*quantize.int16, *self._patterns(moves, INT16)),
            skip=(*quantize.skip, *self._patterns(moves, FLOAT)),
        )
        driver = Driver(task.base.load(), cache=task.cache, progress=task.progress)
        driver.run([raised, *task.passes[1:]], task.context, task.timers)
        with task.progress.step("judge"):
            return self.judge(driver.snapshot, driver.records, moves)

    def _patterns(self, moves: Sequence[Move], to: str) -> list[str]:
        """Return regular expressions for the nodes of the layers that are raised to this."""
        names = [name for move in moves if move.to == to for name in self._nodes[move.layer]]
        return [re.escape(name) for name in names]

    def judge(self, model: Snapshot, records: Sequence[StepRecord], moves: Sequence[Move]) -> Trial:
        """Run a model on all samples and add it to the trials."""
        oracle = Oracle(model.model)
        figures = self._all.figures(oracle.run)
        trial = Trial(
            int16=tuple(move.layer for move in moves if move.to == INT16),
            floats=tuple(move.layer for move in moves if move.to == FLOAT),
            figures=figures,
            holds=shortfall(self._task.budget, figures)[0] == 0,
            size_bytes=records[-1].size_bytes,
            model=model,
            records=records,
        )
        self.trials.append(trial)
        return trial

    def result(self, seconds: float) -> MixedPrecision:
        """Choose the trial that is kept."""

        def worth(number: int) -> tuple[tuple[int, float], int, int]:
            trial = self.trials[number]
            raised = len(trial.int16) + len(trial.floats)
            return shortfall(self._aim, trial.figures), raised, number

        chosen = min(range(len(self.trials)), key=worth)
        if not self.trials[chosen].holds and len(self.trials) > 1:
            self.notes.append(
                "the budget does not hold even with every layer raised; the best is kept"
            )
        return MixedPrecision(trials=self.trials, chosen=chosen, notes=self.notes, seconds=seconds)


@dataclass(frozen=True)
class _Held:
    """Samples, and how to hold answers against those of the original model."""

    original: Snapshot
    samples: Samples
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def _expected(self) -> Outputs:
        oracle = Oracle(self.original.model)
        return [oracle.run(feed) for feed in self.samples.feeds(self.shapes)]

    def figures(self, answer: Callable[[dict[str, Array]], Mapping[str, Array]]) -> dict[str, Any]:
        """Return `accuracy` of what answers all samples."""
        got = [answer(feed) for feed in self.samples.feeds(self.shapes)]
        return accuracy(self.samples, got, self._expected)
