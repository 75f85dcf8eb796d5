"""Runs the samples through the model and notes the range of every activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import CalibrationError, Calibrator, Samples, calibrator_class
from edgepress.passes._taps import grouped, input_shapes, open_taps, size_bytes
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

LISTED = 8  # tensors that a note names


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Notes the range of every float activation in `value.meta["range"]`, inputs included.

    The graph stays as it is. onnxruntime runs it with its optimisations off, one sample at a
    time, so the ranges are those of the values that the graph names.

    Attributes:
        method: how a range is chosen: "min_max", "percentile", "entropy" or "mse".
        percentile: with method "percentile", the share of the values that the range must hold,
            in per cent; None takes that method's default.
    """

    method: str = "min_max"
    percentile: float | None = None

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse without samples, with an unknown method, and with shapes that are not fixed.

        Raises CalibrationError for samples that do not fit the model's inputs or are not finite.
        """
        if self.percentile is not None and self.method != "percentile":
            raise PassRefused(
                self.name,
                "percentile",
                f"method {self.method!r} takes none; remove it or set method = 'percentile'.",
            )
        try:
            self._calibrator()
        except CalibrationError as error:
            raise PassRefused(self.name, "method", str(error)) from error
        if context.samples is None or not len(context.samples):
            raise PassRefused(self.name, "samples", "there are none; give some with --calib.")
        for name in input_shapes(self.name, model):
            if name not in context.samples.inputs:
                known = ", ".join(context.samples.inputs)
                raise PassRefused(
                    self.name,
                    f"input {name!r}",
                    f"{context.samples.source} has no samples of it, only of {known}; "
                    "name the arrays after the model's inputs.",
                )
        context.samples.demand(input_shapes(self.name, model), _dtypes(model))

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Watch every activation and note its range."""
        assert context.samples is not None, "the driver calls `requires` first"
        shapes = input_shapes(self.name, model)
        values = _activations(model)
        groups = list(grouped(values))
        sweeps = self._calibrator().sweeps
        done, rounds = 0, len(groups) * sweeps * len(context.samples)
        for group in groups:
            tap = open_taps(self.name, model, group)
            calibrators = {value.name or "": self._calibrator() for value in group}
            for sweep in range(sweeps):
                for index, feed in enumerate(context.samples.feeds(shapes)):
                    found = tap(feed, index)
                    for name, calibrator in calibrators.items():
                        calibrator.observe(found[name], sweep)
                    done += 1
                    context.progress("calibrate", done, rounds)
            for value in group:
                value.meta["range"] = calibrators[value.name or ""].range()
        stats = {"ranges": len(values), "samples": len(context.samples)}
        notes = [*_few_samples(context.samples), *_unchanging(values)]
        return Outcome(model=model, modified=False, stats={**stats}, notes=notes)

    def _calibrator(self) -> Calibrator:
        """Make one calibrator, for one tensor."""
        options: dict[str, Any] = {}
        if self.percentile is not None:
            options["percentile"] = self.percentile
        return calibrator_class(self.method)(**options)


def _activations(model: ir.Model) -> list[ir.Value]:
    """Every non-empty float32 value that is fed or computed, in graph order."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    floats = (value for value in values if value.name and value.dtype == ir.DataType.FLOAT)
    return [value for value in floats if size_bytes(value)]


def _dtypes(model: ir.Model) -> dict[str, np.dtype[Any]]:
    """The dtype of every model input."""
    known = ((value, value.dtype or ir.DataType.FLOAT) for value in model.graph.inputs)
    return {value.name or "": np.dtype(dtype.numpy()) for value, dtype in known}


def _few_samples(samples: Samples) -> Iterator[str]:
    """Warn where one sample decides all ranges."""
    if len(samples) == 1:
        yield "all ranges come from a single sample; give more, or other inputs may saturate"
    elif all((array == array[:1]).all() for array in samples.inputs.values()):
        yield f"all {len(samples)} samples are equal, so that all ranges come from a single one"


def _unchanging(values: list[ir.Value]) -> Iterator[str]:
    """Warn of tensors that held a single number: dead, or not exercised by the samples."""
    ranges = ((value, value.meta["range"]) for value in values)
    same = [f"{value.name} ({r.low:g})" for value, r in ranges if r.low == r.high]
    if same:
        more = f" and {len(same) - LISTED} more" if len(same) > LISTED else ""
        yield (
            f"these tensors held one number in all samples: {', '.join(same[:LISTED])}{more}; "
            "a value that the samples never showed will saturate"
        )
