"""k-means of words, which are a few weights each that share one codeword: product quantization.

Gong et al., "Compressing Deep Convolutional Networks using Vector Quantization", 2014, section 3.
With a price on bits, words choose as in Chou, Lookabaugh and Gray, "Entropy-constrained vector
quantization", 1989, section III.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgepress.calibration.base import Array
from edgepress.passes._kmeans import Fit, code_bits

#: Most iterations of a fit, and the relative gain below which it ends.
ITERATIONS, GAIN = 100, 1e-5
#: Distances that are held at once.
CHUNK_BYTES = 2**24


class Words:
    """Weighted words of d numbers.

    Attributes:
        size: how many there are.
        distinct: how many different ones.
    """

    def __init__(self, words: Array, weights: Array | None = None) -> None:
        """Keep them.

        Args:
            words: `[n, d]`, finite, at least one.
            weights: `[n, d]`, above 0: one for each number; or None for ones.
        """
        words = np.ascontiguousarray(words, np.float64)
        self.size = len(words)
        self.distinct = len(np.unique(words.view(f"V{8 * words.shape[1]}")))
        self._words = words
        self._weights = None if weights is None else np.ascontiguousarray(weights, np.float64)
        self._weighted = words if self._weights is None else words * self._weights

    def forgy(self, clusters: int, rng: np.random.Generator) -> Array:
        """Return words drawn without replacement, each as likely as another: `[k, d]`."""
        drawn = rng.choice(self.size, min(clusters, self.size), replace=False, shuffle=False)
        return np.asarray(self._words[drawn])

    def plus_plus(self, clusters: int, rng: np.random.Generator) -> Array:
        """Return words drawn one by one, as likely as their weighted squared distance is large."""
        drawn = [int(rng.integers(self.size))]
        nearest = self._distances(self._words[drawn[0]])
        while len(drawn) < min(clusters, self.distinct):
            sums = np.cumsum(nearest)
            if sums[-1] <= 0:
                break
            index = int(np.searchsorted(sums, rng.random() * sums[-1], "right"))
            drawn.append(min(index, self.size - 1))
            np.minimum(nearest, self._distances(self._words[drawn[-1]]), out=nearest)
        return np.asarray(self._words[drawn])

    def grids(self, price: float) -> list[Array]:  # noqa: ARG002
        """Return nothing: no codebooks of words are known to suit a price."""
        return []

    def lloyd(self, codebook: Array, price: float = 0.0) -> Fit:
        """Improve a codebook until that gains next to nothing.

        Args:
            codebook: `[k, d]`.
            price: of a bit, in units of the error. Without one, clusters that become empty move to
                the words of largest error; with one, those that become too dear vanish.
        """
        codebook = np.unique(codebook, axis=0)
        offsets, before = np.full(len(codebook), price * np.log2(len(codebook))), np.inf
        for _ in range(ITERATIONS):
            chosen, costs = self._choose(codebook, offsets)
            cost = float(costs.sum())
            if cost >= before * (1 - GAIN):
                break
            before = cost
            counts = np.bincount(chosen, minlength=len(codebook))
            empty = counts == 0
            codebook = self._means(chosen, len(codebook))
            if price:
                codebook, counts = codebook[~empty], counts[~empty]
                offsets = price * code_bits(counts)
            elif empty.any():
                far = np.argsort(-costs, kind="stable")[: int(empty.sum())]
                codebook[empty] = self._words[far]
        return self.fit_of(codebook, offsets)

    def fit_of(self, codebook: Array, offsets: Array | None = None) -> Fit:
        """Say what a codebook makes of the words as it is; clusters without a word go."""
        codebook = np.asarray(codebook, np.float64)
        offsets = np.zeros(len(codebook)) if offsets is None else offsets
        chosen = self.assigned(codebook, offsets)
        counts = np.bincount(chosen, minlength=len(codebook))
        error = 0.0
        for rows in self._chunks(1):
            difference = self._words[rows] - codebook[chosen[rows]]
            square = difference * difference
            error += float(
                (square if self._weights is None else square * self._weights[rows]).sum()
            )
        full = counts > 0
        return Fit(codebook[full], counts[full], offsets[full], error)

    def assigned(self, codebook: Array, offsets: Array | None = None) -> Array:
        """Return the index of the codeword that each word chooses: `[n]`."""
        codebook = np.asarray(codebook, np.float64)
        return self._choose(codebook, np.zeros(len(codebook)) if offsets is None else offsets)[0]

    def _choose(self, codebook: Array, offsets: Array) -> tuple[Array, Array]:
        """Return for every word the index of the cheapest codeword, and its cost."""
        chosen = np.empty(self.size, np.int64)
        costs = np.empty(self.size)
        squares = codebook * codebook
        for rows in self._chunks(len(codebook)):
            found = self._weighted[rows] @ (-2 * codebook.T)
            if self._weights is None:
                found += squares.sum(axis=1)
            else:
                found += self._weights[rows] @ squares.T
            found += offsets
            chosen[rows] = found.argmin(axis=1)
            costs[rows] = np.take_along_axis(found, chosen[rows, None], axis=1)[:, 0]
            costs[rows] += (self._weighted[rows] * self._words[rows]).sum(axis=1)
        return chosen, costs

    def _means(self, chosen: Array, clusters: int) -> Array:
        """Return the weighted mean of every cluster; of an empty one, zeros."""
        columns = []
        for index, column in enumerate(self._weighted.T):
            sums = np.bincount(chosen, column, clusters)
            weights = None if self._weights is None else self._weights[:, index]
            totals = np.bincount(chosen, weights, clusters)
            columns.append(sums / np.where(totals > 0, totals, 1))
        return np.stack(columns, axis=1)

    def _distances(self, codeword: Array) -> Array:
        """Return the weighted squared distance of every word from a codeword: `[n]`."""
        square = np.square(self._words - codeword)
        return np.asarray((square if self._weights is None else square * self._weights).sum(axis=1))

    def _chunks(self, columns: int) -> Iterator[slice]:
        """Yield rows of which so many columns take CHUNK_BYTES."""
        rows = max(1, CHUNK_BYTES // (8 * columns))
        for start in range(0, self.size, rows):
            yield slice(start, min(start + rows, self.size))
