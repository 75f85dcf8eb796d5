"""The exact extremes: nothing is clipped, one outlier stretches the whole range."""

from __future__ import annotations

import math

from edgepress.calibration.base import Array, CalibrationError, Calibrator, Range, extremes


class MinMax(Calibrator):
    """The smallest and the largest value seen.

    >>> import numpy as np
    >>> calibrator = MinMax()
    >>> calibrator.observe(np.float32([[-1.5, 2.0]]), sweep=0)
    >>> calibrator.range()
    Range(low=-1.5, high=2.0)
    """

    sweeps = 1

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def observe(self, values: Array, sweep: int) -> None:  # noqa: ARG002 - the contract's signature
        """Take in the values of one sample, of any shape."""
        low, high = extremes(values)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self) -> Range:
        """Return the extremes. Raises CalibrationError where nothing was observed."""
        if self._low > self._high:
            raise CalibrationError("min_max saw no values; observe at least one sample.")
        return Range(self._low, self._high)
