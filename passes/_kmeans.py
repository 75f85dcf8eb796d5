"""k-means of numbers: exact Lloyd iterations over sorted values and their prefix sums.

Clusters of numbers are intervals, so an iteration looks at k-1 edges and not at n numbers: it takes
O(k log n) once the numbers are sorted. With a price on bits it is the entropy-constrained
quantizer of Chou, Lookabaugh and Gray, "Entropy-constrained vector quantization", 1989, section
III: a number goes to the cluster of least squared distance plus the price of its code.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgepress.calibration.base import Array

#: Most iterations of a fit; the last ones of a large codebook change next to nothing.
ITERATIONS = 1000
#: With a price on bits, which moves edges for long and to little effect.
PRICED_ITERATIONS = 50
#: Steps of grids, as multiples of what is best for numbers without end.
_WIDTHS = (1.05, 1.3)
#: What an entry of a codebook takes: its numbers in float32, and the length of its code.
VALUE_BITS, LENGTH_BITS = 32, 4


@dataclass(frozen=True)
class Fit:
    """A codebook, and what it makes of the points it was fitted to.

    Attributes:
        codebook: `[k]` ascending, or `[k, d]`: float64.
        counts: `[k]` int64: how many points go to each, at least 1.
        offsets: `[k]` float64: what is added to the squared distance when points choose; zeros
            where bits have no price.
        error: the weighted sum of squared distances.
    """

    codebook: Array
    counts: Array
    offsets: Array
    error: float

    @property
    def index_bits(self) -> float:
        """The zero-order entropy of the points' indices: Shannon's bound on coding them."""
        return float(self.counts @ code_bits(self.counts))

    @property
    def bits(self) -> float:
        """The indices and the codebook."""
        return self.index_bits + codebook_bits(self.codebook)


def codebook_bits(codebook: Array) -> int:
    """Return what a codebook takes: `[k]` or `[k, d]`."""
    return VALUE_BITS * codebook.size + LENGTH_BITS * len(codebook)


def code_bits(counts: Array) -> Array:
    """Return the ideal length of the code of every symbol, in bits."""
    return np.asarray(np.log2(counts.sum() / counts))


class Points(Protocol):
    """What can be clustered: weighted numbers or weighted words."""

    @property
    def size(self) -> int:
        """How many points there are."""
        ...

    @property
    def distinct(self) -> int:
        """How many different points there are."""
        ...

    def forgy(self, clusters: int, rng: np.random.Generator) -> Array:
        """Draw points."""
        ...

    def plus_plus(self, clusters: int, rng: np.random.Generator) -> Array:
        """Draw points by their squared distance from those drawn before."""
        ...

    def grids(self, price: float) -> list[Array]:
        """Return codebooks to begin with that suit a price, where such are known."""
        ...

    def lloyd(self, codebook: Array, price: float = 0.0) -> Fit:
        """Improve a codebook; a price is in units of the error, per bit."""
        ...


class Line:
    """Weighted numbers in ascending order.

    Attributes:
        size: how many there are.
        distinct: how many different ones.
        values: `[n]` float64, ascending.
    """

    def __init__(self, values: Array, weights: Array | None = None) -> None:
        """Sort them.

        Args:
            values: `[n]`, finite, at least one.
            weights: `[n]`, above 0, or None for ones.
        """
        if weights is None:
            self.values = np.sort(values).astype(np.float64)
        else:
            order = np.argsort(values, kind="stable")
            self.values = values[order].astype(np.float64)
            weights = weights[order].astype(np.float64)
        self.size = len(self.values)
        self.distinct = 1 + int(np.count_nonzero(np.diff(self.values)))
        # sums of squares around the mean cancel least
        self._origin = float(self.values.mean())
        centred = self.values - self._origin
        self._sums = np.zeros((3, self.size + 1))
        terms = np.ones(self.size) if weights is None else weights
        for row in self._sums:
            np.cumsum(terms, out=row[1:])
            terms = terms * centred
        self._weight = float(self._sums[0, -1]) / self.size

    def linear(self, clusters: int) -> Array:
        """Return equal steps from the least to the largest number."""
        return np.linspace(self.values[0], self.values[-1], clusters)

    def density(self, clusters: int) -> Array:
        """Return the numbers at equal steps of the weighted cumulative distribution."""
        shares = (np.arange(clusters) + 0.5) / clusters * self._sums[0, -1]
        return np.asarray(self.values[np.searchsorted(self._sums[0, 1:], shares)])

    def grids(self, price: float) -> list[Array]:
        """Return equal steps that suit a price.

        Where bits are coded, equal steps Δ are nearly the best quantizer: Gish and Pierce,
        "Asymptotically efficient quantizing", 1968. Its error Δ²/12 falls by a factor of 4 for each
        bit, which tells the step for a price; wider ones have a smaller codebook.
        """
        step = math.sqrt(6 * price / self._weight / math.log(2))
        span = float(self.values[-1] - self.values[0])
        starts = []
        for width in _WIDTHS:
            count = min(int(span / (step * width)) + 1, self.size)
            starts.append(self.values[0] + (np.arange(count) + 0.5) * (span / count))
        return starts

    def forgy(self, clusters: int, rng: np.random.Generator) -> Array:
        """Return numbers drawn without replacement, each as likely as another."""
        drawn = rng.choice(self.size, min(clusters, self.size), replace=False, shuffle=False)
        return np.asarray(self.values[drawn])

    def plus_plus(self, clusters: int, rng: np.random.Generator) -> Array:
        """Return numbers drawn one by one, as likely as their weighted squared distance is large.

        Prefix sums tell the sum over any interval, so a draw takes O(k + log n).
        """
        first = int(np.searchsorted(self._sums[0, 1:], rng.random() * self._sums[0, -1]))
        drawn = self.values[[first]]
        while len(drawn) < min(clusters, self.distinct):
            ends = self._ends((drawn[1:] + drawn[:-1]) / 2)
            errors = np.maximum(self._errors(drawn, ends), 0)
            sums = np.cumsum(errors)
            if sums[-1] <= 0:
                break
            cell = int(np.searchsorted(sums[:-1], rng.random() * sums[-1], "right"))
            target = rng.random() * errors[cell]
            index = self._where(drawn[cell], int(ends[cell]), int(ends[cell + 1]), target)
            drawn = np.sort(np.append(drawn, self.values[index]))
        return drawn

    def _where(self, centre: float, first: int, end: int, target: float) -> int:
        """Return the number of an interval at which the sum of its errors reaches a target."""
        centre -= self._origin
        row0, row1, row2 = self._sums
        before = row2[first] - centre * (2 * row1[first] - centre * row0[first])

        def reached(index: int) -> float:
            end = index + 1
            after = row2[end] - centre * (2 * row1[end] - centre * row0[end])
            return float(after - before)

        return first + bisect_left(range(first, end - 1), target, key=reached)

    def lloyd(self, codebook: Array, price: float = 0.0) -> Fit:
        """Improve a codebook until no number changes its cluster.

        Without a price, clusters that become empty move to where the error is largest, so that
        there are as many in the end, or as many as there are different numbers.

        Args:
            codebook: `[k]`, in any order.
            price: of a bit, in units of the error. Numbers choose as if they all had the mean
                weight, as clusters would be no intervals otherwise; clusters that become too dear
                vanish.
        """
        wanted = min(len(codebook), self.distinct)
        if price:
            return self._settle(np.unique(codebook), price / self._weight)
        fit = self._settle(np.unique(codebook), 0.0)
        for _ in range(wanted):
            if len(fit.codebook) == wanted:
                break
            fit = self._settle(self._split(fit, wanted - len(fit.codebook)), 0.0)
        return fit

    def fit_of(self, codebook: Array, offsets: Array | None = None) -> Fit:
        """Say what a codebook makes of the numbers as it is; clusters without a number go."""
        codebook = np.asarray(codebook, np.float64)
        offsets = np.zeros(len(codebook)) if offsets is None else offsets
        kept, edges = envelope(codebook, offsets)
        ends = self._ends(edges)
        counts = np.diff(ends)
        kept, found = kept[counts > 0], counts[counts > 0]
        ends = np.append(0, np.cumsum(found))
        error = float(self._errors(codebook[kept], ends).sum())
        return Fit(codebook[kept], found, offsets[kept], max(error, 0.0))

    def _settle(self, codebook: Array, price: float) -> Fit:
        """Iterate: edges from a codebook, means from edges."""
        offsets = np.zeros(len(codebook))
        before = np.empty(0)
        for _ in range(PRICED_ITERATIONS if price else ITERATIONS):
            ends = self._ends(envelope(codebook, offsets)[1])
            counts = np.diff(ends)
            if np.array_equal(ends, before):
                break
            before = ends
            full = counts > 0
            weights, sums = np.diff(self._sums[:2, ends])[:, full]
            codebook = sums / weights + self._origin
            offsets = price * code_bits(counts[full]) if price else np.zeros(len(codebook))
        return self.fit_of(codebook, offsets)

    def _split(self, fit: Fit, more: int) -> Array:
        """Halve the clusters of largest error that hold different numbers."""
        codebook = fit.codebook
        ends = np.append(0, np.cumsum(fit.counts))
        errors = self._errors(codebook, ends)
        splits = self.values[ends[:-1]] < self.values[ends[1:] - 1]
        chosen = np.argsort(np.where(splits, -errors, np.inf), kind="stable")[:more]
        chosen = chosen[splits[chosen]]
        low = np.delete(codebook, chosen)
        return np.sort(
            np.concatenate([low, self.values[ends[chosen]], self.values[ends[chosen + 1] - 1]])
        )

    def _ends(self, edges: Array) -> Array:
        """Return where intervals start, and n: `[k+1]`. A number on an edge belongs below it."""
        inner = np.searchsorted(self.values, edges, "right")
        return np.concatenate([[0], inner, [self.size]])

    def _errors(self, codebook: Array, ends: Array) -> Array:
        """Return the sum of weighted squared distances in every interval."""
        weights, sums, squares = np.diff(self._sums[:, ends])
        centres = codebook - self._origin
        return np.asarray(squares - centres * (2 * sums - centres * weights))


def envelope(codebook: Array, offsets: Array) -> tuple[Array, Array]:
    """Find for which numbers each entry has the least squared distance plus offset.

    Args:
        codebook: `[k]` ascending.
        offsets: `[k]`, in squared units of it.

    Returns:
        The indices of the entries that any number chooses, and the edges between them.
    """
    kept = np.arange(len(codebook))
    while True:
        steps = np.diff(codebook[kept])
        edges = (codebook[kept][1:] + codebook[kept][:-1]) / 2
        edges += np.diff(offsets[kept]) / (2 * np.maximum(steps, np.finfo(np.float64).tiny))
        overlaps = edges[:-1] - edges[1:]
        if len(overlaps) == 0 or overlaps.max() <= 0:
            return kept, edges
        # one that its neighbours undercut everywhere is the cheapest nowhere
        kept = np.delete(kept, 1 + np.flatnonzero(overlaps > 0))


def assigned(values: Array, codebook: Array, offsets: Array | None = None) -> Array:
    """Return the index of the codebook entry that each number chooses, in the numbers' shape.

    Args:
        values: any shape.
        codebook: `[k]` ascending.
        offsets: as those of a Fit; without them the nearest is chosen.
    """
    codebook = np.asarray(codebook, np.float64)
    kept, edges = envelope(codebook, np.zeros(len(codebook)) if offsets is None else offsets)
    return np.asarray(kept[np.searchsorted(edges, values, "left")])
