"""Samples, ranges and the contract of a calibrator.

Errors::

    CalibrationError       samples that cannot be used, or a range that is missing
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
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
_NO_CALIBRATORS = ("base", "importance", "qparams", "samples")


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
        """Yield one onnxruntime feed per sample, reshaped to the model's input shapes."""
        for i in range(len(self)):
            # the ellipsis keeps a single number an array, which onnxruntime insists on
            yield {name: self.inputs[name][i, ...].reshape(shape) for name, shape in shapes.items()}

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
