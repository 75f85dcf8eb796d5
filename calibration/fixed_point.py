"""Qm.n fixed point: formats, rounding and saturation, in NumPy.

A format Qm.n has a sign, m integer bits and n fraction bits: the integer q stands for `q · 2**-n`.
This is ARM's notation, where Q0.15 fills 16 bits. Either number may be negative: Q-3.18 holds
magnitudes below 2**-3 in 16 bits, and Q20.-5 steps of 32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgepress.calibration.base import Array, CalibrationError, Range

#: Most fraction bits of a format: a scale of 2**-100, the least that integer execution takes.
MOST_FRACTION_BITS = 100

#: `2**127` is the largest power of two in float32: no format holds more.
_LARGEST_EXPONENT = 127

#: Maps real steps `x · 2**n`, float64, to whole ones.
Rounding = Callable[[Array], Array]


@dataclass(frozen=True)
class Format:
    """How one tensor is stored.

    Attributes:
        bits: of the integers, sign included; a storage of 16 bits may hold a format of fewer.
        fraction_bits: n of Qm.n.

    >>> str(Format(16, 12)), Format(16, 12).scale
    ('Q3.12', np.float32(0.00024414062))
    """

    bits: int
    fraction_bits: int

    def __str__(self) -> str:
        return f"Q{self.bits - 1 - self.fraction_bits}.{self.fraction_bits}"

    @property
    def scale(self) -> np.float32:
        """What one step is worth, a power of two."""
        return np.float32(math.ldexp(1.0, -self.fraction_bits))

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def fitting_format(value_range: Range, bits: int) -> Format:
    """Return the finest format that holds a range without saturating.

    The extremes may lie half a step outside, since they are rounded. A range of nothing but 0 gets
    no fraction bits: every format represents it, and steps of 1 keep products of scales ordinary.
    Ranges beyond 2**127 saturate.

    Raises:
        CalibrationError: the range is not finite or is reversed.

    >>> str(fitting_format(Range(-1.0, 0.99), 8)), str(fitting_format(Range(0.0, 6.0), 16))
    ('Q0.7', 'Q3.12')
    """
    low, high = value_range.low, value_range.high
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(f"the range {low} to {high} is not finite.")
    if low > high:
        raise CalibrationError(f"the range {low} to {high} is reversed.")
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Format(bits, 0)
    # frexp: largest < 2**exponent, so that one bit more than this could only fit -2**exponent
    fraction_bits = bits - math.frexp(max(-low, high))[1]
    least, largest = Format(bits, 0).limits
    while not (
        round(math.ldexp(low, fraction_bits)) >= least
        and round(math.ldexp(high, fraction_bits)) <= largest
    ):
        fraction_bits -= 1
    fewest = bits - 1 - _LARGEST_EXPONENT
    return Format(bits, min(max(fraction_bits, fewest), MOST_FRACTION_BITS))


def to_fixed(
    values: Array, fraction_bits: Array | int, limits: tuple[int, int], rounding: Rounding = np.rint
) -> tuple[Array, int]:
    """Round to steps of `2**-fraction_bits` and saturate.

    Args:
        values: floats, any shape.
        fraction_bits: one, or integers that broadcast against `values`.
        limits: the least and the largest integer.
        rounding: how steps become whole; half to even as it is.

    Returns:
        int64 in the shape of `values`, and how many of them were saturated.
    """
    # exact: a float32 has 24 bits, and 2**-100 … 2**112 does not leave float64
    steps = rounding(np.ldexp(values.astype(np.float64), fraction_bits))
    kept = np.clip(steps, *limits)
    return kept.astype(np.int64), int(np.count_nonzero(kept != steps))


def stochastic(seed: int, name: str) -> Rounding:
    """Return a rounding that goes up with the probability of the fraction (Gupta et al., 2015).

    "Deep Learning with Limited Numerical Precision", section 3. It is unbiased: the mean over
    seeds is the real number. The random numbers depend on seed and name alone, and every call
    draws the same ones, so neither the order of tensors nor a second look changes a result.

    Args:
        seed: any integer.
        name: of the tensor.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()

    def round_up_at_random(steps: Array) -> Array:
        # raw bits: NumPy promises their stream for good, that of its distributions it does not
        raw = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(steps.size)
        chance = (np.asarray(raw, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        below = np.floor(steps)
        return np.asarray(below + (chance.reshape(steps.shape) < steps - below))

    return round_up_at_random
