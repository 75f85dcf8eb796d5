"""Samples, ranges and the contract of a calibrator.

Errors::

    CalibrationError       samples that cannot be used, or a range that is missing
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import edgepress.calibration

Array = npt.NDArray[Any]
_T = TypeVar("_T")
_NO_CALIBRATORS = ("base", "fixed_point", "importance", "qparams", "samples")


class CalibrationError(Exception):
    """Samples that cannot be used, or a range that is missing: what, where, what to do."""


@dataclass(frozen=True)
class Samples:
    """Samples of every model input, stacked on a leading axis.

    Attributes:
        inputs: input name to array `[n, *input shape without its batch axis of 1]`: one sample of
            an input `[1, 1, 28, 28]` is `[1, 28, 28]`; an input whose first axis is not a batch of
            1 keeps its whole shape behind the sample axis.
        labels: `[n]` int64, or None.
        source: where they came from, for messages.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    source: str = "samples"

    def __len__(self) -> int:
        return next(iter(self.inputs.values())).shape[0] if self.inputs else 0

    def feeds(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Array]]:
        """Yield one onnxruntime feed per sample, in the model's input shapes.

        Raises CalibrationError where an array is missing or does not fit its input.
        """
        for name, shape in shapes.items():
            self._demand_shape(name, shape)
        for i in range(len(self)):
            # the ellipsis keeps a single number an array, which onnxruntime insists on
            yield {name: self.inputs[name][i, ...].reshape(shape) for name, shape in shapes.items()}

    def demand(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]
    ) -> None:
        """Raise CalibrationError unless every input has samples that it can take, all finite."""
        for name, shape in shapes.items():
            self._demand_shape(name, shape)
            array, dtype = self.inputs[name], dtypes[name]
            if array.dtype != dtype:
                raise CalibrationError(
                    f"{self.source}: {name!r} has dtype {array.dtype}, the model's input is "
                    f"{dtype}; convert it with .astype(np.{dtype})."
                )
            if array.dtype.kind != "f":
                continue
            finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            if not finite.all():
                index = int(np.argmin(finite))
                what = "NaN" if np.isnan(array[index]).any() else "infinite"
                raise CalibrationError(
                    f"{self.source}: {name!r} is {what} in sample {index}; "
                    "remove the sample or mend its preprocessing."
                )

    def _demand_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CalibrationError unless there are samples for an input of this shape."""
        if name not in self.inputs:
            known = ", ".join(self.inputs) or "nothing"
            raise CalibrationError(
                f"{self.source}: no samples of the model's input {name!r}, only of {known}; "
                "name the arrays after the model's inputs."
            )
        array, sample = self.inputs[name], shape[1:] if shape[:1] == (1,) else shape
        if not array.ndim or array.shape[1:] not in (sample, shape):
            expected = str(["n", *sample]).replace("'", "")
            raise CalibrationError(
                f"{self.source}: {name!r} has shape {list(array.shape)}, expected {expected}, "
                "n samples on a leading axis."
            )
        if len(array) != len(self):
            raise CalibrationError(
                f"{self.source}: {len(array)} samples of {name!r}, but {len(self)} of "
                f"{next(iter(self.inputs))!r}; every sample needs all inputs."
            )

    def sha256(self) -> str:
        """Hash names, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        parts = dict(self.inputs) | ({} if self.labels is None else {"labels": self.labels})
        for name in sorted(parts):
            array = np.ascontiguousarray(parts[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Range:
    """The range of a tensor that quantization must represent: `low <= x <= high`."""

    low: float
    high: float


class Calibrator(ABC):
    """Watches one tensor over all samples and answers its range.

    The driver shows every sample once per sweep, in order; `sweeps` is 2 for a calibrator that
    needs the extremes before it can fill a histogram. Nothing may depend on how samples are
    batched.
    """

    sweeps: int = 1

    @abstractmethod
    def observe(self, values: Array, sweep: int) -> None:
        """Take in the values that one sample gave this tensor."""

    @abstractmethod
    def range(self) -> Range:
        """Return the range after the last sweep."""


def extremes(values: Array) -> tuple[float, float]:
    """Return the least and the largest value; infinities the wrong way round where there is none.

    Raises CalibrationError for NaN and infinity, which no range holds.
    """
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if values.size and not (math.isfinite(low) and math.isfinite(high)):
        what = "NaN" if math.isnan(low) or math.isnan(high) else "infinite"
        raise CalibrationError(f"a value is {what}, so it has no range; leave the sample out.")
    return low, high


def calibrator_names() -> list[str]:
    """Every calibrator, by file name, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(edgepress.calibration.__path__))
    return sorted(n for n in modules if n not in _NO_CALIBRATORS and n[0] != "_")


def calibrator_class(name: str) -> type[Calibrator]:
    """Import and return the calibrator of this name. Raises CalibrationError."""
    if name not in calibrator_names():
        near = difflib.get_close_matches(name, calibrator_names(), 2, 0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CalibrationError(
            f"no calibration method is called {name!r}.{hint} "
            f"Known: {', '.join(calibrator_names())}."
        )
    module = importlib.import_module(f"edgepress.calibration.{name}")
    return sole_subclass(module, Calibrator)  # type: ignore[type-abstract]


def sole_subclass(module: ModuleType, base: type[_T]) -> type[_T]:
    """Return the one subclass that a module defines, as every file of a registry does.

    Raises TypeError where there is none, or there are several.
    """
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(
            f"{module.__name__} must define exactly one {base.__name__}, it defines {len(found)}"
        )
    return found[0]
