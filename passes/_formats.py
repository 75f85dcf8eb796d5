"""Chooses the fixed-point format of every activation by what it does on the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.calibration.fixed_point import MOST_FRACTION_BITS, Format, to_fixed
from edgepress.passes._fixed_point_layer import FixedPointLayer
from edgepress.passes._taps import grouped, input_shapes, open_taps
from edgepress.passes.base import Context

#: Bits that an activation may give up so that its readers' sums keep more bits of their weights.
MOST_NARROWED = 4


@dataclass
class Observed:
    """What one format does to one activation over all samples.

    Attributes:
        format: the format.
        values: how many were seen.
        saturated: how many of them the format does not hold.
        rounding: sum of squared errors of the others, one per sample.
        saturation: sum of squared errors of the saturated, one per sample.
        power: sum of squares, one per sample.
    """

    format: Format
    values: int = 0
    saturated: int = 0
    rounding: list[float] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)

    def see(self, values: Array) -> None:
        """Take in the values of one sample."""
        real = values.astype(np.float64)
        integers, saturated = to_fixed(values, self.format.fraction_bits, self.format.limits)
        error = np.ldexp(integers.astype(np.float64), -self.format.fraction_bits) - real
        error *= error
        self.values += values.size
        self.saturated += saturated
        lost = 0.0
        if saturated:
            outside = (integers == self.format.limits[0]) | (integers == self.format.limits[1])
            lost = float(error[outside].sum())
        self.saturation.append(lost)
        self.rounding.append(float(error.sum()) - lost)
        self.power.append(float(np.square(real).sum()))

    def noise(self, narrowed: int = 0) -> float:
        """Return squared error over squared signal, also with fewer bits for the same range.

        A rounding error doubles with each bit, that of saturated values stays.
        """
        # fsum: the same for every order of the samples
        error = math.fsum(self.rounding) * 4.0**narrowed + math.fsum(self.saturation)
        power = math.fsum(self.power)
        return error / power if power else 0.0


def observe(
    pass_name: str,
    model: ir.Model,
    fitting: Mapping[ir.Value, Format],
    samples: Samples,
    context: Context,
    *,
    finer: bool,
) -> dict[ir.Value, Observed]:
    """Look at what the format of every activation does, and maybe at one with a finer step.

    The finer one, with a bit more fraction, saturates the largest values and halves the error of
    all others; the smaller sum of squared errors wins.

    Args:
        pass_name: for refusals.
        model: not yet quantized.
        fitting: the finest format that holds the calibrated range.
        samples: all are run.
        context: for its progress.
        finer: whether to try it.

    Returns:
        The winner for each activation.
    """
    tried = {value: [Observed(fits)] for value, fits in fitting.items()}
    for value, fits in fitting.items():
        if finer and fits.fraction_bits < MOST_FRACTION_BITS:
            tried[value].append(Observed(Format(fits.bits, fits.fraction_bits + 1)))
    shapes = input_shapes(pass_name, model)
    groups = list(grouped(list(fitting)))
    done, total = 0, len(groups) * len(samples)
    for group in groups:
        tap = open_taps(pass_name, model, group)
        for index, feed in enumerate(samples.feeds(shapes)):
            found = tap(feed, index)
            for value in group:
                for observed in tried[value]:
                    observed.see(found[value.name or ""])
            done += 1
            context.progress("choose formats", done, total)
    return {value: min(each, key=Observed.noise) for value, each in tried.items()}


def narrowed(
    observed: Observed,
    readers: Sequence[ir.Node],
    layer: Callable[[ir.Node, Format], FixedPointLayer],
) -> Format:
    """Share the bits of int32 sums between an activation and the weights that it meets.

    The product of 16 bits by 16 leaves one bit for the sum. Where many products are summed up, one
    of the two must give up bits. The activation gives up as many as make the sum of both relative
    errors smallest: its own, and that of its readers' weights in the mean, since the noise of
    `Σ w·x` over its power is about the sum of both, where errors are independent.

    Args:
        observed: the activation in its format of all bits.
        readers: layers that sum it up.
        layer: quantizes a layer for an input of a format.

    Returns:
        A format of the same range with at most MOST_NARROWED bits less.
    """
    whole = observed.format
    best, least = whole, math.inf
    for bits in range(MOST_NARROWED + 1 if readers else 0):
        tried = Format(whole.bits - bits, whole.fraction_bits - bits)
        layers = [layer(node, tried) for node in readers]
        noise = observed.noise(bits) + math.fsum(one.noise for one in layers) / len(layers)
        if noise < least:
            best, least = tried, noise
        if not any(one.rescaled for one in layers):
            break
    return best
