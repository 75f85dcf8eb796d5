"""Runs the samples through the model and notes the range of every activation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgepress.calibration.base import Array, CalibrationError, Calibrator, calibrator_class
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

#: Activations that are alive at once; a model with more of them is run several times.
TAPPED_BYTES = 256 * 2**20


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

    needs_samples: ClassVar[bool] = True

    method: str = "min_max"
    percentile: float | None = None

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse without samples, with an unknown method, and with shapes that are not fixed."""
        try:
            self._calibrator()
        except CalibrationError as error:
            raise PassRefused(self.name, "method", str(error)) from error
        if self.percentile is not None and self.method != "percentile":
            raise PassRefused(
                self.name,
                "percentile",
                f"method {self.method!r} takes none; remove it or set method = 'percentile'.",
            )
        if context.samples is None or not len(context.samples):
            raise PassRefused(self.name, "samples", "there are none; give some with --calib.")
        for value in model.graph.inputs:
            _input_shape(self.name, value)
            if value.name not in context.samples.inputs:
                known = ", ".join(context.samples.inputs)
                raise PassRefused(
                    self.name,
                    f"input {value.name!r}",
                    f"{context.samples.source} has no samples of it, only of {known}; "
                    "name the arrays after the model's inputs.",
                )

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Watch every activation and note its range."""
        assert context.samples is not None, "the driver calls `requires` first"
        shapes = {name_of(value): _input_shape(self.name, value) for value in model.graph.inputs}
        inputs = [value for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT]
        groups = list(_grouped(_inner_activations(model))) or [[]]
        sweeps = self._calibrator().sweeps
        done, rounds = 0, len(groups) * sweeps * len(context.samples)
        for number, group in enumerate(groups):
            watched = group if number else inputs + group
            calibrators = {name_of(value): self._calibrator() for value in watched}
            session = self._session(model, group) if group else None
            for sweep in range(sweeps):
                for index, feed in enumerate(context.samples.feeds(shapes)):
                    values = feed | (self._run(session, feed, index) if session else {})
                    for name, calibrator in calibrators.items():
                        if sweep == 0 and not np.isfinite(values[name]).all():
                            raise self._non_finite(name, index, values[name])
                        calibrator.observe(values[name], sweep)
                    done += 1
                    context.progress("calibrate", done, rounds)
            for value in watched:
                value.meta["range"] = calibrators[name_of(value)].range()
        ranges = len(inputs) + sum(map(len, groups))
        return Outcome(
            model=model,
            modified=False,
            stats={"ranges": ranges, "samples": len(context.samples)},
        )

    def _calibrator(self) -> Calibrator:
        """Make one calibrator, for one tensor."""
        method = calibrator_class(self.method)
        options = {} if self.percentile is None else {"percentile": self.percentile}
        return method(**options) if self.method == "percentile" else method()

    def _session(self, model: ir.Model, group: list[ir.Value]) -> ort.InferenceSession:
        """Open a session on a copy of the model whose outputs are this group of activations."""
        copy = model.clone()
        by_name = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(by_name[value.name] for value in group)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            return ort.InferenceSession(
                ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise PassRefused(
                self.name, "model", f"onnxruntime cannot load it, so nothing is measured: {error}"
            ) from error

    def _run(
        self, session: ort.InferenceSession, feed: dict[str, Array], index: int
    ) -> dict[str, Array]:
        """Run one sample and return the activations by name."""
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, feed), strict=True))
        except Exception as error:  # as above
            raise PassRefused(
                self.name, f"sample {index}", f"onnxruntime cannot run the model on it: {error}"
            ) from error

    def _non_finite(self, name: str, index: int, values: Array) -> PassRefused:
        """Say which value is not finite."""
        what = "NaN" if np.isnan(values).any() else "infinite"
        return PassRefused(
            self.name,
            f"value {name!r}",
            f"it is {what} for sample {index}, so it has no range; check the sample's "
            "preprocessing, or replace infinities in the model by large numbers.",
        )


def name_of(value: ir.Value) -> str:
    """The value's name; a value of a graph always has one."""
    assert value.name, "values of a graph are named"
    return value.name


def _input_shape(pass_name: str, value: ir.Value) -> tuple[int, ...]:
    """Return the fixed shape of a model input, or refuse."""
    shape = value.shape
    if shape is None or not shape.is_static():
        raise PassRefused(
            pass_name,
            f"input {value.name!r}",
            f"its shape {shape} is not fixed; give one with --input-shape.",
        )
    return shape.numpy()


def _inner_activations(model: ir.Model) -> list[ir.Value]:
    """Every non-empty float32 value that a node computes, in graph order."""
    values = (value for node in model.graph for value in node.outputs)
    floats = (value for value in values if value.name and value.dtype == ir.DataType.FLOAT)
    return [value for value in floats if _size_bytes(value)]


def _size_bytes(value: ir.Value) -> int:
    """Bytes of a float32 value; a guess on the safe side where its shape is not known."""
    if value.shape is None or not value.shape.is_static():
        return TAPPED_BYTES // 16
    return 4 * math.prod(value.shape.numpy())


def _grouped(values: list[ir.Value]) -> Iterator[list[ir.Value]]:
    """Split into groups that together take at most TAPPED_BYTES, or hold a single value."""
    group: list[ir.Value] = []
    used = 0
    for value in values:
        if group and used + _size_bytes(value) > TAPPED_BYTES:
            yield group
            group, used = [], 0
        group.append(value)
        used += _size_bytes(value)
    if group:
        yield group
