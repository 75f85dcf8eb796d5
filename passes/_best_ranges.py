"""Chooses the range of every activation by the error that it would make on samples not seen.

A range that holds all samples seen clips some of the next ones, and one that is wide enough for
anything wastes steps. Every sample is therefore quantized with ranges that were taken from the
others alone (leave-one-out: Stone, "Cross-Validatory Choice and Assessment of Statistical
Predictions", 1974): their extremes times a factor on each side of 0. The pair of factors with the
least squared error, summed over samples, decides; the range is then the extremes of all samples
times those factors.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Range, Samples
from edgepress.passes._sample_order import in_canonical_order
from edgepress.passes._taps import grouped, input_shapes, open_taps
from edgepress.passes.base import Context

#: What extremes are multiplied with: below 1 clips what was seen, above 1 leaves room.
FACTORS = np.array(
    [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5]
)
_BINS = 2048
_LEVELS = 255


def best_ranges(
    pass_name: str,
    model: ir.Model,
    values: list[ir.Value],
    samples: Samples,
    context: Context,
    *,
    symmetric: bool,
) -> dict[ir.Value, Range]:
    """Choose the ranges of activations.

    Args:
        pass_name: for refusals.
        model: not yet quantized.
        values: float32 activations.
        samples: all are run, twice; their order does not matter.
        context: for its progress.
        symmetric: whether as many steps lie on either side of 0.
    """
    shapes, ordered = input_shapes(pass_name, model), in_canonical_order(samples)
    groups = list(grouped(values))
    ranges: dict[ir.Value, Range] = {}
    done, rounds = 0, 2 * len(groups) * len(ordered)
    for group in groups:
        tap = open_taps(pass_name, model, group)
        seen: dict[ir.Value, list[tuple[float, float]]] = {value: [] for value in group}
        counted: dict[ir.Value, list[Array]] = {value: [] for value in group}
        for sweep in range(2):
            for index, feed in enumerate(ordered.feeds(shapes)):
                found = tap(feed, index)
                for value in group:
                    array = found[value.name or ""]
                    if sweep == 0:
                        least = float(array.min(initial=0.0)), float(array.max(initial=0.0))
                        seen[value].append(least)
                    else:
                        counted[value].append(_histogram(array, *_extent(seen[value])))
                done += 1
                context.progress("choose ranges", done, rounds)
        for value in group:
            counts = np.stack(counted[value])
            ranges[value] = choose_range(np.array(seen[value]), counts, symmetric=symmetric)
    return ranges


def choose_range(extremes: Array, counts: Array, *, symmetric: bool) -> Range:
    """Return the range with the least error on samples that it was not taken from.

    Args:
        extremes: `[samples, 2]`: least and greatest value of each sample, widened to hold 0.
        counts: `[samples, bins]`: how many values, other than 0, which every range holds exactly,
            fell into equal bins over the extremes of all samples.
        symmetric: whether as many steps lie on either side of 0.
    """
    low, high = extremes[:, 0].min(), extremes[:, 1].max()
    if low == high:
        return Range(0.0, 0.0)
    lows = FACTORS if low < 0 else np.ones(1)
    highs = FACTORS if high > 0 else np.ones(1)
    edges = np.linspace(low, high, counts.shape[1] + 1)
    places = (edges[:-1] + edges[1:]) / 2
    cost = np.zeros((len(lows), len(highs)))
    for index, held_out in enumerate(counts):
        # a single sample has no others: it is judged by its own extremes
        others = np.delete(extremes, index, axis=0) if len(extremes) > 1 else extremes
        bottom, top = others[:, 0].min() * lows, others[:, 1].max() * highs
        below = np.maximum(bottom[:, None] - places, 0.0) ** 2 @ held_out
        above = np.maximum(places - top[:, None], 0.0) ** 2 @ held_out
        span = np.maximum(-bottom[:, None], top) * 2 if symmetric else top - bottom[:, None]
        cost += below[:, None] + above + held_out.sum() * (span / _LEVELS) ** 2 / 12
    first, second = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return Range(float(low * lows[first]), float(high * highs[second]))


def _extent(seen: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in seen), max(high for _, high in seen)


def _histogram(array: Array, low: float, high: float) -> Array:
    """Count what is not 0 over equal bins: `[bins]`."""
    values = array.ravel()
    values = values[values != 0].astype(np.float64)
    if low == high:
        return np.zeros(_BINS)
    index = ((values - low) * (_BINS / (high - low))).astype(np.intp)
    return np.bincount(np.clip(index, 0, _BINS - 1), minlength=_BINS).astype(np.float64)
