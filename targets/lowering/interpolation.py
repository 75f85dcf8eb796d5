"""Functions of one 16-bit value as tables that are interpolated in integers.

One entry every 2**bits steps, from the least value to one step beyond the greatest, as TFLite's
`LUTLookup` has it (tensorflow/lite/kernels/internal/common.h); docs/integer.md says the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepress.targets.lowering.quantization import Quantization

Array = npt.NDArray[Any]
_VALUES = 2**16
_COARSEST_BITS, _FINEST_BITS = 7, 4  # 513 to 4097 entries
_FRACTION_BITS = 7  # that entries of an 8-bit result have, so that 16 bits hold them


@dataclass(frozen=True)
class InterpolatedTable:
    """A table and how to read it.

    Attributes:
        entries: int16 `[2**(16 - bits) + 1]`, with `fraction` bits after the point.
        bits: steps of x between two entries, as a power of two.
        fraction: bits of an entry that the result does not have.
    """

    entries: Array
    bits: int
    fraction: int

    def look_up(self, x: Array) -> Array:
        """Return the int64 results for int16 values."""
        steps = x.astype(np.int64) + _VALUES // 2
        index, rest = steps >> self.bits, steps & (2**self.bits - 1)
        entries = self.entries.astype(np.int64)
        base, slope = entries[index], entries[index + 1] - entries[index]
        places = self.bits + self.fraction
        half = 2**places >> 1
        return np.asarray(((base << self.bits) + slope * rest + half) >> places)


def interpolated_table(
    function: Callable[[Array], Array],
    source: Quantization,
    target: Quantization,
    bounds: tuple[float, float],
) -> InterpolatedTable:
    """Tabulate a function: the smallest table that is exact to one step, else the largest.

    Args:
        function: of float64 values.
        source: what the 16-bit value stands for.
        target: of the results, 8 or 16 bits.
        bounds: what a ReLU or Clip behind the function leaves of its values.
    """
    low, high = target.clamp(*bounds)
    fraction = 0 if target.dtype == "int16" else _FRACTION_BITS

    def results(steps: Array, places: int) -> Array:
        with np.errstate(all="ignore"):
            real = function(steps.astype(np.float64) * np.float64(source.scale))
            scaled = np.where(np.isnan(real), np.inf, real) / np.float64(target.scale)
        stored = (np.clip(scaled, -1e6, 1e6) + target.zero_point) * 2.0**places
        limits = (low << places, high << places)
        return np.clip(np.rint(stored), *limits).astype(np.int64)

    every = np.arange(_VALUES) - _VALUES // 2
    exact = results(every, 0)
    bits = _COARSEST_BITS
    while True:
        nodes = np.arange(0, _VALUES + 1, 2**bits) - _VALUES // 2
        table = InterpolatedTable(results(nodes, fraction).astype(np.int16), bits, fraction)
        if bits == _FINEST_BITS or np.abs(table.look_up(every) - exact).max() <= 1:
            return table
        bits -= 1
